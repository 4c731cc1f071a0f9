//! Quantised weights: exactly the model of the rounded weights, and near the model of the original ones.

use std::path::Path;

use ernie_proto::failure::Reason;
use ernie_worker::eval::evaluate::{Evaluation, Sequence, Settings};
use ernie_worker::executor::{Executor, StepOutput};
use ernie_worker::model::pack::Precision;
use ernie_worker::model::{Checkpoint, DtypeChoice, LoadOptions, ModelExecutor, Quantization, load};
use ernie_worker::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::adapters::{ADAPTERS, Tensors, adapter_folder, linears, merged_folder, named, pair, read, side_by_side};
use crate::demo::models;
use crate::reference::{Engine, Reference, folder, single};

const QUANTIZATIONS: [Quantization; 2] = [Quantization::Int8, Quantization::Int4];

/// Rounds a checkpoint's weights to what quantisation keeps of them.
fn round(quantization: Quantization, tied: bool, tensors: &mut Tensors) {
    for (name, (shape, values)) in tensors {
        let precision = match name.as_str() {
            "model.embed_tokens.weight" if tied => Precision::Head,
            "lm_head.weight" => Precision::Head,
            name if name.ends_with("_proj.weight") => Precision::Linear,
            _ => continue,
        };
        let format = quantization.format(precision).expect("quantised");
        values.chunks_exact_mut(shape[1]).for_each(|row| format.round(row).expect("finite"));
    }
}

/// A copy of a golden folder with its weights rounded.
fn rounded_folder(name: &str, quantization: Quantization) -> tempfile::TempDir {
    let mut tensors = read(&folder(name).join("model.safetensors"));
    let tied = Checkpoint::inspect(&folder(name)).expect("a checkpoint").config.tie_word_embeddings;
    round(quantization, tied, &mut tensors);
    merged_folder(name, &tensors)
}

fn load_with(engine: Engine, path: &Path, quantization: Quantization, adapters: &[&Path]) -> ModelExecutor {
    engine.load_with(path, |options| {
        options.quantization = quantization;
        options.adapters =
            adapters.iter().enumerate().map(|(index, path)| (index.to_string(), path.to_path_buf())).collect();
    })
}

/// Fails unless all numbers are equal to the last bit.
fn assert_equal(what: &str, a: &[f32], b: &[f32]) {
    let differ = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(a.len() == b.len() && differ.is_none(), "{what}: number {differ:?} differs");
}

#[test]
fn a_quantised_model_is_to_the_bit_the_single_precision_model_of_the_rounded_weights() {
    for name in ["dense-tied", "dense-untied", "dense-bias", "moe-shared", "moe-noshared"] {
        let prompt = Reference::of(name).prompt();
        let settings = Settings { generate: 8, ..Settings::default() };
        for quantization in QUANTIZATIONS {
            let rounded = rounded_folder(name, quantization);
            for engine in Engine::all() {
                let run = |path: &Path, quantization| {
                    single(&mut load_with(engine, path, quantization, &[]), &prompt, &settings)
                };
                let (ours, wide) = (run(&folder(name), quantization), run(rounded.path(), Quantization::None));
                let what = format!("{name} {quantization} {engine:?}");
                assert_equal(&what, &ours.logits, &wide.logits);
                assert_equal(&what, &ours.greedy_logits, &wide.greedy_logits);
                let plain = run(&folder(name), Quantization::None);
                assert_ne!(ours.logits, plain.logits, "{what}: nothing was quantised");
            }
        }
    }
}

#[test]
fn candle_and_the_kernels_agree_on_quantised_models() {
    for name in ["dense-tied", "moe-shared"] {
        let prompt = Reference::of(name).prompt();
        for quantization in QUANTIZATIONS {
            let run = |engine: Engine| {
                single(&mut load_with(engine, &folder(name), quantization, &[]), &prompt, &Settings::default()).logits
            };
            let ours = run(Engine::best());
            for engine in Engine::all() {
                crate::reference::near(&format!("{name} {quantization} {engine:?}"), &run(engine), &ours, 5e-4);
            }
        }
    }
}

#[test]
fn adapters_are_added_unquantised_and_several_share_a_batch_with_the_same_bits_as_alone() {
    let prompt = Reference::of("dense-lora").prompt();
    let adapters = named(&ADAPTERS);
    let adapters: Vec<&Path> = adapters.iter().map(|(_, path)| path.as_path()).collect();
    for quantization in QUANTIZATIONS {
        let rounded = rounded_folder("dense-lora", quantization);
        for engine in Engine::all() {
            let mut ours = load_with(engine, &folder("dense-lora"), quantization, &adapters);
            let mut wide = load_with(engine, rounded.path(), Quantization::None, &adapters);
            let mut run = |order: &[Option<u32>]| -> (StepOutput, StepOutput) {
                let plan = side_by_side(&prompt, order);
                (ours.execute(&plan).expect("computed"), wide.execute(&plan).expect("computed"))
            };
            let order = [Some(1), None, Some(0), Some(2), Some(1)];
            let (together, wide) = run(&order);
            for ((logits, wide), adapter) in together.logits.iter().zip(&wide.logits).zip(order) {
                let what = format!("{quantization} {engine:?} adapter {adapter:?}");
                assert_equal(&what, logits, wide);
                let (alone, _) = run(&[adapter]);
                crate::reference::near(&what, logits, &alone.logits[0], 1e-5);
                if engine.0 == ernie_worker::model::BackendChoice::Cpu {
                    assert_equal(&format!("{what} alone"), logits, &alone.logits[0]);
                }
            }
            assert_ne!(together.logits[0], together.logits[1], "the adapter changes something");
        }
    }
}

#[test]
fn adapters_of_experts_are_added_unquantised() {
    let tensors = read(&folder("moe-shared").join("model.safetensors"));
    let mut adapter = Tensors::new();
    for module in linears(&tensors) {
        let (shape, _) = &tensors[&format!("{module}.weight")];
        pair(&mut adapter, &module, shape[0], shape[1], 4);
    }
    let adapter = adapter_folder(&json!({"peft_type": "LORA", "r": 4, "lora_alpha": 2}), &adapter);
    let prompt = Reference::of("moe-shared").prompt();
    for quantization in QUANTIZATIONS {
        let rounded = rounded_folder("moe-shared", quantization);
        for engine in Engine::all() {
            let run = |path: &Path, quantization| {
                let mut executor = load_with(engine, path, quantization, &[adapter.path()]);
                executor.execute(&side_by_side(&prompt, &[None, Some(0)])).expect("computed")
            };
            let (ours, wide) = (run(&folder("moe-shared"), quantization), run(rounded.path(), Quantization::None));
            for place in 0..2 {
                assert_equal(&format!("{quantization} {engine:?} {place}"), &ours.logits[place], &wide.logits[place]);
            }
        }
    }
}

/// The held-out paragraphs of the demo model, each after a beginning of sequence.
fn paragraphs() -> Vec<Sequence> {
    let tokenizer = Tokenizer::load(&models().join("austen-2.6m"), 1024).expect("a tokenizer");
    let lines = std::fs::read_to_string(models().join("validation.jsonl")).expect("validation.jsonl");
    let ids = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let ids = tokenizer.encode(line["text"].as_str().expect("a text")).expect("encoded");
        Sequence { ids: std::iter::once(1).chain(ids).collect(), positions: None }
    };
    lines.lines().map(ids).collect()
}

/// The index of the largest number.
fn best(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (index, value)| if *value > row[best] { index } else { best })
}

/// −ln p of a token.
fn surprise(row: &[f32], token: u32) -> f64 {
    let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
    sum.ln() - f64::from(row[token as usize])
}

#[test]
fn the_demo_model_loses_little_by_quantisation() {
    const VOCAB: usize = 1024;
    let paragraphs = paragraphs();
    let run = |quantization| -> Vec<Evaluation> {
        let mut executor = load_with(Engine::best(), &models().join("austen-2.6m"), quantization, &[]);
        paragraphs.iter().map(|paragraph| single(&mut executor, paragraph, &Settings::default())).collect()
    };
    let perplexity = |results: &[Evaluation]| {
        let rows = results.iter().zip(&paragraphs).flat_map(|(result, paragraph)| {
            result.logits.chunks_exact(VOCAB).zip(&paragraph.ids[1..]).map(|(row, &token)| surprise(row, token))
        });
        let rows: Vec<f64> = rows.collect();
        (rows.iter().sum::<f64>() / rows.len() as f64).exp()
    };
    let plain = run(Quantization::None);
    for (quantization, worse, agreement) in [(Quantization::Int8, 0.005, 0.97), (Quantization::Int4, 0.03, 0.85)] {
        let quantised = run(quantization);
        let loss = perplexity(&quantised) / perplexity(&plain) - 1.0;
        let pairs = plain.iter().zip(&quantised);
        let same: Vec<bool> = pairs
            .flat_map(|(a, b)| a.logits.chunks_exact(VOCAB).zip(b.logits.chunks_exact(VOCAB)))
            .map(|(a, b)| best(a) == best(b))
            .collect();
        let equal = same.iter().filter(|same| **same).count() as f64 / same.len() as f64;
        println!("{quantization}: perplexity {:+.3} %, first choices equal {:.2} %", 100.0 * loss, 100.0 * equal);
        assert!(loss <= worse, "{quantization}: perplexity {:+.3} %", 100.0 * loss);
        assert!(equal >= agreement, "{quantization}: {:.2} % of first choices are equal", 100.0 * equal);
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_by_tensor_and_place() {
    let mut tensors = read(&folder("dense-tied").join("model.safetensors"));
    let name = "model.layers.1.self_attn.k_proj.weight";
    tensors.get_mut(name).expect("a tensor").1[3 * 64 + 5] = f32::NAN;
    let broken = merged_folder("dense-tied", &tensors);
    for engine in [Engine::best(), Engine(ernie_worker::model::BackendChoice::Candle, None)] {
        let checkpoint = Checkpoint::inspect(broken.path()).expect("a checkpoint");
        let options = LoadOptions {
            quantization: Quantization::Int4,
            dtype: DtypeChoice::Float32,
            backend: engine.0,
            max_model_len: Some(64),
            max_num_seqs: 1,
            ..LoadOptions::default()
        };
        let Err(error) = load(&checkpoint, &options, &|_| {}) else { panic!("loaded") };
        assert_eq!(error.reason(), Reason::CorruptModel, "{error}");
        for part in [name, "row 3, column 5", "NaN"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}

#[test]
fn quantisation_is_part_of_what_tells_numbers_apart() {
    let identity =
        |quantization| load_with(Engine::best(), &folder("dense-tied"), quantization, &[]).identity().to_owned();
    let all = [Quantization::None, Quantization::Int8, Quantization::Int4].map(identity);
    assert!(all[1].contains("-float32-int8-") && all[2].contains("-float32-int4-"), "{all:?}");
    assert!(!all[0].contains("int") && !all[0].contains("none"), "{all:?}");
}
