//! The cheapest plan that somebody who knows the future would make.
//!
//! It knows every request and its true cost. A plan follows from the work that arrives, smoothed, and a utilisation: level
//! `ℓ` of replicas is on wherever the need is at least `ℓ`; gaps shorter than a cold start are bridged, and each stretch
//! begins a cold start early. Of these plans the cheapest that reaches the goal *in the simulation* is taken, and then
//! stretches are shortened as long as the goal is kept.

use super::outcome::Outcome;
use super::scaler::Planned;
use super::scenario::Case;
use super::simulate;
use crate::scale::step_cost::RequestShape;

/// Seconds of a bin of the plan.
const BIN: f64 = 5.0;
/// Seconds over which work is averaged.
const SMOOTHINGS: [f64; 3] = [20.0, 60.0, 120.0];
/// Halvings of the utilisation's interval.
const HALVINGS: u32 = 6;
/// Most simulations of the search for shorter stretches; fewer where one takes long.
const TRIALS: u32 = 60;
/// Requests that those may simulate together.
const TRIAL_REQUESTS: usize = 5_000_000;

/// Replicas in each bin, by level: `plan[bin]` are on.
type Plan = Vec<u32>;

/// The oracle's outcome; the best that it found when no plan reaches the goal.
pub fn oracle(case: &Case) -> Outcome {
    let work = arriving(case);
    let mut best: Option<(Plan, Outcome)> = None;
    for smoothing in SMOOTHINGS {
        let smooth = smoothed(&work, smoothing);
        let (mut low, mut high) = (0.2, 1.5);
        for _ in 0..HALVINGS {
            let utilization = (low + high) / 2.0;
            let plan = staffed(&smooth, utilization, case);
            let outcome = run(case, &plan);
            let reached = outcome.feasible_attainment >= case.goal;
            if reached {
                low = utilization
            } else {
                high = utilization
            }
            keep_better(&mut best, plan, outcome, case.goal);
        }
    }
    let (mut plan, mut outcome) = best.unwrap_or_else(|| {
        let plan = vec![case.policy.max_replicas; work.len()];
        let outcome = run(case, &plan);
        (plan, outcome)
    });
    if outcome.feasible_attainment >= case.goal {
        shorten(case, &mut plan, &mut outcome);
    }
    outcome
}

fn keep_better(best: &mut Option<(Plan, Outcome)>, plan: Plan, outcome: Outcome, goal: f64) {
    let is_better = best.as_ref().is_none_or(|(_, best)| {
        let (is_in, was_in) = (outcome.feasible_attainment >= goal, best.feasible_attainment >= goal);
        match (is_in, was_in) {
            (true, true) => outcome.mean_replicas < best.mean_replicas,
            (false, false) => outcome.feasible_attainment > best.feasible_attainment,
            _ => is_in,
        }
    });
    if is_better {
        *best = Some((plan, outcome));
    }
}

/// Work that arrives in each bin, in replica-seconds per second.
fn arriving(case: &Case) -> Vec<f64> {
    let cost = &case.setting.engine.cost;
    let mut bins = vec![0.0; (case.setting.seconds / BIN).ceil() as usize];
    for request in &case.requests {
        let shape = RequestShape::new(f64::from(request.prompt), f64::from(request.output));
        let work = cost.work(&RequestShape { prompt: f64::from(request.prompt - request.cached), ..shape });
        if let Some(bin) = bins.get_mut((request.at / BIN) as usize) {
            *bin += work / BIN;
        }
    }
    bins
}

/// Centred moving averages.
fn smoothed(work: &[f64], seconds: f64) -> Vec<f64> {
    let reach = (seconds / BIN / 2.0) as usize;
    let window = |at: usize| &work[at.saturating_sub(reach)..(at + reach + 1).min(work.len())];
    (0..work.len()).map(|at| window(at).iter().sum::<f64>() / window(at).len() as f64).collect()
}

fn staffed(work: &[f64], utilization: f64, case: &Case) -> Plan {
    let (min, max) = (case.policy.min_replicas, case.policy.max_replicas);
    let need: Vec<u32> = work.iter().map(|work| ((work / utilization).ceil() as u32).clamp(min, max)).collect();
    let start = (case.setting.startup.seconds / BIN).ceil() as usize + 1;
    let mut plan = vec![min; work.len()];
    for level in min + 1..=max {
        let mut last: Option<usize> = None;
        for at in 0..work.len() {
            if need[at] < level {
                continue;
            }
            // From a cold start before, or from the last time that it was needed if that is sooner.
            let from = match last {
                Some(last) if at - last <= start => last,
                _ => at.saturating_sub(start),
            };
            plan[from..=at].iter_mut().for_each(|replicas| *replicas = (*replicas).max(level));
            last = Some(at);
        }
    }
    plan
}

fn run(case: &Case, plan: &Plan) -> Outcome {
    let steps = plan.iter().enumerate().map(|(bin, replicas)| (bin as f64 * BIN, *replicas));
    let mut setting = case.setting.clone();
    setting.initial = plan.first().copied().unwrap_or(1);
    simulate(&setting, case.requests.clone(), &mut Planned::new(steps))
}

/// Takes the ends off stretches, long ones first, as long as the goal is kept.
fn shorten(case: &Case, plan: &mut Plan, outcome: &mut Outcome) {
    let most = TRIALS.min((TRIAL_REQUESTS / case.requests.len().max(1)) as u32);
    let mut trials = 0;
    for part in [12, 3, 1] {
        let mut from = 1;
        while let Some(edge) = (from..plan.len()).find(|at| plan[*at] != plan[*at - 1]) {
            from = edge + 1;
            let mut shorter = plan.clone();
            if plan[edge] > plan[edge - 1] {
                let low = plan[edge - 1];
                (edge..(edge + part).min(plan.len())).for_each(|at| shorter[at] = shorter[at].min(low));
            } else {
                let low = plan[edge];
                (edge.saturating_sub(part)..edge).for_each(|at| shorter[at] = shorter[at].min(low));
            }
            trials += 1;
            if trials > most {
                return;
            }
            let found = run(case, &shorter);
            if found.feasible_attainment >= case.goal && found.mean_replicas < outcome.mean_replicas {
                (*plan, *outcome) = (shorter, found);
                from = from.saturating_sub(part + 1).max(1);
            }
        }
    }
}
