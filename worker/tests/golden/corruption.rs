//! Damaged model folders: each is refused in a sentence, and none brings the process down. Ten thousand cases, or as many
//! for each 2000 of `ERNIE_CORRUPTIONS`.

mod adapter;
mod text;

use std::fs;
use std::path::{Path, PathBuf};

use ernie_proto::failure::Reason;
use ernie_worker::model::{Checkpoint, LoadError, LoadOptions, load};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::reference::folder;

/// Cases of the commonest kind; `ERNIE_CORRUPTIONS` sets another number.
fn cases() -> u64 {
    std::env::var("ERNIE_CORRUPTIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// A copy of a golden folder that may be damaged.
struct Copy {
    folder: TempDir,
    name: &'static str,
}

impl Copy {
    fn of(name: &'static str) -> Self {
        let copy = Self { folder: tempfile::tempdir().expect("a folder"), name };
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            copy.restore(file);
        }
        copy
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn original(&self, file: &str) -> Vec<u8> {
        fs::read(folder(self.name).join(file)).expect("a golden file")
    }

    fn restore(&self, file: &str) {
        self.write(file, &self.original(file));
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.path().join(file), bytes).expect("written");
    }

    fn inspect(&self) -> Result<Checkpoint, LoadError> {
        Checkpoint::inspect(self.path())
    }

    /// Fails unless the folder is refused in one sentence.
    fn refused(&self, what: &str) -> LoadError {
        let Err(error) = self.inspect() else { panic!("{} accepted: {what}", self.name) };
        let text = error.to_string();
        assert!(text.len() > 20 && text.len() < 1000 && !text.contains('\n'), "{what}: {text}");
        assert!(
            matches!(error.reason(), Reason::CorruptModel | Reason::UnsupportedModel | Reason::ModelNotFound),
            "{what}: {text}"
        );
        error
    }
}

/// Splits a safetensors file into the text of its header and its data.
fn split(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (header.to_vec(), data.to_vec())
}

/// Puts a safetensors file together.
fn join(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

#[test]
fn configs_with_a_value_that_cannot_be_are_refused() {
    let wrong = [
        json!(-1),
        json!(0),
        json!(0.5),
        json!(u64::MAX),
        json!(1e300),
        json!("many"),
        json!([1, 2]),
        json!({"a": 1}),
        json!(true),
        json!(""),
    ];
    let keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "moe_num_experts",
        "moe_k",
        "moe_intermediate_size",
        "head_dim",
    ];
    let copy = Copy::of("moe-shared");
    let config: Map<String, Value> = serde_json::from_slice(&copy.original("config.json")).expect("JSON");
    for key in keys {
        for value in &wrong {
            let mut config = config.clone();
            config.insert(key.to_owned(), value.clone());
            copy.write("config.json", Value::Object(config).to_string().as_bytes());
            let error = copy.refused(&format!("{key}: {value}"));
            assert!(error.to_string().contains(key), "{key}: {value}: {error}");
        }
    }
}

#[test]
fn configs_of_another_shape_are_refused_with_the_tensor_s_name() {
    let copy = Copy::of("moe-noshared");
    let config: Map<String, Value> = serde_json::from_slice(&copy.original("config.json")).expect("JSON");
    for (key, value) in [
        ("hidden_size", json!(128)),
        ("vocab_size", json!(321)),
        ("intermediate_size", json!(191)),
        ("num_hidden_layers", json!(6)),
        ("num_hidden_layers", json!(4)),
        ("num_key_value_heads", json!(1)),
        ("head_dim", json!(32)),
        ("moe_num_experts", json!(9)),
        ("moe_num_experts", json!(7)),
        ("moe_intermediate_size", json!(47)),
        ("moe_num_shared_experts", json!(1)),
        ("moe_layer_start_index", json!(2)),
        ("moe_layer_end_index", json!(3)),
        ("use_bias", json!(true)),
        ("tie_word_embeddings", json!(false)),
        ("num_hidden_layers", json!(4096)),
        ("moe_num_experts", json!(4096)),
    ] {
        let mut config = config.clone();
        let unchanged = config.insert(key.to_owned(), value.clone()) == Some(value.clone());
        copy.write("config.json", Value::Object(config).to_string().as_bytes());
        if unchanged {
            copy.inspect().expect("what it was");
        } else {
            assert!(copy.refused(key).to_string().contains("tensor"), "{key}");
        }
    }
}

#[test]
fn cut_and_garbled_configs_never_panic_and_cut_ones_are_refused() {
    let copy = Copy::of("dense-tied");
    let original = copy.original("config.json");
    let end = original.iter().rposition(|&byte| byte == b'}').expect("an object");
    let mut random = Random(1);
    for case in 0..cases() {
        let mut bytes = original.clone();
        if case % 3 == 0 {
            bytes.truncate(random.below(end));
            copy.write("config.json", &bytes);
            copy.refused("cut");
        } else {
            for _ in 0..=random.below(3) {
                let place = random.below(bytes.len());
                bytes[place] = random.next() as u8;
            }
            copy.write("config.json", &bytes);
            // a digit may have become another digit: then the shapes decide, or the value is one that could be
            if let Ok(checkpoint) = copy.inspect() {
                assert_eq!(checkpoint.config.hidden_size, 64);
            }
        }
    }
}

#[test]
fn headers_with_a_changed_byte_are_refused_unless_they_say_the_same() {
    for name in ["dense-bf16", "moe-shared"] {
        let copy = Copy::of(name);
        let (header, data) = split(&copy.original("model.safetensors"));
        let expected = copy.inspect().expect("whole").tensors.places;
        let mut random = Random(2);
        let mut refused = 0;
        for _ in 0..cases() / 4 {
            let mut changed = header.clone();
            let place = random.below(changed.len());
            changed[place] = match random.below(3) {
                0 => random.next() as u8,
                1 => *random.pick(b"0123456789"),
                _ => *random.pick(b"{}[]\",:\\ -.eE\n"),
            };
            copy.write("model.safetensors", &join(&changed, &data));
            match copy.inspect() {
                Ok(checkpoint) => assert_eq!(checkpoint.tensors.places, expected, "byte {place}"),
                Err(_) => {
                    copy.refused("changed byte");
                    refused += 1;
                }
            }
        }
        assert!(refused > cases() / 8, "{name}: {refused}");
    }
}

/// A way to damage one entry of a header.
fn damage(random: &mut Random, header: &mut Map<String, Value>) -> String {
    let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
    let name = random.pick(&names).clone();
    let entry = header.get_mut(&name).and_then(Value::as_object_mut).expect("an entry");
    let offsets: Vec<u64> = serde_json::from_value(entry["data_offsets"].clone()).expect("offsets");
    let kind = random.below(9);
    match kind {
        0 => entry["dtype"] = json!(random.pick(&["I64", "U8", "F64", "F8_E4M3", "bf16", "F128", ""])),
        1 => entry["shape"][0] = json!(random.next()),
        2 => entry["shape"][0] = json!(entry["shape"][0].as_u64().expect("a size") + 1 + random.next() % 1000),
        3 => entry["data_offsets"] = json!([offsets[0] + 4, offsets[1] + 4]),
        4 => entry["data_offsets"] = json!([offsets[1], offsets[0]]),
        5 => entry["data_offsets"] = json!([random.next(), random.next()]),
        6 => entry["shape"] = json!([1u64 << 40, 1u64 << 40]),
        7 => {
            entry.shift_remove(*random.pick(&["dtype", "shape", "data_offsets"]));
        }
        _ => {
            let entry = Value::Object(entry.clone());
            header.shift_remove(&name);
            header.insert(format!("{name}.old"), entry);
        }
    }
    format!("{name}, kind {kind}")
}

#[test]
fn headers_with_a_damaged_entry_are_refused() {
    for name in ["dense-untied", "moe-bf16"] {
        let copy = Copy::of(name);
        let (header, data) = split(&copy.original("model.safetensors"));
        let header: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
        let mut random = Random(3);
        for _ in 0..cases() / 4 {
            let mut header = header.clone();
            let what = damage(&mut random, &mut header);
            copy.write("model.safetensors", &join(Value::Object(header).to_string().as_bytes(), &data));
            copy.refused(&what);
        }
    }
}

#[test]
fn files_of_another_length_are_refused() {
    let copy = Copy::of("dense-mha");
    let original = copy.original("model.safetensors");
    let mut random = Random(4);
    for _ in 0..cases() / 4 {
        let mut bytes = original.clone();
        if random.below(4) == 0 {
            bytes.extend(std::iter::repeat_n(0, 1 + random.below(4096)));
        } else {
            bytes.truncate(random.below(bytes.len()));
        }
        copy.write("model.safetensors", &bytes);
        copy.refused(&format!("{} of {} bytes", bytes.len(), original.len()));
    }
}

/// Splits a folder's weights into shards with an index.
fn shard(copy: &Copy, shards: usize) -> Map<String, Value> {
    let (header, data) = split(&copy.original("model.safetensors"));
    let header: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let mut files = vec![(Map::new(), Vec::new()); shards];
    let mut index = Map::new();
    for (number, (name, entry)) in header.iter().filter(|(name, _)| *name != "__metadata__").enumerate() {
        let range: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).expect("offsets");
        let (header, bytes) = &mut files[number % shards];
        let start = bytes.len();
        bytes.extend(&data[range[0]..range[1]]);
        let mut entry = entry.clone();
        entry["data_offsets"] = json!([start, bytes.len()]);
        header.insert(name.clone(), entry);
        index.insert(name.clone(), json!(shard_name(number % shards, shards)));
    }
    for (number, (header, bytes)) in files.into_iter().enumerate() {
        copy.write(&shard_name(number, shards), &join(Value::Object(header).to_string().as_bytes(), &bytes));
    }
    fs::remove_file(copy.path().join("model.safetensors")).expect("removed");
    write_index(copy, &index);
    index
}

fn shard_name(number: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", number + 1)
}

fn write_index(copy: &Copy, index: &Map<String, Value>) {
    let text = json!({"metadata": {"total_size": 1}, "weight_map": index}).to_string();
    copy.write("model.safetensors.index.json", text.as_bytes());
}

#[test]
fn a_sharded_checkpoint_is_the_same_model() {
    for name in ["dense-untied", "moe-shared"] {
        let copy = Copy::of(name);
        let whole = load(&copy.inspect().expect("whole"), &small(), &|_| {}).expect("loaded");
        shard(&copy, 3);
        let sharded = load(&copy.inspect().expect("sharded"), &small(), &|_| {}).expect("loaded");
        assert_eq!(whole.identity(), sharded.identity());
    }
}

fn small() -> LoadOptions {
    LoadOptions { max_model_len: Some(64), max_num_seqs: 1, threads: 1, ..LoadOptions::default() }
}

#[test]
fn damaged_indexes_are_refused() {
    let copy = Copy::of("dense-tied");
    let index = shard(&copy, 3);
    copy.inspect().expect("whole");
    let text = fs::read(copy.path().join("model.safetensors.index.json")).expect("an index");
    let names: Vec<String> = index.keys().cloned().collect();
    let mut random = Random(5);
    for _ in 0..cases() / 4 {
        let mut damaged = index.clone();
        let name = random.pick(&names).clone();
        let kind = random.below(7);
        match kind {
            0 => {
                damaged.shift_remove(&name);
            }
            1 => {
                damaged.insert(format!("{name}.extra"), json!(shard_name(0, 3)));
            }
            2 => {
                let other = (0..3).map(|number| json!(shard_name(number, 3))).find(|file| *file != damaged[&name]);
                damaged.insert(name, other.expect("another file"));
            }
            3 => {
                let file =
                    *random.pick(&["../model.safetensors", "/etc/passwd", "a/b.safetensors", "config.json", "", ".."]);
                damaged.insert(name, json!(file));
            }
            4 => {
                damaged.insert(name, json!("model-00004-of-00003.safetensors"));
            }
            5 => {
                damaged.insert(name, json!(random.next()));
            }
            _ => {
                copy.write("model.safetensors.index.json", &text[..random.below(text.len())]);
                copy.refused("index cut short");
                continue;
            }
        }
        write_index(&copy, &damaged);
        copy.refused(&format!("index, kind {kind}"));
    }
    copy.write("model.safetensors.index.json", br#"{"weight_map": {}}"#);
    copy.refused("empty index");
    write_index(&copy, &index);
    fs::remove_file(copy.path().join(shard_name(1, 3))).expect("removed");
    assert_eq!(copy.refused("missing shard").reason(), Reason::ModelNotFound);
}

#[test]
fn folders_that_are_no_model_are_refused_with_what_is_missing() {
    let copy = Copy::of("dense-tied");
    let missing: PathBuf = copy.path().join("nothing");
    for (path, expected) in [(missing.as_path(), "does not exist"), (&copy.path().join("config.json"), "not a folder")]
    {
        let error = Checkpoint::inspect(path).expect_err("refused");
        assert_eq!(error.reason(), Reason::ModelNotFound);
        assert!(error.to_string().contains(expected), "{error}");
    }
    fs::remove_file(copy.path().join("model.safetensors")).expect("removed");
    assert!(copy.refused("no weights").to_string().contains("neither model.safetensors nor"));
    copy.write("pytorch_model.bin", b"");
    assert!(copy.refused("another format").to_string().contains("convert it to safetensors"));
    fs::remove_file(copy.path().join("config.json")).expect("removed");
    assert!(copy.refused("no config").to_string().contains("no config.json"));
}

#[test]
fn a_file_that_is_cut_between_the_look_and_the_reading_is_refused() {
    let copy = Copy::of("dense-tied");
    let checkpoint = copy.inspect().expect("whole");
    let bytes = copy.original("model.safetensors");
    copy.write("model.safetensors", &bytes[..bytes.len() / 2]);
    let Err(error) = load(&checkpoint, &small(), &|_| {}) else { panic!("loaded") };
    assert_eq!(error.reason(), Reason::CorruptModel);
    assert!(error.to_string().contains("cut short"), "{error}");
}

#[test]
fn every_flipped_bit_of_any_file_is_refused_where_a_digest_is_given() {
    use ernie_worker::model::digest::{Manifest, Reading};
    let manifest = |path: &Path| {
        Manifest::of(path, &Reading { threads: 2, drop_pages: false, report: &|_| {} }).expect("readable")
    };
    let copy = Copy::of("moe-bf16");
    let expected = manifest(copy.path()).digest();
    let (header, data) = split(&copy.original("model.safetensors"));
    let mut random = Random(6);
    for case in 0..cases() / 4 {
        let (file, first) = match case % 8 {
            0 => ("config.json", 0),
            1 => ("generation_config.json", 0),
            // weights, of which no other check could tell
            _ => ("model.safetensors", 8 + header.len()),
        };
        let mut bytes = copy.original(file);
        let place = first + random.below(bytes.len() - first);
        bytes[place] ^= 1 << random.below(8);
        copy.write(file, &bytes);
        if first > 0 {
            copy.inspect().expect("the header is whole");
        }
        let error = manifest(copy.path()).check(expected).expect_err("refused");
        assert_eq!(error.reason(), Reason::DigestMismatch, "{file}, byte {place}");
        copy.restore(file);
    }
    manifest(copy.path()).check(expected).expect("whole again");
    copy.write("model-00002-of-00002.safetensors", &data[..8]);
    assert_eq!(manifest(copy.path()).check(expected).expect_err("one more").reason(), Reason::DigestMismatch);
}

#[test]
fn values_beyond_half_precision_are_refused_by_tensor_and_place() {
    use ernie_worker::model::{BackendChoice, DtypeChoice};
    let copy = Copy::of("dense-tied");
    let (header, mut data) = split(&copy.original("model.safetensors"));
    let entries: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let name = "model.layers.1.mlp.up_proj.weight";
    let start = entries[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    let place = start + (3 * 64 + 5) * 4;
    data[place..place + 4].copy_from_slice(&70000f32.to_le_bytes());
    copy.write("model.safetensors", &join(&header, &data));
    for backend in [BackendChoice::Cpu, BackendChoice::Candle] {
        let options = LoadOptions { dtype: DtypeChoice::Float16, backend, ..small() };
        let Err(error) = load(&copy.inspect().expect("well formed"), &options, &|_| {}) else { panic!("loaded") };
        let text = error.to_string();
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{text}");
        assert!(text.contains(name) && text.contains("row 3, column 5") && text.contains("70000"), "{text}");
        load(&copy.inspect().expect("well formed"), &small(), &|_| {}).expect("single precision holds it");
    }
}

#[test]
fn weights_that_are_not_numbers_show_in_the_logits() {
    use ernie_worker::executor::{Executor, LogitRows, SequenceStep, StepPlan};
    let copy = Copy::of("dense-tied");
    let (header, mut data) = split(&copy.original("model.safetensors"));
    let entries: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let start = entries["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0].as_u64().expect("an offset") as usize;
    data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    copy.write("model.safetensors", &join(&header, &data));
    let mut executor = load(&copy.inspect().expect("well formed"), &small(), &|_| {}).expect("loaded");
    let step = SequenceStep {
        tokens: vec![3, 4],
        start: 0,
        position_ids: None,
        blocks: vec![0],
        adapter: None,
        logits: LogitRows::Last,
    };
    let output = executor.execute(&StepPlan { sequences: vec![step] }).expect("computed");
    assert!(output.logits[0].iter().all(|logit| !logit.is_finite()));
}

/// The largest memory that this process ever had, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
#[ignore = "measures its process: run alone by the test below"]
fn every_kind_of_damage_in_a_process_of_its_own() {
    let copy = Copy::of("dense-tied");
    copy.inspect().expect("whole");
    let base = peak_memory();
    for claim in [10u64 << 30, u64::MAX, 100 << 20, 1 << 62] {
        copy.write("model.safetensors", &[&claim.to_le_bytes()[..], b"{"].concat());
        copy.refused("a header longer than the file");
        // a hole in a file costs the disk nothing
        let file = fs::OpenOptions::new().write(true).open(copy.path().join("model.safetensors")).expect("opened");
        file.set_len(11 << 30).expect("grown");
        copy.refused("a header of 10 GiB");
    }
    configs_with_a_value_that_cannot_be_are_refused();
    configs_of_another_shape_are_refused_with_the_tensor_s_name();
    cut_and_garbled_configs_never_panic_and_cut_ones_are_refused();
    headers_with_a_changed_byte_are_refused_unless_they_say_the_same();
    headers_with_a_damaged_entry_are_refused();
    files_of_another_length_are_refused();
    damaged_indexes_are_refused();
    adapter::adapter_headers_that_are_damaged_are_refused_unless_they_say_the_same();
    adapter::adapter_files_of_another_length_are_refused();
    adapter::adapter_configs_that_are_damaged_are_refused();
    text::tokenizers_with_a_damaged_entry_are_refused();
    text::sentencepiece_models_that_are_cut_are_refused_and_garbled_ones_never_panic();
    text::garbled_chat_templates_are_refused_or_show_what_the_user_says();
    let grown = peak_memory() - base;
    println!("{} MiB above {} MiB", grown >> 20, base >> 20);
    assert!(grown <= 64 << 20, "{grown} bytes more than a sound folder takes");
}

#[test]
fn refusing_damaged_folders_takes_little_memory() {
    let name = "corruption::every_kind_of_damage_in_a_process_of_its_own";
    let mut command = std::process::Command::new(std::env::current_exe().expect("this test"));
    // a fifth of the cases: each kind many times over
    command.args(["--exact", name, "--ignored", "--nocapture"]).env("ERNIE_CORRUPTIONS", (cases() / 5).to_string());
    let output = command.output().expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
