//! The engine as a whole, on an executor whose tokens depend on every token that a row can see.

mod answers;
mod ends;
mod guides;
mod hash_executor;
mod overload;
mod prompts;
mod reference;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::observer::Outcome;
use super::*;
use crate::sampling::SamplingParams;
use hash_executor::{Controls, HashExecutor, VOCAB};

/// Writes down what the engine reports.
#[derive(Default)]
struct Recorder {
    steps: Mutex<Vec<StepReport>>,
    ended: Mutex<Vec<(String, Outcome, Usage)>>,
    first_tokens: Mutex<usize>,
    tokens: Mutex<usize>,
    rejected: Mutex<Vec<RejectionKind>>,
}

impl Observer for Recorder {
    fn step(&self, report: &StepReport) {
        self.steps.lock().unwrap().push(*report);
    }

    fn first_token(&self, _: Duration) {
        *self.first_tokens.lock().unwrap() += 1;
    }

    fn token(&self, _: Duration) {
        *self.tokens.lock().unwrap() += 1;
    }

    fn ended(&self, report: &RequestReport<'_>) {
        self.ended.lock().unwrap().push((report.id.to_owned(), report.outcome, report.usage));
    }

    fn rejected(&self, kind: RejectionKind) {
        self.rejected.lock().unwrap().push(kind);
    }
}

impl Recorder {
    fn sum(&self, of: impl Fn(&StepReport) -> usize) -> usize {
        self.steps.lock().unwrap().iter().map(of).sum()
    }

    fn latest(&self) -> StepReport {
        self.steps.lock().unwrap().last().copied().unwrap_or_default()
    }

    fn outcomes(&self) -> Vec<Outcome> {
        self.ended.lock().unwrap().iter().map(|(_, outcome, _)| *outcome).collect()
    }
}

/// An engine under test.
struct Fixture {
    engine: EngineHandle,
    recorder: Arc<Recorder>,
    controls: Arc<Controls>,
}

fn config() -> EngineConfig {
    EngineConfig { warm_up: Duration::ZERO, max_num_seqs: 8, max_num_batched_tokens: 256, ..EngineConfig::default() }
}

fn start(config: EngineConfig, blocks: usize) -> Fixture {
    let recorder = Arc::new(Recorder::default());
    let controls = Arc::new(Controls::default());
    let executor = HashExecutor::new(blocks, 4096, Arc::clone(&controls));
    let engine = Engine::start(executor, config, Arc::clone(&recorder) as Arc<dyn Observer>).unwrap();
    Fixture { engine, recorder, controls }
}

/// A greedy request for `max_tokens` tokens that no token ends.
fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> Request {
    Request {
        id: "r".to_owned(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(max_tokens),
        ..Request::new(
            prompt.into_iter().map(|token| token % VOCAB as u32).collect(),
            Instant::now() + Duration::from_secs(60),
        )
    }
}

/// Reads a stream to its end: the tokens, and the final event.
async fn read(mut stream: EventStream) -> (Vec<u32>, Event) {
    let mut tokens = vec![];
    loop {
        match stream.next().await.expect("a final event comes before the end") {
            Event::Started(_) | Event::PromptLogprobs(_) | Event::Embedding(_) => assert!(tokens.is_empty()),
            Event::Token(token) => tokens.push(token.id),
            last @ (Event::Finished(_) | Event::Failed(_)) => {
                assert_eq!(stream.next().await, None);
                return (tokens, last);
            }
        }
    }
}

async fn finished(stream: EventStream) -> (Vec<u32>, Finished) {
    match read(stream).await {
        (tokens, Event::Finished(finished)) => (tokens, finished),
        (_, other) => panic!("{other:?}"),
    }
}

async fn failed(stream: EventStream) -> Failure {
    match read(stream).await {
        (_, Event::Failed(failure)) => failure,
        (_, other) => panic!("{other:?}"),
    }
}

/// Waits for a condition, at most ten seconds.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl Fixture {
    /// Waits until nothing is left of any request.
    async fn settled(&self) {
        eventually("the end of all requests", || {
            let latest = self.recorder.latest();
            (latest.running, latest.waiting, latest.blocks_used) == (0, 0, 0)
        })
        .await;
    }

    /// Waits until a forward pass is held up by [`Controls::hold`].
    async fn held(&self) {
        eventually("a step", || self.controls.is_held()).await;
    }
}
