//! `ernie-worker eval` as a user calls it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use ernie_worker::tokenizer::Tokenizer;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::demo::models;
use crate::reference::{F32, Reference, folder, near};

fn eval(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ernie-worker"));
    // a termination log of its own, in case the machine has one
    command.arg("eval").args(arguments).env("ERNIE_TERMINATION_LOG", "/dev/null");
    command.output().expect("started")
}

fn succeeds(arguments: &[&str]) -> String {
    let output = eval(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

fn write_ids(path: &Path, tensors: &[(&str, &[u32])]) {
    let bytes: BTreeMap<&str, Vec<u8>> = tensors
        .iter()
        .map(|(name, ids)| (*name, ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, bytes)| (*name, TensorView::new(Dtype::I64, vec![bytes.len() / 8], bytes).expect("a tensor")));
    safetensors::serialize_to_file(views, None, path).expect("written");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// The output of a run by name.
struct Results(Vec<u8>);

impl Results {
    fn of(path: &Path) -> Self {
        Self(fs::read(path).expect("an output"))
    }

    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = file.tensor(name).unwrap_or_else(|_| panic!("no {name} among {:?}", file.names()));
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.tensor(name).1.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn numbers(&self, name: &str) -> Vec<u32> {
        self.tensor(name).1.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as u32).collect()
    }
}

#[test]
fn one_sequence_gives_logits_tokens_and_a_trace_under_their_names() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (input, output) = (scratch.path().join("in.safetensors"), scratch.path().join("out.safetensors"));
    let (name, reference) = ("moe-shared", Reference::of("moe-shared"));
    write_ids(&input, &[("input_ids", &reference.prompt().ids)]);
    let model = folder(name);
    for backend in ["cpu", "candle"] {
        succeeds(&[
            "--model",
            text(&model),
            "--input",
            text(&input),
            "--output",
            text(&output),
            "--generate",
            "24",
            "--trace",
            "--chunk",
            "7",
            "--threads",
            "2",
            "--backend",
            backend,
        ]);
        let results = Results::of(&output);
        assert_eq!(results.tensor("logits").0, [19, 320]);
        near("logits", &results.floats("logits"), &reference.floats("logits"), F32);
        assert_eq!(results.numbers("greedy.tokens"), reference.numbers("greedy.tokens"));
        near("greedy.logits", &results.floats("greedy.logits"), &reference.floats("greedy.logits"), F32);
        for stage in ["embed", "layer.0", "layer.3", "norm", "router.2.logits"] {
            near(stage, &results.floats(stage), &reference.floats(stage), F32);
        }
        assert_eq!(results.tensor("router.1.index").0, [19, 3]);
        assert_eq!(results.numbers("router.3.index"), reference.numbers("router.3.index"));
    }
}

#[test]
fn a_batch_gives_each_sequence_its_number() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (input, output) = (scratch.path().join("in.safetensors"), scratch.path().join("out.safetensors"));
    let reference = Reference::of("dense-mha");
    let (prompt, far) = (reference.prompt().ids, reference.numbers("gap.position_ids"));
    write_ids(
        &input,
        &[("input_ids.0", &prompt[..5]), ("input_ids.1", &prompt), ("position_ids.1", &far), ("input_ids.2", &prompt)],
    );
    let model = folder("dense-mha");
    succeeds(&["--model", text(&model), "--input", text(&input), "--output", text(&output), "--generate", "3"]);
    let results = Results::of(&output);
    near("near", &results.floats("logits.2"), &reference.floats("logits"), F32);
    near("far", &results.floats("logits.1"), &reference.floats("gap.logits"), F32);
    near("short", &results.floats("logits.0"), &reference.floats("logits")[..5 * 320], F32);
    assert_eq!(results.numbers("greedy.tokens.2"), reference.numbers("greedy.tokens")[..3]);
    succeeds(&["--model", text(&model), "--input", text(&input), "--output", text(&output), "--rows", "last"]);
    let results = Results::of(&output);
    assert_eq!(results.tensor("logits.2").0, [1, 320]);
    near("last", &results.floats("logits.2"), &reference.floats("logits")[18 * 320..], F32);
}

#[test]
fn an_adapter_is_applied_to_every_sequence() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (input, output) = (scratch.path().join("in.safetensors"), scratch.path().join("out.safetensors"));
    let reference = Reference::of("dense-lora");
    write_ids(&input, &[("input_ids", &reference.prompt().ids)]);
    let model = folder("dense-lora");
    let adapter = format!("mine={}", text(&model.join("adapter-rslora")));
    succeeds(&["--model", text(&model), "--input", text(&input), "--output", text(&output), "--adapter", &adapter]);
    near("adapter", &Results::of(&output).floats("logits"), &reference.floats("lora.adapter-rslora.logits"), F32);
}

/// The lines of the demo model's held-out paragraphs as token ids, without a beginning of sequence, as the reference
/// scored them.
fn validation_ids() -> String {
    let tokenizer = Tokenizer::load(&models().join("austen-2.6m"), 1024).expect("a tokenizer");
    let lines = fs::read_to_string(models().join("validation.jsonl")).expect("validation.jsonl");
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let ids = tokenizer.encode(line["text"].as_str().expect("a text")).expect("encoded");
        assert_eq!(ids.len() as u64, line["tokens"].as_u64().expect("a count"));
        json!({"ids": ids}).to_string() + "\n"
    };
    lines.lines().map(line).collect()
}

#[test]
fn the_demo_model_s_perplexity_is_the_reference_s() {
    let scratch = tempfile::tempdir().expect("a folder");
    let file = scratch.path().join("validation.jsonl");
    fs::write(&file, validation_ids()).expect("written");
    let golden = fs::read_to_string(models().join("golden.json")).expect("golden.json");
    let expected = &serde_json::from_str::<Value>(&golden).expect("JSON")["validation"];
    let model = models().join("austen-2.6m");
    for (dtype, nll, tolerance) in
        [("float32", "nll_f32", 0.01), ("bfloat16", "nll_f32", 0.5), ("auto", "nll_bf16", 3.0)]
    {
        let printed = succeeds(&["--model", text(&model), "--perplexity", text(&file), "--json", "--dtype", dtype]);
        let score: Value = serde_json::from_str(&printed).expect("JSON");
        assert_eq!(score["tokens"], expected["scored"], "{dtype}");
        let (ours, theirs) = (score["nll"].as_f64().expect("a number"), expected[nll].as_f64().expect("a number"));
        assert!((ours - theirs).abs() <= tolerance, "{dtype}: {ours}, expected {theirs}");
        let perplexity = score["perplexity"].as_f64().expect("a number");
        assert!((perplexity - (ours / expected["scored"].as_f64().expect("a number")).exp()).abs() < 1e-9);
    }
}

#[test]
fn texts_are_scored_after_a_beginning_of_sequence() {
    let (model, file) = (models().join("austen-2.6m"), models().join("validation.jsonl"));
    let printed = succeeds(&["--model", text(&model), "--perplexity", text(&file), "--json"]);
    let score: Value = serde_json::from_str(&printed).expect("JSON");
    // each of the 20 paragraphs has one more token to predict: its first
    assert_eq!(score["tokens"], 6150 + 20);
    let perplexity = score["perplexity"].as_f64().expect("a number");
    assert!((16.0..19.0).contains(&perplexity), "{perplexity}");
}

#[test]
fn mistakes_have_the_exit_code_of_their_kind_and_a_sentence() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (input, output) = (scratch.path().join("in.safetensors"), scratch.path().join("out.safetensors"));
    write_ids(&input, &[("input_ids", &[1, 2, 999])]);
    let model = folder("dense-tied");
    let base = ["--model", text(&model), "--input", text(&input), "--output", text(&output)];
    for (arguments, code, expected) in [
        (base.to_vec(), 2, "token 999"),
        (vec!["--model", "/nowhere", "--input", text(&input), "--output", text(&output)], 10, "does not exist"),
        (vec!["--model", text(&model), "--input", "/nowhere", "--output", text(&output)], 2, "/nowhere"),
        (vec!["--model", text(&model)], 2, "--perplexity"),
        ([&base[..], &["--level", "avx9"]].concat(), 2, "avx9"),
    ] {
        let output = eval(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
}
