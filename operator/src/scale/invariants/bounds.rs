//! Bounds and sanity, explanation, persistence.

use super::*;
use crate::scale::history::PERSISTED_BYTES;

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_answer_is_within_the_bounds_whatever_the_input(
        observations in prop::collection::vec(hostile_observations(), 1..4), policy in policies(), now in moments(),
    ) {
        let history = hostile_history(&policy, &observations);
        let decision = decide(&observations[0], &policy, &history, now);
        prop_assert!((policy.min_replicas..=policy.max_replicas).contains(&decision.desired), "{decision}");
    }

    #[test]
    fn the_numbers_of_a_decision_recompute_to_it(
        observations in prop::collection::vec(hostile_observations(), 1..4), policy in policies(),
    ) {
        let history = hostile_history(&policy, &observations[1..]);
        let now = Moment::from_seconds(observations.len() as f64 * 5.0);
        let decision = decide(&observations[0], &policy, &history, now);
        prop_assert_eq!(recomputed(&decision.figures), decision.desired, "{:?}", decision.figures);
    }

    #[test]
    fn the_numbers_of_a_believable_decision_recompute_to_it(fleet in fleets(), ticks in 1..40_u32, current in 1..20_u32) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let decision = decide(&fleet.observe(current, now + 5.0), &policy, &history, Moment::from_seconds(now + 5.0));
        prop_assert_eq!(recomputed(&decision.figures), decision.desired, "{:?}", decision.figures);
    }

    #[test]
    fn a_change_stays_within_behavior_and_max_asks_for_no_more(
        fleet in fleets(), current in 1..30_u32, policy in policies(), ticks in 1..20_u32,
    ) {
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let current = current.clamp(policy.min_replicas, policy.max_replicas);
        let decision = decide(&fleet.observe(current, now + 5.0), &policy, &history, at);
        let upper = policy.behavior.upper_limit(current, &history.events, at);
        let lower = policy.behavior.lower_limit(current, &history.events, at);
        prop_assert!((lower..=upper).contains(&decision.desired), "{} in {lower}..={upper}: {decision}", decision.desired);
    }

    #[test]
    fn what_is_asked_for_is_bounded_by_what_arrives_however_long_a_start_takes(
        fleet in fleets(), start in 1.0..3000.0_f64, current in 1..20_u32,
    ) {
        let policy = Policy { cold_start: start, ..policy(1000) };
        let (history, now) = fleet.history(&policy, 15, false);
        let decision = decide(&fleet.observe(current, now + 5.0), &policy, &history, Moment::from_seconds(now + 5.0));
        let f = decision.figures;
        // While replicas start, at most four times what exceeds the capacity, and the backlog over the horizon.
        let over = 4.0 * f.arriving + f.backlog / f.drain_horizon;
        let bound = f.base.max((f.arriving + over) / f.ceiling).ceil() as u32;
        prop_assert!(decision.desired <= bound.max(current), "{} > {bound}: {decision}", decision.desired);
    }

    #[test]
    fn an_objective_that_cannot_be_met_leaves_the_answer_to_throughput(fleet in fleets(), current in 1..20_u32) {
        let absurd = Policy { slo: Slo { itl: 1e-9, ..policy(50).slo }, ..policy(50) };
        let lax = Policy { slo: Slo { itl: 1e9, ..policy(50).slo }, ..policy(50) };
        let answer = |policy: &Policy| {
            let (history, now) = fleet.history(policy, 15, false);
            decide(&fleet.observe(current, now + 5.0), policy, &history, Moment::from_seconds(now + 5.0))
        };
        let (absurd, lax) = (answer(&absurd), answer(&lax));
        prop_assert!(absurd.figures.infeasible);
        prop_assert_eq!(absurd.desired, lax.desired);
    }

    #[test]
    fn history_survives_serialisation_with_the_same_next_decision(fleet in fleets(), ticks in 1..40_u32, door in any::<bool>()) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, door);
        let text = serde_json::to_string(&history).expect("serialises");
        let restored: History = serde_json::from_str(&text).expect("deserialises");
        let next = |history: &History| {
            let at = Moment::from_seconds(now + 5.0);
            decide(&fleet.observe(fleet.loads.len() as u32, now + 5.0), &policy, history, at)
        };
        let without_cursors = History { cursors: Vec::new(), front_door: None, ..history };
        prop_assert_eq!(next(&restored), next(&without_cursors));
    }

    #[test]
    fn what_is_kept_of_a_history_fits_an_annotation_and_is_read_back(
        observations in prop::collection::vec(hostile_observations(), 1..40), fleet in fleets(), ticks in 1..100_u32,
    ) {
        let policy = policy(30);
        for history in [hostile_history(&policy, &observations), fleet.history(&policy, ticks, true).0] {
            let text = history.persisted();
            prop_assert!(text.len() <= PERSISTED_BYTES, "{} bytes: {text}", text.len());
            prop_assert_ne!(History::restored(&text), History::default());
        }
    }

    #[test]
    fn text_that_is_no_history_is_an_empty_one(text in ".{0,100}") {
        prop_assert_eq!(History::restored(&text), History::default());
    }
}
