//! What the engine tells whoever counts. The engine knows no metrics library.

use std::time::Duration;

use super::request::{FailureKind, FinishReason, RejectionKind, Timings, Usage};

/// Receives the engine's figures. Called on the engine thread (`rejected`: on the caller's), so it must not block.
pub trait Observer: Send + Sync + 'static {
    /// After every step, and when the engine falls idle.
    fn step(&self, report: &StepReport);

    /// A request got its first token, so long after it was accepted.
    fn first_token(&self, time_to_first_token: Duration);

    /// A request got a further token, so long after its previous one.
    fn token(&self, inter_token_latency: Duration);

    /// An accepted request has ended.
    fn ended(&self, report: &RequestReport<'_>);

    /// A request was refused.
    fn rejected(&self, kind: RejectionKind);

    /// A client asked for so many answers to one prompt, each of which is a request here. On the caller's thread, too.
    fn asked(&self, _choices: u32) {}
}

/// Counts nothing.
impl Observer for () {
    fn step(&self, _: &StepReport) {}
    fn first_token(&self, _: Duration) {}
    fn token(&self, _: Duration) {}
    fn ended(&self, _: &RequestReport<'_>) {}
    fn rejected(&self, _: RejectionKind) {}
}

/// The state after a step, and what happened since the last report.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// Requests that hold key-value blocks.
    pub running: usize,
    /// Requests that wait, the preempted ones among them.
    pub waiting: usize,
    /// Blocks held by running requests.
    pub blocks_used: usize,
    /// Blocks in the pool.
    pub blocks_total: usize,
    /// Duration of the forward pass; zero when the report only says that the engine is idle.
    pub forward: Duration,
    /// Duration of everything else in this turn: planning, sampling, waiting for guides, delivering.
    pub overhead: Duration,
    /// Prompt tokens computed in this step (again, after a preemption).
    pub prefill_tokens: usize,
    /// Sequences that decoded one token in this step.
    pub decode_tokens: usize,
    /// Sequences preempted since the last report.
    pub preemptions: usize,
    /// Prompt tokens looked up in the prefix cache since the last report.
    pub prefix_queries: usize,
    /// Prompt tokens found there.
    pub prefix_hits: usize,
    /// The learnt cost of a step: see [`StepCost`](super::cost::StepCost).
    pub cost: super::cost::StepCost,
}

/// One accepted request, at its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestReport<'a> {
    /// The caller's id.
    pub id: &'a str,
    /// How it ended.
    pub outcome: Outcome,
    /// Its tokens.
    pub usage: Usage,
    /// Its times.
    pub timings: Timings,
    /// Acceptance to end.
    pub end_to_end: Duration,
    /// The most output tokens it could have had.
    pub max_tokens: u32,
    /// How often it was preempted.
    pub preemptions: u32,
}

/// How an accepted request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// With a complete answer.
    Finished(FinishReason),
    /// With a failure.
    Failed(FailureKind),
    /// The reader went away.
    Cancelled,
}
