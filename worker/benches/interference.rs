//! What running streams feel of long prompts: their inter-token latency while prompts of 4,096 tokens arrive, with steps
//! that adapt to what they cost and with a fixed chunk of 512 tokens, as engines with a constant token budget have it.
//!
//! `cargo bench --workspace --bench interference`. Each way runs in turn, several times, on random weights in the shape of
//! ERNIE-4.5-0.3B with fewer layers, so that a prompt takes seconds.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ernie_worker::bench::figures::{Percentiles, Spread};
use ernie_worker::bench::synthetic::Shape;
use ernie_worker::engine::{Engine, EngineConfig, EngineHandle, Event, Health, Request};
use ernie_worker::model::{self, Checkpoint, KvSize, LoadOptions};
use ernie_worker::sampling::SamplingParams;
use ernie_workload::Chance;

/// Layers of the model: as many as make a prompt take seconds on two cores.
const LAYERS: usize = 2;
/// Streams that run all the time.
const STREAMS: usize = 8;
/// Tokens of each prompt that arrives beside them.
const PROMPT: usize = 4096;
/// Prompts, one after another.
const PROMPTS: usize = 3;
/// Times that each way is measured, in turn with the other.
const ROUNDS: usize = 3;
/// A context for the prompts, and for streams that outlast them.
const CONTEXT: usize = 8192;

/// How prompts are read beside running streams.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// In pieces so small that a step keeps to the inter-token target.
    Adaptive,
    /// In pieces that fill up a step to 512 tokens, whatever that costs.
    Fixed,
}

impl Way {
    fn config(self) -> EngineConfig {
        let config = EngineConfig { max_num_seqs: STREAMS + 1, stream_capacity: CONTEXT, ..EngineConfig::default() };
        match self {
            Self::Adaptive => config,
            Self::Fixed => {
                EngineConfig { max_num_batched_tokens: 512, inter_token_target: Duration::from_secs(3600), ..config }
            }
        }
    }
}

fn request(chance: &mut Chance, vocab: usize, prompt: usize, max_tokens: u32) -> Request {
    Request {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Request::new(
            (0..prompt).map(|_| chance.below(vocab) as u32).collect(),
            Instant::now() + Duration::from_secs(3600),
        )
    }
}

/// What one run gave, in seconds.
struct Measured {
    itl: Percentiles,
    /// From a prompt's arrival to its first token.
    ttft: f64,
}

async fn measure(engine: &EngineHandle, vocab: usize, round: u64) -> Measured {
    let mut chance = Chance::new(round, 0);
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = engine.submit(request(&mut chance, vocab, 32, (CONTEXT - 64) as u32)).unwrap();
        while !matches!(stream.next().await, Some(Event::Token(_))) {}
        streams.push(stream);
    }
    let mut ttft = Vec::new();
    let begun = Instant::now();
    for _ in 0..PROMPTS {
        let asked = Instant::now();
        let mut prompt = engine.submit(request(&mut chance, vocab, PROMPT, 1)).unwrap();
        while let Some(event) = prompt.next().await {
            if let Event::Token(token) = event {
                ttft.push((token.at - asked).as_secs_f64());
            }
        }
    }
    let ended = Instant::now();
    let mut gaps = Vec::new();
    for mut stream in streams {
        // Everything until now lies in the stream; the latest gap may reach over the end.
        let mut last: Option<Instant> = None;
        while let Some(event) = stream.next().await {
            let Event::Token(token) = event else { break };
            if let Some(last) = last.filter(|&last| last >= begun) {
                gaps.push((token.at - last).as_secs_f64());
            }
            if token.at > ended {
                break;
            }
            last = Some(token.at);
        }
    }
    Measured { itl: Percentiles::of(gaps).unwrap(), ttft: Spread::of(ttft).unwrap().median }
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        // `cargo test --benches` asks for no figures
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    Shape { layers: LAYERS, ..Shape::ERNIE_0_3B }.write(folder.path()).unwrap();
    let checkpoint = Checkpoint::inspect(folder.path()).unwrap();
    let options = LoadOptions {
        kv: KvSize::Blocks((STREAMS + 1) * (CONTEXT / 32 + 1)),
        max_model_len: Some(CONTEXT),
        max_num_seqs: STREAMS + 1,
        ..LoadOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let ways = [Way::Adaptive, Way::Fixed];
    let mut results: Vec<(Vec<Percentiles>, Vec<f64>)> = vec![Default::default(); ways.len()];
    for round in 0..ROUNDS {
        for (way, (latencies, first)) in ways.iter().zip(&mut results) {
            let executor = model::load(&checkpoint, &options, &|_| {}).unwrap();
            let engine = Engine::start(executor, way.config(), Arc::new(())).unwrap();
            let measured = runtime.block_on(async {
                let mut health = engine.health();
                health.wait_for(|health| !matches!(health, Health::Starting)).await.unwrap();
                let measured = measure(&engine, checkpoint.config.vocab_size, round as u64).await;
                engine.drain(Instant::now()).await;
                measured
            });
            latencies.push(measured.itl);
            first.push(measured.ttft);
        }
    }
    println!("{STREAMS} streams while prompts of {PROMPT} tokens arrive; medians of {ROUNDS} rounds, milliseconds");
    println!("{:10} {:>9} {:>9} {:>9} {:>22}", "", "ITL p50", "ITL p90", "ITL p99", "prompt's first token");
    let median = |values: Vec<f64>| Spread::of(values).unwrap().median * 1e3;
    let mut p99 = Vec::new();
    for (way, (latencies, first)) in ways.iter().zip(results) {
        let of = |figure: fn(&Percentiles) -> f64| median(latencies.iter().map(figure).collect());
        let (half, most, worst) = (of(|figures| figures.p50), of(|figures| figures.p90), of(|figures| figures.p99));
        println!("{:10} {half:9.1} {most:9.1} {worst:9.1} {:22.0}", format!("{way:?}"), median(first));
        p99.push(worst);
    }
    println!("ITL p99: adaptive is {:.3} of fixed", p99[0] / p99[1]);
}
