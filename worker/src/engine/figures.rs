//! What the engine thread tells the outside about itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::client::Latency;
use super::cost::StepCost;
use super::load::{Load, StartRate};
use super::observer::{Observer, RequestReport, StepReport};
use super::scheduler::{Scheduler, Step};

/// Gathers figures, hands them to the observer, and lets callers see the load.
pub(super) struct Figures {
    observer: Arc<dyn Observer>,
    load: Arc<Mutex<Load>>,
    /// What happened since the last report.
    report: StepReport,
    starts: StartRate,
    /// Prompt tokens looked up in the prefix cache and found there, with fading weights.
    prefix: (f64, f64),
    epoch: Instant,
}

impl Figures {
    pub(super) fn new(observer: Arc<dyn Observer>, load: Arc<Mutex<Load>>) -> Self {
        Self {
            observer,
            load,
            report: StepReport::default(),
            starts: StartRate::default(),
            prefix: (0.0, 0.0),
            epoch: Instant::now(),
        }
    }

    /// Origin of the engine's clock.
    pub(super) fn epoch(&self) -> Instant {
        self.epoch
    }

    /// A request left the queue for the first time.
    pub(super) fn started(&mut self, prompt_tokens: usize, cached: usize) {
        /// Weight that earlier prompts keep with each later one.
        const FADING: f64 = 0.98;
        self.report.prefix_queries += prompt_tokens;
        self.report.prefix_hits += cached;
        let (queried, found) = self.prefix;
        self.prefix = (queried * FADING + prompt_tokens as f64, found * FADING + cached as f64);
    }

    /// A step was planned; so many requests left the queue for the first time, and so many were preempted.
    pub(super) fn planned(&mut self, now: Instant, starts: usize, preemptions: usize, scheduler: &Scheduler) {
        self.report.preemptions += preemptions;
        let seconds = now.saturating_duration_since(self.epoch).as_secs_f64();
        self.starts.observe(seconds, starts, scheduler.waiting());
    }

    /// A step that began at `begun` is over.
    pub(super) fn stepped(
        &mut self,
        step: &Step,
        begun: Instant,
        forward: Duration,
        scheduler: &Scheduler,
        cost: StepCost,
    ) {
        self.report.forward = forward;
        self.report.overhead = begun.elapsed().saturating_sub(forward);
        self.report.prefill_tokens = step.prompt_rows();
        self.report.decode_tokens = step.decode_rows;
        self.idle(scheduler, cost);
    }

    /// No step runs.
    pub(super) fn idle(&mut self, scheduler: &Scheduler, cost: StepCost) {
        let pool = scheduler.pool();
        self.observer.step(&StepReport {
            running: scheduler.running(),
            waiting: scheduler.waiting(),
            blocks_used: pool.total() - pool.free(),
            blocks_total: pool.total(),
            cost,
            ..std::mem::take(&mut self.report)
        });
        self.publish(scheduler, cost, None);
    }

    /// Lets callers see the load. `forward_since`: a forward pass begins.
    pub(super) fn publish(&self, scheduler: &Scheduler, cost: StepCost, forward_since: Option<Instant>) {
        let (queried, found) = self.prefix;
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = Load {
            running: scheduler.running(),
            waiting: scheduler.waiting(),
            start_interval: self.starts.interval(),
            cost,
            prefix_hit_rate: if queried > 0.0 { found / queried } else { 0.0 },
            forward_since,
        };
    }

    pub(super) fn token(&self, latency: Latency) {
        match latency {
            Latency::First(latency) => self.observer.first_token(latency),
            Latency::Between(latency) => self.observer.token(latency),
        }
    }

    pub(super) fn ended(&self, report: &RequestReport<'_>) {
        self.observer.ended(report);
    }
}
