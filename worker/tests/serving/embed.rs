//! Texts to vectors.

use ernie_proto::ernie::v1::{
    EmbedInput, EmbedRequest, EmbedResponse, Pooling, TokenIds, TokenizeRequest, embed_input::Input,
    tokenize_request::Input as Text,
};
use ernie_worker::{
    eval::evaluate::{Sequence, Settings, evaluate},
    model::{self, Checkpoint, KvSize, LoadOptions},
};
use tonic::{Code, Status};

use super::running::{Running, complete, endless, model as folder, within};

const TEXTS: [&str; 4] =
    ["It is a truth", "My dear Miss Woodhouse,", "x", "universally acknowledged, that a single man"];

fn of(texts: &[&str]) -> EmbedRequest {
    let input = |text: &&str| EmbedInput { input: Some(Input::Text((*text).to_owned())) };
    EmbedRequest { inputs: texts.iter().map(input).collect(), ..Default::default() }
}

async fn embed(worker: &Running, request: EmbedRequest) -> Result<EmbedResponse, Status> {
    within(worker.client().await.embed(request)).await.map(tonic::Response::into_inner)
}

fn bits(answer: &EmbedResponse) -> Vec<Vec<u32>> {
    answer.embeddings.iter().map(|one| one.values.iter().map(|value| value.to_bits()).collect()).collect()
}

/// The hidden states behind the last norm, as `eval --trace` gives them, pooled.
fn expected(ids: &[Vec<u32>], pooling: Pooling) -> Vec<Vec<u32>> {
    let checkpoint = Checkpoint::inspect(&folder()).expect("a model");
    let options =
        LoadOptions { threads: 1, kv: KvSize::Blocks(64), max_model_len: Some(512), ..LoadOptions::default() };
    let mut executor = model::load(&checkpoint, &options, &|_| {}).expect("loads");
    let settings = Settings { trace: true, ..Settings::default() };
    let pooled = |ids: &Vec<u32>| {
        let sequence = Sequence { ids: ids.clone(), positions: None };
        let result = evaluate(&mut executor, &[sequence], &settings).expect("evaluated").remove(0);
        let (_, norm) = result.trace.activations.iter().find(|(name, _)| name == "norm").expect("the norm");
        let width = norm.len() / ids.len();
        let first = if pooling == Pooling::Mean { 0 } else { ids.len() - 1 };
        let mut sum = vec![0f64; width];
        for row in norm.chunks_exact(width).skip(first) {
            sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        sum.iter().map(|sum| ((sum / (ids.len() - first) as f64) as f32).to_bits()).collect()
    };
    ids.iter().map(pooled).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_are_the_hidden_states_of_eval_alone_in_batches_in_pieces_and_beside_answers() {
    let long = "It is a truth universally acknowledged, that ".repeat(8);
    let texts: Vec<&str> = TEXTS.iter().copied().chain([long.as_str(), TEXTS[0]]).collect();
    let worker = Running::start(&[]).await;
    let mut ids = Vec::new();
    for text in &texts {
        let request = TokenizeRequest { input: Some(Text::Text((*text).to_owned())), ..Default::default() };
        ids.push(within(worker.client().await.tokenize(request)).await.expect("tokenized").into_inner().ids);
    }
    let pieces = Running::start(&["--max-num-batched-tokens", "64"]).await;
    let mut busy = pieces.client().await;
    let _running = within(busy.complete(complete("It was", endless()))).await.expect("accepted").into_inner();
    for pooling in [Pooling::Last, Pooling::Mean] {
        let expected = expected(&ids, pooling);
        let request = |texts: &[&str]| EmbedRequest {
            pooling: pooling.into(),
            normalize: Some(false),
            request_id: "e".into(),
            ..of(texts)
        };
        for worker in [&worker, &pieces] {
            let answer = embed(worker, request(&texts)).await.expect("embedded");
            assert!(bits(&answer) == expected, "{pooling:?}, together");
            let tokens: usize = ids.iter().map(Vec::len).sum();
            assert_eq!(answer.usage.expect("usage").prompt_tokens as usize, tokens);
            assert_eq!((answer.request_id.as_str(), answer.model.as_str()), ("e", "austen-2.6m"));
            for (text, expected) in texts.iter().zip(&expected) {
                let alone = embed(worker, request(&[text])).await.expect("embedded");
                assert!(bits(&alone)[0] == *expected, "{pooling:?}, alone");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_have_a_length_of_one_and_the_dimensions_asked_for_unless_told_otherwise() {
    let worker = Running::start(&[]).await;
    let raw = EmbedRequest { normalize: Some(false), ..of(&TEXTS) };
    let raw = embed(&worker, raw).await.expect("embedded").embeddings;
    for dimensions in [None, Some(10)] {
        let scaled = EmbedRequest { dimensions, ..of(&TEXTS) };
        let scaled = embed(&worker, scaled).await.expect("embedded").embeddings;
        for (raw, scaled) in raw.iter().zip(scaled) {
            let kept = &raw.values[..dimensions.map_or(raw.values.len(), |width| width as usize)];
            let length = kept.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
            assert_eq!(scaled.values.len(), kept.len());
            for (scaled, kept) in scaled.values.iter().zip(kept) {
                assert!((f64::from(*scaled) - f64::from(*kept) / length).abs() < 1e-6);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_may_fill_the_context_and_no_more() {
    let worker = Running::start(&["--max-model-len", "64"]).await;
    let tokens = |count| EmbedInput { input: Some(Input::Tokens(TokenIds { ids: vec![5; count] })) };
    let request = EmbedRequest { inputs: vec![tokens(64), tokens(1)], ..Default::default() };
    assert_eq!(embed(&worker, request).await.expect("embedded").embeddings.len(), 2);
    let request = EmbedRequest { inputs: vec![tokens(64), tokens(65)], ..Default::default() };
    let status = embed(&worker, request).await.expect_err("refused");
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "inputs[1]: has 65 tokens; send at most 64"));
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_without_sense_are_refused_by_field() {
    let worker = Running::start(&[]).await;
    let cases = [
        (of(&[]), "inputs: has 0 inputs; send 1 to 256"),
        (of(&["x"; 257]), "inputs: has 257 inputs"),
        (of(&["x", ""]), "inputs[1]: has no token"),
        (EmbedRequest { inputs: vec![EmbedInput::default()], ..Default::default() }, "inputs[0]: is missing"),
        (EmbedRequest { pooling: 9, ..of(&["x"]) }, "pooling: is 9, which is no pooling"),
        (EmbedRequest { dimensions: Some(0), ..of(&["x"]) }, "dimensions: is 0; choose from 1 to"),
        (EmbedRequest { dimensions: Some(70_000), ..of(&["x"]) }, "dimensions: is 70000; choose from 1 to"),
        (EmbedRequest { cache_salt: "x".repeat(65), ..of(&["x"]) }, "cache_salt: has 65 bytes; give at most 64"),
    ];
    for (request, words) in cases {
        let status = embed(&worker, request).await.expect_err(words);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(words), "{words:?} in {:?}", status.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_inputs_with_it() {
    let worker = Running::start(&["--max-num-batched-tokens", "64"]).await;
    let long = "It is a truth universally acknowledged, that ".repeat(60);
    let mut client = worker.client().await;
    let request = of(&vec![long.as_str(); 200]);
    let call = tokio::spawn(async move { client.embed(request).await.map(|_| ()) });
    super::running::until("some run", async || worker.figure("vllm:num_requests_running").await > 0.0).await;
    call.abort();
    worker.figure_becomes("vllm:num_requests_running", 0.0).await;
    worker.figure_becomes("vllm:num_requests_waiting", 0.0).await;
    let canceled = "grpc_server_handled_total{grpc_code=\"Canceled\",grpc_method=\"Embed\"";
    super::running::until("counted", async || worker.page("/metrics").await.1.contains(canceled)).await;
}
