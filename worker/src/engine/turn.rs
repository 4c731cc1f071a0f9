//! The engine thread's loop: listen, retire, plan, forward, sample, deliver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Instant;

use tokio::sync::{oneshot, watch};

use crate::executor::Executor;
use crate::sampling::Scratch;

use super::blocks::Blocks;
use super::client::{Client, End, Fate};
use super::config::EngineConfig;
use super::cost::CostModel;
use super::figures::Figures;
use super::handle::{Command, Drained, Health};
use super::observer::Outcome;
use super::request::{Failure, FailureKind};
use super::scheduler::{Bounds, Pace, Scheduler, SequenceId, Step};
use super::warm_up;

mod deliver;
mod forward;

use forward::{Fault, forward};

/// What connects the engine thread to the outside.
pub(super) struct Outside {
    pub(super) commands: Receiver<Command>,
    /// Set while a [`Command::Wake`] is on its way.
    pub(super) rung: Arc<AtomicBool>,
    pub(super) health: Arc<watch::Sender<Health>>,
}

/// Everything the engine thread owns.
pub(super) struct Turns {
    executor: Box<dyn Executor>,
    config: EngineConfig,
    outside: Outside,
    scheduler: Scheduler,
    /// The requests, at the index of their sequence.
    clients: Vec<Option<Client>>,
    cost: CostModel,
    figures: Figures,
    draining: Option<Draining>,
    /// Origin of the engine's clock.
    epoch: Instant,
    step: Step,
    scratch: Scratch,
}

struct Draining {
    deadline: Instant,
    done: Vec<oneshot::Sender<Drained>>,
    drained: Drained,
}

impl Turns {
    pub(super) fn new(executor: Box<dyn Executor>, config: EngineConfig, figures: Figures, outside: Outside) -> Self {
        let bounds = Bounds {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            long_prefill_token_threshold: usize::MAX,
            prefix_caching: config.enable_prefix_caching,
        };
        let pool = Blocks::new(executor.geometry().blocks, config.prefix_cache_key);
        Self {
            executor,
            config,
            epoch: figures.epoch(),
            figures,
            outside,
            scheduler: Scheduler::new(bounds, pool),
            clients: Vec::new(),
            cost: CostModel::default(),
            draining: None,
            step: Step::default(),
            scratch: Scratch::default(),
        }
    }

    /// Serves until nobody can ask for anything any more, a drain is over, or the executor panicked.
    pub(super) fn run(mut self) {
        let mut outcome = self.warm_up();
        if outcome.is_ok() {
            self.figures.publish(&self.scheduler, self.cost.cost(), None);
            self.outside.health.send_replace(Health::Ready);
        }
        while outcome.is_ok() {
            self.retire();
            if self.drained() || !self.listen() {
                break;
            }
            outcome = self.turn();
        }
        self.close(outcome.err());
    }

    /// One step, from plan to delivery. A failed step fails its sequences; an error ends the engine.
    fn turn(&mut self) -> Result<(), String> {
        self.take_up();
        let begun = Instant::now();
        let pace = Pace { cost: self.cost.cost(), target: self.config.inter_token_target.as_secs_f64() };
        let mut step = std::mem::take(&mut self.step);
        self.scheduler.plan(&pace, &mut step);
        self.note_plan(&step, begun);
        if step.is_empty() {
            self.step = step;
            return if !self.stand_by() && self.scheduler.has_work() {
                Err("the scheduler found nothing to do".to_owned())
            } else {
                Ok(())
            };
        }
        self.figures.publish(&self.scheduler, self.cost.cost(), Some(begun));
        let output = forward(&mut *self.executor, &step);
        let forward = begun.elapsed();
        match output {
            Ok(output) => {
                self.scheduler.commit(&step);
                let waited = self.deliver(&step, output);
                // What guides need says nothing of the executor.
                self.cost.observe(step.shape, begun.elapsed().saturating_sub(waited).as_secs_f64());
            }
            Err(Fault::Step(details)) => self.fail_step(&step, &details),
            Err(Fault::Panic(details)) => return Err(details),
        }
        self.figures.stepped(&step, begun, forward, &self.scheduler, self.cost.cost());
        self.step = step;
        Ok(())
    }

    /// Takes commands, and waits for one when there is nothing to run. `false`: no command will ever come.
    fn listen(&mut self) -> bool {
        if !self.scheduler.has_work() && self.held().is_empty() {
            self.figures.idle(&self.scheduler, self.cost.cost());
            let command = match self.alarm() {
                Some(alarm) => {
                    let patience = alarm.saturating_duration_since(Instant::now());
                    self.outside.commands.recv_timeout(patience)
                }
                None => self.outside.commands.recv().map_err(|_gone| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => return true,
                // The streams are gone too, so whoever is left will be retired.
                Err(RecvTimeoutError::Disconnected) => return self.clients.iter().any(Option::is_some),
            }
        }
        loop {
            match self.outside.commands.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let EngineConfig { priority_ageing, model_digest, .. } = &self.config;
                let (client, sequence) = Client::new(*submission, self.epoch, *priority_ageing, model_digest);
                let SequenceId(index) = self.scheduler.add(sequence);
                if self.clients.len() <= index {
                    self.clients.resize_with(index + 1, || None);
                }
                self.clients[index] = Some(client);
            }
            Command::Drain { deadline, done } => {
                self.outside.health.send_replace(Health::Draining);
                let draining =
                    self.draining.get_or_insert(Draining { deadline, done: Vec::new(), drained: Drained::default() });
                draining.deadline = draining.deadline.min(deadline);
                draining.done.push(done);
            }
            Command::Wake => self.outside.rung.store(false, Ordering::Release),
        }
    }

    /// Ends requests whose reader left or is too slow, or whose deadline passed; lets those go on whose reader caught up.
    fn retire(&mut self) {
        let now = Instant::now();
        for index in 0..self.clients.len() {
            let Some(client) = &mut self.clients[index] else { continue };
            match client.fate(now, self.config.stall_timeout) {
                Fate::GoesOn => {}
                Fate::CaughtUp => self.scheduler.resume(SequenceId(index)),
                Fate::Ends(end) => self.end(SequenceId(index), end),
            }
        }
    }

    /// Whether a drain is over. At its deadline, whoever is left is failed.
    fn drained(&mut self) -> bool {
        let Some(draining) = &mut self.draining else { return false };
        if draining.deadline <= Instant::now() {
            let left = self.clients.iter().flatten().count();
            let before = draining.drained.completed;
            self.fail_all(FailureKind::Draining, "the server is shutting down and the time to finish is over");
            if let Some(draining) = &mut self.draining {
                draining.drained = Drained { completed: before, cut: draining.drained.cut + left };
            }
        }
        self.clients.iter().all(Option::is_none)
    }

    /// The last words of the engine thread; `failure` says what ended it, if it was not meant to end.
    fn close(&mut self, failure: Option<String>) {
        let health = match failure {
            None => Health::Stopped,
            Some(details) => {
                tracing::error!("the engine has failed: {details}");
                Health::Failed(details)
            }
        };
        // First of all, so that nothing more is submitted.
        let failed = health != Health::Stopped;
        self.outside.health.send_replace(health);
        let (kind, message) = if failed {
            (FailureKind::EngineFailed, "the engine has failed; use another replica")
        } else {
            (FailureKind::Draining, "the server is shutting down; use another replica")
        };
        let (mut waiting, drained) = match self.draining.take() {
            Some(Draining { done, drained, .. }) => (done, drained),
            None => (Vec::new(), Drained::default()),
        };
        // Whoever came at the last moment.
        while let Ok(command) = self.outside.commands.try_recv() {
            match command {
                Command::Drain { done, .. } => waiting.push(done),
                other => self.obey(other),
            }
        }
        self.fail_all(kind, message);
        self.figures.idle(&self.scheduler, self.cost.cost());
        for done in waiting {
            // Whoever no longer listens does not care.
            let _ = done.send(drained);
        }
    }

    /// Says the last word of one request, and frees what it holds.
    fn end(&mut self, id: SequenceId, end: End) {
        let Some(client) = self.clients.get_mut(id.0).and_then(Option::take) else { return };
        self.scheduler.remove(id);
        client.end(end, Instant::now(), |report| {
            if let Some(draining) = self.draining.as_mut().filter(|_| report.outcome != Outcome::Cancelled) {
                draining.drained.completed += 1;
            }
            self.figures.ended(report);
        });
    }

    fn fail_step(&mut self, step: &Step, details: &str) {
        for part in &step.parts {
            if let Some(client) = self.clients.get(part.id.0).and_then(Option::as_ref) {
                tracing::error!(request = client.id(), "a step failed: {details}");
            }
            self.end(part.id, internal("the forward pass failed; the server's log says more".to_owned()));
        }
    }

    fn fail_all(&mut self, kind: FailureKind, message: &str) {
        for index in 0..self.clients.len() {
            self.end(SequenceId(index), End::Failed(Failure { kind, message: message.to_owned() }));
        }
    }

    /// When something must be looked at even if no command comes. `None`: never.
    fn alarm(&self) -> Option<Instant> {
        let clients = self.clients.iter().flatten().map(|client| client.alarm(self.config.stall_timeout));
        clients.chain(self.draining.as_ref().map(|draining| draining.deadline)).min()
    }

    /// Tells requests what a plan did to them.
    fn note_plan(&mut self, step: &Step, now: Instant) {
        let mut starts = 0;
        for started in step.started.iter().filter(|started| started.first) {
            let Some(client) = self.clients.get_mut(started.id.0).and_then(Option::as_mut) else { continue };
            client.start(started.cached, now);
            self.figures.started(client.prompt_tokens(), started.cached);
            starts += 1;
        }
        for id in &step.preempted {
            if let Some(client) = self.clients.get_mut(id.0).and_then(Option::as_mut) {
                client.note_preemption();
            }
        }
        self.figures.planned(now, starts, step.preempted.len(), &self.scheduler);
    }

    /// Measures the executor. An error ends the engine before it served.
    fn warm_up(&mut self) -> Result<(), String> {
        let EngineConfig { max_num_seqs, max_num_batched_tokens, warm_up, .. } = self.config;
        let bounds = (max_num_seqs, max_num_batched_tokens);
        let (executor, cost) = (&mut *self.executor, &mut self.cost);
        match catch_unwind(AssertUnwindSafe(|| warm_up::measure(executor, bounds, warm_up, cost))) {
            Ok(result) => result.map_err(|error| format!("the first steps failed: {error}")),
            Err(panic) => Err(format!("the first steps panicked: {}", forward::panic_message(&*panic))),
        }
    }
}

fn internal(message: String) -> End {
    End::Failed(Failure { kind: FailureKind::Internal, message })
}
