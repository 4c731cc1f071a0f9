//! Inter-token latency of running streams: of constrained ones, and of free ones beside them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_worker::bench::figures::Percentiles;
use ernie_worker::bench::synthetic::Shape;
use ernie_worker::constraint::{Constraint, Grammar, Grammars};
use ernie_worker::engine::{Engine, EngineConfig, EngineHandle, Event, Health, Request};
use ernie_worker::model::{self, Checkpoint, KvSize, LoadOptions};
use ernie_worker::sampling::SamplingParams;
use ernie_workload::Chance;

use crate::vocabulary::{self, END, VOCAB};

/// Streams that are constrained in turn with being free, and as many beside them that are always free.
const STREAMS: [usize; 2] = [1, 4];
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

/// Seconds between the tokens of answers that begin together: of so many that follow the grammar if there is one, and of as
/// many that are free.
async fn gaps(engine: &EngineHandle, streams: usize, grammar: Option<&Arc<Grammar>>, seed: u64) -> [Vec<f64>; 2] {
    let mut chance = Chance::new(seed, 0);
    let submit = |index: usize| {
        let grammar = grammar.filter(|_| index.is_multiple_of(2));
        let guide = grammar.map(|grammar| grammar.start(false, &[]).unwrap());
        engine.submit_guided(request(&mut chance), guide).unwrap()
    };
    let submitted: Vec<_> = (0..2 * streams).map(submit).collect();
    let mut gaps = [Vec::new(), Vec::new()];
    for (index, mut stream) in submitted.into_iter().enumerate() {
        let gaps = &mut gaps[index % 2];
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

/// Prints the latencies of both kinds of streams, with and without a constraint, and their ratio.
pub fn measure() {
    let folder = tempfile::tempdir().unwrap();
    Shape::ERNIE_0_3B.write(folder.path()).unwrap();
    let checkpoint = Checkpoint::inspect(folder.path()).unwrap();
    let most = 2 * STREAMS.into_iter().max().unwrap_or(1);
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
            let (mut without, mut with) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
            for round in 0..ROUNDS as u64 {
                for (grammar, all) in [(None, &mut without), (Some(&grammar), &mut with)] {
                    let gaps = gaps(&engine, streams, grammar, round).await;
                    all.iter_mut().zip(gaps).for_each(|(all, gaps)| all.extend(gaps));
                }
            }
            for (kind, (without, with)) in ["those", "the others"].into_iter().zip(without.into_iter().zip(with)) {
                report(streams, kind, without, with);
            }
        }
        engine.drain(Instant::now()).await;
    });
}

/// Prints the latencies of one kind of streams.
fn report(streams: usize, kind: &str, without: Vec<f64>, with: Vec<f64>) {
    let gaps = with.len();
    let [without, with] = [without, with].map(|gaps| Percentiles::of(gaps).unwrap());
    let line = |without: f64, with: f64| {
        format!("{:.2} ms, without constraints {:.2} ms, ratio {:.3}", with * 1e3, without * 1e3, with / without)
    };
    println!(
        "{streams} of {} streams constrained, ITL of {kind:10} ({gaps} tokens): p50 {}; p99 {}",
        2 * streams,
        line(without.p50, with.p50),
        line(without.p99, with.p99)
    );
}
