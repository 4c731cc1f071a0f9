//! Feedback: where users do not get what they were promised although nothing is on its way, replicas are asked to do less.
//!
//! It follows the share of requests outside of the objective, not a percentile of latency: a loop on the 90th cannot hold
//! 99 %.

use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// Seconds over which requests are judged together.
const PERIOD: f64 = 60.0;
/// Fewest requests that say anything.
const FEWEST: f64 = 20.0;
/// Least share of the planned utilisation.
const LEAST: f64 = 0.5;
/// Step down for each multiple of the budget that is burnt, and back up.
const DOWN: f64 = 0.02;
const UP: f64 = 0.003;

/// How far the plan proved right.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct ErrorBudget {
    /// η: share of the planned utilisation that is used, 0.5 to 1.
    pub share: f64,
    /// Share of bad requests over the allowed share, in the last period; above 1 the budget shrinks.
    pub burn: f64,
    judged: f64,
    good: f64,
    /// Since when all replicas that were asked for are ready.
    settled: Option<Moment>,
    /// When the period began.
    began: Option<Moment>,
}

impl Default for ErrorBudget {
    fn default() -> Self {
        Self { share: 1.0, burn: 0.0, judged: 0.0, good: 0.0, settled: None, began: None }
    }
}

impl ErrorBudget {
    /// Takes one tick in. `settled`: all replicas that were asked for are ready and nothing is held. `used`: utilisation
    /// over the planned one.
    pub fn record(&mut self, judged: f64, good: f64, settled: bool, used: f64, attainment: f64, now: Moment) {
        if !settled {
            *self = Self { share: self.share, burn: 0.0, ..Self::default() };
            return;
        }
        let since = *self.settled.get_or_insert(now);
        if now.since(since) < PERIOD {
            return;
        }
        let began = *self.began.get_or_insert(now);
        self.judged += judged;
        self.good += good;
        if now.since(began) < PERIOD {
            return;
        }
        if self.judged >= FEWEST {
            let bad = 1.0 - self.good / self.judged;
            self.burn = bad / (1.0 - attainment).max(1e-4);
            if self.burn > 1.0 && used > 0.5 {
                self.share -= DOWN * self.burn.min(3.0);
            } else if self.burn < 0.5 {
                self.share += UP;
            }
            self.share = self.share.clamp(LEAST, 1.0);
        } else {
            // Who stays away burns nothing: the last overload must not hold replicas for ever.
            self.burn = 0.0;
        }
        (self.judged, self.good, self.began) = (0.0, 0.0, Some(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(budget: &mut ErrorBudget, seconds: u32, bad: f64, settled: bool) {
        let start = budget.began.or(budget.settled).unwrap_or_default();
        for tick in 1..=seconds / 5 {
            let now = start.after(f64::from(tick) * 5.0);
            budget.record(50.0, 50.0 * (1.0 - bad), settled, 0.9, 0.99, now);
        }
    }

    #[test]
    fn bad_requests_lower_the_share_and_good_ones_raise_it_slowly() {
        let mut budget = ErrorBudget::default();
        run(&mut budget, 600, 0.05, true);
        let low = budget.share;
        assert!(low < 0.8, "{budget:?}");
        run(&mut budget, 600, 0.0, true);
        assert!(budget.share > low && budget.share < low + 0.1, "{budget:?}");
        run(&mut budget, 36_000, 0.5, true);
        assert!((budget.share - LEAST).abs() < 1e-9, "{budget:?}");
    }

    #[test]
    fn nothing_is_learnt_while_replicas_start() {
        let mut budget = ErrorBudget::default();
        run(&mut budget, 3600, 0.9, false);
        assert_eq!(budget.share, 1.0);
    }
}
