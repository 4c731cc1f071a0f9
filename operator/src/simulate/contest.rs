//! Rules in one load, on all seeds: each with its default settings and, when asked, with every value of its knob.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::load::Load;
use crate::scale::simulate::baselines::{Baseline, PUBLISHED};
use crate::scale::simulate::oracle::oracle;
use crate::scale::simulate::report::Run;
use crate::scale::simulate::routing::Routing;
use crate::scale::simulate::scaler::{Mortal, Ours};
use crate::scale::simulate::scenario::{Case, Scenario};
use crate::scale::simulate::{Outcome, simulate};

/// The product's own rule, or one of somebody else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    Ours,
    Theirs(Baseline),
}

/// Promised shares of good requests (`slo.attainment`) that the product's own rule is tried with, beside the scenario's goal.
const PROMISES: [f64; 4] = [0.9, 0.95, 0.99, 0.999];

impl Rule {
    pub(super) fn name(self) -> String {
        match self {
            Self::Ours => "ernie".to_owned(),
            Self::Theirs(baseline) => baseline.name(),
        }
    }

    /// What its knob is; `None` without one.
    pub(super) fn knob(self) -> Option<&'static str> {
        match self {
            Self::Ours => Some("slo.attainment"),
            Self::Theirs(baseline) => baseline.knob(),
        }
    }

    /// Values of its knob; the default first, `None` where it depends on the scenario.
    pub(super) fn grid(self) -> Vec<Option<f64>> {
        match self {
            Self::Ours => [None].into_iter().chain(PROMISES.map(Some)).collect(),
            Self::Theirs(baseline) if baseline.grid().is_empty() => vec![None],
            Self::Theirs(baseline) => baseline.grid().iter().copied().map(Some).collect(),
        }
    }
}

/// The rules of some names.
///
/// # Errors
///
/// A name that does not exist.
pub(super) fn rules(names: &[String]) -> anyhow::Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for name in names {
        match name.as_str() {
            "ernie" => rules.push(Rule::Ours),
            "all" => rules.extend(PUBLISHED.map(Rule::Theirs)),
            name => rules.push(Rule::Theirs(Baseline::from_name(name).map_err(anyhow::Error::msg)?)),
        }
    }
    Ok(if rules.is_empty() { vec![Rule::Ours] } else { rules })
}

/// How a contest is held.
#[derive(Debug)]
pub(super) struct Contest<'a> {
    /// Who takes part.
    pub rules: &'a [Rule],
    /// Whether each has every value of its knob.
    pub tuned: bool,
    /// Whether costs are compared with the oracle's.
    pub oracle: bool,
    /// Whether the product's decisions are explained.
    pub explains: bool,
    /// Simulations at the same time.
    pub jobs: usize,
}

/// One rule with one value of its knob, on one seed.
#[derive(Clone, Copy)]
struct Trial<'a> {
    rule: Rule,
    knob: Option<f64>,
    case: &'a Case,
}

impl Contest<'_> {
    /// Runs all rules over the cases of all seeds.
    pub(super) fn hold(&self, load: &Load, routing: Routing, seeds: Range<u64>, cases: &[Case]) -> Vec<Run> {
        let grid_of = |rule: Rule| match self.tuned {
            true => rule.grid(),
            false => rule.grid().into_iter().take(1).collect(),
        };
        // The oracles take longest: they begin.
        let clairvoyant = Rule::Theirs(Baseline::Oracle);
        let oracles = [clairvoyant].into_iter().filter(|_| self.oracle);
        let entrants = oracles.chain(self.rules.iter().copied().filter(|rule| !(self.oracle && *rule == clairvoyant)));
        let entries: Vec<(Rule, Option<f64>)> =
            entrants.flat_map(|rule| grid_of(rule).into_iter().map(move |knob| (rule, knob))).collect();
        let trials: Vec<Trial<'_>> = entries
            .iter()
            .flat_map(|(rule, knob)| cases.iter().map(|case| Trial { rule: *rule, knob: *knob, case }))
            .collect();
        let outcomes = in_parallel(&trials, self.jobs, |trial| trial.run(self.explains));
        let by_entry: Vec<&[Outcome]> = outcomes.chunks(cases.len().max(1)).collect();
        let best = by_entry.first().filter(|_| self.oracle).copied();
        let with_label = |of: &[Outcome], label: &str| -> Vec<Run> {
            let each = seeds.clone().zip(of).enumerate();
            each.map(|(index, (seed, outcome))| {
                run(load, label, routing, seed, outcome, best.and_then(|best| best.get(index)))
            })
            .collect()
        };
        let goal = cases.first().map_or(1.0, |case| case.goal);
        let mut runs = Vec::new();
        for rule in self.rules {
            let own = entries.iter().zip(&by_entry).filter(|((owner, _), _)| owner == rule);
            let own: Vec<(Option<f64>, &[Outcome])> = own.map(|((_, knob), outcomes)| (*knob, *outcomes)).collect();
            let Some(((_, default), others)) = own.split_first() else { continue };
            let better = others.iter().filter(|(_, of)| standing(of, goal) > standing(default, goal));
            let tuned = better.max_by(|a, b| {
                standing(a.1, goal).partial_cmp(&standing(b.1, goal)).unwrap_or(std::cmp::Ordering::Equal)
            });
            let name = rule.name();
            let is_best = !others.is_empty() && tuned.is_none();
            runs.extend(with_label(default, &if is_best { format!("{name} (tuned: the same)") } else { name.clone() }));
            if let Some((knob, outcomes)) = tuned {
                runs.extend(with_label(outcomes, &format!("{name} tuned {}", knob.unwrap_or_default())));
            }
        }
        runs
    }
}

impl Trial<'_> {
    fn run(&self, explains: bool) -> Outcome {
        let case = self.case;
        let baseline = match self.rule {
            Rule::Theirs(baseline) => baseline,
            Rule::Ours => {
                let mut policy = case.policy.clone();
                policy.slo.attainment = self.knob.unwrap_or(policy.slo.attainment);
                let mut ours = Mortal::new(Ours::new(policy, explains).with_takeover(case.takeover));
                return simulate(&case.setting, case.requests.clone(), &mut ours);
            }
        };
        let knob = self.knob.unwrap_or_default();
        let Some(mut scaler) = baseline.scaler(knob, &case.policy) else { return oracle(case) };
        let mut setting = case.setting.clone();
        if let Some(count) = baseline.fixed(knob, &case.policy) {
            // More than the cluster has room for wait for it like everybody's.
            let places =
                setting.room.iter().find(|(from, _)| *from <= 0.0).map_or(u32::MAX, |(_, places)| *places as u32);
            setting.initial = count.min(places);
        }
        simulate(&setting, case.requests.clone(), scaler.as_mut())
    }
}

fn run(load: &Load, policy: &str, routing: Routing, seed: u64, outcome: &Outcome, best: Option<&Outcome>) -> Run {
    let burst = load.scenario.and_then(Scenario::burst);
    let cost_ratio = best.map(|best| outcome.mean_replicas / best.mean_replicas);
    Run {
        scenario: load.name.clone(),
        policy: policy.to_owned(),
        routing,
        seed,
        reaction_seconds: burst.and_then(|burst| outcome.reaction(burst)),
        recovery_seconds: burst.map(|burst| outcome.recovery(burst)),
        outcome: Outcome { cost_ratio, ..outcome.clone() },
    }
}

/// How good outcomes are, to be compared: those whose mean reaches the goal come first and by their cost; the others by
/// their attainment, then by their cost.
fn standing(outcomes: &[Outcome], goal: f64) -> (f64, f64) {
    let count = outcomes.len().max(1) as f64;
    let attainment = outcomes.iter().map(|outcome| outcome.feasible_attainment).sum::<f64>() / count;
    let cost = outcomes.iter().map(|outcome| outcome.mean_replicas).sum::<f64>() / count;
    (attainment.min(goal), -cost)
}

/// Applies a function to all items on some threads; results in the order of the items.
fn in_parallel<T: Sync, R: Send>(items: &[T], jobs: usize, of: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    let work = || {
        while let Some((index, item)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, items.get(at)?)))
        {
            let result = of(item);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
        }
    };
    thread::scope(|scope| (0..jobs.clamp(1, items.len().max(1))).for_each(|_| drop(scope.spawn(work))));
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}
