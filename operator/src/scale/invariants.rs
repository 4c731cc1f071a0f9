//! What holds of `decide` whatever it is given. `PROPTEST_CASES` sets the number of cases of each property.

use proptest::prelude::*;

use super::behavior::{Kind, Limit, Rules, Select};
use super::policy::{Fallback, Slo};
use super::*;

/// A pod in a test.
fn replica(id: u128, state: State, sample: Option<Sample>) -> Replica {
    let ready = matches!(state, State::Ready | State::Draining).then_some(Moment::from_seconds(START - 600.0));
    Replica { id, state, created: Moment::from_seconds(START - 660.0), ready, sample }
}

/// A time of our days, in seconds: its digits count in what is kept.
const START: f64 = 1_764_000_000.0;

/// A fleet under steady load: `load` is each replica's arrivals per second; totals are those at `now`.
#[derive(Clone, Debug)]
struct Fleet {
    loads: Vec<f64>,
    waiting: f64,
    prompt: f64,
    output: f64,
}

impl Fleet {
    fn sample(&self, load: f64, at: f64) -> Sample {
        let now = at - START + 1000.0;
        let done = (load * now).floor();
        let step = 0.03;
        let sequences = (load * self.output * step).max(0.01);
        let steps = (now / step).floor();
        let context = self.prompt + self.output / 2.0;
        let cost = step_cost::StepCost::default();
        let seconds = cost.step(load * self.prompt * step, sequences, sequences * context);
        Sample {
            at: Moment::from_seconds(at),
            accepted: done,
            finished: done,
            prompt_tokens: done * self.prompt,
            output_tokens: done * self.output,
            steps,
            step_seconds: steps * seconds,
            prefill_tokens: (load * self.prompt * now).floor(),
            decode_tokens: (steps * sequences).floor(),
            kv_token_steps: (steps * sequences * context).floor(),
            judged: done,
            good: done,
            running: sequences.floor(),
            waiting: self.waiting,
            kv_used: (sequences * context).floor().min(300_000.0),
            kv_capacity: 350_000.0,
            max_num_seqs: 256.0,
            ..Sample::default()
        }
    }

    fn observe(&self, current: u32, now: f64) -> Observation {
        let pods = self.loads.iter().enumerate();
        let replicas =
            pods.map(|(id, load)| replica(id as u128, State::Ready, Some(self.sample(*load, now)))).collect();
        Observation { current, replicas, front_door: None, quota: None }
    }

    fn total(&self) -> f64 {
        self.loads.iter().sum()
    }

    /// The front door of the same load.
    fn door(&self, now: f64) -> FrontDoor {
        let requests = (self.total() * (now - START + 1000.0)).floor();
        FrontDoor {
            at: Moment::from_seconds(now),
            requests,
            prompt_tokens: requests * self.prompt,
            ..FrontDoor::default()
        }
    }

    /// The history after `ticks` of 5 s, and when that is.
    fn history(&self, policy: &Policy, ticks: u32, door: bool) -> (History, f64) {
        let mut history = History::default();
        let mut now = START;
        for _ in 0..ticks {
            now += 5.0;
            let mut observation = self.observe(self.loads.len() as u32, now);
            observation.front_door = door.then(|| self.door(now));
            history = decide(&observation, policy, &history, Moment::from_seconds(now)).history;
        }
        (history, now)
    }
}

fn policy(max: u32) -> Policy {
    Policy { max_replicas: max, ..Policy::default() }
}

fn fleets() -> impl Strategy<Value = Fleet> {
    (prop::collection::vec(0.0..2.0_f64, 1..8), 0.0..20.0_f64, 50.0..6000.0_f64, 5.0..1000.0_f64).prop_map(
        |(loads, waiting, prompt, output)| Fleet {
            loads,
            waiting: waiting.floor(),
            prompt: prompt.floor(),
            output: output.floor(),
        },
    )
}

fn hostile() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => 0.0..1e6_f64,
        1 => any::<f64>(),
        1 => prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300, 9e15]),
    ]
}

fn moments() -> impl Strategy<Value = Moment> {
    prop_oneof![3 => (0..4_000_000_000_i64).prop_map(Moment), 1 => any::<i64>().prop_map(Moment)]
}

fn hostile_samples() -> impl Strategy<Value = Sample> {
    (moments(), prop::array::uniform16(hostile()), hostile()).prop_map(|(at, values, last)| {
        let [
            accepted,
            rejected,
            finished,
            prompt_tokens,
            output_tokens,
            steps,
            step_seconds,
            prefill_tokens,
            rest @ ..,
        ] = values;
        let [decode_tokens, kv_token_steps, judged, good, running, waiting, kv_used, kv_capacity] = rest;
        Sample {
            at,
            accepted,
            rejected,
            finished,
            prompt_tokens,
            output_tokens,
            steps,
            step_seconds,
            prefill_tokens,
            decode_tokens,
            kv_token_steps,
            judged,
            good,
            running,
            waiting,
            kv_used,
            kv_capacity,
            max_num_seqs: last,
        }
    })
}

fn states() -> impl Strategy<Value = State> {
    prop::sample::select(vec![
        State::Ready,
        State::Ready,
        State::Starting,
        State::Unschedulable,
        State::Draining,
        State::Failed,
    ])
}

fn hostile_observations() -> impl Strategy<Value = Observation> {
    let pod = (0..6_u128, states(), moments(), prop::option::of(moments()), prop::option::of(hostile_samples()));
    let pods = prop::collection::vec(pod, 0..5);
    let door =
        (moments(), prop::array::uniform4(hostile())).prop_map(|(at, [requests, prompt_tokens, held, tokens])| {
            FrontDoor { at, requests, prompt_tokens, held, held_prompt_tokens: tokens }
        });
    (0..50_u32, pods, prop::option::of(door), prop::option::of(0..30_u32)).prop_map(
        |(current, pods, front_door, quota)| {
            let replicas = pods.into_iter().map(|(id, state, created, ready, sample)| Replica {
                id,
                state,
                created,
                ready,
                sample,
            });
            Observation { current, replicas: replicas.collect(), front_door, quota }
        },
    )
}

fn rules() -> impl Strategy<Value = Rules> {
    let limit = (prop::bool::ANY, 0..200_u32, 1.0..600.0_f64).prop_map(|(pods, value, period)| Limit {
        kind: if pods { Kind::Pods } else { Kind::Percent },
        value,
        period,
    });
    let select = prop::sample::select(vec![Select::Max, Select::Min, Select::Disabled]);
    (prop::option::of(0.0..600.0_f64), select, prop::collection::vec(limit, 0..3))
        .prop_map(|(stabilization_window, select, policies)| Rules { stabilization_window, select, policies })
}

fn policies() -> impl Strategy<Value = Policy> {
    (1..10_u32, 0..30_u32, 0.001..10.0_f64, 0.001..0.5_f64, rules(), rules(), prop::option::of(0..20_u32)).prop_map(
        |(min, more, ttft, itl, scale_up, scale_down, fallback)| Policy {
            min_replicas: min,
            max_replicas: min + more,
            slo: Slo { ttft, itl, attainment: 0.99 },
            behavior: super::behavior::Behavior { scale_up, scale_down },
            fallback: Fallback { after: 15.0, replicas: fallback },
            ..Policy::default()
        },
    )
}

/// A history after hostile observations.
fn hostile_history(policy: &Policy, observations: &[Observation]) -> History {
    observations.iter().enumerate().fold(History::default(), |history, (tick, observation)| {
        decide(observation, policy, &history, Moment::from_seconds(tick as f64 * 5.0)).history
    })
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(5000);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// The answer that the numbers of a decision lead to, worked out anew from the documented rules.
fn recomputed(f: &Figures) -> u32 {
    let whole = |need: f64| (need - 1e-9).ceil().max(0.0) as u32;
    let swing = f.deviations * f.deviation;
    let expected = f.arriving.max(f.headroom * f.sustained);
    let base = (expected / f.planned).max((f.arriving + swing) / (f.ceiling * f.share));
    let need = base + f.surplus;
    let up = need > f64::from(f.current) * (1.0 + if f.surplus > 0.0 { 0.0 } else { f.tolerance_up });
    let down = f.highest.max(f.resident).max(whole(f.base_high * (1.0 + f.tolerance_down)));
    let wish = match (f.blind, up, down < f.current && !f.hold) {
        (true, ..) => f.fallback.unwrap_or(0).max(f.current),
        (_, true, _) => whole(need).min(f.lowest).max(f.current),
        (_, _, true) => down,
        _ => f.current,
    };
    let paced = wish.clamp(f.lower_limit.min(f.current), f.upper_limit.max(f.current));
    let afforded = f.quota.map_or(paced, |quota| paced.min(quota.max(f.current)));
    afforded.max(f.scheduled).min(f.max_replicas).max(f.min_replicas)
}

mod bounds;
mod data;
mod monotone;
mod stability;
