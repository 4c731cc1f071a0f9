//! Damaged configurations.

use serde_json::{Map, Value, json};

use super::{Copy, Random, cases};

#[test]
pub(super) fn configs_with_a_value_that_cannot_be_are_refused() {
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
pub(super) fn configs_of_another_shape_are_refused_with_the_tensor_s_name() {
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
pub(super) fn garbled_configs_are_refused_or_sound_and_cut_ones_are_refused() {
    let copy = Copy::of("dense-tied");
    let (whole, original) = (copy.inspect().expect("whole"), copy.original("config.json"));
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
            copy.refused_or_sound("garbled", &whole);
        }
    }
}
