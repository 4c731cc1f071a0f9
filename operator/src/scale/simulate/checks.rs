//! The simulator checks itself: against Little's law, the conservation of work, the closed form of a step's time, and every
//! plan there is.

use super::engine::Engine;
use super::outcome::Outcome;
use super::routing::Routing;
use super::scaler::{Fixed, Mortal, Ours, Planned};
use super::scenario::{Case, Scenario};
use super::{Request, Setting, oracle::oracle, simulate};
use crate::scale::policy::Policy;
use crate::scale::step_cost::RequestShape;
use ernie_workload::{Chance, Lengths, renewal, steps};

fn quiet() -> Engine {
    Engine { noise: 0.0, ..Engine::default() }
}

fn setting(seconds: f64, initial: u32, engine: Engine) -> Setting {
    let case = Scenario::S1.case(5, Routing::LateBinding, &[]);
    Setting { seconds, initial, engine, ..case.setting }
}

fn poisson(rate: f64, seconds: f64, lengths: Lengths) -> Vec<Request> {
    renewal(|_| rate, seconds, 1.0, lengths, &mut Chance::new(9, 1))
}

#[test]
fn the_same_seed_gives_the_same_outcome_and_another_seed_another() {
    let run = |seed| {
        let case = Scenario::S2.case(seed, Routing::Connection, &[]);
        simulate(&case.setting, case.requests, &mut Ours::new(case.policy, true))
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1).ttft_seconds, run(2).ttft_seconds);
}

#[test]
fn littles_law_holds_within_one_percent() {
    for routing in [Routing::Connection, Routing::LateBinding] {
        for scenario in [Scenario::S1, Scenario::S2, Scenario::S14] {
            let case = scenario.case(3, routing, &[]);
            let outcome = simulate(&case.setting, case.requests, &mut Ours::new(case.policy, false));
            let ratio = outcome.little.area / outcome.little.stays;
            assert!((ratio - 1.0).abs() < 0.01, "{scenario:?} {routing:?}: {:?}", outcome.little);
        }
    }
}

#[test]
fn work_is_conserved() {
    use super::batch::{Batch, Job, Progress};
    let engine = quiet();
    let mut batch = Batch::default();
    let mut chance = Chance::new(4, 1);
    let (mut prompts, mut outputs, mut finished) = (0, 0, 0);
    let mut progress = Vec::new();
    let mut due = None;
    for id in 0..500 {
        let (prompt, output) = (1 + chance.below(3000) as u32, 1 + chance.below(300) as u32);
        let cached = chance.below(prompt as usize) as u32;
        assert!(batch.accept(Job { id, prompt, cached, output }, &Engine { max_num_queued: 1000, ..engine }));
        prompts += u64::from(prompt - cached);
        outputs += u64::from(output);
        due = due.or(batch.poke(0.0, &engine, 1.0));
    }
    let mut now = 0.0;
    while let Some(at) = due {
        now = at;
        due = batch.advance(&engine, 1.0, f64::INFINITY, &mut progress);
        finished += progress.drain(..).filter(|event| matches!(event, Progress::Finished(_))).count();
    }
    let sample = batch.sample(now, &engine);
    assert_eq!((finished, batch.len(), batch.reserved(), sample.kv_used), (500, 0, 0, 0.0));
    assert_eq!((sample.prefill_tokens, sample.output_tokens), (prompts as f64, outputs as f64));
    // Each answer's first token comes from the last step of its prompt.
    assert_eq!(sample.decode_tokens, (outputs - 500) as f64);
    assert!((sample.step_seconds - now).abs() < 1e-6, "always busy: {} of {now}", sample.step_seconds);
}

#[test]
fn the_time_of_a_step_is_the_closed_form_within_three_percent() {
    let engine = quiet();
    for (prompt, output, rate) in [(4000, 1000, 0.7), (4000, 1000, 1.1), (500, 200, 6.0), (1000, 50, 5.0)] {
        let requests = poisson(rate, 20_000.0, Lengths::Fixed(prompt, output));
        let setting = setting(20_000.0, 1, engine);
        let outcome = simulate(&setting, requests, &mut Fixed(1));
        let work = engine.cost.work(&RequestShape::new(f64::from(prompt), f64::from(output)));
        let expected = engine.cost.base / (1.0 - rate * work);
        let found = outcome.itl_seconds.p50;
        assert!((found / expected - 1.0).abs() < 0.03, "{prompt}/{output} at {rate}/s: {found} for {expected}");
    }
}

#[test]
fn the_published_episode_is_served_whole_by_eight_replicas() {
    let case = Scenario::S1.case(0, Routing::LateBinding, &[]);
    let outcome = simulate(&Setting { initial: 8, ..case.setting }, case.requests, &mut Fixed(8));
    assert_eq!((outcome.attainment, outcome.mean_replicas, outcome.lost), (1.0, 8.0, 0));
}

/// A small case: two steps of load, up to three replicas that start in 20 s.
fn small(seed: u64) -> Case {
    let mut case = Scenario::S1.case(seed, Routing::LateBinding, &[]);
    let parts = [(60.0, 0.6), (60.0, 3.2), (60.0, 0.6)];
    let rate = steps(&parts);
    case.requests = renewal(rate, 180.0, 1.0, Lengths::Fixed(4000, 300), &mut Chance::new(seed, 1));
    case.setting.seconds = 180.0;
    case.setting.initial = 1;
    case.setting.startup.seconds = 20.0;
    case.policy = Policy { min_replicas: 1, max_replicas: 3, ..case.policy };
    case.goal = 0.97;
    case
}

/// The cheapest of all plans that change every 30 s and reach the goal.
fn exhaustive(case: &Case) -> Option<Outcome> {
    let plans = (0..3_u32.pow(6)).map(|code| {
        let levels: Vec<u32> = (0..6).map(|at| 1 + code / 3_u32.pow(at) % 3).collect();
        let steps = levels.iter().enumerate().map(|(at, level)| (30.0 * at as f64, *level));
        let setting = Setting { initial: levels[0], ..case.setting.clone() };
        simulate(&setting, case.requests.clone(), &mut Planned::new(steps))
    });
    plans
        .filter(|outcome| outcome.feasible_attainment >= case.goal)
        .min_by(|a, b| a.mean_replicas.total_cmp(&b.mean_replicas))
}

#[test]
fn the_oracle_is_as_cheap_as_the_best_of_all_plans_on_small_cases() {
    for seed in 0..3 {
        let case = small(seed);
        let best = exhaustive(&case).expect("some plan reaches the goal");
        let found = oracle(&case);
        assert!(found.feasible_attainment >= case.goal);
        let ratio = found.mean_replicas / best.mean_replicas;
        assert!(ratio < 1.05, "seed {seed}: {} for {}", found.mean_replicas, best.mean_replicas);
    }
}

#[test]
fn the_autoscaler_keeps_its_promises_on_a_subset_of_the_scenarios() {
    let run = |scenario: Scenario, seed| {
        let case = scenario.case(seed, Routing::LateBinding, &[]);
        let mut ours = Mortal::new(Ours::new(case.policy.clone(), false).with_takeover(case.takeover));
        (simulate(&case.setting, case.requests.clone(), &mut ours), case)
    };
    let (step, _) = run(Scenario::S2, 0);
    assert!(step.reaction(600.0).is_some_and(|seconds| seconds <= 5.0), "S2: {:?}", step.decisions);
    let (dark, case) = run(Scenario::S10, 0);
    let (from, to) = case.setting.blackouts[0];
    let blind =
        |change: &&super::outcome::Change| change.time > from + 15.0 && change.time < to && change.to < change.from;
    assert_eq!(dark.decisions.iter().find(blind), None, "S10: nothing goes while nothing is heard");
    let (full, _) = run(Scenario::S11, 0);
    let fallen = full.decisions.iter().find(|change| change.time > 4200.0 && change.to < change.from);
    assert!(fallen.is_some_and(|change| change.time < 4200.0 + 60.0 + 120.0 + 30.0 + 5.0), "S11: {:?}", full.decisions);
    let (closed, _) = run(Scenario::S14, 0);
    assert!(closed.peak_replicas <= 4, "S14: a closed loop does not climb: {}", closed.peak_replicas);
}

#[test]
fn a_controller_that_dies_every_minute_does_about_as_well_as_one_that_does_not() {
    let run = |scenario: Scenario| {
        let case = scenario.case(1, Routing::LateBinding, &[]);
        let mut ours = Mortal::new(Ours::new(case.policy.clone(), false).with_takeover(case.takeover));
        simulate(&case.setting, case.requests, &mut ours)
    };
    let (whole, broken) = (run(Scenario::S1), run(Scenario::S12));
    assert!(
        broken.feasible_attainment >= whole.feasible_attainment - 0.02,
        "{} {}",
        whole.attainment,
        broken.attainment
    );
    assert!(broken.mean_replicas <= 1.1 * whole.mean_replicas, "{} {}", whole.mean_replicas, broken.mean_replicas);
}

#[test]
fn a_prior_that_is_wrong_is_within_ten_percent_of_the_true_capacity_after_two_minutes() {
    use crate::scale::step_cost::{Room, capacity};
    for seed in 0..4 {
        for routing in [Routing::Connection, Routing::LateBinding] {
            let mut case = Scenario::S13.case(seed, routing, &[]);
            case.setting.seconds = 120.0;
            case.requests.retain(|request| request.at < 120.0);
            let mut ours = Ours::new(case.policy.clone(), false);
            simulate(&Setting { patience: 0.0, ..case.setting.clone() }, case.requests, &mut ours);
            let learnt = ours.history().fit.cost(&case.policy.prior);
            let engine = case.setting.engine;
            let room = Room { kv_tokens: f64::from(engine.kv_tokens), sequences: f64::from(engine.max_num_seqs) };
            let shape = RequestShape::new(4000.0, 1000.0);
            let per_second = |cost| capacity(&cost, &shape, room, &case.policy.slo, 0.85).planned / cost.work(&shape);
            let ratio = per_second(learnt) / per_second(engine.cost);
            assert!((ratio - 1.0).abs() < 0.1, "seed {seed} {routing:?}: {ratio}");
        }
    }
}
