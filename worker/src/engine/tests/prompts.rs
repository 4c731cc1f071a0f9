//! What is read off prompts: the same alone, in a crowd, in pieces, behind cached blocks and after preemptions.

use super::hash_executor::{Accident, cell, row};
use super::*;
use crate::sampling::{Scratch, TokenLogprobs, score};

/// What a prompt gave before its answer, and the answer.
#[derive(Debug, Default, PartialEq)]
struct Given {
    logprobs: Vec<PromptLogprob>,
    embedding: Option<Vec<f32>>,
    tokens: Vec<u32>,
}

async fn given(mut stream: EventStream) -> (Given, Finished) {
    let mut given = Given::default();
    loop {
        match stream.next().await.expect("a final event comes before the end") {
            Event::Started(_) => assert_eq!(given, Given::default()),
            Event::PromptLogprobs(more) => {
                assert!(given.tokens.is_empty() && !more.is_empty());
                given.logprobs.extend(more);
            }
            Event::Embedding(embedding) => {
                assert_eq!(given.embedding.replace(embedding), None);
            }
            Event::Token(token) => given.tokens.push(token.id),
            Event::Finished(finished) => return (given, finished),
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
}

/// The row behind the first `len` tokens of a prompt.
fn row_behind(request: &Request, len: usize) -> Vec<f32> {
    let adapter = request.adapter.map(|adapter| adapter.index);
    row((0..).zip(&request.prompt[..len]).map(|(place, &token)| cell(token, place, adapter)))
}

/// What a request must be given, worked out without an engine.
fn expected(request: &Request) -> Given {
    let mut scratch = Scratch::default();
    let (mut logprobs, mut embedding) = (vec![], None);
    let len = request.prompt.len();
    match request.prompt_output {
        Some(PromptOutput::Logprobs { first, top }) => {
            for place in first..len {
                let id = request.prompt[place];
                let scored = score(&row_behind(request, place), id, top as usize, &mut scratch);
                logprobs.push(PromptLogprob { id, logprobs: TokenLogprobs::from(scored) });
            }
        }
        Some(PromptOutput::Embedding(pooling)) => {
            let first = if pooling == Pooling::Last { len } else { 1 };
            let rows = (first..=len).map(|len| row_behind(request, len));
            let sum = rows.fold(vec![0.0; VOCAB], |sum: Vec<f64>, row| {
                sum.iter().zip(row).map(|(a, b)| a + f64::from(b)).collect()
            });
            let rows = (len - first + 1) as f64;
            embedding = Some(sum.into_iter().map(|sum| (sum / rows) as f32).collect());
        }
        None => {}
    }
    let generates = request.max_tokens != Some(0);
    let tokens = if generates { super::reference::answer(request, 4096).0 } else { vec![] };
    Given { logprobs, embedding, tokens }
}

/// Requests of every kind that begin alike, longest first.
fn mixture() -> Vec<Request> {
    let outputs = [
        Some(PromptOutput::Logprobs { first: 1, top: 3 }),
        None,
        Some(PromptOutput::Embedding(Pooling::Mean)),
        Some(PromptOutput::Logprobs { first: 70, top: 0 }),
        Some(PromptOutput::Embedding(Pooling::Last)),
        Some(PromptOutput::Logprobs { first: 1, top: 20 }),
    ];
    let request = |index: u32| {
        let len = [300, 33, 100, 180, 75, 64, 2, 1][index as usize % 8];
        let prompt_output = outputs[index as usize % outputs.len()];
        let max_tokens = if prompt_output.is_some() && !index.is_multiple_of(3) { 0 } else { 120 };
        let adapter = index.is_multiple_of(5).then_some(Adapter { index: 1, digest: [1; 32] });
        Request { id: index.to_string(), prompt_output, adapter, ..request((0..len).chain([index; 3]), max_tokens) }
    };
    (0..24).map(request).collect()
}

async fn assert_all_as_expected(what: &str, fixture: &Fixture) {
    let requests = mixture();
    let streams: Vec<_> = requests.iter().map(|request| fixture.engine.submit(request.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(streams) {
        let (given, finished) = given(stream).await;
        assert_eq!(given, expected(request), "{what}: request {}", request.id);
        let reason = if request.max_tokens == Some(0) { FinishReason::NoAnswer } else { FinishReason::Length };
        assert_eq!(finished.reason, reason);
        assert_eq!(finished.usage.completion_tokens as usize, given.tokens.len());
    }
    fixture.settled().await;
}

#[tokio::test]
async fn prompts_give_the_same_in_every_mode() {
    assert_all_as_expected("with room", &start(config(), 400)).await;

    let small = EngineConfig { max_num_batched_tokens: 11, ..config() };
    assert_all_as_expected("in pieces", &start(small, 400)).await;

    let fixture = start(config(), 14);
    assert_all_as_expected("preempted", &fixture).await;
    assert!(fixture.recorder.sum(|step| step.preemptions) > 0);

    let fixture = start(config(), 400);
    for round in 0..3 {
        assert_all_as_expected(&format!("round {round} with cached prompts"), &fixture).await;
    }
    assert!(fixture.recorder.sum(|step| step.prefix_hits) > 500);
}

#[tokio::test]
async fn rows_that_are_read_are_not_taken_from_the_cache_and_those_before_them_are() {
    let fixture = start(config(), 400);
    let cached = async |prompt_output, max_tokens| {
        let request = Request { prompt_output, ..request(0..100, max_tokens) };
        given(fixture.engine.submit(request).unwrap()).await.1.usage.cached_tokens
    };
    assert_eq!(cached(None, 1).await, 0);
    assert_eq!(cached(None, 1).await, 96);
    assert_eq!(cached(Some(PromptOutput::Logprobs { first: 1, top: 0 }), 1).await, 0);
    assert_eq!(cached(Some(PromptOutput::Logprobs { first: 64, top: 0 }), 0).await, 32);
    assert_eq!(cached(Some(PromptOutput::Logprobs { first: 65, top: 0 }), 0).await, 64);
    assert_eq!(cached(Some(PromptOutput::Embedding(Pooling::Mean)), 0).await, 0);
    assert_eq!(cached(Some(PromptOutput::Embedding(Pooling::Last)), 0).await, 96);
}

#[tokio::test]
async fn a_reader_who_takes_his_time_misses_nothing_and_bounds_what_waits_for_him() {
    let config = EngineConfig { max_num_batched_tokens: 8, stream_capacity: 1, ..config() };
    let fixture = start(config, 400);
    let request = Request { prompt_output: Some(PromptOutput::Logprobs { first: 1, top: 2 }), ..request(0..300, 5) };
    let stream = fixture.engine.submit(request.clone()).unwrap();
    // Nothing is read: the engine falls idle with most of the prompt to go.
    eventually("a pause", || {
        let steps = fixture.recorder.steps.lock().unwrap();
        steps.len() > 1 && steps.last().is_some_and(|step| step.forward.is_zero() && step.running == 1)
    })
    .await;
    let computed = fixture.recorder.sum(|step| step.prefill_tokens);
    assert!(computed <= 4 * 8, "{computed} tokens were read ahead of the reader");
    assert_eq!(given(stream).await.0, expected(&request));
}

#[tokio::test]
async fn a_prompt_without_an_answer_may_fill_the_context_and_no_more() {
    // The pool of 4 blocks is the tightest bound.
    let fixture = start(config(), 4);
    let output = Some(PromptOutput::Logprobs { first: 1, top: 0 });
    let longest = Request { prompt_output: output, ..request(0..128, 0) };
    assert_eq!(given(fixture.engine.submit(longest.clone()).unwrap()).await.0.logprobs.len(), 127);
    let longer = Request { prompt: vec![1; 129], ..longest };
    let refused = fixture.engine.submit(longer).err().unwrap().to_string();
    assert!(refused.starts_with("the prompt has 129 tokens; this server takes at most 128"), "{refused}");
}

#[tokio::test]
async fn an_answer_of_no_tokens_is_refused_unless_the_prompt_gives_something() {
    let fixture = start(config(), 4);
    assert_eq!(fixture.engine.submit(request(0..5, 0)).err(), Some(Rejected::NoTokens));
    let prompt_output = Some(PromptOutput::Logprobs { first: 1, top: 21 });
    let refused = fixture.engine.submit(Request { prompt_output, ..request(0..5, 1) }).err().unwrap();
    assert_eq!(refused.to_string(), "prompt_logprobs is 21; choose from 0 to 20");
    let prompt_output = Some(PromptOutput::Embedding(Pooling::Last));
    let emitted = Request { prompt_output, emitted: vec![1], ..request(0..5, 0) };
    let refused = fixture.engine.submit(emitted).err().unwrap();
    assert_eq!(refused, Rejected::NothingToResume { emitted: 1, max_tokens: 0 });
}

#[tokio::test]
async fn scores_that_are_not_numbers_fail_their_request_alone() {
    let fixture = start(config(), 100);
    *fixture.controls.next.lock().unwrap() = Some(Accident::NotANumber(9));
    let prompt_output = Some(PromptOutput::Logprobs { first: 1, top: 0 });
    let failure = failed(fixture.engine.submit(Request { prompt_output, ..request(0..10, 0) }).unwrap()).await;
    assert_eq!(failure.kind, FailureKind::Internal);
    let (given, _) = given(fixture.engine.submit(Request { prompt_output, ..request(0..10, 0) }).unwrap()).await;
    assert_eq!(given.logprobs.len(), 9);
    fixture.settled().await;
}
