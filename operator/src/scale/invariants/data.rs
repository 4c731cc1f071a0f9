//! Missing, stale, absurd and lying data.

use super::*;

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn missing_samples_never_lower_the_answer(
        fleet in fleets(), ticks in 1..60_u32, missing in prop::collection::vec(any::<bool>(), 8), current in 1..12_u32,
    ) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let full = fleet.observe(current, now + 5.0);
        let mut partial = full.clone();
        for (replica, missing) in partial.replicas.iter_mut().zip(missing) {
            replica.sample = replica.sample.filter(|_| !missing);
        }
        let (full, partial) = (decide(&full, &policy, &history, at), decide(&partial, &policy, &history, at));
        prop_assert!(partial.desired >= full.desired.min(current), "{full}\n{partial}");
    }

    #[test]
    fn without_any_data_the_answer_stays_and_then_is_the_fallback_at_least(
        fleet in fleets(), ticks in 1..60_u32, dark in 10..40_u32, replicas in prop::option::of(1..20_u32),
    ) {
        let policy = Policy { fallback: Fallback { after: 15.0, replicas }, ..policy(30) };
        let (mut history, start) = fleet.history(&policy, ticks, false);
        let mut current = fleet.loads.len() as u32;
        let begun_with = current;
        for tick in 1..=dark {
            let now = start + 15.0 + 5.0 * f64::from(tick);
            let pods = (0..fleet.loads.len()).map(|id| super::replica(id as u128, State::Ready, None)).collect();
            let observation = Observation { current, replicas: pods, front_door: None, quota: None };
            let decision = decide(&observation, &policy, &history, Moment::from_seconds(now));
            (current, history) = (decision.desired, decision.history);
        }
        prop_assert_eq!(current, begun_with.max(replicas.unwrap_or(0)));
    }

    #[test]
    fn the_samples_of_pods_that_are_not_ready_have_no_effect(
        fleet in fleets(), ticks in 1..40_u32, sample in hostile_samples(), current in 1..12_u32,
        state in prop::sample::select(vec![State::Starting, State::Unschedulable, State::Failed]),
    ) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let with = |sample: Option<Sample>| {
            let mut observation = fleet.observe(current, now + 5.0);
            observation.replicas.push(replica(77, state, sample));
            decide(&observation, &policy, &history, Moment::from_seconds(now + 5.0)).desired
        };
        prop_assert_eq!(with(Some(Sample { at: Moment::from_seconds(now + 5.0), ..sample })), with(None));
    }

    #[test]
    fn a_counter_that_starts_again_makes_no_work(fleet in fleets(), ticks in 2..40_u32, which in any::<prop::sample::Index>()) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let mut observation = fleet.observe(fleet.loads.len() as u32, now + 5.0);
        let index = which.index(observation.replicas.len());
        observation.replicas[index].sample = Some(Sample { at, kv_capacity: 350_000.0, ..Sample::default() });
        let reset = decide(&observation, &policy, &history, at);
        observation.replicas[index].sample = None;
        let silent = decide(&observation, &policy, &history, at);
        let work = |decision: &Decision| decision.figures.arriving;
        prop_assert!(work(&reset) >= 0.0 && (work(&reset) - work(&silent)).abs() < 1e-9, "{reset}\n{silent}");
    }

    #[test]
    fn a_clock_that_is_set_back_hides_no_load(fleet in fleets(), ticks in 1..60_u32, back in 10.0..500.0_f64) {
        let policy = policy(100);
        let sustained = |back: f64| {
            let (mut history, start) = fleet.history(&policy, ticks, false);
            let mut sustained = 0.0;
            for tick in 1..=40 {
                let now = start + 5.0 * f64::from(tick);
                let at = Moment::from_seconds(now - back);
                let mut observation = fleet.observe(fleet.loads.len() as u32, now);
                for replica in &mut observation.replicas {
                    replica.sample = replica.sample.map(|sample| Sample { at, ..sample });
                }
                let decision = decide(&observation, &policy, &history, at);
                (sustained, history) = (decision.figures.sustained, decision.history);
            }
            sustained
        };
        let (straight, bent) = (sustained(0.0), sustained(back));
        prop_assert!((bent - straight).abs() <= 0.1 * straight + 0.05, "{straight} {bent}");
    }

    #[test]
    fn one_replica_of_several_that_lies_moves_the_answer_by_little(
        load in 0.05..1.2_f64, count in 4..9_usize, ticks in 15..40_u32, sample in hostile_samples(), current in 3..12_u32,
    ) {
        let fleet = Fleet { loads: vec![load; count], waiting: 0.0, prompt: 1000.0, output: 200.0 };
        let policy = policy(100);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let honest = decide(&fleet.observe(current, now + 5.0), &policy, &history, at);
        let mut observation = fleet.observe(current, now + 5.0);
        observation.replicas[0].sample = Some(Sample { at, ..sample });
        let lied = decide(&observation, &policy, &history, at);
        // One for the work that it claims and one for its queue; a decrease may also wait for what it did not tell.
        let most = honest.desired + 2;
        prop_assert!(lied.desired <= most.max(current), "{honest}\n{lied}");
        prop_assert!(lied.desired + 1 >= honest.desired.min(current), "{honest}\n{lied}");
    }

    #[test]
    fn one_replica_that_hangs_moves_the_answer_by_one_at_most(
        load in 0.05..1.2_f64, count in 4..9_usize, ticks in 15..60_u32, current in 1..12_u32,
    ) {
        let fleet = Fleet { loads: vec![load; count], waiting: 0.0, prompt: 1000.0, output: 200.0 };
        let policy = policy(100);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let honest = decide(&fleet.observe(current, now + 5.0), &policy, &history, at);
        let mut observation = fleet.observe(current, now + 5.0);
        observation.replicas[0].sample = None;
        let hung = decide(&observation, &policy, &history, at);
        prop_assert!(hung.desired.abs_diff(honest.desired) <= 1 || hung.desired == current, "{honest}\n{hung}");
    }

    #[test]
    fn pods_that_do_not_start_neither_raise_the_answer_nor_block_a_decrease(
        fleet in fleets(), ticks in 1..60_u32, stuck in 1..20_u128, current in 1..12_u32,
    ) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let alone = decide(&fleet.observe(current, now + 5.0), &policy, &history, at);
        let mut observation = fleet.observe(current, now + 5.0);
        let pods = (0..stuck).map(|id| Replica { created: at, ..replica(1000 + id, State::Unschedulable, None) });
        observation.replicas.extend(pods);
        prop_assert_eq!(decide(&observation, &policy, &history, at).desired, alone.desired);
    }

    #[test]
    fn the_steps_of_a_replica_that_warms_up_teach_nothing(fleet in fleets(), slow in 2.0..100.0_f64) {
        let policy = policy(30);
        let run = |with: bool| {
            let (mut history, start) = fleet.history(&policy, 12, false);
            for now in [start + 5.0, start + 10.0] {
                let mut observation = fleet.observe(fleet.loads.len() as u32, now);
                if with {
                    let mut sample = fleet.sample(0.5, now);
                    sample.step_seconds *= slow;
                    let ready = Some(Moment::from_seconds(start + 1.0));
                    observation.replicas.push(Replica { ready, ..replica(500, State::Ready, Some(sample)) });
                }
                history = decide(&observation, &policy, &history, Moment::from_seconds(now)).history;
            }
            history.fit
        };
        prop_assert_eq!(run(true), run(false));
    }
}
