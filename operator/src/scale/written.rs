//! When what was learnt of a model is written down again: whoever leads next goes on from it, and each write costs the API
//! server and everybody who watches.

use super::decision::{Decision, Reason};
use super::history::History;
use super::moment::Moment;

/// Seconds between two writes, at least, while nothing is decided.
const LEAST: f64 = 30.0;
/// Seconds after which it is written again while requests come, whatever it is.
const MOST: f64 = 300.0;
/// Relative change of a learnt parameter that is worth a write.
const MATERIAL: f64 = 0.1;
/// Seconds of lower need after which a decrease is on its way.
const LOWER: f64 = 60.0;

/// What was written last, and when.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    at: Option<Moment>,
    learnt: Option<[f64; 4]>,
}

impl Written {
    /// What another process wrote: as old as its last decision.
    pub fn inherited(history: &History) -> Self {
        Self { at: history.decided, learnt: None }
    }

    /// What is written now.
    pub fn now(decision: &Decision, now: Moment) -> Self {
        Self { at: Some(now), learnt: Some(learnt(decision)) }
    }

    /// Whether it is to be written again although nothing was decided: at first, when something else was learnt, while a
    /// decrease is on its way, and now and then under load.
    pub fn is_due(&self, decision: &Decision, now: Moment) -> bool {
        let history = &decision.history;
        let Some(at) = self.at else { return history.began.is_some() };
        // Later than now: the clock was set back.
        let ago = if at > now { MOST } else { now.since(at) };
        let is_other = |written: [f64; 4]| {
            written.iter().zip(learnt(decision)).any(|(then, now)| (now - then).abs() > MATERIAL * then.abs())
        };
        let is_news = is_decreasing(decision, now) || (history.is_busy() && self.learnt.is_some_and(is_other));
        (ago >= LEAST && is_news) || (ago >= MOST && history.is_busy())
    }
}

/// What a replica takes in, how long it takes to arrive, how much demand grows meanwhile, and the down window.
fn learnt(decision: &Decision) -> [f64; 4] {
    let figures = &decision.figures;
    [figures.planned, figures.lead_time, figures.headroom, decision.history.down_window.seconds]
}

/// Whether replicas wait for the end of the down window to go.
fn is_decreasing(decision: &Decision, now: Moment) -> bool {
    let figures = &decision.figures;
    let floor = figures.min_replicas.max(figures.scheduled);
    decision.reason == Reason::HoldingDown
        && decision.history.down_window.highest(LOWER, now).max(floor) < figures.current
}
