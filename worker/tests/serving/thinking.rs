//! A model that thinks and asks for tools: its answers arrive as typed fields.
//!
//! The checkpoint is made here. Each token's embedding is a direction of its own, attention and MLP add nothing, and the
//! head gives that direction to the next token of a transcript: so a real model writes, greedily, what we want to read.

use std::path::Path;

use ernie_proto::ernie::v1::{FinishReason, Role, Tool, ToolCall};
use ernie_worker::{
    serve::Worker,
    server::{connection::ConnectionLimits, lifecycle::Stage},
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

use super::running::{Answer, Running, args, chat, complete, greedy, message, read, within};

/// What the model writes, one token each; tags are special tokens, as in a published tokenizer.
const TRANSCRIPT: [&str; 11] = [
    "I look",
    " it up.\n",
    "</think>",
    "<response>",
    "Wait",
    " a moment",
    "</response>",
    "<tool_call>",
    "{\"name\": \"weather\", \"arguments\"",
    ": {\"city\": \"Berlin\"}}",
    "</tool_call>",
];
const TEMPLATE: &str = "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}\
                        {% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}{{ '<think>\\n' }}";
const HIDDEN: usize = 64;
const END_OF_SEQUENCE: usize = 2;

pub(super) fn model() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).expect("written");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
    let mut tokenizer: Value =
        serde_json::from_slice(&std::fs::read(golden).expect("tokenizer.json")).expect("a tokenizer");
    let newline = tokenizer["model"]["vocab"]["\n"].as_u64().expect("a piece") as usize;
    let named = tokenizer["model"]["vocab"].as_object().expect("pieces").values().filter_map(Value::as_u64);
    let added = tokenizer["added_tokens"].as_array().expect("tokens").iter().filter_map(|token| token["id"].as_u64());
    let first = named.chain(added).max().expect("ids") as usize + 1;
    let tokens = TRANSCRIPT.iter().enumerate().map(|(index, text)| {
        json!({"id": first + index, "content": text, "special": text.starts_with('<'), "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
    });
    tokenizer["added_tokens"].as_array_mut().expect("tokens").extend(tokens);
    write("tokenizer.json", tokenizer.to_string());
    write("chat_template.jinja", TEMPLATE.to_owned());
    let vocab = first + TRANSCRIPT.len();
    let config = json!({
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "vocab_size": vocab, "hidden_size": HIDDEN,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "use_bias": false, "tie_word_embeddings": false, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": END_OF_SEQUENCE
    });
    write("config.json", config.to_string());
    write_weights(&folder.path().join("model.safetensors"), newline, first, vocab);
    folder
}

/// The prompt's last token is a line break; then the transcript, then its end.
fn write_weights(path: &Path, newline: usize, first: usize, vocab: usize) {
    let chain: Vec<usize> =
        std::iter::once(newline).chain(first..first + TRANSCRIPT.len()).chain([END_OF_SEQUENCE]).collect();
    let (mut embedding, mut head) = (vec![0f32; vocab * HIDDEN], vec![0f32; vocab * HIDDEN]);
    for (direction, pair) in chain.windows(2).enumerate() {
        embedding[pair[0] * HIDDEN + direction] = 1.0;
        head[pair[1] * HIDDEN + direction] = 1.0;
    }
    let zeros = |rows: usize, columns: usize| (vec![rows, columns], vec![0f32; rows * columns]);
    let ones = || (vec![HIDDEN], vec![1f32; HIDDEN]);
    let tensors = [
        ("model.embed_tokens.weight", (vec![vocab, HIDDEN], embedding)),
        ("lm_head.weight", (vec![vocab, HIDDEN], head)),
        ("model.norm.weight", ones()),
        ("model.layers.0.input_layernorm.weight", ones()),
        ("model.layers.0.post_attention_layernorm.weight", ones()),
        ("model.layers.0.self_attn.q_proj.weight", zeros(64, HIDDEN)),
        ("model.layers.0.self_attn.k_proj.weight", zeros(32, HIDDEN)),
        ("model.layers.0.self_attn.v_proj.weight", zeros(32, HIDDEN)),
        ("model.layers.0.self_attn.o_proj.weight", zeros(HIDDEN, 64)),
        ("model.layers.0.mlp.gate_proj.weight", zeros(32, HIDDEN)),
        ("model.layers.0.mlp.up_proj.weight", zeros(32, HIDDEN)),
        ("model.layers.0.mlp.down_proj.weight", zeros(HIDDEN, 32)),
    ]
    .map(|(name, (shape, values))| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (name, shape, bytes)
    });
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor")));
    safetensors::serialize_to_file(views, None, path).expect("written");
}

pub(super) async fn start(folder: &TempDir) -> Running {
    let worker = Worker::bind(args(folder.path(), &[]), ConnectionLimits::default()).await.expect("binds");
    let running = Running::run(worker);
    within(running.lifecycle.reached(Stage::Serving)).await;
    running
}

pub(super) fn reasoning(answer: &Answer) -> String {
    answer.deltas.iter().map(|delta| delta.reasoning_content.as_str()).collect()
}

pub(super) fn calls(answer: &Answer) -> Vec<ToolCall> {
    answer.deltas.iter().flat_map(|delta| delta.tool_calls.clone()).collect()
}

pub(super) fn weather() -> Tool {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}}).to_string();
    Tool { name: "weather".into(), description: "The weather of a city.".into(), parameters }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_model_thinks_says_and_asks_for_arrives_in_fields_of_its_own() {
    let folder = model();
    let worker = start(&folder).await;
    let mut client = worker.client().await;
    let mut request = chat("hello", greedy(64));
    request.tools = vec![weather()];
    request.request_id = "it".to_owned();
    let answer = read(within(client.chat(request)).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!((reasoning(&answer).as_str(), answer.text().as_str()), ("I look it up.", "Wait a moment"));
    let call = ToolCall { id: "call-it-0".into(), name: "weather".into(), arguments: "{\"city\": \"Berlin\"}".into() };
    assert_eq!(calls(&answer), [call]);
    assert_eq!(answer.done.finish_reason(), FinishReason::ToolCalls);
    assert_eq!(answer.ids().len(), TRANSCRIPT.len() + 1, "the tokens are all there, the end of sequence too");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_cut_short_in_a_call_keeps_every_word() {
    let folder = model();
    let worker = start(&folder).await;
    let mut client = worker.client().await;
    let request = chat("hello", greedy(9));
    let answer = read(within(client.chat(request)).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!(reasoning(&answer), "I look it up.");
    assert_eq!(answer.text(), "Wait a moment<tool_call>{\"name\": \"weather\", \"arguments\"");
    assert_eq!((calls(&answer), answer.done.finish_reason()), (vec![], FinishReason::Length));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_is_not_taken_apart() {
    let folder = model();
    let worker = start(&folder).await;
    let mut client = worker.client().await;
    let request = complete("so\n", greedy(64));
    let answer = read(within(client.complete(request)).await.expect("accepted").into_inner()).await.expect("an answer");
    let readable: String = TRANSCRIPT.iter().filter(|text| !text.starts_with('<')).copied().collect();
    assert_eq!((answer.text(), reasoning(&answer)), (readable, String::new()));
    assert_eq!((calls(&answer), answer.done.finish_reason()), (vec![], FinishReason::Stop));
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_are_refused_by_a_model_whose_template_does_not_show_them() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let mut request = chat("hello", greedy(4));
    request.tools = vec![weather()];
    let status = within(client.chat(request)).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("tools: are given, but this model's chat template does not show"), "{status}");
    let mut turn = message(Role::Assistant, "well");
    turn.tool_calls = vec![ToolCall { name: "weather".into(), ..Default::default() }];
    let mut request = chat("hello", greedy(4));
    request.messages.push(turn);
    let status = within(client.chat(request)).await.expect_err("refused");
    assert!(status.message().starts_with("messages[1].tool_calls: are given, but"), "{status}");
}
