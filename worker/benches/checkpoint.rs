//! What checkpoints of synthetic weights cost: loading the shape of ERNIE-4.5-0.3B in time and memory against the size
//! of its file, and a token of a mixture of experts against dense models of its whole and of its active size.
//!
//! `cargo bench -p ernie-worker --bench checkpoint`. Needs 1 GB in the folder for temporary files.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ernie_worker::bench::memory::memory;
use ernie_worker::bench::synthetic::{Experts, Shape};
use ernie_worker::executor::{BLOCK_TOKENS, Executor, LogitRows, SequenceStep, StepPlan};
use ernie_worker::model::{self, Checkpoint, KvSize, LoadOptions};

/// Decoder steps that are timed.
const STEPS: u32 = 200;

fn load(folder: &Path) -> model::ModelExecutor {
    let options =
        LoadOptions { kv: KvSize::Blocks(16), max_model_len: Some(512), max_num_seqs: 1, ..LoadOptions::default() };
    let options = LoadOptions { max_num_batched_tokens: 256, ..options };
    model::load(&Checkpoint::inspect(folder).unwrap(), &options, &|_| {}).unwrap()
}

/// Loads a folder and says what that took; in a process of its own, for its peak of memory.
fn loading(folder: &Path) {
    let begun = Instant::now();
    let checkpoint = Checkpoint::inspect(folder).unwrap();
    let inspected = begun.elapsed();
    let executor = load(folder);
    let loaded = begun.elapsed();
    let file = fs::metadata(folder.join("model.safetensors")).unwrap().len();
    let (peak, mib) = (memory("self", "VmHWM").unwrap(), |bytes: u64| bytes as f64 / f64::from(1 << 20));
    println!(
        "{}: file {:.0} MiB; metadata {:.1} ms, all {:.2} s, {:.2} GB/s; peak memory {:.0} MiB, {:.3} of the file",
        checkpoint.config.model_type(),
        mib(file),
        inspected.as_secs_f64() * 1e3,
        loaded.as_secs_f64(),
        file as f64 / loaded.as_secs_f64() / 1e9,
        mib(peak),
        peak as f64 / file as f64,
    );
    drop(executor);
}

/// Median seconds of a step that decodes one token.
fn decoding(folder: &Path) -> f64 {
    let mut executor = load(folder);
    let mut seconds: Vec<f64> = (0..STEPS)
        .map(|start| {
            let step = SequenceStep {
                tokens: vec![(start * 37) % 1000],
                start,
                position_ids: None,
                blocks: (0..=start / BLOCK_TOKENS as u32).collect(),
                adapter: None,
                logits: LogitRows::Last,
                reading: None,
            };
            let begun = Instant::now();
            executor.execute(&StepPlan { sequences: vec![step] }).unwrap();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(place) = arguments.iter().position(|argument| argument == "--load") {
        return loading(Path::new(&arguments[place + 1]));
    }
    if !arguments.iter().any(|argument| argument == "--bench") {
        // `cargo test --benches` asks for no figures
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("0.3b");
    Shape::ERNIE_0_3B.write(&folder).unwrap();
    for _ in 0..3 {
        let status = Command::new(&arguments[0]).arg("--load").arg(&folder).status().unwrap();
        assert!(status.success());
    }
    fs::remove_dir_all(&folder).unwrap();

    let experts = Experts { count: 64, active: 6, inner: 384, shared: 0, dense_layers: 0 };
    let shape =
        |inner, experts| Shape { vocab: 1024, layers: 4, heads: 8, inner, context: 2048, experts, ..Shape::ERNIE_0_3B };
    for (name, shape) in [
        ("64 experts of 384, 6 active", shape(384, Some(experts))),
        ("dense of the whole size", shape(384 * 64, None)),
        ("dense of the active size", shape(384 * 6, None)),
    ] {
        let folder = scratch.path().join(name.replace(' ', "-"));
        let bytes = shape.write(&folder).unwrap();
        println!("{name}: {} MiB, {:.2} ms a token", bytes >> 20, decoding(&folder) * 1e3);
        fs::remove_dir_all(&folder).unwrap();
    }
}
