//! Fifth to seventh rule: replicas for the load, and more for a while when work has piled up.

use super::demand::Arriving;
use super::fresh::Fresh;
use super::moment::Moment;
use super::policy::Policy;
use super::step_cost::{Capacity, RequestShape, StepCost};

/// Standard deviations between the mean and the load that is exceeded in a share `1 − attainment` of the time.
pub fn deviations(attainment: f64) -> f64 {
    // Abramowitz and Stegun 26.2.23: the error is below 4.5e-4.
    let tail = (1.0 - attainment).clamp(1e-6, 0.5);
    let t = (-2.0 * tail.ln()).sqrt();
    let (above, below) =
        (2.515517 + t * (0.802853 + t * 0.010328), 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
    (t - above / below).max(0.0)
}

/// Replicas for the load: the planned utilisation for what is likely to come while a replica starts, and hardly a replica
/// saturated in the swings of what arrives now (square-root staffing). `window` is the time over which swings even out.
pub fn base(arriving: &Arriving, headroom: f64, capacity: &Capacity, share: f64, deviations: f64, window: f64) -> f64 {
    let expected = arriving.proven.max(headroom * arriving.sustained);
    let swing = deviations * arriving.deviation / window.sqrt();
    (expected / (capacity.planned * share)).max((arriving.proven + swing) / (capacity.ceiling * share))
}

/// Work that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    /// Now, in replica-seconds.
    pub now: f64,
    /// When the replicas on their way arrive.
    pub at_arrival: f64,
    /// Seconds in which it is to be gone then.
    pub horizon: f64,
    /// Replicas beyond `base`.
    pub surplus: f64,
}

/// Work that is held at the front door or waits in replicas. Of three or more replicas, none counts for more than `most`
/// beyond the middle one: a replica that lies moves little.
pub fn waiting(fresh: &Fresh, cost: &StepCost, shape: &RequestShape, most: f64) -> f64 {
    let mut queues: Vec<f64> = fresh.samples.iter().map(|sample| sample.waiting).collect();
    queues.sort_by(f64::total_cmp);
    let bound = match queues.len() {
        0..=2 => f64::INFINITY,
        several => queues[(several - 1) / 2] + most / cost.work(shape).max(f64::MIN_POSITIVE),
    };
    let queued: f64 = queues.iter().map(|waiting| waiting.min(bound)).sum();
    let held = fresh
        .front_door
        .map_or(0.0, |door| cost.prefill_token * door.held_prompt_tokens + door.held * cost.decode_work(shape));
    queued * cost.work(shape) + held
}

/// The backlog and what it asks for. It is a finite amount to be drained over a stated time, not a load: the surplus is
/// bounded by what arrives, however long a cold start is.
pub fn backlog(
    fresh: &Fresh,
    arriving: f64,
    base: f64,
    capacity: &Capacity,
    waits: f64,
    timing: &Timing,
    current: u32,
) -> Backlog {
    let horizon = timing.drain_horizon;
    let ready = f64::from(fresh.ready);
    let elapsed = fresh.earliest_start.map_or(0.0, |start| timing.now.since(start));
    let remaining = (timing.lead_time - elapsed).clamp(0.0, timing.lead_time);
    let grows = (arriving - capacity.ceiling * ready).max(0.0);
    let at_arrival = waits + grows * remaining;
    // What is asked for already may be enough to be done within a lead time.
    let spare = f64::from(current) * capacity.ceiling - arriving;
    let soon_gone = spare > 0.0 && at_arrival <= spare * timing.patience;
    let surplus = if soon_gone { 0.0 } else { ((arriving + at_arrival / horizon) / capacity.ceiling - base).max(0.0) };
    Backlog { now: waits, at_arrival, horizon, surplus }
}

/// Times that a backlog is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Now.
    pub now: Moment,
    /// Seconds from asking for a replica until it serves.
    pub lead_time: f64,
    /// Seconds in which a backlog is to be gone once replicas have arrived.
    pub drain_horizon: f64,
    /// Seconds within which a backlog may drain without extra replicas.
    pub patience: f64,
}

impl Timing {
    /// The times under a policy.
    pub fn new(policy: &Policy, lead_time: f64, now: Moment) -> Self {
        let drain_horizon = policy.drain_horizon.unwrap_or(0.25 * lead_time).max(15.0);
        Self { now, lead_time, drain_horizon, patience: lead_time.max(drain_horizon) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_those_of_the_normal_distribution() {
        for (share, expected) in [(0.5, 0.0), (0.9, 1.2816), (0.99, 2.3263), (0.999, 3.0902)] {
            assert!((deviations(share) - expected).abs() < 1e-3, "{share}: {}", deviations(share));
        }
    }
}
