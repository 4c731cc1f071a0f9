//! The kernels give the same bits however a sequence is run.

use std::path::Path;

use ernie_kernels::Level;
use ernie_worker::eval::evaluate::{Evaluation, Sequence, Settings, evaluate};
use ernie_worker::model::{BackendChoice, KvSize, ModelExecutor, Quantization};
use ernie_worker::tokenizer::Tokenizer;

use crate::demo::models;
use crate::reference::{Engine, Reference, adapter, folder};

/// A model folder, an adapter for it, and how it is loaded.
#[derive(Clone, Copy)]
struct Model<'a> {
    path: &'a Path,
    with: Option<&'a str>,
    quantization: Quantization,
}

fn load(model: Model<'_>, level: Level, threads: usize, blocks: usize) -> ModelExecutor {
    Engine(BackendChoice::Cpu, Some(level)).load_with(model.path, |options| {
        options.quantization = model.quantization;
        options.threads = threads;
        options.kv = KvSize::Blocks(blocks);
        options.max_model_len = Some(options.max_model_len.unwrap_or(1024).min(blocks * 32));
        options.adapters = model.with.into_iter().map(adapter).collect();
    })
}

/// Everything that came out, as bits.
fn bits(result: &Evaluation) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    (bits(&result.logits), result.greedy_tokens.clone(), bits(&result.greedy_logits))
}

fn assert_same(what: &str, expected: &[Evaluation], results: &[Evaluation]) {
    for (index, (expected, result)) in expected.iter().zip(results).enumerate() {
        assert!(bits(expected) == bits(result), "{what}, sequence {index}: other bits than alone on one thread");
    }
}

/// Runs sequences alone on one thread, then on several, in batches, in chunks, preempted and behind found prefixes.
fn assert_deterministic(model: Model<'_>, sequences: &[Sequence], generate: usize, tight: usize) {
    let Model { path, with, quantization } = model;
    let settings = Settings { generate, adapter: with.is_some(), ..Settings::default() };
    let roomy: usize = sequences.iter().map(|sequence| (sequence.ids.len() + generate).div_ceil(32) + 1).sum();
    for level in Level::available() {
        let what = |mode: &str| format!("{} {with:?} {quantization} at {level} {mode}", path.display());
        let mut executor = load(model, level, 1, roomy);
        let alone = |sequence: &Sequence| evaluate(&mut executor, std::slice::from_ref(sequence), &settings);
        let expected: Vec<Evaluation> =
            sequences.iter().map(alone).map(|result| result.expect("evaluated").remove(0)).collect();
        for threads in [1, 2, 3] {
            let mut executor = load(model, level, threads, roomy);
            let results = evaluate(&mut executor, sequences, &settings).expect("evaluated");
            assert_same(&what(&format!("in a batch on {threads} threads")), &expected, &results);
            let chunked = Settings { chunk: 37, step_tokens: 50, ..settings };
            let results = evaluate(&mut executor, sequences, &chunked).expect("evaluated");
            assert_same(&what(&format!("in chunks on {threads} threads")), &expected, &results);
        }
        let results = evaluate(&mut executor, sequences, &Settings { repeat: 2, ..settings }).expect("evaluated");
        let hits: usize = results.iter().map(|result| result.figures.prefix_hit_tokens).sum();
        assert!(hits >= 32, "{}: nothing was found", what("repeated"));
        assert_same(&what("behind a found prefix"), &expected, &results);
        let mut executor = load(model, level, 2, tight);
        let results = evaluate(&mut executor, sequences, &settings).expect("evaluated");
        let again: usize = results.iter().map(|result| result.figures.recomputed_tokens).sum();
        assert!(again > 0, "{}: nothing was preempted", what("with a small cache"));
        assert_same(&what("preempted"), &expected, &results);
    }
}

#[test]
fn golden_folders_give_the_same_bits_however_they_are_run() {
    for (name, with, quantization) in [
        ("dense-tied", None, Quantization::None),
        ("dense-bf16", None, Quantization::None),
        ("dense-bf16", None, Quantization::Int8),
        ("moe-shared", None, Quantization::None),
        ("moe-shared", None, Quantization::Int4),
        ("moe-bf16", None, Quantization::None),
        ("dense-lora", Some("adapter"), Quantization::None),
        ("dense-lora", Some("adapter"), Quantization::Int4),
    ] {
        let reference = Reference::of(name);
        let fed = |length: usize| {
            let ids = [reference.prompt().ids, reference.numbers("greedy.tokens")].concat();
            Sequence { ids: ids[..length].to_vec(), positions: None }
        };
        let sequences = [fed(31), reference.gap_prompt(), fed(42), fed(3)];
        let path = &folder(name);
        assert_deterministic(Model { path, with, quantization }, &sequences, 40, 4);
    }
}

#[test]
fn long_prompts_of_the_demo_model_give_the_same_bits_however_they_are_run() {
    let path = models().join("austen-2.6m");
    let tokenizer = Tokenizer::load(&path, 1024).expect("a tokenizer");
    let text = std::fs::read_to_string(models().join("validation.jsonl")).expect("validation.jsonl");
    let ids = tokenizer.encode(&text).expect("encoded");
    // Attention reduces 512 places at a time; these begin on either side of the border and cross it.
    let sequence = |from: usize, length: usize| Sequence { ids: ids[from..from + length].to_vec(), positions: None };
    let sequences = [sequence(0, 620), sequence(1000, 500), sequence(2000, 90), sequence(0, 511)];
    for quantization in [Quantization::None, Quantization::Int8] {
        assert_deterministic(Model { path: &path, with: None, quantization }, &sequences, 60, 38);
    }
}
