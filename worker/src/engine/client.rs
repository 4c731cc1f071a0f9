//! The engine's side of one request: choosing its tokens, and getting them to its reader.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::executor::RowScore;
use crate::sampling::{Chosen, Narrowing, SampleError, Sampler, Scratch};

use super::admission::Permit;
use super::dead_end::{Ban, CONSTRAINT, dead_end};
use super::guide::{Guide, GuideError, Next};
use super::handle::{Reader, Submission};
use super::observer::{Outcome, RequestReport};
use super::prompt_output::PromptLogprob;
use super::request::{Event, Failure, FailureKind, FinishReason, Finished, Started, Token};
use super::scheduler::{NewSequence, RowReading, RowReadingKind};
use super::tally::Tally;

/// One accepted request that has not ended.
pub(super) struct Client {
    id: String,
    sampler: Sampler,
    guide: Option<Box<dyn Guide>>,
    /// Those of its next token, until that is chosen.
    logits: Option<Vec<f32>>,
    tally: Tally,
    events: mpsc::Sender<Event>,
    reader: Arc<Reader>,
    permit: Permit,
    deadline: Instant,
    /// Most output tokens, with those emitted earlier.
    max_tokens: u32,
    min_tokens: u32,
    /// Rows of the prompt that log-probabilities are still to come of.
    unscored: usize,
    /// Rows that the sum of hidden states is made of.
    pooled: usize,
    stop_token_ids: Vec<u32>,
    /// Those that end the answer: empty when the request ignores them and no guide says when it is over.
    eos_token_ids: Arc<[u32]>,
    ignore_eos: bool,
    /// Since when the reader has had no room for a token.
    stalled: Option<Instant>,
    preemptions: u32,
}

/// How a request ends.
pub(super) enum End {
    /// The answer is complete.
    Finished(FinishReason),
    /// It cannot be completed.
    Failed(Failure),
    /// The reader left; whether content or not, it said on its side.
    ReaderLeft,
}

/// What became of a request between two steps.
pub(super) enum Fate {
    /// Nothing.
    GoesOn,
    /// Its reader has caught up.
    CaughtUp,
    /// It ends.
    Ends(End),
}

/// What follows from a delivered token.
pub(super) enum Delivery {
    /// The next token.
    GoesOn,
    /// The reader has no room for another one.
    ReaderBehind,
    /// It was the last one.
    Complete(FinishReason),
}

/// Room for the final event, kept free of tokens.
const FINAL_EVENT: usize = 1;
/// Events that may wait for the reader before more of the prompt is scored: each tells of as many tokens as a step has.
const WAITING_SCORES: usize = 2;

impl Client {
    /// Splits a submission into what is delivered and what is scheduled. `epoch` is the origin of the engine's clock.
    pub(super) fn new(
        submission: Submission,
        epoch: Instant,
        priority_ageing: Duration,
        model_digest: &[u8; 32],
    ) -> (Self, NewSequence) {
        let Submission { request, sampler, guide, max_tokens, tally, events, reader, permit } = submission;
        let arrival = i64::try_from(tally.accepted().saturating_duration_since(epoch).as_micros()).unwrap_or(i64::MAX);
        let ageing = i64::try_from(priority_ageing.as_micros()).unwrap_or(i64::MAX);
        let prompt_tokens = request.prompt.len();
        let mut tokens = request.prompt;
        tokens.extend_from_slice(&request.emitted);
        let reading = request.prompt_output.and_then(|output| output.rows(prompt_tokens));
        let (unscored, pooled) = match &reading {
            Some(RowReading { rows, kind: RowReadingKind::Scores { .. } }) => (rows.len(), 0),
            Some(RowReading { rows, kind: RowReadingKind::HiddenSum { .. } }) => (0, rows.len()),
            None => (0, 0),
        };
        let adapter_digest = request.adapter.map_or_else(Vec::new, |adapter| adapter.digest.to_vec());
        let salt = request.cache_salt.as_bytes().to_vec();
        let sequence = NewSequence {
            tokens,
            position_ids: request.position_ids,
            adapter: request.adapter.map(|adapter| adapter.index),
            scope: vec![request.tenant.as_bytes().to_vec(), salt, model_digest.to_vec(), adapter_digest],
            rank_micros: arrival.saturating_add(ageing.saturating_mul(i64::from(request.priority))),
            tenant: request.tenant,
            reading,
            generates: max_tokens > 0,
        };
        let client = Self {
            id: request.id,
            eos_token_ids: if request.ignore_eos && guide.is_none() { Arc::default() } else { request.eos_token_ids },
            ignore_eos: request.ignore_eos,
            sampler,
            guide,
            logits: None,
            tally,
            events,
            reader,
            permit,
            deadline: request.deadline,
            // Bounded by the context, which fits.
            max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
            min_tokens: request.min_tokens,
            unscored,
            pooled,
            stop_token_ids: request.stop_token_ids,
            stalled: None,
            preemptions: 0,
        };
        (client, sequence)
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.tally.usage().prompt_tokens as usize
    }

    /// It has to be computed again, its latest logits too.
    pub(super) fn note_preemption(&mut self) {
        self.preemptions += 1;
        self.logits = None;
    }

    /// Takes the logits of its next token.
    pub(super) fn keep(&mut self, logits: Vec<f32>) {
        self.logits = Some(logits);
    }

    /// Whether it has logits of which no token was chosen yet.
    pub(super) fn is_held(&self) -> bool {
        self.logits.is_some()
    }

    /// Waits until its next token can be chosen, but not beyond a moment. Whether it can.
    pub(super) fn wait(&mut self, until: Instant) -> bool {
        self.guide.as_mut().is_none_or(|guide| guide.wait(until))
    }

    /// It left the queue for the first time.
    pub(super) fn start(&mut self, cached_tokens: usize, now: Instant) {
        let cached_tokens = u32::try_from(cached_tokens).unwrap_or(u32::MAX);
        // Tokens emitted earlier may be in the cache as well; usage speaks of the prompt.
        let cached_tokens = cached_tokens.min(self.tally.usage().prompt_tokens);
        let started = Started { cached_tokens, queued: now.saturating_duration_since(self.tally.accepted()) };
        self.tally.start(started);
        self.send(Event::Started(started));
    }

    /// Sends log-probabilities of the next tokens of its prompt. `false`: its reader has no room for more.
    pub(super) fn deliver_scores(&mut self, targets: &[u32], scores: Vec<RowScore>, now: Instant) -> bool {
        self.unscored = self.unscored.saturating_sub(scores.len());
        let scores = targets.iter().zip(scores);
        let logprobs = scores.map(|(&id, score)| PromptLogprob { id, logprobs: score.into() }).collect();
        self.send(Event::PromptLogprobs(logprobs));
        self.has_room() || {
            self.fall_behind(now);
            false
        }
    }

    /// Sends the mean of its prompt's hidden states, from their sum.
    pub(super) fn deliver_sum(&mut self, sum: &[f64]) {
        let rows = self.pooled.max(1) as f64;
        self.send(Event::Embedding(sum.iter().map(|number| (number / rows) as f32).collect()));
    }

    /// Its prompt was read, and that is all.
    pub(super) fn note_prompt_read(&mut self, now: Instant) {
        self.tally.prompt_read(now);
    }

    /// Chooses its next token from the logits that it has; `None` if it has none. The error says why there is no token.
    pub(super) fn sample(&mut self, scratch: &mut Scratch) -> Option<Result<Chosen, Failure>> {
        let mut logits = self.logits.take()?;
        Some(self.choose(&mut logits, scratch))
    }

    fn choose(&mut self, logits: &mut [f32], scratch: &mut Scratch) -> Result<Chosen, Failure> {
        let position = self.tally.usage().completion_tokens;
        let too_early = position < self.min_tokens;
        let next = self.guide.as_mut().map(|guide| guide.next()).transpose().map_err(unguided)?;
        let stops: &[u32] = if too_early { &self.stop_token_ids } else { &[] };
        let eos = |banned: bool| if banned { &self.eos_token_ids[..] } else { &[] };
        let (banned, mask): ([&[u32]; 3], _) = match next {
            None => ([eos(too_early), stops, &[]], None),
            Some(Next::Free(never)) => ([eos(true), stops, never], None),
            // Ignored where there is something else to say.
            Some(Next::Within(mask)) => ([eos(too_early || self.ignore_eos), stops, &[]], Some(mask)),
            Some(Next::Over(ends)) => ([&[]; 3], Some(ends)),
        };
        let narrowing = Narrowing { banned: &banned, mask, alone: matches!(next, Some(Next::Over(_))) };
        let chosen = self.sampler.sample(logits, position, narrowing, scratch);
        chosen.map_err(|error| match error {
            SampleError::NotFinite(_) => Failure { kind: FailureKind::Internal, message: error.to_string() },
            SampleError::NothingAllowed => {
                let [biased, words] = self.sampler.forbidden();
                let bans: [Ban<'_>; 5] = [
                    ("sampling.logit_bias", &biased),
                    ("sampling.bad_words", &words),
                    ("sampling.min_tokens", eos(too_early)),
                    ("sampling.min_tokens", stops),
                    ("sampling.ignore_eos", eos(self.ignore_eos)),
                ];
                dead_end(position, mask, &bans)
            }
        })
    }

    /// Sends a token; the latency that it ends is given too: to the first token, or between two.
    pub(super) fn deliver(&mut self, chosen: Chosen, now: Instant) -> (Delivery, Latency) {
        let latency = match self.tally.last() {
            None => Latency::First(now.saturating_duration_since(self.tally.accepted())),
            Some(last) => Latency::Between(now.saturating_duration_since(last)),
        };
        let id = chosen.id;
        self.tally.token(now);
        self.send(Event::Token(Token { id, logprobs: chosen.logprobs, at: now }));
        let delivery = if self.eos_token_ids.contains(&id) {
            Delivery::Complete(FinishReason::EndOfSequence(id))
        } else if self.stop_token_ids.contains(&id) {
            Delivery::Complete(FinishReason::StopToken(id))
        } else if self.tally.usage().completion_tokens >= self.max_tokens {
            Delivery::Complete(FinishReason::Length)
        } else if self.has_room() {
            Delivery::GoesOn
        } else {
            self.fall_behind(now);
            Delivery::ReaderBehind
        };
        if let Some(guide) = self.guide.as_mut().filter(|_| !matches!(delivery, Delivery::Complete(_))) {
            guide.advance(id);
        }
        (delivery, latency)
    }

    /// What has happened to it, now that a step is over.
    pub(super) fn fate(&mut self, now: Instant, stall_timeout: Duration) -> Fate {
        if self.events.is_closed() {
            return Fate::Ends(End::ReaderLeft);
        }
        let failed = |kind, message: String| Fate::Ends(End::Failed(Failure { kind, message }));
        if self.deadline <= now {
            let when =
                if self.tally.last().is_some() { "before the answer was complete" } else { "before the first token" };
            return failed(FailureKind::DeadlineExceeded, format!("the deadline passed {when}"));
        }
        match self.stalled {
            Some(_) if self.has_room() => {
                self.stalled = None;
                Fate::CaughtUp
            }
            Some(since) if now.saturating_duration_since(since) >= stall_timeout => {
                failed(FailureKind::SlowReader, format!("the reader took no token for {stall_timeout:?}"))
            }
            _ => Fate::GoesOn,
        }
    }

    /// When its fate must be looked at again even if nothing happens.
    pub(super) fn alarm(&self, stall_timeout: Duration) -> Instant {
        let stalled = self.stalled.and_then(|since| since.checked_add(stall_timeout));
        stalled.map_or(self.deadline, |stalled| stalled.min(self.deadline))
    }

    /// Says the last word to the reader; `report` hears it too, before the reader does.
    pub(super) fn end(self, end: End, now: Instant, report: impl FnOnce(&RequestReport<'_>)) {
        let Self { id, tally, events, reader, permit, max_tokens, preemptions, .. } = self;
        let (mut usage, mut timings) = (tally.usage(), tally.timings());
        let (outcome, event) = match end {
            End::Finished(reason) => {
                (Outcome::Finished(reason), Some(Event::Finished(Finished { reason, usage, timings })))
            }
            End::Failed(failure) => (Outcome::Failed(failure.kind), Some(Event::Failed(failure))),
            End::ReaderLeft => match *reader.stopped.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(finished) => {
                    (usage, timings) = (finished.usage, finished.timings);
                    (Outcome::Finished(finished.reason), None)
                }
                None => (Outcome::Cancelled, None),
            },
        };
        let end_to_end = now.saturating_duration_since(tally.accepted());
        report(&RequestReport { id: &id, outcome, usage, timings, end_to_end, max_tokens, preemptions });
        // Before the event, so that a reader who submits again on hearing it finds the place free.
        drop(permit);
        if let Some(event) = event {
            // Fails only when the reader is gone: there is room for it.
            let _ = events.try_send(event);
        }
    }

    /// Its reader has no room.
    fn fall_behind(&mut self, now: Instant) {
        self.stalled = Some(now);
        // Said first and looked at afterwards (in `fate`), so that a reader who catches up in between is noticed.
        self.reader.paused.swap(true, Ordering::SeqCst);
    }

    /// Whether its reader has room for what the next step gives.
    fn has_room(&self) -> bool {
        let (free, all) = (self.events.capacity(), self.events.max_capacity());
        // The last scores of a prompt come with the first token.
        let scores = self.unscored == 0 || (free > FINAL_EVENT + 1 && all - free <= WAITING_SCORES);
        free > FINAL_EVENT && scores
    }

    /// Sends an event for which there is room. A reader that is gone is noticed in `fate`.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

/// The failure of an answer whose guide knows nothing more.
fn unguided(error: GuideError) -> Failure {
    let kind = match error {
        GuideError::Nothing(_) => FailureKind::Unanswerable(CONSTRAINT),
        GuideError::Failed(_) => FailureKind::Internal,
    };
    Failure { kind, message: error.to_string() }
}

/// The latency that a token ends.
pub(super) enum Latency {
    /// From acceptance to the first token.
    First(Duration),
    /// From one token to the next.
    Between(Duration),
}
