//! `ernie-worker eval` as a user calls it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use ernie_kernels::Level;
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
fn another_digest_than_that_of_the_folder_ends_with_its_exit_code() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (input, output) = (scratch.path().join("in.safetensors"), scratch.path().join("out.safetensors"));
    write_ids(&input, &[("input_ids", &[3, 4])]);
    let model = folder("dense-tied");
    let with = |digest: &str| {
        eval(&["--model", text(&model), "--input", text(&input), "--output", text(&output), "--model-digest", digest])
    };
    let printed = Command::new(env!("CARGO_BIN_EXE_ernie-worker")).args(["digest", "--model", text(&model)]).output();
    let digest = String::from_utf8(printed.expect("started").stdout).expect("text");
    assert!(with(digest.trim()).status.success());
    fs::remove_file(&output).expect("written before");
    let refused = with(&format!("sha256:{}", "0".repeat(64)));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(15), "{said}");
    assert!(said.contains("DigestMismatch") && said.contains(digest.trim()), "{said}");
    assert!(!output.exists());
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

/// Runs a batch and gives the results with how each sequence was run.
fn run_batch(scratch: &Path, model: &Path, tensors: &[(&str, &[u32])], more: &[&str]) -> (Results, Vec<Value>) {
    let (input, output) = (scratch.join("in.safetensors"), scratch.join("out.safetensors"));
    write_ids(&input, tensors);
    let base = ["--model", text(model), "--input", text(&input), "--output", text(&output), "--json"];
    let printed = succeeds(&[&base[..], more].concat());
    let report: Value = serde_json::from_str(&printed).expect("JSON");
    (Results::of(&output), report["sequences"].as_array().expect("sequences").clone())
}

fn figure(sequence: &Value, name: &str) -> u64 {
    sequence[name].as_u64().unwrap_or_else(|| panic!("no {name} in {sequence}"))
}

#[test]
fn a_small_cache_preempts_sequences_and_changes_no_result() {
    let scratch = tempfile::tempdir().expect("a folder");
    for name in ["dense-tied", "moe-shared"] {
        let reference = Reference::of(name);
        let (prompt, far) = (reference.prompt().ids, reference.numbers("gap.position_ids"));
        let fed = [&prompt[..], &reference.numbers("greedy.tokens")[..12]].concat();
        let near_by: Vec<u32> = (0..19).collect();
        let batch = [
            ("input_ids.0", &fed[..]),
            ("input_ids.1", &prompt[..]),
            ("position_ids.1", &near_by[..]),
            ("input_ids.2", &fed[..]),
            ("input_ids.3", &prompt[..]),
            ("position_ids.3", &far[..]),
        ];
        for backend in ["cpu", "candle"] {
            let flags = ["--generate", "40", "--kv-blocks", "4", "--threads", "2", "--backend", backend];
            let (results, sequences) = run_batch(scratch.path(), &folder(name), &batch, &flags);
            for victim in [1, 3] {
                assert!(figure(&sequences[victim], "preemptions") > 0, "{sequences:?}");
                assert!(figure(&sequences[victim], "recomputed_tokens") > 32, "{sequences:?}");
            }
            near("preempted", &results.floats("logits.1"), &reference.floats("logits"), F32);
            near("preempted, far", &results.floats("logits.3"), &reference.floats("gap.logits"), F32);
            assert_eq!(
                results.numbers("greedy.tokens.1")[..24],
                reference.numbers("greedy.tokens"),
                "{name} {backend}"
            );
            assert_eq!(results.numbers("greedy.tokens.0")[..12], reference.numbers("greedy.tokens")[12..]);
        }
    }
}

#[test]
fn a_repeated_input_is_found_in_the_prefix_cache_and_changes_no_result() {
    let scratch = tempfile::tempdir().expect("a folder");
    let reference = Reference::of("moe-noshared");
    let tokens = reference.numbers("greedy.tokens");
    let fed = [&reference.prompt().ids[..], &tokens[..20]].concat();
    for flags in [&["--rows", "all"][..], &["--rows", "last"], &["--rows", "all", "--chunk", "3"], &["--deterministic"]]
    {
        let flags = [&["--repeat", "3", "--generate", "4"], flags].concat();
        let (results, sequences) = run_batch(scratch.path(), &folder("moe-noshared"), &[("input_ids", &fed)], &flags);
        assert_eq!(figure(&sequences[0], "prefix_hit_tokens"), 32, "{flags:?}");
        assert_eq!(results.numbers("greedy.tokens"), tokens[20..], "{flags:?}");
        let rows = results.floats("logits");
        let greedy = reference.floats("greedy.logits");
        near("last row", &rows[rows.len() - 320..], &greedy[20 * 320..21 * 320], F32);
        if !flags.contains(&"last") {
            // the rows of the tokens that were found are those of the run that computed them
            near("rows", &rows[..19 * 320], &reference.floats("logits"), F32);
            near("fed rows", &rows[18 * 320..], &greedy[..21 * 320], F32);
        }
    }
    let (_, once) = run_batch(scratch.path(), &folder("moe-noshared"), &[("input_ids", &fed)], &[]);
    assert_eq!(figure(&once[0], "prefix_hit_tokens"), 0);
    assert_eq!((figure(&once[0], "tokens"), figure(&once[0], "steps")), (39, 1));
}

#[test]
fn results_are_numbered_as_the_input_is() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (results, _) = run_batch(scratch.path(), &folder("dense-tied"), &[("input_ids.0", &[5, 6])], &["--trace"]);
    for name in ["logits.0", "embed.0", "layer.2.0", "norm.0"] {
        assert_eq!(results.tensor(name).0[0], 2, "{name}");
    }
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
    let best = Level::best().name();
    // Tiles round activations, as the reference in bf16 does; it loses 1.0 by that.
    let exact = Level::available().filter(|level| *level < Level::Amx).last().unwrap_or(Level::Scalar).name();
    for (dtype, level, nll, tolerance) in [
        ("float32", best, "nll_f32", 0.01),
        ("bfloat16", exact, "nll_f32", 0.5),
        ("bfloat16", best, "nll_f32", 2.0),
        ("auto", best, "nll_bf16", 3.0),
    ] {
        let (model, file) = (text(&model), text(&file));
        let printed = succeeds(&["--model", model, "--perplexity", file, "--json", "--dtype", dtype, "--level", level]);
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
        ([&base[..], &["--quantization", "int3"]].concat(), 2, "none, int8, int4"),
        ([&base[..], &["--repeat", "0"]].concat(), 2, "at least 1"),
        ([&base[..], &["--deterministic", "--backend", "candle"]].concat(), 2, "does not go with candle"),
        ([&base[..], &["--generate", "62", "--kv-blocks", "2"]].concat(), 2, "give at least 3"),
        ([&base[..], &["--generate", "18446744073709551615"]].concat(), 2, "the context of 131072"),
        (vec!["--model", text(&model), "--perplexity", text(&input), "--repeat", "2"], 2, "--repeat"),
    ] {
        let output = eval(&arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
}
