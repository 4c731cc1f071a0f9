//! The engine on the demo model: an answer is the same alone and in a crowd, with prompts read in pieces, with
//! preemptions, with prompts found in the cache, and resumed at any token.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ernie_worker::engine::{
    Engine, EngineConfig, EngineHandle, Event, EventStream, FinishReason, Guide, GuideError, Next, Observer,
    RejectionKind, Request, RequestReport, StepReport,
};
use ernie_worker::model::{self, Checkpoint, DtypeChoice, KvSize, LoadOptions};
use ernie_worker::sampling::{Mask, SamplingParams};
use ernie_worker::tokenizer::Tokenizer;

/// What happened, summed over all steps.
#[derive(Default)]
struct Happened(Mutex<StepReport>);

impl Observer for Happened {
    fn step(&self, report: &StepReport) {
        let mut sum = self.0.lock().unwrap();
        sum.preemptions += report.preemptions;
        sum.prefix_hits += report.prefix_hits;
        sum.running = sum.running.max(report.running);
        sum.prefill_tokens = sum.prefill_tokens.max(report.prefill_tokens);
    }

    fn first_token(&self, _: Duration) {}
    fn token(&self, _: Duration) {}
    fn ended(&self, _: &RequestReport<'_>) {}
    fn rejected(&self, _: RejectionKind) {}
}

impl Happened {
    fn sum(&self) -> StepReport {
        *self.0.lock().unwrap()
    }
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/austen-2.6m")
}

fn start(blocks: usize, config: EngineConfig) -> (EngineHandle, Arc<Happened>) {
    let checkpoint = Checkpoint::inspect(&folder()).unwrap();
    let options = LoadOptions {
        dtype: DtypeChoice::Auto,
        threads: 2,
        kv: KvSize::Blocks(blocks),
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        ..LoadOptions::default()
    };
    let executor = model::load(&checkpoint, &options, &|_| {}).unwrap();
    let happened = Arc::new(Happened::default());
    (Engine::start(executor, config, Arc::clone(&happened) as Arc<dyn Observer>).unwrap(), happened)
}

fn config() -> EngineConfig {
    EngineConfig { max_num_seqs: 16, max_num_batched_tokens: 512, ..EngineConfig::default() }
}

/// Greedy and seeded requests over passages of very different length, some of which begin alike.
fn requests() -> Vec<Request> {
    let tokenizer = Tokenizer::load(&folder(), 1024).unwrap();
    let text = std::fs::read_to_string(folder().join("../validation.jsonl")).unwrap();
    let passages: Vec<Vec<u32>> = text
        .lines()
        .take(6)
        .map(|line| {
            let passage: serde_json::Value = serde_json::from_str(line).unwrap();
            let mut ids = vec![1];
            ids.extend(tokenizer.encode(passage["text"].as_str().unwrap()).unwrap());
            ids
        })
        .collect();
    let request = |index: usize| {
        let passage = &passages[index % passages.len()];
        let length = [5, 33, 64, 130, 260, 17, 96, 200][index % 8].min(passage.len());
        let temperature = if index.is_multiple_of(2) { 0.0 } else { 0.9 };
        let seeded = SamplingParams { temperature, top_p: 0.95, seed: index as u64, ..SamplingParams::default() };
        Request {
            id: index.to_string(),
            sampling: SamplingParams { repetition_penalty: [1.0, 1.2][index / 2 % 2], ..seeded },
            max_tokens: Some(40 + 40 * (index as u32 % 4)),
            eos_token_ids: [2].into(),
            ignore_eos: !index.is_multiple_of(3),
            ..Request::new(passage[..length].to_vec(), Instant::now() + Duration::from_secs(600))
        }
    };
    (0..24).map(request).collect()
}

/// Submits everything at once, and gives the answers in order.
async fn answers(engine: &EngineHandle, requests: &[Request]) -> Vec<(Vec<u32>, FinishReason)> {
    read(requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect()).await
}

/// Gives the answers in order.
async fn read(mut streams: VecDeque<EventStream>) -> Vec<(Vec<u32>, FinishReason)> {
    let mut answers = vec![];
    while let Some(mut stream) = streams.pop_front() {
        let mut tokens = vec![];
        let reason = loop {
            match stream.next().await.unwrap() {
                Event::Started(_) | Event::PromptLogprobs(_) | Event::Embedding(_) => {}
                Event::Token(token) => tokens.push(token.id),
                Event::Finished(finished) => break finished.reason,
                Event::Failed(failure) => panic!("{failure}"),
            }
        };
        answers.push((tokens, reason));
    }
    answers
}

/// Each request alone, its prompt read in one piece, nothing cached.
async fn alone() -> Vec<(Vec<u32>, FinishReason)> {
    let (engine, happened) = start(64, EngineConfig { enable_prefix_caching: false, ..config() });
    let mut all = vec![];
    for request in requests() {
        all.extend(answers(&engine, &[request]).await);
    }
    assert_eq!(happened.sum().running, 1);
    assert!(all.iter().any(|(tokens, _)| tokens.len() > 40), "answers are long enough to differ");
    all
}

/// Allows everything, but is ready only each third time it is asked.
struct Dawdling {
    everything: Mask,
    asked: usize,
}

impl Guide for Dawdling {
    fn wait(&mut self, _: Instant) -> bool {
        self.asked += 1;
        self.asked.is_multiple_of(3)
    }

    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        Ok(Next::Within(&self.everything))
    }

    fn advance(&mut self, _: u32) {}
}

fn assert_same(mode: &str, expected: &[(Vec<u32>, FinishReason)], got: &[(Vec<u32>, FinishReason)]) {
    let different: Vec<_> = (0..expected.len()).filter(|&index| expected[index] != got[index]).collect();
    assert!(different.is_empty(), "{mode}: the answers to requests {different:?} differ from those alone");
}

#[tokio::test]
async fn greedy_and_seeded_answers_equal_those_alone_in_every_mode() {
    let expected = alone().await;
    let requests = requests();

    let (engine, happened) = start(512, config());
    assert_same("in a crowd", &expected, &answers(&engine, &requests).await);
    assert_eq!(happened.sum().running, 16, "as many at once as may be");
    let before = happened.sum().prefix_hits;
    assert_same("with cached prompts", &expected, &answers(&engine, &requests).await);
    assert!(happened.sum().prefix_hits > before + 1000, "{:?}", happened.sum());

    let small = EngineConfig { max_num_batched_tokens: 24, ..config() };
    let (engine, happened) = start(512, small);
    assert_same("in small pieces", &expected, &answers(&engine, &requests).await);
    assert!(happened.sum().prefill_tokens <= 24);

    let (engine, happened) = start(14, EngineConfig { enable_prefix_caching: false, ..config() });
    assert_same("with preemptions", &expected, &answers(&engine, &requests).await);
    assert!(happened.sum().preemptions > 0, "{:?}", happened.sum());
}

#[tokio::test]
async fn answers_that_are_held_back_by_their_guides_equal_those_alone_and_so_do_those_beside_them() {
    let expected = alone().await;
    for (mode, blocks) in [("held back", 512), ("held back and preempted", 14)] {
        let (engine, happened) = start(blocks, EngineConfig { enable_prefix_caching: blocks > 14, ..config() });
        let vocab = engine.limits().vocab;
        let submit = |request: Request| {
            let everything = Mask::of(0..vocab as u32, vocab);
            // A guide bans the ends that its request ignores.
            let guide = (!request.ignore_eos).then(|| Box::new(Dawdling { everything, asked: 0 }) as Box<dyn Guide>);
            engine.submit_guided(request, guide).unwrap()
        };
        assert_same(mode, &expected, &read(requests().into_iter().map(submit).collect()).await);
        assert!(happened.sum().preemptions > 0 || blocks > 14, "{:?}", happened.sum());
    }
}

#[tokio::test]
async fn an_answer_resumed_at_any_token_goes_on_as_before() {
    let expected = alone().await;
    let (engine, _) = start(512, config());
    for index in [2, 7] {
        let whole = &requests()[index];
        let (tokens, reason) = &expected[index];
        let cut = |at: usize| Request { emitted: tokens[..at].to_vec(), ..whole.clone() };
        let resumed: Vec<_> = (0..tokens.len()).map(cut).collect();
        for (at, answer) in answers(&engine, &resumed).await.iter().enumerate() {
            assert_eq!(answer, &(tokens[at..].to_vec(), *reason), "request {index} cut at {at}");
        }
    }
}
