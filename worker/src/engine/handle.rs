//! The callers' side of the engine: admission, and the stream of one answer.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::sync::{mpsc, oneshot, watch};

use super::admission::{Admission, Full, Permit};
use super::guide::Guide;
use super::load::Load;
use super::observer::Observer;
use super::request::{
    Event, Failure, FailureKind, FinishReason, Finished, Rejected, Request, Timings, Usage, output_limit,
};
use super::tally::Tally;
use crate::sampling::Sampler;

/// Whether the engine serves.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Health {
    /// It measures the executor before it serves; requests are accepted and wait.
    Starting,
    /// It serves.
    Ready,
    /// It finishes what it has and accepts nothing more.
    Draining,
    /// It has stopped after a drain, or because every handle and stream is gone.
    Stopped,
    /// The executor or the engine itself panicked; nothing more is served. The sentence says what happened.
    Failed(String),
}

/// What a drain came to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Drained {
    /// Requests that ended by themselves after the drain began; those whose reader left are not counted.
    pub completed: usize,
    /// Requests that outlived the deadline and were failed with [`FailureKind::Draining`].
    pub cut: usize,
}

/// Sizes that follow from configuration and executor.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Prompt and answer together, in tokens.
    pub context: usize,
    /// Token ids are smaller than this.
    pub vocab: usize,
    /// Numbers of an embedding.
    pub hidden: usize,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most requests in flight, running or waiting.
    pub max_in_flight: usize,
}

/// Submits requests; cheap to clone. The engine stops when all handles and streams are gone.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) stream_capacity: usize,
    pub(super) admission: Arc<Admission>,
    pub(super) load: Arc<Mutex<Load>>,
    pub(super) draining: Arc<AtomicBool>,
    pub(super) health: watch::Receiver<Health>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) bell: Bell,
}

/// What handles and streams say to the engine thread.
pub(super) enum Command {
    Submit(Box<Submission>),
    Drain {
        deadline: Instant,
        done: oneshot::Sender<Drained>,
    },
    /// A reader left or caught up.
    Wake,
}

/// An admitted request on its way to the engine thread.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) sampler: Sampler,
    pub(super) guide: Option<Box<dyn Guide>>,
    /// Most output tokens, with those emitted earlier.
    pub(super) max_tokens: usize,
    pub(super) tally: Tally,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) reader: Arc<Reader>,
    pub(super) permit: Permit,
}

/// What the two ends of one stream know of each other.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Set by the engine when it waits for the reader; the reader clears it and rings.
    pub(super) paused: AtomicBool,
    /// Set when the reader ended the answer with [`EventStream::stop`].
    pub(super) stopped: Mutex<Option<Finished>>,
}

/// Sends commands to the engine thread.
#[derive(Clone)]
pub(super) struct Bell {
    commands: SyncSender<Command>,
    /// A `Wake` is on its way; a second one would say nothing new.
    rung: Arc<AtomicBool>,
}

impl Bell {
    /// `rung` must be cleared by the receiver of each [`Command::Wake`], before it looks around.
    pub(super) fn new(commands: SyncSender<Command>, rung: Arc<AtomicBool>) -> Self {
        Self { commands, rung }
    }

    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // Full means that the engine is about to look around anyway; closed, that it is gone.
            let _ = self.commands.try_send(Command::Wake);
        }
    }
}

/// Room in an event channel beside tokens: for `Started`, for what is read off the prompt, and for the final event.
pub(super) const EVENTS_BESIDE_TOKENS: usize = 3;

impl EngineHandle {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared: Arc::new(shared) }
    }

    /// Admits a request, or refuses it at once. Does not block.
    ///
    /// # Errors
    /// [`Rejected`], whose [`kind`](Rejected::kind) gives the status.
    pub fn submit(&self, request: Request) -> Result<EventStream, Rejected> {
        self.submit_guided(request, None)
    }

    /// Tells the observer that the requests submitted last are so many answers to one prompt.
    pub fn note_choices(&self, choices: u32) {
        self.shared.observer.asked(choices);
    }

    /// As [`submit`](Self::submit) for a request whose answer a guide follows, which has heard of the tokens emitted earlier. The request needs
    /// end-of-sequence tokens: with one of them the answer ends where the guide says so, also when it ignores them elsewhere.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn submit_guided(&self, request: Request, guide: Option<Box<dyn Guide>>) -> Result<EventStream, Rejected> {
        self.admit(request, guide).inspect_err(|rejected| self.shared.observer.rejected(rejected.kind()))
    }

    fn admit(&self, request: Request, guide: Option<Box<dyn Guide>>) -> Result<EventStream, Rejected> {
        let shared = &*self.shared;
        let accepted = Instant::now();
        self.refuse_unless_serving()?;
        let max_tokens = output_limit(&request, shared.limits.context, shared.limits.vocab)?;
        let Request { sampling, choice, prompt, emitted, .. } = &request;
        let sampler = Sampler::new(sampling.clone(), *choice, shared.limits.vocab, prompt, emitted)?;

        let load = *shared.load.lock().unwrap_or_else(PoisonError::into_inner);
        let permit = shared.admission.admit(&request.tenant).map_err(|full| match full {
            Full::Engine { limit } => Rejected::QueueFull { limit, retry_after: load.retry_after() },
            Full::Tenant { limit } => Rejected::TenantQuota { limit, retry_after: load.retry_after() },
        })?;
        let remaining = request.deadline.saturating_duration_since(accepted);
        let expected = load.expected_first_token(permit.before(), prompt.len());
        if remaining.is_zero() || expected > remaining {
            return Err(Rejected::DeadlineUnmeetable { remaining, expected });
        }

        let (events, receiver) = mpsc::channel(shared.stream_capacity + EVENTS_BESIDE_TOKENS);
        let reader = Arc::new(Reader::default());
        let tally = Tally::new(accepted, prompt.len(), emitted.len());
        let stream = EventStream {
            events: receiver,
            reader: Arc::clone(&reader),
            bell: shared.bell.clone(),
            tally,
            ended: false,
        };
        let submission = Submission { request, sampler, guide, max_tokens, tally, events, reader, permit };
        // The channel holds as many submissions as there are permits, so it is never full.
        match shared.bell.commands.try_send(Command::Submit(Box::new(submission))) {
            Ok(()) => Ok(stream),
            Err(_) => Err(self.refuse_unless_serving().err().unwrap_or(Rejected::Draining)),
        }
    }

    /// Checks what a request asks for as [`submit`](Self::submit) does, whatever the load is. Gives the most output tokens
    /// that it may have.
    ///
    /// # Errors
    /// [`Rejected`] of the kind that never succeeds.
    pub fn check(&self, request: &Request) -> Result<usize, Rejected> {
        let Limits { context, vocab, .. } = self.shared.limits;
        let limit = output_limit(request, context, vocab)?;
        request.sampling.validate(vocab)?;
        Ok(limit)
    }

    /// Whether requests are taken at all, so that none is prepared in vain.
    ///
    /// # Errors
    /// [`Rejected`] when the engine has failed or is draining.
    pub fn serving(&self) -> Result<(), Rejected> {
        self.refuse_unless_serving().inspect_err(|rejected| self.shared.observer.rejected(rejected.kind()))
    }

    fn refuse_unless_serving(&self) -> Result<(), Rejected> {
        if matches!(*self.shared.health.borrow(), Health::Failed(_)) {
            return Err(Rejected::EngineFailed);
        }
        if self.shared.draining.load(Ordering::Acquire) { Err(Rejected::Draining) } else { Ok(()) }
    }

    /// Accepts nothing more, finishes what was accepted, and fails what is left at `deadline`. The engine thread has
    /// ended, or is about to, when this resolves.
    pub async fn drain(&self, deadline: Instant) -> Drained {
        self.shared.draining.store(true, Ordering::Release);
        let (done, drained) = oneshot::channel();
        let mut command = Command::Drain { deadline, done };
        // The channel is full for as long as a step takes, at most.
        loop {
            use std::sync::mpsc::TrySendError;
            match self.shared.bell.commands.try_send(command) {
                Ok(()) => return drained.await.unwrap_or_default(),
                Err(TrySendError::Disconnected(_)) => return Drained::default(),
                Err(TrySendError::Full(back)) => command = back,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Follows the engine's health: the first value is the present one.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.shared.health.clone()
    }

    /// Whether requests are, or will be, served.
    pub fn healthy(&self) -> bool {
        matches!(*self.shared.health.borrow(), Health::Starting | Health::Ready)
    }

    /// For how long the present forward pass has been running; `None` between steps. `/livez` compares it with what no
    /// step should ever take.
    pub fn forward_running_for(&self) -> Option<Duration> {
        self.shared.load.lock().unwrap_or_else(PoisonError::into_inner).forward_since.map(|since| since.elapsed())
    }

    /// Sizes that follow from configuration and executor.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// What the engine has to do at present, and its learnt costs.
    pub fn load(&self) -> Load {
        *self.shared.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events of one request. Dropping it cancels the request within one step.
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    reader: Arc<Reader>,
    bell: Bell,
    tally: Tally,
    ended: bool,
}

impl EventStream {
    /// The next event; `None` after the final one.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// Ends the answer after the last token read from here, as a complete one. What that token completed, for instance
    /// a stop string, is the caller's to know.
    pub fn stop(self) -> Finished {
        let finished =
            Finished { reason: FinishReason::Stopped, usage: self.tally.usage(), timings: self.tally.timings() };
        if !self.ended {
            *self.reader.stopped.lock().unwrap_or_else(PoisonError::into_inner) = Some(finished);
        }
        finished
    }

    /// Tokens read so far.
    pub fn usage(&self) -> Usage {
        self.tally.usage()
    }

    /// Times so far.
    pub fn timings(&self) -> Timings {
        self.tally.timings()
    }

    fn read(&mut self, event: Option<Event>) -> Option<Event> {
        if self.reader.paused.swap(false, Ordering::AcqRel) {
            self.bell.ring();
        }
        match &event {
            Some(Event::Started(started)) => self.tally.start(*started),
            Some(Event::Token(token)) => self.tally.token(token.at),
            Some(Event::PromptLogprobs(_) | Event::Embedding(_)) => {}
            Some(Event::Finished(_) | Event::Failed(_)) => self.ended = true,
            None if self.ended => return None,
            None => {
                self.ended = true;
                let message = "the engine stopped before the answer was complete".to_owned();
                return Some(Event::Failed(Failure { kind: FailureKind::EngineFailed, message }));
            }
        }
        event
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| self.read(event))
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.events.close();
        if !self.ended {
            self.bell.ring();
        }
    }
}
