//! What happens over time.

use super::*;

/// Runs a load, given by the tick, for `ticks`, with as many ready replicas as were asked for one start ago; calls `check`
/// with each decision.
fn run(
    policy: &Policy,
    first: u32,
    ticks: u32,
    load: impl Fn(u32) -> f64,
    mut check: impl FnMut(u32, u32, &Decision) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    let mut history = History::default();
    let mut current = first;
    let (mut requests, mut asked) = (0.0, vec![first; 12]);
    for tick in 0..ticks {
        let now = Moment::from_seconds(START + f64::from(tick) * 5.0);
        requests += load(tick) * 5.0;
        let ready = asked[asked.len() - 12].min(current);
        let sample = Sample { at: now, kv_capacity: 350_000.0, max_num_seqs: 256.0, ..Sample::default() };
        let created = Moment::from_seconds(START - 120.0);
        let replicas = (0..ready).map(|id| Replica {
            created,
            ready: Some(Moment::from_seconds(START - 60.0)),
            ..replica(u128::from(id), State::Ready, Some(sample))
        });
        let front_door =
            Some(FrontDoor { at: now, requests, prompt_tokens: requests * 2000.0, ..FrontDoor::default() });
        let observation = Observation { current, replicas: replicas.collect(), front_door, quota: None };
        let decision = decide(&observation, policy, &history, now);
        check(tick, current, &decision)?;
        current = decision.desired;
        asked.push(current);
        history = decision.history;
    }
    Ok(())
}

/// Pseudo-random ripple between -1 and 1.
fn ripple(tick: u32, seed: u32) -> f64 {
    f64::from(tick.wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(2_246_822_519) >> 16) / 32_768.0 - 1.0
}

/// A long run costs as much as a hundred single decisions.
fn fewer_cases() -> ProptestConfig {
    ProptestConfig { cases: cases().cases.div_ceil(20), ..cases() }
}

proptest! {
    #![proptest_config(fewer_cases())]

    #[test]
    fn a_constant_load_never_sends_the_number_of_replicas_back_and_forth(
        rate in 0.5..60.0_f64, first in 1..40_u32, seed in any::<u32>(),
    ) {
        // What it learns of the load's calm may give up one more replica later on; none ever comes back.
        let (mut ups, mut downs) = (0, 0);
        run(&policy(60), first, 300, |tick| rate * (1.0 + 0.03 * ripple(tick, seed)), |tick, current, decision| {
            if tick > 160 {
                ups += u32::from(decision.desired > current);
                downs += u32::from(decision.desired < current);
                prop_assert!(ups == 0 && downs <= 1, "tick {}: {}", tick, decision);
            }
            Ok(())
        })?;
    }

    #[test]
    fn nothing_goes_within_the_down_window_of_a_higher_recommendation(
        rates in prop::collection::vec(0.0..40.0_f64, 8), first in 1..20_u32,
    ) {
        let mut seen: Vec<(u32, u32)> = Vec::new();
        run(&policy(60), first, 160, |tick| rates[(tick / 20) as usize], |tick, current, decision| {
            seen.push((tick, decision.figures.for_decrease()));
            if decision.desired < current {
                let window = (decision.figures.down_window / 5.0) as u32;
                let within = seen.iter().filter(|(at, _)| tick - at <= window);
                let highest = within.map(|(_, recommended)| *recommended).max().unwrap_or(0);
                prop_assert!(decision.desired >= highest.min(current), "tick {tick}: {highest} {decision}");
                prop_assert!(tick >= window, "nothing goes before the first window is over: tick {}", tick);
            }
            Ok(())
        })?;
    }

    #[test]
    fn what_is_left_after_a_decrease_carries_the_load(rates in prop::collection::vec(0.0..40.0_f64, 8), first in 1..20_u32) {
        run(&policy(60), first, 160, |tick| rates[(tick / 20) as usize], |_, current, decision| {
            let f = &decision.figures;
            let left = f64::from(decision.desired);
            let carries = f.arriving <= left * f.planned && decision.desired >= f.resident;
            prop_assert!(decision.desired >= current || carries, "{decision}");
            Ok(())
        })?;
    }

    #[test]
    fn saturation_always_scales_up(rate in 0.2..20.0_f64, over in 1.25..5.0_f64, behind in 1..8_u32) {
        // With any number of replicas, a load beyond what they take in asks for more within a minute and a half.
        let policy = policy(1000);
        let mut highest = 0;
        let mut enough = 0.0;
        run(&policy, behind, 40, |_| rate * over, |_, _, decision| {
            highest = decision.desired;
            enough = decision.figures.sustained / decision.figures.ceiling;
            Ok(())
        })?;
        prop_assert!(f64::from(highest) >= enough, "{highest} for {enough}");
    }

    #[test]
    fn a_takeover_gives_nothing_up_for_one_down_window(
        rates in prop::collection::vec(0.0..40.0_f64, 5), at in 40..60_u32, gap in prop_oneof![1..6_u32, 24..80_u32],
    ) {
        let policy = policy(60);
        let fleet = |rate: f64| Fleet { loads: vec![rate / 8.0; 8], waiting: 0.0, prompt: 2000.0, output: 200.0 };
        let (mut history, mut current) = (History::default(), 8);
        let mut heir = None;
        for tick in (0..200_u32).filter(|tick| !(at..at + gap).contains(tick)) {
            let now = Moment::from_seconds(START + f64::from(tick) * 5.0);
            let mut observation = fleet(rates[(tick / 40) as usize]).observe(current, START + f64::from(tick) * 5.0);
            observation.replicas.iter_mut().for_each(|replica| replica.id += 100 * u128::from(tick / 40));
            let unbroken = decide(&observation, &policy, &history, now);
            if tick == at + gap {
                heir = Some((current, History::restored(&history.persisted()), unbroken.figures.down_window));
            }
            if let Some((replicas, history, window)) = heir.take() {
                let observation = Observation { current: replicas, ..observation.clone() };
                let decision = decide(&observation, &policy, &history, now);
                let least = if tick == at + gap { unbroken.desired.min(replicas) } else { 0 };
                prop_assert!(decision.desired >= least, "{unbroken}\n{decision}");
                let (away, ago) = (5.0 * f64::from(gap + 1), 5.0 * f64::from(tick - at - gap));
                let holds = away > window && ago < decision.figures.down_window.min(window);
                prop_assert!(!holds || decision.desired >= replicas, "{away} s away, {ago} s ago: {decision}");
                heir = Some((decision.desired, decision.history, window));
            }
            (current, history) = (unbroken.desired, unbroken.history);
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_same_arguments_give_the_same_answer(observations in prop::collection::vec(hostile_observations(), 1..4), policy in policies()) {
        let history = hostile_history(&policy, &observations);
        let now = Moment::from_seconds(20.0);
        prop_assert_eq!(decide(&observations[0], &policy, &history, now), decide(&observations[0], &policy, &history, now));
    }

    #[test]
    fn asking_again_at_once_changes_nothing(fleet in fleets(), ticks in 1..60_u32, current in 1..12_u32) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, false);
        let at = Moment::from_seconds(now + 5.0);
        let first = decide(&fleet.observe(current, now + 5.0), &policy, &history, at);
        let second = decide(&fleet.observe(first.desired, now + 5.0), &policy, &first.history, at);
        prop_assert_eq!(second.desired, first.desired, "{}\n{}", first, second);
    }

    #[test]
    fn nothing_goes_while_requests_are_held(fleet in fleets(), ticks in 1..60_u32, held in 1..100_u32, current in 1..30_u32) {
        let policy = policy(30);
        let (history, now) = fleet.history(&policy, ticks, true);
        let mut observation = fleet.observe(current, now + 5.0);
        observation.front_door = Some(FrontDoor { held: f64::from(held), ..fleet.door(now + 5.0) });
        let decision = decide(&observation, &policy, &history, Moment::from_seconds(now + 5.0));
        prop_assert!(decision.desired >= current, "{decision}");
    }
}
