//! PURE: what the engine has to do at present, and what follows for a newcomer.

use std::time::{Duration, Instant};

use super::cost::StepCost;

/// A snapshot after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests that hold key-value blocks.
    pub running: usize,
    /// Requests that wait, as far as the engine had heard of them.
    pub waiting: usize,
    /// Usual time between two requests leaving the queue, while there is one.
    pub start_interval: Option<Duration>,
    /// Learnt cost of a step.
    pub cost: StepCost,
    /// Fraction of recent prompt tokens that were in the prefix cache.
    pub prefix_hit_rate: f64,
    /// When the present forward pass began; `None` between steps.
    pub forward_since: Option<Instant>,
}

/// The least and the most that a client is told to wait before it tries again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

impl Load {
    /// Expected time to the first token of a prompt of so many tokens, given the number of requests in flight before
    /// it. Leans to the short side: what is not known counts as nothing.
    pub fn expected_first_token(&self, in_flight: usize, prompt_tokens: usize) -> Duration {
        let ahead = u32::try_from(in_flight.saturating_sub(self.running)).unwrap_or(u32::MAX);
        let queue = self.start_interval.unwrap_or_default().saturating_mul(ahead);
        let computed = prompt_tokens as f64 * (1.0 - self.prefix_hit_rate.clamp(0.0, 1.0));
        let prefill = Duration::try_from_secs_f64(computed * self.cost.per_token).unwrap_or(Duration::MAX);
        queue.saturating_add(prefill)
    }

    /// When one more place in the queue will probably be free.
    pub fn retry_after(&self) -> Duration {
        self.start_interval.unwrap_or(Duration::from_secs(1)).clamp(RETRY.0, RETRY.1)
    }
}

/// Learns the usual time between two requests leaving a queue that is not empty.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StartRate {
    interval: Option<f64>,
    /// Seconds on the caller's clock since when somebody has been waiting, or the latest start after that.
    since: Option<f64>,
}

impl StartRate {
    /// At `now` seconds, `started` requests have left the queue in this step and `waiting` are left in it.
    pub(super) fn observe(&mut self, now: f64, started: usize, waiting: usize) {
        /// Weight of the newest interval.
        const NEWEST: f64 = 0.1;
        if let Some(since) = self.since.filter(|_| started > 0) {
            let newest = (now - since).max(0.0) / started as f64;
            self.interval = Some(self.interval.map_or(newest, |old| old + NEWEST * (newest - old)));
        }
        self.since = match self.since {
            _ if waiting == 0 => None,
            Some(since) if started == 0 => Some(since),
            _ => Some(now),
        };
    }

    pub(super) fn interval(&self) -> Option<Duration> {
        self.interval.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn the_expected_time_counts_the_queue_and_the_part_of_the_prompt_that_is_not_cached() {
        let cost = StepCost { per_token: 0.001, ..StepCost::default() };
        let load =
            Load { running: 8, start_interval: Some(seconds(0.5)), cost, prefix_hit_rate: 0.25, ..Load::default() };
        assert_eq!(load.expected_first_token(8, 1000), seconds(0.75));
        assert_eq!(load.expected_first_token(12, 1000), seconds(2.75));
        assert_eq!(load.expected_first_token(3, 0), Duration::ZERO);
    }

    #[test]
    fn what_is_not_known_refuses_nobody() {
        assert_eq!(Load::default().expected_first_token(1000, 100_000), Duration::ZERO);
    }

    #[test]
    fn the_retry_hint_stays_between_a_tenth_and_thirty_seconds() {
        let hint = |interval| Load { start_interval: interval, ..Load::default() }.retry_after();
        assert_eq!(hint(None), seconds(1.0));
        assert_eq!(hint(Some(seconds(0.001))), seconds(0.1));
        assert_eq!(hint(Some(seconds(500.0))), seconds(30.0));
    }

    #[test]
    fn the_start_interval_is_that_of_a_queue_with_requests_in_it() {
        let mut rate = StartRate::default();
        rate.observe(0.0, 1, 0);
        rate.observe(100.0, 1, 0);
        assert_eq!(rate.interval(), None, "nobody waited");
        rate.observe(100.0, 0, 5);
        rate.observe(101.0, 0, 5);
        rate.observe(102.0, 1, 4);
        rate.observe(104.0, 1, 3);
        assert_eq!(rate.interval(), Some(seconds(2.0)));
        rate.observe(104.5, 3, 0);
        rate.observe(900.0, 1, 0);
        assert!(rate.interval().unwrap() < seconds(2.0), "the idle time afterwards does not count");
    }
}
