use std::path::{Path, PathBuf};

use ernie_kernels::{Format, Layout, WeightFormat};

use super::*;
use crate::model::{BackendChoice, DtypeChoice};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn plan(name: &str, options: &LoadOptions) -> MemoryPlan {
    MemoryPlan::new(&Checkpoint::inspect(&folder(name)).expect("a checkpoint"), options).expect("a plan")
}

fn with_limit(bytes: u64) -> LoadOptions {
    LoadOptions { memory_limit: Some(MemoryLimit::cgroup(bytes)), ..LoadOptions::default() }
}

#[test]
fn weights_are_counted_in_the_format_they_are_kept_in() {
    let stored = Checkpoint::inspect(&folder("dense-untied")).expect("a checkpoint").tensors.bytes();
    assert_eq!(plan("dense-untied", &LoadOptions::default()).weight_bytes, stored);
    let half = LoadOptions { dtype: DtypeChoice::Bfloat16, ..LoadOptions::default() };
    let norms = 7 * 64 * 4;
    assert_eq!(plan("dense-untied", &half).weight_bytes, (stored - norms) / 2 + norms);
    // router and correction bias stay in single precision
    let stored = Checkpoint::inspect(&folder("moe-bf16")).expect("a checkpoint").tensors.bytes();
    let norms = 9 * 64 * 2;
    assert_eq!(plan("moe-bf16", &LoadOptions::default()).weight_bytes, stored + norms);
}

#[test]
fn quantised_weights_are_counted_to_the_byte_with_their_scales() {
    let stored = Checkpoint::inspect(&folder("dense-untied")).expect("a checkpoint").tensors.bytes();
    let bytes = |quantization, backend| {
        plan("dense-untied", &LoadOptions { quantization, backend, ..LoadOptions::default() }).weight_bytes
    };
    assert_eq!(bytes(Quantization::None, BackendChoice::Cpu), stored);
    let config = Checkpoint::inspect(&folder("dense-untied")).expect("a checkpoint").config;
    let (hidden, inner, wide) = (config.hidden_size, config.intermediate_size, config.query_width());
    let matrix = |format: WeightFormat, outputs, inputs| format.bytes(Layout::Plain, outputs, inputs) as u64;
    let all = |linear, head| {
        let qkv = matrix(linear, wide + 2 * config.kv_width(), hidden);
        let others = matrix(linear, hidden, wide) + 2 * matrix(linear, inner, hidden) + matrix(linear, hidden, inner);
        config.layers as u64 * (qkv + others) + matrix(head, config.vocab_size, hidden)
    };
    let rest = stored - all(Format::F32.into(), Format::F32.into());
    let (int8, int4) = (WeightFormat::Int8, WeightFormat::Int4);
    assert_eq!(bytes(Quantization::Int8, BackendChoice::Cpu), rest + all(int8, int8));
    assert_eq!(bytes(Quantization::Int4, BackendChoice::Cpu), rest + all(int4, int8));
    assert_eq!(bytes(Quantization::Int4, BackendChoice::Candle), stored);
}

#[test]
fn a_plan_that_does_not_fit_names_the_formats_of_the_weights() {
    let options = LoadOptions { quantization: Quantization::Int4, ..with_limit(32 << 20) };
    let plan = plan("dense-tied", &options);
    let text = plan.check().expect_err("too small").to_string();
    assert!(text.contains("of int4 and float32 weights"), "{text}");
    assert_eq!(serde_json::to_value(&plan).expect("JSON")["quantization"], "int4");
}

#[test]
fn a_token_s_cache_follows_layers_heads_and_format() {
    assert_eq!(plan("dense-tied", &LoadOptions::default()).kv_bytes_per_token, 3 * 2 * 2 * 32 * 4);
    assert_eq!(plan("dense-bf16", &LoadOptions::default()).kv_bytes_per_token, 3 * 2 * 2 * 32 * 2);
    assert_eq!(plan("dense-mha", &LoadOptions::default()).kv_bytes_per_token, 3 * 2 * 4 * 16 * 4);
}

#[test]
fn the_cache_takes_what_the_limit_leaves_and_the_context_follows() {
    let plan = plan("dense-tied", &with_limit(128 << 20));
    plan.check().expect("fits");
    assert!(plan.needed_bytes <= 128 << 20 && plan.needed_bytes > 100 << 20, "{plan:?}");
    assert!(plan.max_model_len <= plan.kv_tokens && plan.max_model_len >= USEFUL_TOKENS, "{plan:?}");
}

#[test]
fn a_context_whose_texts_do_not_fit_is_shortened_unless_it_was_asked_for() {
    let (wide, tight) = (plan("dense-tied", &with_limit(8 << 30)), plan("dense-tied", &with_limit(128 << 20)));
    assert_eq!(wide.max_model_len, 131_072);
    assert!(
        wide.overhead_bytes >= tight.overhead_bytes + (64 << 20),
        "{} {}",
        wide.overhead_bytes,
        tight.overhead_bytes
    );
    assert!((USEFUL_TOKENS..131_072).contains(&tight.max_model_len), "{tight:?}");
    let asked = LoadOptions { max_model_len: Some(131_072), ..with_limit(128 << 20) };
    assert_eq!(plan("dense-tied", &asked).overhead_bytes, wide.overhead_bytes);
}

#[test]
fn every_sequence_may_follow_a_constraint() {
    let overhead =
        |max_num_seqs| plan("dense-tied", &LoadOptions { max_num_seqs, ..with_limit(8 << 30) }).overhead_bytes;
    let checkpoint = Checkpoint::inspect(&folder("dense-tied")).expect("a checkpoint");
    assert_eq!(overhead(9) - overhead(1), 8 * 10 * checkpoint.config.vocab_size as u64);
}

#[test]
fn the_longest_text_follows_the_context_within_what_a_request_may_have() {
    assert_eq!([1, 4096, 131_072].map(longest_text), [64 << 10, 128 << 10, 1 << 20]);
}

#[test]
fn a_cache_is_no_larger_than_its_sequences_can_use() {
    let options = LoadOptions { max_model_len: Some(100), max_num_seqs: 3, ..with_limit(8 << 30) };
    let plan = plan("dense-tied", &options);
    assert_eq!((plan.kv_blocks, plan.kv_tokens, plan.max_model_len), (12, 384, 100));
}

#[test]
fn too_little_memory_is_said_with_numbers_and_remedy_before_loading() {
    let checkpoint = Checkpoint::inspect(&folder("dense-tied")).expect("a checkpoint");
    let result = crate::model::load(&checkpoint, &with_limit(32 << 20), &|_| panic!("a weight was read"));
    let Err(error) = result else { panic!("loaded") };
    let text = error.to_string();
    assert_eq!(error.reason(), Reason::InsufficientMemory);
    assert!(text.contains("limit is 32.0 MiB: raise spec.resources.limits.memory"), "{text}");
    assert!(!text.contains("--max-model-len"), "a smaller context would not help: {text}");
    assert_eq!(error.detail()["limitSource"], "cgroup");
    let plan: MemoryPlan = serde_json::from_value(error.detail().clone()).expect("the plan");
    assert_eq!(plan.available_bytes, Some(32 << 20));
    assert!(plan.needed_bytes > 32 << 20);
}

#[test]
fn where_nobody_set_a_limit_the_node_is_named_and_the_remedy_is_another_one() {
    let node = |bytes| MemoryLimit { bytes, source: LimitSource::Node };
    let options = LoadOptions { memory_limit: Some(node(32 << 20)), ..LoadOptions::default() };
    let plan = plan("dense-tied", &options);
    let error = plan.check().expect_err("too small");
    let (text, mebibytes) = (error.to_string(), plan.needed_bytes.div_ceil(1 << 20));
    assert!(text.contains("the node has 32.0 MiB and no limit is set"), "{text}");
    assert!(text.contains(&format!("set spec.resources.requests.memory to {mebibytes}Mi or more")), "{text}");
    assert!(!text.contains("limits.memory"), "{text}");
    assert_eq!(error.detail()["limitSource"], "node");
}

#[test]
fn a_device_without_room_is_named_with_what_is_free_there() {
    let device = MemoryLimit { bytes: 32 << 20, source: LimitSource::Device };
    let options = LoadOptions { memory_limit: Some(device), ..LoadOptions::default() };
    let error = plan("dense-tied", &options).check().expect_err("too small");
    assert!(error.to_string().contains("device has 32.0 MiB free: take a device with more memory"), "{error}");
    assert_eq!(error.detail()["limitSource"], "device");
}

#[test]
fn attention_on_a_device_takes_more_the_longer_the_context() {
    let config = Checkpoint::inspect(&folder("dense-tied")).expect("a checkpoint").config;
    let bytes = |context| attention_bytes(&config, Dtype::Float32, context);
    // two key-value heads of 32 columns in single precision
    assert_eq!(bytes(1024) - bytes(0), 4 * 1024 * 2 * 32 * 4);
    assert_eq!(bytes(0), 1 << 30);
}

#[test]
fn a_smaller_context_is_proposed_where_the_rest_fits() {
    let options = LoadOptions { max_model_len: Some(131_072), ..with_limit(128 << 20) };
    let text = plan("dense-tied", &options).check().expect_err("too small").to_string();
    assert!(text.contains("raise spec.resources.limits.memory, or lower --max-model-len"), "{text}");
}

#[test]
fn a_cache_that_is_too_small_for_the_context_asked_for_is_refused() {
    let options = LoadOptions { kv: KvSize::Blocks(3), max_model_len: Some(97), ..LoadOptions::default() };
    let error = plan("dense-tied", &options).check().expect_err("too small");
    assert_eq!(error.detail()["limitSource"], "flag");
    let error = error.to_string();
    assert!(error.contains("holds 96 tokens") && error.contains("context of 97"), "{error}");
    let options = LoadOptions { max_model_len: None, ..options };
    let plan = plan("dense-tied", &options);
    plan.check().expect("the context follows the cache");
    assert_eq!(plan.max_model_len, 96);
}

#[test]
fn a_context_beyond_the_model_s_is_a_mistake_of_the_caller() {
    let checkpoint = Checkpoint::inspect(&folder("dense-tied")).expect("a checkpoint");
    for asked in [0, 131_073] {
        let options = LoadOptions { max_model_len: Some(asked), ..LoadOptions::default() };
        let error = MemoryPlan::new(&checkpoint, &options).expect_err("refused");
        assert_eq!(error.reason(), Reason::Usage);
        assert!(error.to_string().contains("1..=131072"), "{error}");
    }
}

#[test]
fn a_plan_is_json_in_camel_case() {
    let json = serde_json::to_value(plan("dense-tied", &with_limit(1 << 30))).expect("JSON");
    for key in ["weightBytes", "kvBytesPerToken", "kvTokens", "neededBytes", "availableBytes", "maxModelLen"] {
        assert!(json[key].is_u64(), "{key}: {json}");
    }
    assert_eq!(json["dtype"], "float32");
}

#[test]
fn sizes_read_as_people_write_them() {
    assert_eq!((size(3 << 30), size(1536 << 10), size(12)), ("3.0 GiB".into(), "1.5 MiB".into(), "12 bytes".into()));
}
