//! Numbers at and beyond their limits: each is served, or refused with the right status and a sentence.

use ernie_proto::ernie::v1::{CompleteRequest, GetModelRequest, SamplingParams, generate_response::Event};
use tonic::{Code, Status};

use super::running::{Answer, Running, chat, complete_ids, greedy, read, within};

async fn ask(worker: &Running, request: CompleteRequest) -> Result<Answer, Status> {
    let stream = within(worker.client().await.complete(request)).await?;
    read(stream.into_inner()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_are_not_finite_are_refused_by_field_and_value() {
    type Set = fn(&mut SamplingParams, f32);
    let worker = Running::start(&[]).await;
    let fields: [(&str, Set); 7] = [
        ("sampling.temperature", |params, value| params.temperature = Some(value)),
        ("sampling.top_p", |params, value| params.top_p = Some(value)),
        ("sampling.min_p", |params, value| params.min_p = Some(value)),
        ("sampling.repetition_penalty", |params, value| params.repetition_penalty = Some(value)),
        ("sampling.presence_penalty", |params, value| params.presence_penalty = Some(value)),
        ("sampling.frequency_penalty", |params, value| params.frequency_penalty = Some(value)),
        ("sampling.logit_bias", |params, value| params.logit_bias = [(7, value)].into()),
    ];
    for (field, set) in fields {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
            let mut sampling = SamplingParams { max_tokens: Some(1), ..Default::default() };
            set(&mut sampling, value);
            let status = ask(&worker, complete_ids(&[5], sampling.clone())).await.expect_err(field);
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            let words = format!("{field}: is {value}; choose");
            assert!(status.message().starts_with(&words), "{words:?} in {:?}", status.message());
            let status = within(worker.client().await.chat(chat("x", sampling))).await.expect_err(field);
            assert!(status.message().starts_with(&words), "{words:?} in {:?}", status.message());
        }
    }
    assert_eq!(worker.figure("ernie:panics_total").await, 0.0);
    ask(&worker, complete_ids(&[5], greedy(1))).await.expect("still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn max_tokens_may_fill_the_context_and_not_exceed_it() {
    let worker = Running::start(&["--max-model-len", "256"]).await;
    let full = SamplingParams { ignore_eos: true, ..greedy(56) };
    assert_eq!(ask(&worker, complete_ids(&[5; 200], full)).await.expect("fits").ids().len(), 56);
    for (max_tokens, words) in [
        (57, "max_tokens 57 and a prompt of 200 tokens exceed the context of 256; ask for at most 56"),
        (u32::MAX, "max_tokens 4294967295 and a prompt of 200 tokens exceed the context of 256; ask for at most 56"),
        (0, "sampling.max_tokens: is 0; ask for at least 1, or leave it out"),
    ] {
        let status = ask(&worker, complete_ids(&[5; 200], greedy(max_tokens))).await.expect_err(words);
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, words));
    }
    let least = SamplingParams { min_tokens: 57, ..Default::default() };
    let status = ask(&worker, complete_ids(&[5; 200], least)).await.expect_err("too many");
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "min_tokens 57 exceeds the 56 tokens that may be generated")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_of_the_context_is_one_token_too_long() {
    let worker = Running::start(&["--max-model-len", "256"]).await;
    let answer = ask(&worker, complete_ids(&[5; 255], SamplingParams::default())).await.expect("room for one");
    assert_eq!(answer.ids().len(), 1);
    for tokens in [256, 257] {
        let status = ask(&worker, complete_ids(&vec![5; tokens], SamplingParams::default())).await.expect_err("long");
        let words = format!("the prompt has {tokens} tokens; this server takes at most 255, since prompt and answer");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(&words), "{status}");
    }
    let cut = SamplingParams { truncate_prompt_tokens: Some(255), ..Default::default() };
    ask(&worker, complete_ids(&[5; 257], cut)).await.expect("its last 255 fit");
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_that_do_not_fit_the_cache_together_wait_for_each_other() {
    let cold = ["--kv-cache-memory", "960Ki", "--enable-prefix-caching", "false"];
    let worker = Running::start(&cold).await;
    // The cache is smaller than the model's own context.
    let model = within(worker.client().await.get_model(GetModelRequest::default())).await.expect("a model");
    let pool = model.into_inner().max_model_len as usize;
    let sampling = SamplingParams {
        n: Some(8),
        temperature: Some(1.0),
        seed: Some(1),
        max_tokens: Some(60),
        ignore_eos: true,
        ..Default::default()
    };
    let prompt: Vec<u32> = (0..200).map(|token| 300 + token % 100).collect();
    assert!(pool < 8 * 200, "{pool}");
    let mut client = worker.client().await;
    let request = complete_ids(&prompt, sampling.clone());
    let mut stream = within(client.complete(request)).await.expect("accepted").into_inner();
    let (mut choices, mut done) = (vec![Vec::new(); 8], 0);
    while let Some(message) = within(stream.message()).await.expect("goes on") {
        match message.event.expect("an event") {
            Event::Delta(delta) => choices[delta.index as usize].extend(delta.token_ids),
            Event::Done(_) => done += 1,
            Event::Started(_) | Event::PromptLogprobs(_) => {}
        }
    }
    assert_eq!(done, 8);
    let alone = ask(&worker, complete_ids(&prompt, SamplingParams { n: None, ..sampling.clone() })).await;
    assert_eq!(alone.expect("an answer").ids(), choices[0]);
    assert!(choices.iter().all(|ids| ids.len() == 60) && choices[0] != choices[7]);
    // One that does not fit alone never will.
    let longer = vec![5; pool + 1];
    let status = ask(&worker, complete_ids(&longer, sampling)).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains(&format!("prompt and answer together may have {pool}")), "{status}");
}
