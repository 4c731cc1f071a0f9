//! `adapter_config.json`: every module of a layer gets a scale that is a number.
#![no_main]

use ernie_worker::model::adapter::Scale;
use libfuzzer_sys::fuzz_target;

const MODULES: [&str; 4] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.down_proj",
    "model.layers.1.mlp.gate",
    "lm_head",
];

fuzz_target!(|text: &str| {
    let Ok(scale) = Scale::parse("adapter_config.json", text) else { return };
    for module in MODULES {
        assert!(scale.of(module).is_finite() && scale.rank(module) >= 1, "{module}: {scale:?}");
    }
});
