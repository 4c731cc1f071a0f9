//! `config.json`, and the same text as `generation_config.json` of a model that it describes.
#![no_main]

use ernie_worker::model::{GenerationDefaults, ModelConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = ModelConfig::parse("config.json", text) {
        // what later code multiplies must not overflow
        assert!(config.query_width() > 0 && config.kv_width() > 0);
        assert!(config.heads.is_multiple_of(config.kv_heads));
        assert!(config.eos_token_ids.iter().all(|&id| (id as usize) < config.vocab_size));
        for layer in [0, config.layers - 1] {
            config.moe_layer(layer);
        }
        let _ = GenerationDefaults::parse("generation_config.json", text, &config);
    }
});
