//! PURE: what one request took, in tokens and time.

use std::time::{Duration, Instant};

use super::request::{Started, Timings, Usage};

/// Counts one request's tokens and times, at either end of its stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tally {
    accepted: Instant,
    usage: Usage,
    queue: Option<Duration>,
    /// When a prompt without an answer had been read.
    read: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Tally {
    /// For a request accepted now, which goes on after `emitted` output tokens.
    pub(super) fn new(accepted: Instant, prompt: usize, emitted: usize) -> Self {
        // Both are bounded by the context, which fits.
        let prompt_tokens = u32::try_from(prompt).unwrap_or(u32::MAX);
        let completion_tokens = u32::try_from(emitted).unwrap_or(u32::MAX);
        let usage = Usage { prompt_tokens, completion_tokens, cached_tokens: 0 };
        Self { accepted, usage, queue: None, read: None, first: None, last: None }
    }

    pub(super) fn start(&mut self, started: Started) {
        self.usage.cached_tokens = started.cached_tokens;
        self.queue = Some(started.queued);
    }

    pub(super) fn token(&mut self, at: Instant) {
        self.usage.completion_tokens += 1;
        self.first.get_or_insert(at);
        self.last = Some(at);
    }

    /// The prompt was read, and no answer asked for.
    pub(super) fn prompt_read(&mut self, at: Instant) {
        self.read = Some(at);
    }

    /// When the request was accepted.
    pub(super) fn accepted(&self) -> Instant {
        self.accepted
    }

    /// When its latest token came.
    pub(super) fn last(&self) -> Option<Instant> {
        self.last
    }

    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    pub(super) fn timings(&self) -> Timings {
        let queue = self.queue.unwrap_or_default();
        let time_to_first_token = self.first.map(|first| first - self.accepted).unwrap_or_default();
        let decode = self.first.zip(self.last).map(|(first, last)| last - first).unwrap_or_default();
        let read = self.first.or(self.read).map(|read| read - self.accepted).unwrap_or_default();
        Timings { queue, prefill: read.saturating_sub(queue), decode, time_to_first_token }
    }
}
