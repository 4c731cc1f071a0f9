//! The chain of rules, in order.

use super::decision::{Decision, Figures, to_replicas};
use super::demand::{Arriving, robust_sum};
use super::fresh::{Fresh, fresh};
use super::history::{History, Remembered, ScaleEvent};
use super::moment::Moment;
use super::need::{self, Timing};
use super::observation::Observation;
use super::policy::Policy;
use super::schedule;
use super::step_cost::{self, Capacity, RequestShape, StepCost};

/// Bounds of the time over which swings of the load even out: shorter swings are what queues are for.
const SHORTEST_SWING: f64 = 10.0;
const LONGEST_SWING: f64 = 120.0;
/// Seconds after a backlog has gone before the replicas for it may go.
const SURPLUS_REST: f64 = 60.0;
/// Seconds after a change of leader in which nothing goes: what happened meanwhile has not been heard.
const RESUMED_REST: f64 = 15.0;
/// Polling intervals without a decision that are no gap yet.
const NO_GAP: f64 = 3.0;
/// Part of the cache that may be in use after a decrease.
const RESIDENT_SHARE: f64 = 0.9;

/// How many replicas to ask for. Pure, total and deterministic: the same arguments give the same answer, whatever they are.
pub fn decide(observation: &Observation, policy: &Policy, history: &History, now: Moment) -> Decision {
    let mut next = history.clone();
    let elapsed = history.decided.map_or(0.0, |decided| now.since(decided).max(0.0));
    if history.decided.is_some_and(|decided| decided > now) {
        next.set_back(now);
    }
    // What was recommended before a gap as long as the window says nothing of now: a whole window is to be seen again.
    let window = policy.behavior.scale_down.stabilization_window.unwrap_or(history.down_window.seconds);
    if elapsed > window.max(NO_GAP * policy.polling_interval) {
        next.began = None;
    }

    // 1. What may be believed.
    let fresh = fresh(observation, policy, &mut next, now);
    let takes_over = history.decided.is_some() && history.cursors.is_empty() && history.front_door.is_none();
    if takes_over && !fresh.is_blind() {
        next.resumed = Some(now);
    }
    if !fresh.is_blind() {
        next.heard = Some(now);
        next.began.get_or_insert(now);
    }

    // 2. What a step costs, what a replica takes in, how much work arrives.
    let (cost, capacity, arriving) = measure(&fresh, policy, &mut next, elapsed, now);

    // 3., 4. How long a replica takes to arrive, and how much demand grows meanwhile.
    next.cold_starts.record(observation, now);
    let lead_time = next.cold_starts.lead_time(policy.cold_start, policy.polling_interval);
    if !fresh.is_blind() {
        next.growth.record(arriving.sustained, arriving.recent_floor, lead_time, now);
    }
    let headroom = next.growth.headroom(arriving.sustained, policy.headroom.quantile, policy.headroom.max);

    // 5., 6. Replicas for the load.
    let shape = next.demand.shape(policy.first_guess);
    let deviations = need::deviations(policy.slo.attainment);
    let window = swing_window(&cost, &capacity, &shape, policy);
    next.imbalance.record(&fresh, elapsed);
    // A gateway gives requests to whoever has room.
    let evenness = if fresh.front_door.is_some() { 1.0 } else { next.imbalance.share() };
    let share = next.budget.share * evenness;
    let base = need::base(&arriving, headroom, &capacity, share, deviations, window);

    // 7. Replicas for what has piled up.
    let timing = Timing::new(policy, lead_time, now);
    let waits = need::waiting(&fresh, &cost, &shape, timing.drain_horizon * capacity.ceiling);
    let backlog = need::backlog(&fresh, arriving.proven, base, &capacity, waits, &timing, observation.current);
    let was_high = next.surplus.is_some_and(|at| now.since(at) < SURPLUS_REST);
    if backlog.surplus > 0.0 || (was_high && backlog.at_arrival > 0.1 * base) {
        next.surplus = Some(now);
    }

    // 8. What the silent ones may be doing.
    let unheard = unheard(&fresh, cost.work(&shape), &capacity);
    let high = Arriving { sustained: arriving.sustained + unheard, proven: arriving.proven + unheard, ..arriving };
    let base_high = need::base(&high, headroom, &capacity, share, deviations, window);

    let mut figures = Figures {
        current: observation.current,
        ready: fresh.ready,
        silent: fresh.silent,
        sustained: arriving.sustained,
        arriving: arriving.proven,
        headroom,
        deviation: arriving.deviation / window.sqrt(),
        deviations,
        planned: capacity.planned * share,
        ceiling: capacity.ceiling,
        share,
        bound: capacity.bound,
        infeasible: capacity.infeasible,
        backlog: backlog.now,
        backlog_at_arrival: backlog.at_arrival,
        drain_horizon: backlog.horizon,
        lead_time,
        base,
        surplus: backlog.surplus,
        base_high,
        resident: resident(&fresh, next.room),
        tolerance_up: policy.tolerance.up,
        tolerance_down: policy.tolerance.down,
        down_window: policy.behavior.scale_down.stabilization_window.unwrap_or(next.down_window.seconds),
        highest: 0,
        lowest: u32::MAX,
        hold: false,
        blind: fresh.is_blind(),
        fallback: None,
        scheduled: schedule::floor(&policy.schedules, now, lead_time),
        lower_limit: policy.behavior.lower_limit(observation.current, &history.events, now),
        upper_limit: policy.behavior.upper_limit(observation.current, &history.events, now),
        quota: observation.quota,
        min_replicas: policy.min_replicas.min(policy.max_replicas),
        max_replicas: policy.max_replicas,
    };
    remember_recommendation(&mut figures, policy, &mut next, now);
    figures.hold = must_hold(&figures, &fresh, &next, now);
    figures.fallback = policy
        .fallback
        .replicas
        .filter(|_| next.heard.or(next.decided).is_some_and(|heard| now.since(heard) >= policy.fallback.after));

    // 9. to 11. The answer within all limits.
    let (desired, reason) = figures.answer();
    let change = i64::from(desired) - i64::from(observation.current);
    if change != 0 && !policy.advisory {
        let change = change.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
        next.push_event(ScaleEvent { at: now, change });
    }
    // Advice that nobody follows is no replica given up or wanted back.
    if !policy.advisory {
        next.down_window.learn(observation.current, desired, lead_time, elapsed, now);
    }
    next.decided = Some(now);
    Decision { desired, reason, figures, history: next }
}

/// Seconds over which swings of the load even out: as long as a request stays and users wait for a first token.
fn swing_window(cost: &StepCost, capacity: &Capacity, shape: &RequestShape, policy: &Policy) -> f64 {
    let stay = shape.output * cost.base / (1.0 - capacity.planned).max(0.05);
    (stay + policy.slo.ttft).clamp(SHORTEST_SWING, LONGEST_SWING)
}

/// Takes one tick's data in, and says what it amounts to.
fn measure(
    fresh: &Fresh,
    policy: &Policy,
    next: &mut History,
    elapsed: f64,
    now: Moment,
) -> (StepCost, Capacity, Arriving) {
    next.fit.learn(&policy.prior, fresh.lessons.iter().copied(), elapsed);
    let cost = next.fit.cost(&policy.prior);
    // The middle one: a replica that lies about its size moves nothing.
    let told = |of: fn(&super::observation::Sample) -> f64| {
        let mut told: Vec<f64> = fresh.samples.iter().map(of).filter(|value| *value > 0.0).collect();
        told.sort_by(f64::total_cmp);
        told.get(told.len().saturating_sub(1) / 2).copied()
    };
    next.room = Remembered {
        kv_tokens: told(|sample| sample.kv_capacity).unwrap_or(next.room.kv_tokens),
        sequences: told(|sample| sample.max_num_seqs).unwrap_or(next.room.sequences),
    };
    let limits = |next: &History| {
        let shape = next.demand.shape(policy.first_guess);
        step_cost::capacity(&cost, &shape, next.room.into(), &policy.slo, policy.target_utilization)
    };
    let most = limits(next).planned;
    let dispersion = next.demand.record(fresh, &cost, most, policy.first_guess, elapsed);
    let capacity = limits(next);
    let arriving = next.demand.arriving(&cost, &next.demand.shape(policy.first_guess), dispersion);
    let bad = robust_sum(&fresh.deltas, |delta| delta.judged - delta.good);
    let judged = robust_sum(&fresh.deltas, |delta| delta.judged).max(bad);
    let held = fresh.front_door.is_some_and(|door| door.held > 0.0);
    let settled = fresh.starting == 0 && fresh.silent == 0 && fresh.ready > 0 && !held;
    let used = arriving.sustained / (f64::from(fresh.ready.max(1)) * capacity.planned);
    next.budget.record(judged, judged - bad, settled, used, policy.slo.attainment, now);
    (cost, capacity, arriving)
}

/// Work that the silent replicas may be taking in: as much as the busiest that answers and one replica's worth more, which
/// no bounded claim exceeds while most of them answer.
fn unheard(fresh: &Fresh, work: f64, capacity: &Capacity) -> f64 {
    if fresh.front_door.is_some() || fresh.silent == 0 {
        return 0.0;
    }
    let busiest = fresh.deltas.iter().map(|delta| delta.arrivals / delta.seconds * work).fold(0.0, f64::max);
    f64::from(fresh.silent) * (busiest + capacity.planned)
}

/// Replicas below which the cache that is in use would not fit.
fn resident(fresh: &Fresh, room: Remembered) -> u32 {
    let used: f64 = fresh.samples.iter().map(|sample| sample.kv_used.min(room.kv_tokens)).sum();
    if room.kv_tokens > 0.0 { to_replicas(used / (RESIDENT_SHARE * room.kv_tokens)) } else { 0 }
}

/// Enters this moment's recommendations and reads the windows.
fn remember_recommendation(figures: &mut Figures, policy: &Policy, next: &mut History, now: Moment) {
    let up_window = policy.behavior.scale_up.stabilization_window.unwrap_or(0.0);
    let down_window = figures.down_window;
    if !figures.blind {
        let up = to_replicas(figures.need());
        next.down_window.record(figures.for_decrease(), up, down_window.max(up_window), now);
    }
    figures.highest = next.down_window.highest(down_window, now);
    // Stretches of the window hold several moments: without a window only this one counts.
    figures.lowest = match up_window > 0.0 {
        true => next.down_window.lowest(up_window, now),
        false => u32::MAX,
    };
}

/// Whether a decrease is out of the question now.
fn must_hold(figures: &Figures, fresh: &Fresh, next: &History, now: Moment) -> bool {
    let backlog = next.surplus.is_some_and(|at| now.since(at) < SURPLUS_REST)
        || fresh.front_door.is_some_and(|door| door.held > 0.0);
    let needed_one_starts = fresh.starting > 0 && figures.base_high > f64::from(fresh.ready);
    let just_began = next.began.is_none_or(|began| now.since(began) < figures.down_window);
    let just_resumed = next.resumed.is_some_and(|resumed| now.since(resumed) < RESUMED_REST);
    let mostly_silent =
        fresh.front_door.is_none() && fresh.silent > 0 && (fresh.ready < 3 || 2 * fresh.silent >= fresh.ready);
    let none_ready = fresh.ready == 0 && fresh.front_door.is_none();
    backlog || needed_one_starts || just_began || just_resumed || mostly_silent || none_ready || next.budget.burn > 1.0
}
