//! The golden folders.

use ernie_worker::eval::evaluate::{Sequence, Settings, evaluate};
use ernie_worker::model::DtypeChoice;

use crate::reference::{
    DENSE, Engine, F32, MOE, Reference, assert_routes, distance, folder, is_bf16, near, near_greedy_bf16, single,
};

fn all_folders() -> impl Iterator<Item = &'static str> {
    DENSE.into_iter().chain(MOE)
}

#[test]
fn logits_equal_the_reference_in_every_folder_on_every_backend() {
    for engine in Engine::all() {
        for name in all_folders() {
            let reference = Reference::of(name);
            let result = engine.run(name, &reference.prompt(), &Settings::default());
            near(&format!("{name} {engine:?}"), &result.logits, &reference.floats("logits"), engine.tolerance(name));
        }
    }
}

#[test]
fn every_stage_equals_the_reference_in_f32() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| !is_bf16(name)) {
            let reference = Reference::of(name);
            let settings = Settings { trace: true, ..Settings::default() };
            let result = engine.run(name, &reference.prompt(), &settings);
            let stages = reference.names();
            let stages = stages.iter().filter(|name| *name == "embed" || *name == "norm" || name.starts_with("layer."));
            assert_eq!(stages.clone().count(), result.trace.activations.len(), "{name}: stages");
            for stage in stages {
                let (_, rows) = result.trace.activations.iter().find(|(known, _)| known == stage).expect("traced");
                near(&format!("{name} {engine:?} {stage}"), rows, &reference.floats(stage), F32);
            }
        }
    }
}

#[test]
fn routers_choose_the_reference_s_experts_with_its_weights() {
    for engine in Engine::all() {
        for name in MOE {
            let reference = Reference::of(name);
            let settings = Settings { trace: true, ..Settings::default() };
            let result = engine.run(name, &reference.prompt(), &settings);
            assert_routes(engine, name, &format!("{name} {engine:?}"), &result.trace, &reference);
        }
    }
}

#[test]
fn greedy_decoding_with_the_cache_gives_the_reference_s_tokens() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| !is_bf16(name)) {
            let reference = Reference::of(name);
            let expected = reference.numbers("greedy.tokens");
            let settings = Settings { generate: expected.len(), ..Settings::default() };
            let result = engine.run(name, &reference.prompt(), &settings);
            assert_eq!(result.greedy_tokens, expected, "{name} {engine:?}");
            near(&format!("{name} {engine:?} greedy"), &result.greedy_logits, &reference.floats("greedy.logits"), F32);
        }
    }
}

#[test]
fn bf16_fed_with_the_reference_s_tokens_stays_near_its_rows() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| is_bf16(name)) {
            let reference = Reference::of(name);
            let (prompt, tokens) = (reference.prompt().ids, reference.numbers("greedy.tokens"));
            let expected = reference.floats("greedy.logits");
            let vocab = expected.len() / tokens.len();
            let fed = Sequence { ids: [&prompt[..], &tokens[..tokens.len() - 1]].concat(), positions: None };
            let result = engine.run(name, &fed, &Settings::default());
            let rows = &result.logits[(prompt.len() - 1) * vocab..];
            near_greedy_bf16(&format!("{name} {engine:?} fed"), rows, &expected);
        }
    }
}

#[test]
fn far_positions_turn_by_angles_rounded_as_the_reference_rounds_them() {
    for engine in Engine::all() {
        for name in all_folders() {
            let reference = Reference::of(name);
            let result = engine.run(name, &reference.gap_prompt(), &Settings::default());
            let tolerance = engine.gap_tolerance(name);
            near(&format!("{name} {engine:?} gap"), &result.logits, &reference.floats("gap.logits"), tolerance);
        }
    }
}

#[test]
fn far_positions_in_bf16_are_as_exact_as_in_f32() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| is_bf16(name)) {
            let prompt = Reference::of(name).gap_prompt();
            let mut wide = engine.load(&folder(name), DtypeChoice::Float32, &[]);
            let expected = single(&mut wide, &prompt, &Settings::default());
            let result = engine.run(name, &prompt, &Settings::default());
            // what a cache of two-byte keys and values changes, where angles rounded to bf16 would change whole logits; on
            // tiles what the reference's own roundings do, and angles are those of the other levels
            let tolerance = if engine.rounds() { engine.gap_tolerance(name) / 1.5 } else { 0.03 };
            near(&format!("{name} {engine:?} gap beside f32"), &result.logits, &expected.logits, tolerance);
        }
    }
}

#[test]
fn bf16_weights_in_f32_equal_the_reference_s_f32_pass() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| is_bf16(name)) {
            let reference = Reference::of(name);
            let mut executor = engine.load(&folder(name), DtypeChoice::Float32, &[]);
            let result = single(&mut executor, &reference.prompt(), &Settings::default());
            near(&format!("{name} {engine:?} in f32"), &result.logits, &reference.floats("f32.logits"), F32);
        }
    }
}

#[test]
fn f16_weights_stay_near_f32() {
    for engine in Engine::all() {
        for name in all_folders().filter(|name| !is_bf16(name)) {
            let reference = Reference::of(name);
            let mut executor = engine.load(&folder(name), DtypeChoice::Float16, &[]);
            let result = single(&mut executor, &reference.prompt(), &Settings::default());
            near(&format!("{name} {engine:?} in f16"), &result.logits, &reference.floats("logits"), 0.05);
        }
    }
}

#[test]
fn chunks_of_any_size_give_the_logits_and_tokens_of_one_pass() {
    for name in ["dense-tied", "dense-mha", "moe-shared", "moe-noshared"] {
        let reference = Reference::of(name);
        for engine in Engine::all() {
            for chunk in [1, 2, 5, 7, 18] {
                let settings = Settings { chunk, generate: 24, ..Settings::default() };
                let result = engine.run(name, &reference.prompt(), &settings);
                let what = format!("{name} {engine:?} in chunks of {chunk}");
                near(&what, &result.logits, &reference.floats("logits"), F32);
                assert_eq!(result.greedy_tokens, reference.numbers("greedy.tokens"), "{what}");
            }
        }
    }
}

/// Sequences of many lengths: the prompt, its beginnings, and the prompt at far positions.
fn mixed(reference: &Reference) -> Vec<Sequence> {
    let prompt = reference.prompt();
    let mut sequences: Vec<Sequence> = [1, 3, 8, 19, 12]
        .into_iter()
        .map(|length| Sequence { ids: prompt.ids[..length].to_vec(), positions: None })
        .collect();
    sequences.insert(2, reference.gap_prompt());
    sequences
}

#[test]
fn a_mixed_batch_in_chunks_gives_what_each_sequence_gives_alone() {
    for name in ["dense-tied", "dense-bias", "dense-bf16", "moe-shared", "moe-bf16"] {
        let reference = Reference::of(name);
        let sequences = mixed(&reference);
        for engine in Engine::all() {
            let mut executor = engine.load(&folder(name), DtypeChoice::Float32, &[]);
            let alone = Settings { generate: 6, trace: true, ..Settings::default() };
            let expected: Vec<_> = sequences.iter().map(|sequence| single(&mut executor, sequence, &alone)).collect();
            for chunk in [4, 64] {
                let settings = Settings { chunk, ..alone };
                let results = evaluate(&mut executor, &sequences, &settings).expect("evaluated");
                for (index, (result, expected)) in results.iter().zip(&expected).enumerate() {
                    let what = format!("{name} {engine:?} sequence {index} in chunks of {chunk}");
                    near(&what, &result.logits, &expected.logits, 1e-4);
                    near(&what, &result.greedy_logits, &expected.greedy_logits, 1e-4);
                    assert_eq!(result.greedy_tokens, expected.greedy_tokens, "{what}");
                    for ((stage, rows), (_, expected)) in
                        result.trace.activations.iter().zip(&expected.trace.activations)
                    {
                        assert!(distance(rows, expected) < 1e-4, "{what} {stage}");
                    }
                }
            }
        }
    }
}

/// A copy of a golden folder whose config has more keys.
fn with_config(name: &str, keys: &serde_json::Value) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    let text = std::fs::read_to_string(folder(name).join("config.json")).expect("a config");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (key, value) in keys.as_object().expect("keys") {
        config[key] = value.clone();
    }
    std::fs::write(copy.path().join("config.json"), config.to_string()).expect("written");
    std::fs::copy(folder(name).join("model.safetensors"), copy.path().join("model.safetensors")).expect("copied");
    copy
}

#[test]
fn a_sliding_window_hides_what_lies_further_back_than_its_layers_reach() {
    let reference = Reference::of("dense-tied");
    let settings = Settings { generate: 8, ..Settings::default() };
    let whole = with_config("dense-tied", &serde_json::json!({"sliding_window": 64}));
    let narrow = with_config("dense-tied", &serde_json::json!({"sliding_window": 4}));
    let kinds = serde_json::json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let mixed = with_config("dense-tied", &serde_json::json!({"sliding_window": 4, "layer_types": kinds}));
    // three layers reach 3 · (4 − 1) places back: the last of 19 rows sees the places from 9 on
    let mut changed = reference.prompt();
    changed.ids[..9].iter_mut().for_each(|id| *id = (*id + 1) % 320);
    let mut results = Vec::new();
    for engine in Engine::all() {
        let run = |path: &std::path::Path, prompt: &Sequence, chunk: usize| {
            let mut executor = engine.load(path, DtypeChoice::Auto, &[]);
            single(&mut executor, prompt, &Settings { chunk, ..settings })
        };
        let result = run(whole.path(), &reference.prompt(), 64);
        near(&format!("{engine:?} wide window"), &result.logits, &reference.floats("logits"), F32);
        let result = run(narrow.path(), &reference.prompt(), 64);
        assert!(distance(&result.logits, &reference.floats("logits")) > 0.1, "{engine:?}: the window hides nothing");
        near(&format!("{engine:?} chunks"), &run(narrow.path(), &reference.prompt(), 5).logits, &result.logits, 1e-4);
        let last = |logits: &[f32]| logits[18 * 320..].to_vec();
        let hidden = run(narrow.path(), &changed, 64);
        near(&format!("{engine:?} hidden"), &last(&hidden.logits), &last(&result.logits), 1e-5);
        let seen = run(mixed.path(), &changed, 64);
        let mixed = run(mixed.path(), &reference.prompt(), 64);
        assert!(distance(&last(&seen.logits), &last(&mixed.logits)) > 1e-3, "{engine:?}: a full layer sees all");
        results.push((result.logits, result.greedy_tokens, mixed.logits));
    }
    for (narrow, tokens, mixed) in &results[1..] {
        near("backends", narrow, &results[0].0, F32);
        near("backends, mixed", mixed, &results[0].2, F32);
        assert_eq!(tokens, &results[0].1);
    }
}

#[test]
fn a_file_cut_short_after_loading_does_not_matter_any_more() {
    let reference = Reference::of("dense-tied");
    let copy = with_config("dense-tied", &serde_json::json!({}));
    let mut executor = Engine::best().load(copy.path(), DtypeChoice::Auto, &[]);
    let file = std::fs::OpenOptions::new().write(true).open(copy.path().join("model.safetensors")).expect("opened");
    file.set_len(100).expect("cut");
    let result = single(&mut executor, &reference.prompt(), &Settings::default());
    near("after the cut", &result.logits, &reference.floats("logits"), F32);
}
