//! Shards, and damaged indexes of them.

use std::fs;

use ernie_proto::failure::Reason;
use ernie_worker::model::load;
use serde_json::{Map, Value, json};

use super::{Copy, Random, cases, join, small, split};

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
pub(super) fn a_sharded_checkpoint_is_the_same_model() {
    for name in ["dense-untied", "moe-shared"] {
        let copy = Copy::of(name);
        let whole = load(&copy.inspect().expect("whole"), &small(), &|_| {}).expect("loaded");
        shard(&copy, 3);
        let sharded = load(&copy.inspect().expect("sharded"), &small(), &|_| {}).expect("loaded");
        assert_eq!(whole.identity(), sharded.identity());
    }
}

#[test]
pub(super) fn damaged_indexes_are_refused() {
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
