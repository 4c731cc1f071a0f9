//! What is decided, and the numbers that lead to it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::history::History;
use super::step_cost::Bound;

/// The answer for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Replicas to ask for.
    pub desired: u32,
    /// Why.
    pub reason: Reason,
    /// The numbers: the reason's rule applied to them gives `desired`.
    pub figures: Figures,
    /// What the next decision needs to know.
    pub history: History,
}

/// The rule that had the last word.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Reason {
    /// The need exceeds what is asked for: up.
    LoadGrew,
    /// Every need of the down window is below: down.
    LoadFell,
    /// The need is what is asked for, within the tolerance.
    WithinTolerance,
    /// The need fell, but not yet for the whole down window, or something forbids to act on it now.
    HoldingDown,
    /// Not enough is known for any change.
    MetricsMissing,
    /// Nothing has been heard for so long that the fallback applies.
    Fallback,
    /// A schedule asks for more.
    Schedule,
    /// `minReplicas` asks for more.
    MinReplicas,
    /// `maxReplicas` allows no more.
    MaxReplicas,
    /// Quota or the budget shared with other models allows no more.
    Quota,
    /// `behavior.scaleUp` allows no more yet.
    ScaleUpLimit,
    /// `behavior.scaleDown` allows no fewer yet.
    ScaleDownLimit,
}

/// The numbers of a decision. Work is in replica-seconds per second: what so many replicas, always busy, would do.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Replicas that are asked for at present.
    pub current: u32,
    /// Those of them that are ready.
    pub ready: u32,
    /// Those of them that did not tell their state.
    pub silent: u32,
    /// Work that arrives, over the last minute.
    pub sustained: f64,
    /// Work that is proven to arrive: more than that when a burst is certain.
    pub arriving: f64,
    /// Factor for what may come while a replica starts.
    pub headroom: f64,
    /// Standard deviation of the work that arrives, over the time that users wait.
    pub deviation: f64,
    /// Standard deviations to be ready for.
    pub deviations: f64,
    /// Work that one replica takes in with every promise kept.
    pub planned: f64,
    /// Work at which a replica saturates.
    pub ceiling: f64,
    /// Share of both that is planned for, by what the error budget and uneven replicas taught; it is in `planned` already.
    pub share: f64,
    /// What binds `planned`.
    pub bound: Bound,
    /// The objective cannot be met by any number of replicas: latency has no part in `planned`.
    pub infeasible: bool,
    /// Work that waits, in replica-seconds.
    pub backlog: f64,
    /// Work that will wait when the replicas on their way arrive.
    pub backlog_at_arrival: f64,
    /// Seconds in which it is to be gone then.
    pub drain_horizon: f64,
    /// Seconds from asking for a replica until it serves.
    pub lead_time: f64,
    /// Replicas for the load, from what is proven.
    pub base: f64,
    /// Replicas beyond that for the backlog.
    pub surplus: f64,
    /// Replicas for the load, if those that are silent had much to do.
    pub base_high: f64,
    /// Replicas below which the cache that is in use would not fit.
    pub resident: u32,
    /// Relative change that is ignored, upwards and downwards.
    pub tolerance_up: f64,
    /// See `tolerance_up`.
    pub tolerance_down: f64,
    /// Seconds of the down window.
    pub down_window: f64,
    /// The highest recommendation for a decrease within it.
    pub highest: u32,
    /// The lowest recommendation for an increase within its window.
    pub lowest: u32,
    /// A decrease is out of the question now.
    pub hold: bool,
    /// Nothing has been heard of late.
    pub blind: bool,
    /// The fallback applies, with so many replicas.
    pub fallback: Option<u32>,
    /// The floor of the schedules; 0 without one.
    pub scheduled: u32,
    /// What `behavior` allows at least.
    pub lower_limit: u32,
    /// What `behavior` allows at most.
    pub upper_limit: u32,
    /// What quota or a shared budget allows.
    pub quota: Option<u32>,
    /// `minReplicas`.
    pub min_replicas: u32,
    /// `maxReplicas`.
    pub max_replicas: u32,
}

impl Figures {
    /// Replicas that are needed, from what is proven.
    pub fn need(&self) -> f64 {
        self.base + self.surplus
    }

    /// The answer that follows from the numbers, and the rule that had the last word: rules eight to eleven.
    pub fn answer(&self) -> (u32, Reason) {
        let (wish, reason) = self.wish();
        let mut answer = (wish, reason);
        // Limits of speed first: the bounds outrank them, as in HPA.
        if answer.0 > self.upper_limit.max(self.current) {
            answer = (self.upper_limit.max(self.current), Reason::ScaleUpLimit);
        }
        if answer.0 < self.lower_limit.min(self.current) {
            answer = (self.lower_limit.min(self.current), Reason::ScaleDownLimit);
        }
        if let Some(quota) = self.quota.filter(|quota| answer.0 > (*quota).max(self.current)) {
            answer = (quota.max(self.current), Reason::Quota);
        }
        if answer.0 < self.scheduled {
            answer = (self.scheduled, Reason::Schedule);
        }
        if answer.0 > self.max_replicas {
            answer = (self.max_replicas, Reason::MaxReplicas);
        }
        if answer.0 < self.min_replicas {
            answer = (self.min_replicas, Reason::MinReplicas);
        }
        answer
    }

    /// What the load asks for, before any limit.
    fn wish(&self) -> (u32, Reason) {
        let current = self.current;
        if self.blind {
            return match self.fallback {
                Some(replicas) if replicas > current => (replicas, Reason::Fallback),
                _ => (current, Reason::MetricsMissing),
            };
        }
        let ignored = if self.surplus > 0.0 { 0.0 } else { self.tolerance_up };
        if self.need() > f64::from(current) * (1.0 + ignored) {
            let wish = to_replicas(self.need()).min(self.lowest);
            return if wish > current { (wish, Reason::LoadGrew) } else { (current, Reason::WithinTolerance) };
        }
        let lower = self.highest.max(self.resident).max(self.for_decrease());
        if lower < current {
            return if self.hold { (current, Reason::HoldingDown) } else { (lower, Reason::LoadFell) };
        }
        let reason = if self.for_decrease() < current { Reason::HoldingDown } else { Reason::WithinTolerance };
        (current, reason)
    }

    /// What a decrease would go to if only the load of this moment counted.
    pub fn for_decrease(&self) -> u32 {
        to_replicas(self.base_high * (1.0 + self.tolerance_down))
    }
}

/// Whole replicas for a need; what is no number asks for none.
pub(super) fn to_replicas(need: f64) -> u32 {
    // A need that is whole but for rounding is whole.
    (need - 1e-9).ceil().clamp(0.0, f64::from(u32::MAX)) as u32
}

impl fmt::Display for Decision {
    /// A sentence for events, status and logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = &self.figures;
        let Figures { current, sustained, arriving, headroom, planned, base, backlog, surplus, .. } = n;
        write!(f, "{current} to {} replicas ({:?}): ", self.desired, self.reason)?;
        if n.blind {
            return write!(f, "no replica and no gateway has told its state of late");
        }
        write!(
            f,
            "work arrives for {arriving:.2} busy replicas ({sustained:.2} over the last minute), headroom x{headroom:.2}, a \
             replica takes in {planned:.2} (limited by {:?}), so the load needs {base:.2}; {backlog:.1} replica-seconds wait, \
             which needs {surplus:.2} more",
            n.bound
        )?;
        match self.reason {
            Reason::HoldingDown => write!(f, "; a decrease waits for {:.0} s of lower need", n.down_window),
            Reason::MaxReplicas => write!(f, "; maxReplicas is {}", n.max_replicas),
            Reason::MinReplicas => write!(f, "; minReplicas is {}", n.min_replicas),
            Reason::Schedule => write!(f, "; a schedule asks for {}", n.scheduled),
            Reason::ScaleUpLimit => write!(f, "; behavior.scaleUp allows {} now", n.upper_limit),
            Reason::ScaleDownLimit => write!(f, "; behavior.scaleDown allows {} now", n.lower_limit),
            Reason::Quota => write!(f, "; quota allows {}", n.quota.unwrap_or_default()),
            _ => Ok(()),
        }
    }
}
