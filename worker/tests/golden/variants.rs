//! The same model in the forms that other tools write it.

use std::fs;
use std::path::Path;

use ernie_worker::eval::evaluate::Settings;
use ernie_worker::model::{Checkpoint, Dtype, DtypeChoice};
use half::f16;
use safetensors::tensor::{Dtype as Stored, TensorView};
use serde_json::{Value, json};

use crate::adapters::{Tensors, merged_folder, noise, read};
use crate::reference::{Engine, F32, Reference, folder, near, single};

fn tensors(name: &str) -> Tensors {
    read(&folder(name).join("model.safetensors"))
}

/// Sets keys of a folder's config.
fn configure(path: &Path, keys: &Value) {
    let path = path.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a config")).expect("JSON");
    for (key, value) in keys.as_object().expect("keys") {
        config[key] = value.clone();
    }
    fs::write(&path, config.to_string()).expect("written");
}

/// Fails unless every backend computes a golden folder's numbers from this one.
fn assert_is(name: &str, path: &Path, dtype: DtypeChoice, tolerance: f32) {
    let reference = Reference::of(name);
    for engine in Engine::all() {
        let mut executor = engine.load(path, dtype, &[]);
        let result = single(&mut executor, &reference.prompt(), &Settings::default());
        near(&format!("{name} {engine:?}"), &result.logits, &reference.floats("logits"), tolerance);
    }
}

fn warnings(path: &Path) -> String {
    Checkpoint::inspect(path).expect("a checkpoint").warnings.join("\n")
}

#[test]
fn heads_for_multi_token_prediction_are_reported_and_change_nothing() {
    let mut all = tensors("moe-shared");
    for (name, shape) in [
        ("mtp_emb_norm.0.weight", vec![64]),
        ("mtp_hidden_norm.0.weight", vec![64]),
        ("mtp_linear_proj.0.weight", vec![64, 128]),
        ("mtp_block.0.self_attn.q_proj.weight", vec![64, 64]),
        ("mtp_block.0.mlp.up_proj.weight", vec![192, 64]),
    ] {
        let count = shape.iter().product();
        all.insert(format!("model.{name}"), (shape, noise(name, count)));
    }
    let copy = merged_folder("moe-shared", &all);
    configure(copy.path(), &json!({"num_nextn_predict_layers": 1}));
    let said = warnings(copy.path());
    assert!(said.contains("5 tensors are not used") && said.contains("model.mtp_"), "{said}");
    assert_is("moe-shared", copy.path(), DtypeChoice::Auto, F32);
}

#[test]
fn a_copy_of_the_tied_head_is_reported_and_changes_nothing() {
    let mut all = tensors("dense-tied");
    let head = all["model.embed_tokens.weight"].clone();
    all.insert("lm_head.weight".to_owned(), head);
    let copy = merged_folder("dense-tied", &all);
    assert!(warnings(copy.path()).contains("lm_head.weight"));
    assert_is("dense-tied", copy.path(), DtypeChoice::Auto, F32);
}

#[test]
fn experts_in_one_tensor_are_the_same_experts() {
    for (name, experts) in [("moe-shared", 8), ("moe-noshared", 8)] {
        let mut all = tensors(name);
        for layer in 0..5 {
            let prefix = format!("model.layers.{layer}.mlp");
            let part = |expert: usize, name: &str| format!("{prefix}.experts.{expert}.{name}_proj.weight");
            if !all.contains_key(&part(0, "gate")) {
                continue;
            }
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            let mut take = |expert, name| all.remove(&part(expert, name)).expect("an expert").1;
            for expert in 0..experts {
                gate_up.extend(take(expert, "gate"));
                gate_up.extend(take(expert, "up"));
                down.extend(take(expert, "down"));
            }
            all.insert(format!("{prefix}.experts.gate_up_proj"), (vec![experts, 96, 64], gate_up));
            all.insert(format!("{prefix}.experts.down_proj"), (vec![experts, 64, 48], down));
            let bias = all.remove(&format!("{prefix}.moe_statics.e_score_correction_bias")).expect("a bias");
            all.insert(format!("{prefix}.gate.moe_statics.e_score_correction_bias"), bias);
        }
        assert!(all.keys().any(|name| name.ends_with("experts.down_proj")), "{name} has experts");
        assert_is(name, merged_folder(name, &all).path(), DtypeChoice::Auto, F32);
    }
}

#[test]
fn a_checkpoint_stored_in_half_precision_is_kept_and_computed_in_it() {
    let copy = tempfile::tempdir().expect("a folder");
    let all = tensors("dense-untied");
    let halves: Vec<(&String, &Vec<usize>, Vec<u8>)> = all
        .iter()
        .map(|(name, (shape, values))| {
            (name, shape, values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect())
        })
        .collect();
    let views = halves
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Stored::F16, (*shape).clone(), bytes).expect("a tensor")));
    safetensors::serialize_to_file(views, None, &copy.path().join("model.safetensors")).expect("written");
    fs::copy(folder("dense-untied").join("config.json"), copy.path().join("config.json")).expect("copied");
    configure(copy.path(), &json!({"torch_dtype": "float16"}));
    assert_eq!(Checkpoint::inspect(copy.path()).expect("a checkpoint").dtype, Dtype::Float16);
    assert_is("dense-untied", copy.path(), DtypeChoice::Auto, 0.05);
    assert_is("dense-untied", copy.path(), DtypeChoice::Float32, 0.05);
}

#[test]
fn keys_that_nobody_knows_are_reported_by_name() {
    let copy = merged_folder("dense-tied", &tensors("dense-tied"));
    configure(copy.path(), &json!({"a_new_key": 3, "another_one": {"x": true}}));
    let said = warnings(copy.path());
    assert!(said.contains("a_new_key") && said.contains("another_one"), "{said}");
    assert_is("dense-tied", copy.path(), DtypeChoice::Auto, F32);
}
