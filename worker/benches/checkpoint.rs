//! What checkpoints of synthetic weights cost: loading the shape of ERNIE-4.5-0.3B in time and memory against the size
//! of its file, and a token of a mixture of experts against dense models of its whole and of its active size.
//!
//! `cargo bench -p ernie-worker --bench checkpoint`. Needs 1 GB in the folder for temporary files.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use ernie_worker::executor::{BLOCK_TOKENS, Executor, LogitRows, SequenceStep, StepPlan};
use ernie_worker::model::{self, Checkpoint, KvSize, LoadOptions};
use serde_json::{Map, Value, json};

/// Decoder steps that are timed.
const STEPS: u32 = 200;

/// Tensors by name, and how they are stored.
type Shapes = Vec<(String, Vec<usize>, &'static str)>;

/// A model's shape.
struct Shape {
    vocab: usize,
    hidden: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Inner width of a dense network, or of one expert.
    inner: usize,
    /// All experts and those of one token.
    experts: Option<(usize, usize)>,
}

impl Shape {
    fn config(&self) -> Value {
        let mut config = json!({
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.inner, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
            "model_type": "ernie4_5", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        });
        if let Some((experts, active)) = self.experts {
            for (key, value) in [
                ("model_type", json!("ernie4_5_moe")),
                ("moe_num_experts", json!(experts)),
                ("moe_k", json!(active)),
                ("moe_intermediate_size", json!(self.inner)),
                ("moe_layer_start_index", json!(0)),
                ("moe_num_shared_experts", json!(0)),
            ] {
                config[key] = value;
            }
        }
        config
    }

    fn tensors(&self) -> Shapes {
        let Self { vocab, hidden, heads, kv_heads, head_dim, inner, .. } = *self;
        let mut all = vec![("embed_tokens.weight".to_owned(), vec![vocab, hidden], "BF16")];
        for layer in 0..self.layers {
            let mut add = |name: String, shape: &[usize], dtype| {
                all.push((format!("layers.{layer}.{name}.weight"), shape.to_vec(), dtype));
            };
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(norm.to_owned(), &[hidden], "BF16");
            }
            for (name, width) in [("q", heads), ("k", kv_heads), ("v", kv_heads)] {
                add(format!("self_attn.{name}_proj"), &[width * head_dim, hidden], "BF16");
            }
            add("self_attn.o_proj".to_owned(), &[hidden, heads * head_dim], "BF16");
            let networks = match self.experts {
                None => vec!["mlp".to_owned()],
                Some((experts, _)) => (0..experts).map(|expert| format!("mlp.experts.{expert}")).collect(),
            };
            for network in networks {
                add(format!("{network}.gate_proj"), &[inner, hidden], "BF16");
                add(format!("{network}.up_proj"), &[inner, hidden], "BF16");
                add(format!("{network}.down_proj"), &[hidden, inner], "BF16");
            }
            if let Some((experts, _)) = self.experts {
                add("mlp.gate".to_owned(), &[experts, hidden], "F32");
                let bias = format!("layers.{layer}.mlp.moe_statics.e_score_correction_bias");
                all.push((bias, vec![1, experts], "F32"));
            }
        }
        all.push(("norm.weight".to_owned(), vec![hidden], "BF16"));
        all
    }

    /// Writes a checkpoint of small random weights; returns the bytes of its weights' file.
    fn write(&self, folder: &Path) -> u64 {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
        let (mut header, mut end) = (Map::new(), 0);
        for (name, shape, dtype) in self.tensors() {
            let start = end;
            end += shape.iter().product::<usize>() * if dtype == "F32" { 4 } else { 2 };
            header
                .insert(format!("model.{name}"), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        }
        let header = Value::Object(header).to_string();
        let path = folder.join("model.safetensors");
        let mut file = BufWriter::new(File::create(&path).unwrap());
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        // both halves of a single made of two such words are small, so that they will do for routers too
        let mut state = 1u64;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let sign = (state >> 63) as u16;
            (sign << 15) | (0x3c00 + ((state >> 40) as u16 & 0xff))
        };
        let pattern: Vec<u8> = (0..(1 << 19) + 1).flat_map(|_| word().to_le_bytes()).collect();
        let mut left = end;
        while left > 0 {
            let count = left.min(pattern.len());
            file.write_all(&pattern[..count]).unwrap();
            left -= count;
        }
        file.flush().unwrap();
        fs::metadata(path).unwrap().len()
    }
}

fn load(folder: &Path) -> model::ModelExecutor {
    let options =
        LoadOptions { kv: KvSize::Blocks(16), max_model_len: Some(512), max_num_seqs: 1, ..LoadOptions::default() };
    let options = LoadOptions { max_num_batched_tokens: 256, ..options };
    model::load(&Checkpoint::inspect(folder).unwrap(), &options, &|_| {}).unwrap()
}

/// A figure of this process's memory in bytes.
fn memory(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_matches(|character: char| !character.is_ascii_digit()).parse::<u64>().unwrap() << 10
}

/// Loads a folder and says what that took; in a process of its own, for its peak of memory.
fn loading(folder: &Path) {
    let begun = Instant::now();
    let checkpoint = Checkpoint::inspect(folder).unwrap();
    let inspected = begun.elapsed();
    let executor = load(folder);
    let loaded = begun.elapsed();
    let file = fs::metadata(folder.join("model.safetensors")).unwrap().len();
    let (peak, mib) = (memory("VmHWM:"), |bytes: u64| bytes as f64 / f64::from(1 << 20));
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
    let small = Shape {
        vocab: 103_424,
        hidden: 1024,
        layers: 18,
        heads: 16,
        kv_heads: 2,
        head_dim: 128,
        inner: 3072,
        experts: None,
    };
    let folder = scratch.path().join("0.3b");
    small.write(&folder);
    for _ in 0..3 {
        let status = Command::new(&arguments[0]).arg("--load").arg(&folder).status().unwrap();
        assert!(status.success());
    }
    fs::remove_dir_all(&folder).unwrap();

    let shape = |inner, experts| Shape {
        vocab: 1024,
        hidden: 1024,
        layers: 4,
        heads: 8,
        kv_heads: 2,
        head_dim: 128,
        inner,
        experts,
    };
    for (name, shape) in [
        ("64 experts of 384, 6 active", shape(384, Some((64, 6)))),
        ("dense of the whole size", shape(384 * 64, None)),
        ("dense of the active size", shape(384 * 6, None)),
    ] {
        let folder = scratch.path().join(name.replace(' ', "-"));
        let bytes = shape.write(&folder);
        println!("{name}: {} MiB, {:.2} ms a token", bytes >> 20, decoding(&folder) * 1e3);
        fs::remove_dir_all(&folder).unwrap();
    }
}
