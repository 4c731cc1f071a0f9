use ernie_proto::failure::Reason;
use serde_json::{Value, json};

use super::*;
use crate::model::error::LoadError;

/// The 0.3B's config as it was first published.
fn dense() -> Value {
    json!({
        "architectures": ["Ernie4_5_ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 131072, "model_type": "ernie4_5",
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 18,
        "rms_norm_eps": 1e-05, "use_cache": false, "vocab_size": 103424, "rope_theta": 500000,
        "use_bias": false, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    })
}

/// The 21B-A3B-Thinking's config as it was published.
fn moe() -> Value {
    json!({
        "architectures": ["Ernie4_5_MoeForCausalLM"], "_attn_implementation": "eager", "attention_bias": false,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "top2_fused",
        "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_interval": 1, "moe_layer_start_index": 1,
        "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": true,
        "num_attention_heads": 20, "num_key_value_heads": 4, "num_hidden_layers": 28,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "use_bias": false, "use_cache": true, "vocab_size": 103424
    })
}

fn parse(config: &Value) -> Result<ModelConfig, LoadError> {
    ModelConfig::parse("config.json", &config.to_string())
}

/// A config with some keys replaced; `null` stays null.
fn with(mut config: Value, changes: &[(&str, Value)]) -> Value {
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    config
}

/// A config without some keys.
fn without(mut config: Value, keys: &[&str]) -> Value {
    let map = config.as_object_mut().expect("an object");
    keys.iter().for_each(|key| {
        map.shift_remove(*key).expect("a key that was there");
    });
    config
}

fn accepted(config: &Value) -> ModelConfig {
    parse(config).expect("accepted")
}

#[test]
fn the_published_dense_config_is_read() {
    let config = accepted(&dense());
    assert_eq!(config.architecture, Architecture::Dense);
    assert_eq!((config.query_width(), config.kv_width()), (2048, 256));
    assert_eq!((config.layers, config.vocab_size, config.max_positions), (18, 103_424, 131_072));
    assert_eq!(config.dtype, Some(Dtype::Bfloat16));
    assert_eq!((config.bos_token_id, &config.eos_token_ids[..], config.pad_token_id), (Some(1), &[2][..], Some(0)));
    assert!(config.unknown_keys.is_empty(), "{:?}", config.unknown_keys);
}

#[test]
fn the_published_moe_config_is_read() {
    let config = accepted(&moe());
    assert_eq!(config.head_dim, 128);
    let Architecture::Moe(moe) = &config.architecture else { panic!("no experts") };
    assert_eq!((moe.experts, moe.active, moe.intermediate_size, moe.shared), (64, 6, 1536, Some(2)));
    assert_eq!((moe.first_layer, moe.last_layer, moe.interval, moe.norm_min), (1, 27, 1, 1e-12));
    assert!(config.moe_layer(0).is_none() && config.moe_layer(1).is_some() && config.moe_layer(27).is_some());
    assert!(config.unknown_keys.is_empty(), "{:?}", config.unknown_keys);
}

#[test]
fn the_spelling_of_transformers_5_means_the_same() {
    let new = without(dense(), &["torch_dtype", "rope_theta", "auto_map", "tie_word_embeddings"]);
    let new = with(
        new,
        &[
            ("architectures", json!(["Ernie4_5ForCausalLM"])),
            ("dtype", json!("bfloat16")),
            ("rope_parameters", json!({"rope_type": "default", "rope_theta": 500000.0})),
            ("rope_scaling", Value::Null),
            ("initializer_range", json!(0.02)),
        ],
    );
    assert_eq!(accepted(&new), accepted(&dense()));
}

#[test]
fn a_missing_head_dim_is_128_in_dense_and_hidden_by_heads_in_moe_models() {
    assert_eq!(accepted(&without(dense(), &["head_dim"])).head_dim, 128);
    assert_eq!(accepted(&with(dense(), &[("head_dim", Value::Null)])).head_dim, 64);
    assert_eq!(accepted(&with(moe(), &[("num_attention_heads", json!(40))])).head_dim, 64);
    assert_eq!(accepted(&with(moe(), &[("head_dim", json!(96))])).head_dim, 96);
}

#[test]
fn missing_and_null_key_value_heads_are_told_apart() {
    assert_eq!(accepted(&with(dense(), &[("num_key_value_heads", Value::Null)])).kv_heads, 16);
    assert_eq!(accepted(&without(dense(), &["num_key_value_heads"])).kv_heads, 2);
    assert_eq!(accepted(&without(moe(), &["num_key_value_heads"])).kv_heads, 4);
}

#[test]
fn what_a_config_leaves_out_has_the_reference_s_defaults() {
    let keys =
        ["tie_word_embeddings", "rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "use_bias"];
    assert_eq!(accepted(&without(dense(), &keys)), accepted(&dense()));
    let sparse = accepted(&without(moe(), &["moe_layer_start_index", "moe_layer_interval", "moe_num_shared_experts"]));
    let Architecture::Moe(sparse) = sparse.architecture else { panic!("no experts") };
    assert_eq!((sparse.first_layer, sparse.interval, sparse.shared), (1, 1, None));
}

#[test]
fn layers_with_experts_follow_start_end_and_interval() {
    let config = accepted(&with(
        moe(),
        &[("moe_layer_start_index", json!(3)), ("moe_layer_end_index", json!(9)), ("moe_layer_interval", json!(2))],
    ));
    let layers: Vec<usize> = (0..28).filter(|&layer| config.moe_layer(layer).is_some()).collect();
    assert_eq!(layers, [3, 5, 7, 9]);
    assert_eq!(accepted(&with(moe(), &[("moe_layer_end_index", json!(-1))])), accepted(&moe()));
}

#[test]
fn several_ends_of_sequence_are_kept() {
    assert_eq!(accepted(&with(dense(), &[("eos_token_id", json!([2, 5]))])).eos_token_ids, [2, 5]);
}

#[test]
fn unknown_keys_are_reported_by_name() {
    let config = accepted(&with(dense(), &[("flux_capacitor", json!(1.21))]));
    assert_eq!(config.unknown_keys, ["flux_capacitor"]);
}

#[test]
fn a_sliding_window_is_taken_unless_it_is_switched_off() {
    let window = accepted(&with(dense(), &[("sliding_window", json!(4096))])).sliding_window;
    assert_eq!(window.expect("a window").of_layer(17), Some(4096));
    let off = [("sliding_window", json!(4096)), ("use_sliding_window", json!(false))];
    assert_eq!(accepted(&with(dense(), &off)).sliding_window, None);
}

#[test]
fn numbers_out_of_range_are_refused_with_key_value_and_range() {
    let huge = json!(u64::MAX);
    for (key, value) in [
        ("vocab_size", json!(0)),
        ("vocab_size", huge.clone()),
        ("hidden_size", json!(-1024)),
        ("hidden_size", json!(1024.5)),
        ("num_hidden_layers", json!("18")),
        ("num_hidden_layers", huge.clone()),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(32)),
        ("head_dim", json!(127)),
        ("head_dim", json!(0)),
        ("intermediate_size", json!([3072])),
        ("max_position_embeddings", huge),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!(10)),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(1e300)),
        ("eos_token_id", json!(103_424)),
        ("eos_token_id", json!([2, -1])),
        ("bos_token_id", json!("<s>")),
        ("pad_token_id", json!(1_000_000)),
        ("tie_word_embeddings", json!("yes")),
        ("sliding_window", json!(0)),
    ] {
        let error = parse(&with(dense(), &[(key, value.clone())])).expect_err(key);
        let text = error.to_string();
        assert_eq!(error.reason(), Reason::CorruptModel, "{text}");
        assert!(text.contains(key) && text.contains("config.json") && text.contains("must be"), "{text}");
    }
    for (key, value) in [
        ("moe_k", json!(65)),
        ("moe_k", json!(0)),
        ("moe_num_experts", json!(0)),
        ("moe_layer_end_index", json!(28)),
        ("moe_layer_start_index", json!(28)),
        ("moe_layer_interval", json!(0)),
        ("moe_norm_min", json!(-1)),
    ] {
        let error = parse(&with(moe(), &[(key, value)])).expect_err(key);
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn shapes_that_a_config_must_name_are_missed_by_name() {
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        let error = parse(&without(dense(), &[key])).expect_err(key);
        assert!(error.to_string().contains(&format!("no {key}")), "{error}");
    }
    for key in ["moe_num_experts", "moe_k", "moe_intermediate_size"] {
        let error = parse(&without(moe(), &[key])).expect_err(key);
        assert!(error.to_string().contains(&format!("no {key}")), "{error}");
    }
}

#[test]
fn what_is_not_computed_is_refused_by_the_key_s_name() {
    for (key, value) in [
        ("model_type", json!("llama")),
        ("model_type", json!("ernie4_5_vl_moe")),
        ("architectures", json!(["Ernie4_5_VLMoeForConditionalGeneration"])),
        ("architectures", json!(["Ernie4_5Model"])),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("quantization_config", json!({"quant_method": "gptq"})),
        ("rope_scaling", json!({"type": "linear", "factor": 4.0})),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 500000.0})),
        ("partial_rotary_factor", json!(0.5)),
        ("compression_ratio", json!(0.25)),
        ("moe_gate_act", json!("sigmoid")),
        ("vision_config", json!({"depth": 32})),
        ("torch_dtype", json!("float8_e4m3fn")),
    ] {
        let error = parse(&with(dense(), &[(key, value)])).expect_err(key);
        let text = error.to_string();
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{text}");
        let name = if key.starts_with("rope") { "type" } else { key };
        assert!(text.contains(name), "{key}: {text}");
    }
    let error = parse(&with(dense(), &[("quantization_config", json!({"bits": 4, "quant_method": "gptq"}))]));
    let text = error.expect_err("quantised").to_string();
    assert!(text.contains("gptq (quant_method)") && text.contains("--quantization int8"), "{text}");
    let lists = [("moe_num_experts", json!([64, 64])), ("moe_intermediate_size", json!([1536, 512]))];
    for change in lists {
        let error = parse(&with(moe(), std::slice::from_ref(&change))).expect_err(change.0);
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{error}");
    }
}

#[test]
fn class_and_type_that_contradict_each_other_are_refused() {
    let error = parse(&with(dense(), &[("model_type", json!("ernie4_5_moe"))])).expect_err("contradiction");
    assert!(error.to_string().contains("architectures"), "{error}");
    assert!(parse(&without(dense(), &["model_type"])).is_ok());
    assert!(parse(&without(dense(), &["architectures"])).is_ok());
    assert!(parse(&without(dense(), &["architectures", "model_type"])).is_err());
    let error = parse(&with(dense(), &[("dtype", json!("float32"))])).expect_err("two dtypes");
    assert!(error.to_string().contains("dtype"), "{error}");
}

#[test]
fn text_that_is_no_json_object_is_refused_where_it_breaks() {
    for text in ["", "[]", "{", "null", "{\"hidden_size\": 1, \"hidden_size\": 2}", &"[".repeat(100_000)] {
        let error = ModelConfig::parse("config.json", text).expect_err("no object");
        assert_eq!(error.reason(), Reason::CorruptModel);
        assert!(error.to_string().starts_with("config.json is not valid"), "{error}");
    }
}

#[test]
fn sampling_defaults_are_read_and_ids_fall_back_to_the_config() {
    let config = accepted(&dense());
    let text = r#"{"do_sample": true, "top_p": 0.95, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0,
        "transformers_version": "5.0.0"}"#;
    let defaults = GenerationDefaults::parse("generation_config.json", text, &config).expect("read");
    assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(0.6), Some(0.95), Some(20)));
    assert_eq!((defaults.do_sample, &defaults.eos_token_ids[..]), (Some(true), &[2][..]));
    assert!(defaults.unknown_keys.is_empty(), "{:?}", defaults.unknown_keys);
    let empty = GenerationDefaults::parse("generation_config.json", "{}", &config).expect("read");
    assert_eq!(empty, GenerationDefaults::of_config(&config));
    assert_eq!(empty.eos_token_ids, [2]);
}

#[test]
fn sampling_defaults_out_of_range_are_refused_by_name() {
    let config = accepted(&dense());
    for (key, value) in [
        ("temperature", "-1"),
        ("top_p", "0"),
        ("top_p", "1.5"),
        ("top_k", "-5"),
        ("min_p", "2"),
        ("repetition_penalty", "0"),
        ("eos_token_id", "999999"),
        ("max_new_tokens", "0"),
    ] {
        let text = format!("{{\"{key}\": {value}}}");
        let error = GenerationDefaults::parse("generation_config.json", &text, &config).expect_err(key);
        assert!(error.to_string().contains(key), "{error}");
    }
}
