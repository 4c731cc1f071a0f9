//! What a client may ask of an answer, beside the prompt.

use ernie_proto::ernie::v1::{
    CompleteRequest, FinishReason, SamplingParams, TokenizeRequest, done::MatchedStop, generate_response::Event,
    tokenize_request::Input,
};
use tonic::Code;

use super::running::{Answer, Running, complete, complete_ids, greedy, read, within};

const PROMPT: &str = "It is a truth universally";

async fn ask(worker: &Running, request: CompleteRequest) -> Answer {
    let mut client = worker.client().await;
    read(within(client.complete(request)).await.expect("accepted").into_inner()).await.expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_choices_equals_its_own_request_of_the_same_seed() {
    let worker = Running::start(&[]).await;
    let sampling = SamplingParams {
        temperature: Some(1.0),
        seed: Some(7),
        max_tokens: Some(24),
        n: Some(3),
        ..Default::default()
    };
    let mut texts = Vec::new();
    for _ in 0..2 {
        let mut client = worker.client().await;
        let request = complete(PROMPT, sampling.clone());
        let mut stream = within(client.complete(request)).await.expect("accepted").into_inner();
        let (mut choices, mut done) = (vec![String::new(); 3], Vec::new());
        while let Some(message) = within(stream.message()).await.expect("goes on") {
            match message.event.expect("an event") {
                Event::Started(_) | Event::PromptLogprobs(_) => {}
                Event::Delta(delta) => choices[delta.index as usize].push_str(&delta.text),
                Event::Done(end) => done.push(end.index),
            }
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2], "each choice ends once");
        texts.push(choices);
    }
    assert_eq!(texts[0], texts[1], "the seed says every choice");
    let choices = &texts[0];
    assert!(choices[0] != choices[1] && choices[1] != choices[2], "choices differ: {choices:?}");
    let alone = ask(&worker, complete(PROMPT, SamplingParams { n: None, ..sampling })).await;
    assert_eq!(alone.text(), choices[0], "the first choice is the answer of a request for one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_all_its_choices_with_it() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let sampling = SamplingParams { n: Some(4), ignore_eos: true, ..greedy(1500) };
    let mut stream = within(client.complete(complete(PROMPT, sampling))).await.expect("accepted").into_inner();
    within(stream.message()).await.expect("begins");
    worker.figure_becomes("vllm:num_requests_running", 4.0).await;
    drop(stream);
    worker.figure_becomes("vllm:num_requests_running", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_choices_than_the_server_runs_side_by_side_are_refused() {
    let worker = Running::start(&["--max-num-seqs", "2"]).await;
    let mut client = worker.client().await;
    let sampling = SamplingParams { n: Some(3), ..greedy(4) };
    let status = within(client.complete(complete(PROMPT, sampling))).await.expect_err("refused");
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "sampling.n: is 3; choose from 1 to 2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_is_the_last_word_when_asked_for() {
    let worker = Running::start(&[]).await;
    let whole = ask(&worker, complete(PROMPT, greedy(32))).await.text();
    let stop = whole.split_whitespace().nth(3).expect("words").to_owned();
    let sampling = SamplingParams { stop: vec![stop.clone()], ..greedy(32) };
    let without = ask(&worker, complete(PROMPT, sampling.clone())).await;
    let with = ask(&worker, complete(PROMPT, SamplingParams { include_stop_str_in_output: true, ..sampling })).await;
    assert_eq!(with.text(), without.text() + &stop);
    assert!(whole.starts_with(&with.text()), "{whole:?}");
    assert_eq!(with.done.matched_stop, Some(MatchedStop::Stop(stop)));
}

#[tokio::test(flavor = "multi_thread")]
async fn banned_words_are_not_written_and_biases_move_tokens() {
    let worker = Running::start(&[]).await;
    let free = ask(&worker, complete(PROMPT, greedy(24))).await;
    let word = free.text().split_whitespace().nth(2).expect("words").to_owned();
    let banned = ask(&worker, complete(PROMPT, SamplingParams { bad_words: vec![word.clone()], ..greedy(24) })).await;
    let ids = free.ids();
    assert!(banned.text().split_whitespace().all(|said| said != word), "{word:?} in {:?}", banned.text());
    let logit_bias = [(ids[0], -100.0)].into();
    let biased = ask(&worker, complete(PROMPT, SamplingParams { logit_bias, ..greedy(24) })).await;
    assert!(!biased.ids().contains(&ids[0]), "{:?}", biased.ids());
    let logit_bias = [(ids[1], 100.0)].into();
    let pushed = ask(&worker, complete(PROMPT, SamplingParams { logit_bias, ..greedy(5) })).await;
    assert_eq!(pushed.ids(), [ids[1]; 5]);
    assert_eq!(pushed.done.finish_reason(), FinishReason::Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_prompt_answers_as_its_last_tokens_alone() {
    let worker = Running::start(&[]).await;
    let long = "and so on, ".repeat(2_000) + PROMPT;
    let mut client = worker.client().await;
    let status = within(client.complete(complete(&long, greedy(8)))).await.expect_err("too long");
    assert_eq!(status.code(), Code::InvalidArgument);
    let tokens = TokenizeRequest { input: Some(Input::Text(long.clone())), ..Default::default() };
    let ids = within(client.tokenize(tokens)).await.expect("tokenized").into_inner().ids;
    let mut request = complete(&long, SamplingParams { truncate_prompt_tokens: Some(4), ..greedy(8) });
    request.echo = true;
    let truncated = ask(&worker, request).await;
    let mut request = complete_ids(&ids[ids.len() - 4..], greedy(8));
    request.echo = true;
    let alone = ask(&worker, request).await;
    assert_eq!(truncated.started.prompt_tokens, 4);
    assert_eq!((truncated.text(), truncated.ids()), (alone.text(), alone.ids()));
}

/// The log-probabilities of the tokens of an answer, as a request with the prompt and the answer in one is told them.
fn chosen(logprobs: &[ernie_proto::ernie::v1::Logprobs]) -> Vec<(u32, u32)> {
    logprobs.iter().filter_map(|one| one.chosen.as_ref()).map(|one| (one.id, one.logprob.to_bits())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logprobs_of_a_prompt_are_those_it_had_as_an_answer() {
    let worker = Running::start(&[]).await;
    let tokens = TokenizeRequest { input: Some(Input::Text(PROMPT.repeat(20))), ..Default::default() };
    let mut client = worker.client().await;
    let ids = within(client.tokenize(tokens)).await.expect("tokenized").into_inner().ids;
    assert!(ids.len() > 65, "more than one message");
    let sampling = SamplingParams { logprobs: Some(2), ignore_eos: true, ..greedy(40) };
    let free = ask(&worker, complete_ids(&ids, sampling)).await;
    let told: Vec<_> = free.deltas.iter().flat_map(|delta| delta.logprobs.clone()).collect();
    let whole = [ids.clone(), free.ids()].concat();
    let sampling = SamplingParams { prompt_logprobs: Some(2), n: Some(2), ..greedy(1) };
    for small in [false, true] {
        let worker = match small {
            false => Running::start(&[]).await,
            true => Running::start(&["--max-num-batched-tokens", "64"]).await,
        };
        for _ in 0..2 {
            // Twice, so that the second finds the first's blocks in the cache.
            let mut client = worker.client().await;
            let request = complete_ids(&whole, sampling.clone());
            let mut stream = within(client.complete(request)).await.expect("accepted").into_inner();
            let (mut prompt, mut deltas) = (Vec::new(), 0);
            while let Some(message) = within(stream.message()).await.expect("goes on") {
                match message.event.expect("an event") {
                    Event::PromptLogprobs(more) => {
                        assert_eq!((more.first_index as usize, deltas), (prompt.len() + 1, 0));
                        assert!(more.logprobs.len() <= 64);
                        prompt.extend(more.logprobs);
                    }
                    Event::Delta(_) => deltas += 1,
                    Event::Started(_) | Event::Done(_) => {}
                }
            }
            assert_eq!((prompt.len(), deltas), (whole.len() - 1, 2), "the prompt is told once");
            assert_eq!(chosen(&prompt[ids.len() - 1..]), chosen(&told));
            assert_eq!(prompt[ids.len() - 1].top, told[0].top);
            assert!(prompt.iter().all(|one| one.top.len() == 2));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_of_one_token_has_no_logprobs_and_echo_comes_after_those_of_a_longer_one() {
    let worker = Running::start(&[]).await;
    let sampling = SamplingParams { prompt_logprobs: Some(0), ..greedy(2) };
    assert_eq!(ask(&worker, complete_ids(&[5], sampling.clone())).await.prompt, []);
    let mut request = complete(PROMPT, sampling);
    request.echo = true;
    let answer = ask(&worker, request).await;
    assert_eq!(answer.prompt.len() + 1, answer.started.prompt_tokens as usize);
    assert!(answer.text().starts_with(PROMPT) && answer.prompt.iter().all(|one| one.top.is_empty()));
}
