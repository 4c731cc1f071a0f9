//! More demand never asks for less, more capacity never for more.

use super::*;
use crate::scale::step_cost::StepCost;

fn answer(observation: &Observation, policy: &Policy, history: &History, now: f64) -> u32 {
    decide(observation, policy, history, Moment::from_seconds(now)).desired
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn another_arrival_never_lowers_the_answer(
        fleet in fleets(), ticks in 1..30_u32, which in any::<prop::sample::Index>(), more in 1..50_u32, current in 1..12_u32,
    ) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let before = fleet.observe(current, now + 5.0);
        let mut after = before.clone();
        let index = which.index(after.replicas.len());
        if let Some(sample) = &mut after.replicas[index].sample {
            sample.accepted += f64::from(more);
        }
        prop_assert!(answer(&after, &policy, &history, now + 5.0) >= answer(&before, &policy, &history, now + 5.0));
    }

    #[test]
    fn a_refused_request_counts_like_an_accepted_one(fleet in fleets(), ticks in 1..30_u32, more in 1..500_u32) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let with = |field: fn(&mut Sample) -> &mut f64| {
            let mut observation = fleet.observe(2, now + 5.0);
            if let Some(sample) = &mut observation.replicas[0].sample {
                *field(sample) += f64::from(more);
            }
            answer(&observation, &policy, &history, now + 5.0)
        };
        prop_assert_eq!(with(|sample| &mut sample.rejected), with(|sample| &mut sample.accepted));
    }

    #[test]
    fn a_request_that_waits_or_is_held_never_lowers_the_answer(
        fleet in fleets(), ticks in 1..30_u32, more in 1..500_u32, current in 1..12_u32,
    ) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, true);
        let mut before = fleet.observe(current, now + 5.0);
        before.front_door = Some(fleet.door(now + 5.0));
        let least = answer(&before, &policy, &history, now + 5.0);
        let mut waits = before.clone();
        if let Some(sample) = &mut waits.replicas[0].sample {
            sample.waiting += f64::from(more);
        }
        prop_assert!(answer(&waits, &policy, &history, now + 5.0) >= least);
        let mut held = before.clone();
        if let Some(door) = &mut held.front_door {
            door.held += f64::from(more);
        }
        prop_assert!(answer(&held, &policy, &history, now + 5.0) >= least);
        let mut arrived = before;
        if let Some(door) = &mut arrived.front_door {
            door.requests += f64::from(more);
            door.prompt_tokens += f64::from(more) * fleet.prompt;
        }
        prop_assert!(answer(&arrived, &policy, &history, now + 5.0) >= least);
    }

    #[test]
    fn another_ready_replica_never_raises_the_answer(fleet in fleets(), ticks in 1..30_u32, current in 1..12_u32) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, true);
        let mut before = fleet.observe(current, now + 5.0);
        before.front_door = Some(fleet.door(now + 5.0));
        let mut after = before.clone();
        let idle = Fleet { waiting: 0.0, ..fleet.clone() }.sample(0.0, now + 5.0);
        after.replicas.push(replica(99, State::Ready, Some(Sample { kv_used: 0.0, ..idle })));
        prop_assert!(answer(&after, &policy, &history, now + 5.0) <= answer(&before, &policy, &history, now + 5.0));
    }

    #[test]
    fn a_laxer_objective_or_a_higher_utilisation_raises_the_answer_by_one_at_most(
        fleet in fleets(), ticks in 1..30_u32, ttft in 1.0..10.0_f64, itl in 0.05..0.5_f64, use_ in 0.3..0.95_f64,
        laxer in 1.0..3.0_f64, current in 1..12_u32,
    ) {
        let strict = Policy { slo: Slo { ttft, itl, attainment: 0.99 }, target_utilization: use_, ..policy(50) };
        let (history, now) = fleet.history(&strict, ticks, false);
        let at = |policy: &Policy| {
            decide(&fleet.observe(current, now + 5.0), policy, &history, Moment::from_seconds(now + 5.0))
        };
        let first = at(&strict);
        let lax = [
            Policy { slo: Slo { ttft: ttft * laxer, ..strict.slo }, ..strict.clone() },
            Policy { slo: Slo { itl: itl * laxer, ..strict.slo }, ..strict.clone() },
            Policy { target_utilization: (use_ * laxer).min(0.99), ..strict.clone() },
        ];
        for policy in lax {
            let second = at(&policy);
            // What cannot be met has no part in the answer: only objectives that can be met are compared.
            let comparable = !first.figures.infeasible && !second.figures.infeasible;
            // What one replica may claim beyond the others is bounded by what a replica is planned for, which a laxer
            // objective raises: so is, by one replica at most, the work that is believed to arrive.
            prop_assert!(!comparable || second.desired <= first.desired + 1, "{first}\n{second}");
        }
    }

    #[test]
    fn higher_bounds_never_lower_the_answer(fleet in fleets(), ticks in 1..30_u32, min in 1..10_u32, more in 1..10_u32) {
        let low = Policy { min_replicas: min, ..policy(20) };
        let (history, now) = fleet.history(&low, ticks, false);
        let observation = fleet.observe(5, now + 5.0);
        let least = answer(&observation, &low, &history, now + 5.0);
        for high in [
            Policy { min_replicas: min + more, ..low.clone() },
            Policy { max_replicas: 20 + more, ..low.clone() },
        ] {
            prop_assert!(answer(&observation, &high, &history, now + 5.0) >= least);
        }
    }

    #[test]
    fn the_unit_of_tokens_does_not_matter(fleet in fleets(), ticks in 1..30_u32, power in -3..4_i32, current in 1..12_u32) {
        // Prompt tokens counted in units of 2^power, which is exact in binary; a cache that costs nothing knows no unit.
        let unit = 2.0_f64.powi(power);
        let scaled = |observation: &Observation, unit: f64| {
            let mut observation = observation.clone();
            for sample in observation.replicas.iter_mut().filter_map(|replica| replica.sample.as_mut()) {
                sample.prompt_tokens *= unit;
                sample.prefill_tokens *= unit;
                (sample.kv_token_steps, sample.kv_capacity) = (0.0, 0.0);
            }
            if let Some(door) = &mut observation.front_door {
                door.prompt_tokens *= unit;
            }
            observation
        };
        let cost = StepCost { resident_token: 0.0, ..StepCost::default() };
        let first = Policy { prior: cost, ..policy(30) };
        let second = Policy { prior: StepCost { prefill_token: cost.prefill_token / unit, ..cost }, ..first.clone() };
        let second = Policy { first_guess: (1000.0 * unit, 200.0), ..second };
        let (mut one, mut two) = (History::default(), History::default());
        let (mut a, mut b) = (0, 0);
        for tick in 1..=ticks {
            let now = START + 5.0 * f64::from(tick);
            let mut observation = fleet.observe(current, now);
            observation.front_door = Some(fleet.door(now));
            let at = Moment::from_seconds(now);
            let (left, right) = (decide(&scaled(&observation, 1.0), &first, &one, at), decide(&scaled(&observation, unit), &second, &two, at));
            (a, b, one, two) = (left.desired, right.desired, left.history, right.history);
        }
        prop_assert_eq!(a, b);
    }
}
