//! Low-rank adapters: PEFT's numbers for a dense model, and merged weights for the rest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ernie_proto::failure::Reason;
use ernie_worker::eval::evaluate::{Sequence, Settings, evaluate};
use ernie_worker::executor::{Executor, LogitRows, SequenceStep, StepPlan};
use ernie_worker::model::{Checkpoint, DtypeChoice, LoadError, LoadOptions, load};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::reference::{Engine, F32, Reference, folder, near, single};

pub(crate) const ADAPTERS: [&str; 3] = ["adapter", "adapter-qv", "adapter-rslora"];

pub(crate) fn named(names: &[&str]) -> Vec<(String, PathBuf)> {
    names.iter().map(|name| ((*name).to_owned(), folder("dense-lora").join(name))).collect()
}

#[test]
fn each_adapter_gives_peft_s_logits_and_tokens() {
    let reference = Reference::of("dense-lora");
    for engine in Engine::all() {
        for name in ADAPTERS {
            let mut executor = engine.load(&folder("dense-lora"), DtypeChoice::Auto, &named(&[name]));
            let expected = reference.numbers(&format!("lora.{name}.greedy.tokens"));
            let settings = Settings { adapter: true, generate: expected.len(), ..Settings::default() };
            for chunk in [64, 5] {
                let result = single(&mut executor, &reference.prompt(), &Settings { chunk, ..settings });
                let logits = reference.floats(&format!("lora.{name}.logits"));
                near(&format!("{name} {engine:?} in chunks of {chunk}"), &result.logits, &logits, F32);
                assert_eq!(result.greedy_tokens, expected, "{name} {engine:?}");
            }
        }
    }
}

/// One step that runs the prompt under each of some adapters, side by side.
pub(crate) fn side_by_side(prompt: &Sequence, adapters: &[Option<u32>]) -> StepPlan {
    let step = |(number, adapter): (usize, &Option<u32>)| SequenceStep {
        tokens: prompt.ids.clone(),
        start: 0,
        position_ids: None,
        blocks: vec![number as u32],
        adapter: *adapter,
        logits: LogitRows::All,
        reading: None,
    };
    StepPlan { sequences: adapters.iter().enumerate().map(step).collect() }
}

#[test]
fn several_adapters_and_the_base_model_share_a_batch() {
    let reference = Reference::of("dense-lora");
    for engine in Engine::all() {
        let mut executor = engine.load(&folder("dense-lora"), DtypeChoice::Auto, &named(&ADAPTERS));
        let names: Vec<_> = executor.adapters().iter().map(|adapter| adapter.name.as_str()).collect();
        assert_eq!(names, ADAPTERS);
        assert_ne!(executor.adapters()[0].digest, executor.adapters()[1].digest);
        let order = [Some(1), None, Some(0), Some(2), Some(1)];
        let output = executor.execute(&side_by_side(&reference.prompt(), &order)).expect("computed");
        for (logits, adapter) in output.logits.iter().zip(order) {
            let name = adapter.map_or("logits".to_owned(), |index| format!("lora.{}.logits", ADAPTERS[index as usize]));
            near(&format!("{name} {engine:?}"), logits, &reference.floats(&name), F32);
        }
        let unknown = side_by_side(&reference.prompt(), &[Some(3)]);
        assert!(executor.execute(&unknown).is_err());
    }
}

#[test]
fn the_base_model_gives_the_same_bits_beside_adapters() {
    let prompt = Reference::of("dense-lora").prompt();
    let mut executor = Engine::best().load(&folder("dense-lora"), DtypeChoice::Auto, &named(&ADAPTERS));
    let alone = executor.execute(&side_by_side(&prompt, &[None])).expect("computed");
    let beside = executor.execute(&side_by_side(&prompt, &[Some(2), None, Some(0)])).expect("computed");
    assert_eq!(alone.logits[0], beside.logits[1]);
}

/// Numbers that are the same each time, about ±0.25.
pub(crate) fn noise(seed: &str, count: usize) -> Vec<f32> {
    let mut state = seed
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// Tensors of a checkpoint or an adapter.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub(crate) fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let floats = |view: &TensorView<'_>| {
        view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<f32>>()
    };
    file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), floats(&view)))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, path).expect("written");
}

/// A = noise `[rank, inputs]` and B = noise `[outputs, rank]` for a module.
pub(crate) fn pair(tensors: &mut Tensors, module: &str, outputs: usize, inputs: usize, rank: usize) {
    let name = |letter: &str| format!("base_model.model.{module}.lora_{letter}.weight");
    tensors.insert(name("A"), (vec![rank, inputs], noise(&name("A"), rank * inputs)));
    tensors.insert(name("B"), (vec![outputs, rank], noise(&name("B"), outputs * rank)));
}

/// Adds scale · B·A to a weight `[outputs, inputs]`.
fn merge(
    weight: &mut [f32],
    b: impl Fn(usize, usize) -> f32,
    a: impl Fn(usize, usize) -> f32,
    rank: usize,
    inputs: usize,
    scale: f32,
) {
    for (place, value) in weight.iter_mut().enumerate() {
        let (row, column) = (place / inputs, place % inputs);
        *value += scale * (0..rank).map(|r| b(row, r) * a(r, column)).sum::<f32>();
    }
}

/// A model folder with other weights.
pub(crate) fn merged_folder(name: &str, tensors: &Tensors) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    fs::copy(folder(name).join("config.json"), copy.path().join("config.json")).expect("copied");
    write(&copy.path().join("model.safetensors"), tensors);
    copy
}

/// An adapter folder.
pub(crate) fn adapter_folder(config: &Value, tensors: &Tensors) -> tempfile::TempDir {
    let adapter = tempfile::tempdir().expect("a folder");
    fs::write(adapter.path().join("adapter_config.json"), config.to_string()).expect("written");
    write(&adapter.path().join("adapter_model.safetensors"), tensors);
    adapter
}

/// Compares a model with an adapter applied to it as it runs with the model that has it merged into its weights; and in
/// the same batch a sequence without adapter with the plain model.
fn assert_live_equals_merged(name: &str, adapter: &Path, merged: &Path) {
    let reference = Reference::of(name);
    for engine in Engine::all() {
        let mut expected = engine.load(merged, DtypeChoice::Auto, &[]);
        let expected = single(&mut expected, &reference.prompt(), &Settings::default());
        let adapters = [("live".to_owned(), adapter.to_owned())];
        let mut executor = engine.load(&folder(name), DtypeChoice::Auto, &adapters);
        let output = executor.execute(&side_by_side(&reference.prompt(), &[None, Some(0), None])).expect("computed");
        near(&format!("{name} {engine:?} live"), &output.logits[1], &expected.logits, F32);
        for base in [0, 2] {
            near(&format!("{name} {engine:?} base"), &output.logits[base], &reference.floats("logits"), F32);
        }
        let adapter_matters = output.logits[1].iter().zip(&output.logits[0]).any(|(a, b)| (a - b).abs() > 0.1);
        assert!(adapter_matters, "{name}: the adapter changes nothing");
    }
}

/// Modules of a MoE checkpoint with a linear weight each, but the router, the embedding and the head.
pub(crate) fn linears(tensors: &Tensors) -> Vec<String> {
    let names = tensors.keys().filter_map(|name| name.strip_suffix("_proj.weight"));
    names.map(|name| format!("{name}_proj")).collect()
}

#[test]
fn adapters_of_single_experts_and_shared_experts_equal_merged_weights() {
    let mut merged = read(&folder("moe-shared").join("model.safetensors"));
    let mut adapter = Tensors::new();
    for module in linears(&merged) {
        let (shape, weight) = merged.get_mut(&format!("{module}.weight")).expect("a weight");
        let (outputs, inputs) = (shape[0], shape[1]);
        pair(&mut adapter, &module, outputs, inputs, 4);
        let get = |letter: &str| adapter[&format!("base_model.model.{module}.lora_{letter}.weight")].1.clone();
        let (a, b) = (get("A"), get("B"));
        merge(weight, |row, r| b[row * 4 + r], |r, column| a[r * inputs + column], 4, inputs, 0.5);
    }
    assert!(adapter.keys().any(|name| name.contains("mlp.experts.7.down_proj")));
    assert!(adapter.keys().any(|name| name.contains("mlp.shared_experts.up_proj")));
    let adapter = adapter_folder(&json!({"peft_type": "LORA", "r": 4, "lora_alpha": 2}), &adapter);
    assert_live_equals_merged("moe-shared", adapter.path(), merged_folder("moe-shared", &merged).path());
}

#[test]
fn adapters_of_fused_experts_equal_merged_weights() {
    const EXPERTS: usize = 8;
    let (hidden, inner, rank) = (64, 48, 3);
    let mut merged = read(&folder("moe-noshared").join("model.safetensors"));
    let mut adapter = Tensors::new();
    for layer in 3..5 {
        // gate and up together have twice the rank and alpha
        for (module, outputs, inputs, rank) in
            [("experts.base_layer", 2 * inner, hidden, 2 * rank), ("experts", hidden, inner, rank)]
        {
            let name =
                |letter: &str| format!("base_model.model.model.layers.{layer}.mlp.{module}.lora_{letter}.weight");
            let a = noise(&name("A"), EXPERTS * rank * inputs);
            let b = noise(&name("B"), outputs * rank * EXPERTS);
            for expert in 0..EXPERTS {
                let a = |r: usize, column: usize| a[(expert * rank + r) * inputs + column];
                let b = |row: usize, r: usize| b[row * rank * EXPERTS + r * EXPERTS + expert];
                let projections: &[&str] = if outputs == 2 * inner { &["gate", "up"] } else { &["down"] };
                for (half, projection) in projections.iter().enumerate() {
                    let name = format!("model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight");
                    let (_, weight) = merged.get_mut(&name).expect("a weight");
                    merge(weight, |row, r| b(half * inner + row, r), a, rank, inputs, 2.0);
                }
            }
            adapter.insert(name("A"), (vec![EXPERTS * rank, inputs], a));
            adapter.insert(name("B"), (vec![outputs, rank * EXPERTS], b));
        }
    }
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 2 * rank}, "alpha_pattern": {r".*\.gate_up_proj": 4 * rank}});
    let adapter = adapter_folder(&config, &adapter);
    assert_live_equals_merged("moe-noshared", adapter.path(), merged_folder("moe-noshared", &merged).path());
}

#[test]
fn greedy_tokens_with_an_adapter_do_not_depend_on_the_neighbours() {
    let prompt = Reference::of("dense-lora").prompt();
    let mut executor = Engine::best().load(&folder("dense-lora"), DtypeChoice::Auto, &named(&["adapter"]));
    let settings = Settings { adapter: true, generate: 12, ..Settings::default() };
    let alone = single(&mut executor, &prompt, &settings);
    let half = Sequence { ids: prompt.ids[..9].to_vec(), positions: None };
    let together =
        evaluate(&mut executor, &[half, prompt.clone()], &Settings { chunk: 4, ..settings }).expect("evaluated");
    assert_eq!(together[1].logits, alone.logits);
    assert_eq!(together[1].greedy_tokens, alone.greedy_tokens);
}

fn refused(adapter: &Path) -> LoadError {
    let checkpoint = Checkpoint::inspect(&folder("dense-lora")).expect("a checkpoint");
    let options = LoadOptions {
        adapters: vec![("mine".to_owned(), adapter.to_owned())],
        max_model_len: Some(64),
        max_num_seqs: 1,
        ..LoadOptions::default()
    };
    match load(&checkpoint, &options, &|_| panic!("a weight of the model was read")) {
        Err(error) => error,
        Ok(_) => panic!("loaded"),
    }
}

#[test]
fn adapters_that_do_not_fit_the_model_are_refused_by_tensor() {
    let whole = read(&folder("dense-lora/adapter").join("adapter_model.safetensors"));
    let config: Value =
        serde_json::from_slice(&fs::read(folder("dense-lora/adapter/adapter_config.json")).expect("a file"))
            .expect("JSON");
    let first = whole.keys().find(|name| name.ends_with("lora_A.weight")).expect("a tensor").clone();
    let mut cases: Vec<(&str, Tensors, Value, &str)> = Vec::new();
    let mut tensors = whole.clone();
    tensors.remove(&first);
    cases.push(("half a pair", tensors, config.clone(), "without"));
    let mut tensors = whole.clone();
    let entry = tensors.remove(&first).expect("a tensor");
    tensors.insert(first.replace("layers.0", "layers.7"), entry.clone());
    cases.push(("a layer beyond the last", tensors, config.clone(), "without"));
    let mut tensors = whole.clone();
    pair(&mut tensors, "lm_head", 320, 64, 4);
    cases.push(("the head", tensors, config.clone(), "lm_head"));
    let mut tensors = whole.clone();
    tensors.insert(first.clone(), (vec![4, 65], vec![0.0; 4 * 65]));
    cases.push(("another width", tensors, config.clone(), "shape [4, 65]"));
    let mut other = config.clone();
    other["r"] = json!(5);
    cases.push(("another rank", whole.clone(), other, "rank 4"));
    let mut other = config;
    other["use_dora"] = json!(true);
    cases.push(("another kind", whole, other, "use_dora"));
    for (what, tensors, config, expected) in cases {
        let error = refused(adapter_folder(&config, &tensors).path());
        assert!(matches!(error.reason(), Reason::CorruptModel | Reason::UnsupportedModel), "{what}: {error}");
        assert!(error.to_string().contains(expected), "{what}: {error}");
    }
    let missing = refused(Path::new("/nowhere"));
    assert_eq!(missing.reason(), Reason::ModelNotFound);
    assert!(missing.to_string().contains("NAME=DIR"), "{missing}");
}
