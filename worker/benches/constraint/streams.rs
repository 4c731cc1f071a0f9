//! Inter-token latency of running streams, constrained and free in turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_worker::bench::figures::{Percentiles, Spread};
use ernie_worker::bench::synthetic::Shape;
use ernie_worker::constraint::{Constraint, Grammar, Grammars};
use ernie_worker::engine::{Engine, EngineConfig, EngineHandle, Event, Health, Request};
use ernie_worker::model::{self, Checkpoint, KvSize, LoadOptions};
use ernie_worker::sampling::SamplingParams;
use ernie_workload::Chance;

use crate::vocabulary::{self, END, VOCAB};

/// Streams that run side by side.
const STREAMS: [usize; 2] = [1, 8];
/// Tokens of each answer.
const TOKENS: usize = 64;
/// Times that each way is measured, in turn with the other.
const ROUNDS: usize = 3;
/// A list that does not end before the answer is cut.
const SCHEMA: &str = r#"{"type": "array", "minItems": 1000, "items": {"type": "object", "properties":
    {"name": {"type": "string", "maxLength": 40}, "count": {"type": "integer"}, "kind": {"enum": ["a", "b", "other"]}},
    "required": ["name", "count", "kind"], "additionalProperties": false}}"#;

fn request(chance: &mut Chance) -> Request {
    Request {
        sampling: SamplingParams { seed: chance.below(1 << 30) as u64, ..SamplingParams::default() },
        max_tokens: Some(TOKENS as u32),
        min_tokens: TOKENS as u32,
        eos_token_ids: [END].into(),
        ignore_eos: true,
        ..Request::new(
            (0..32).map(|_| 300 + chance.below(VOCAB - 2000) as u32).collect(),
            Instant::now() + Duration::from_secs(3600),
        )
    }
}

/// Times between the tokens of so many answers that begin together.
async fn gaps(engine: &EngineHandle, streams: usize, grammar: Option<&Arc<Grammar>>, seed: u64) -> Vec<f64> {
    let mut chance = Chance::new(seed, 0);
    let submit = |_| {
        let guide = grammar.map(|grammar| grammar.start(false, &[]).unwrap());
        engine.submit_guided(request(&mut chance), guide).unwrap()
    };
    let submitted: Vec<_> = (0..streams).map(submit).collect();
    let mut gaps = Vec::new();
    for mut stream in submitted {
        let mut last: Option<Instant> = None;
        while let Some(event) = stream.next().await {
            match event {
                Event::Token(token) => {
                    gaps.extend(last.map(|last| (token.at - last).as_secs_f64()));
                    last = Some(token.at);
                }
                Event::Failed(failure) => panic!("{failure}"),
                _ => {}
            }
        }
    }
    gaps
}

/// Prints the latencies of both ways, and their ratio.
pub fn measure() {
    let folder = tempfile::tempdir().unwrap();
    Shape::ERNIE_0_3B.write(folder.path()).unwrap();
    let checkpoint = Checkpoint::inspect(folder.path()).unwrap();
    let most = STREAMS.into_iter().max().unwrap_or(1);
    let options = LoadOptions {
        kv: KvSize::Blocks(most * 8),
        max_model_len: Some(256),
        max_num_seqs: most,
        ..LoadOptions::default()
    };
    let grammars = Grammars::new(Arc::new(vocabulary::tokenizer()), VOCAB, [END].into(), Arc::new(()));
    let grammar = grammars.compile(&Constraint::JsonSchema(SCHEMA.to_owned())).unwrap();
    let executor = model::load(&checkpoint, &options, &|_| {}).unwrap();
    let config = EngineConfig { max_num_seqs: most, stream_capacity: TOKENS, ..EngineConfig::default() };
    let engine = Engine::start(executor, config, Arc::new(())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut health = engine.health();
        health.wait_for(|health| !matches!(health, Health::Starting)).await.unwrap();
        for streams in STREAMS {
            let ways = [("free", None), ("constrained", Some(&grammar))];
            let mut medians = vec![Vec::new(); ways.len()];
            for round in 0..ROUNDS as u64 {
                for ((_, grammar), medians) in ways.iter().zip(&mut medians) {
                    medians.push(Percentiles::of(gaps(&engine, streams, *grammar, round).await).unwrap().p50);
                }
            }
            let of = |values: &[f64]| Spread::of(values.to_vec()).unwrap().median * 1e3;
            let [free, constrained] = [of(&medians[0]), of(&medians[1])];
            println!(
                "{streams} streams, ITL p50, median of {ROUNDS}: free {free:.2} ms, constrained {constrained:.2} ms, ratio {:.3}",
                constrained / free
            );
        }
        engine.drain(Instant::now()).await;
    });
}
