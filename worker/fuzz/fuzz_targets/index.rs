//! The index of a sharded checkpoint.
#![no_main]

use ernie_worker::model::checkpoint::shard_names;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(shards) = shard_names("model.safetensors.index.json", text) {
        // nothing outside the model folder is ever opened
        assert!(shards.keys().all(|name| !name.contains('/') && name.ends_with(".safetensors")), "{shards:?}");
    }
});
