//! How probable continuations are.

use ernie_proto::ernie::v1::{
    Continuation, ContinuationScore, SamplingParams, ScoreRequest, ScoreResponse, TokenIds, TokenizeRequest,
    continuation::Continuation as Given, score_request::Prompt, tokenize_request::Input,
};
use tonic::{Code, Status};

use super::running::{Running, complete_ids, greedy, read, within};

const PROMPT: &str = "It is a truth universally acknowledged, that";

fn texts(prompt: &str, continuations: &[&str]) -> ScoreRequest {
    let continuation = |text: &&str| Continuation { continuation: Some(Given::Text((*text).to_owned())) };
    ScoreRequest {
        prompt: Some(Prompt::Text(prompt.to_owned())),
        continuations: continuations.iter().map(continuation).collect(),
        ..Default::default()
    }
}

fn tokens(prompt: &[u32], continuations: &[&[u32]]) -> ScoreRequest {
    let of = |ids: &[u32]| TokenIds { ids: ids.to_vec() };
    let continuation = |ids: &&[u32]| Continuation { continuation: Some(Given::Tokens(of(ids))) };
    ScoreRequest {
        prompt: Some(Prompt::Tokens(of(prompt))),
        continuations: continuations.iter().map(continuation).collect(),
        ..Default::default()
    }
}

async fn score(worker: &Running, request: ScoreRequest) -> Result<ScoreResponse, Status> {
    within(worker.client().await.score(request)).await.map(tonic::Response::into_inner)
}

async fn ids(worker: &Running, text: &str) -> Vec<u32> {
    let request = TokenizeRequest { input: Some(Input::Text(text.to_owned())), ..Default::default() };
    within(worker.client().await.tokenize(request)).await.expect("tokenized").into_inner().ids
}

fn pairs(score: &ContinuationScore) -> Vec<(u32, u32)> {
    score.tokens.iter().map(|token| (token.id, token.logprob.to_bits())).collect()
}

/// The log-probabilities of a prompt's tokens from one on, as a completion tells them.
async fn told(worker: &Running, ids: &[u32], first: usize) -> Vec<(u32, u32)> {
    let sampling = SamplingParams { prompt_logprobs: Some(0), ..greedy(1) };
    let stream = within(worker.client().await.complete(complete_ids(ids, sampling))).await.expect("accepted");
    let answer = read(stream.into_inner()).await.expect("an answer");
    let chosen = answer.prompt[first - 1..].iter().filter_map(|one| one.chosen.as_ref());
    chosen.map(|token| (token.id, token.logprob.to_bits())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_the_log_probabilities_that_a_completion_tells() {
    let worker = Running::start(&[]).await;
    let continuations = [" a single man", " it must be so", " x"];
    let answer = score(&worker, texts(PROMPT, &continuations)).await.expect("scored");
    assert_eq!(answer.scores.len(), 3);
    let prompt = ids(&worker, PROMPT).await;
    let mut total = 0;
    for (text, score) in continuations.iter().zip(&answer.scores) {
        let whole = ids(&worker, &format!("{PROMPT}{text}")).await;
        assert!(whole.starts_with(&prompt));
        assert_eq!(pairs(score), told(&worker, &whole, prompt.len()).await, "{text}");
        let sum: f64 = score.tokens.iter().map(|token| f64::from(token.logprob)).sum();
        assert_eq!(score.logprob.to_bits(), sum.to_bits());
        let bytes: Vec<u8> = score.tokens.iter().flat_map(|token| token.bytes.clone()).collect();
        assert_eq!(String::from_utf8(bytes).expect("text"), *text);
        total += whole.len();
    }
    let usage = answer.usage.expect("usage");
    assert_eq!((usage.prompt_tokens as usize, usage.completion_tokens), (total, 0));
    assert_eq!(answer.model, "austen-2.6m");
    worker.figure_becomes("vllm:num_requests_running", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_greedy_answer_is_greedy_and_scores_as_it_did_when_it_was_generated() {
    let worker = Running::start(&[]).await;
    let prompt = ids(&worker, PROMPT).await;
    let sampling = SamplingParams { logprobs: Some(0), ..greedy(12) };
    let stream = within(worker.client().await.complete(complete_ids(&prompt, sampling))).await.expect("accepted");
    let answer = read(stream.into_inner()).await.expect("an answer");
    let free = answer.ids();
    let generated = answer.deltas.iter().flat_map(|delta| &delta.logprobs).filter_map(|one| one.chosen.as_ref());
    let generated: Vec<_> = generated.map(|token| (token.id, token.logprob.to_bits())).collect();
    let other = [&free[..5], &[free[5] ^ 1], &free[6..]].concat();
    let scored = score(&worker, tokens(&prompt, &[&free, &other, &free[..1]])).await.expect("scored").scores;
    assert_eq!(scored.iter().map(|score| score.is_greedy).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(pairs(&scored[0]), generated);
    assert_eq!(pairs(&scored[1])[..5], generated[..5]);
    assert!(scored[1].logprob < scored[0].logprob);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_continuations_have_in_common_is_computed_once() {
    let worker = Running::start(&[]).await;
    let prompt = ids(&worker, &PROMPT.repeat(12)).await;
    let scored = |answer: ScoreResponse| answer.scores.iter().map(pairs).collect::<Vec<_>>();
    let four: [&[u32]; 4] = [&[5, 6], &[7], &[8, 9, 10], &[11]];
    let answer = score(&worker, tokens(&prompt, &four)).await.expect("scored");
    let blocks = (prompt.len() - 1) / 32 * 32;
    assert_eq!(answer.usage.expect("usage").cached_tokens as usize, 3 * blocks);
    let cold = Running::start(&["--enable-prefix-caching", "false", "--max-num-batched-tokens", "64"]).await;
    assert_eq!(scored(score(&cold, tokens(&prompt, &four)).await.expect("scored")), scored(answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_and_continuation_may_fill_the_context_and_no_more() {
    let worker = Running::start(&["--max-model-len", "64"]).await;
    let answer = score(&worker, tokens(&[5; 40], &[&[6; 24]])).await.expect("scored");
    assert_eq!(answer.scores[0].tokens.len(), 24);
    let status = score(&worker, tokens(&[5; 40], &[&[6; 2], &[6; 25]])).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.message(), "continuations[1]: and the prompt have 65 tokens; send at most 64");
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_without_sense_are_refused_by_field() {
    let worker = Running::start(&[]).await;
    let cases = [
        (texts(PROMPT, &[]), "continuations: has 0 continuations; send 1 to 64"),
        (texts(PROMPT, &["x"; 65]), "continuations: has 65 continuations"),
        (texts("", &["x"]), "prompt: has no token"),
        (ScoreRequest { prompt: None, ..texts("x", &["y"]) }, "prompt: is missing"),
        (texts(PROMPT, &["x", ""]), "continuations[1].text: adds no token"),
        (tokens(&[5, 70_000], &[&[6]]), "prompt.tokens.ids[1]: is 70000"),
        (tokens(&[5], &[&[6], &[70_000]]), "continuations[1].tokens.ids[0]: is 70000"),
        (tokens(&[5], &[&[]]), "continuations[0].tokens.ids: adds no token"),
        (
            ScoreRequest { continuations: vec![Continuation::default()], ..texts("x", &[]) },
            "continuations[0]: is missing",
        ),
        (
            ScoreRequest { prompt: Some(Prompt::Tokens(TokenIds { ids: vec![5] })), ..texts("x", &["y"]) },
            "continuations[0].text: is text, but the prompt is token ids",
        ),
        (ScoreRequest { priority: -101, ..texts(PROMPT, &["x"]) }, "priority: is -101; choose from -100 to 100"),
    ];
    for (request, words) in cases {
        let status = score(&worker, request).await.expect_err(words);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(words), "{words:?} in {:?}", status.message());
    }
    let status = score(&worker, ScoreRequest { model: "x".into(), ..texts("x", &["y"]) }).await.expect_err("unknown");
    assert_eq!(status.code(), Code::NotFound);
}
