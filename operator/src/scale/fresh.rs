//! First rule: what may be believed. Samples that are absurd or old are dropped, totals become differences, and a counter
//! that went backwards says nothing until it has a predecessor again.

use super::history::{Cursor, History};
use super::moment::Moment;
use super::observation::{FrontDoor, Observation, Replica, ReplicaId, Sample, State};
use super::policy::Policy;

/// Intervals after which a sample is stale.
const STALE_INTERVALS: f64 = 3.0;
/// Seconds by which a time of Kubernetes may be too early: it has no fractions.
const WHOLE_SECOND: f64 = 1.0;

/// What one replica did between two samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Delta {
    /// Which one.
    pub id: ReplicaId,
    /// When the difference ends.
    pub to: Moment,
    /// Seconds that it covers.
    pub seconds: f64,
    /// Requests that arrived: accepted and refused ones.
    pub arrivals: f64,
    /// Requests that ended.
    pub finished: f64,
    /// Their computed prompt tokens.
    pub prompt_tokens: f64,
    /// Their generated tokens.
    pub output_tokens: f64,
    /// Forward passes.
    pub steps: f64,
    /// Seconds in them.
    pub step_seconds: f64,
    /// Prompt tokens in them.
    pub prefill_tokens: f64,
    /// Sequences in them, summed.
    pub decode_tokens: f64,
    /// Resident tokens in them, summed.
    pub kv_token_steps: f64,
    /// Requests judged against the objective.
    pub judged: f64,
    /// Those that met it.
    pub good: f64,
}

/// What the front door counted between two samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrived {
    /// When the difference ends.
    pub to: Moment,
    /// Seconds that it covers.
    pub seconds: f64,
    /// Requests.
    pub requests: f64,
    /// Their prompt tokens.
    pub prompt_tokens: f64,
}

/// What may be believed of an observation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fresh {
    /// Ready replicas.
    pub ready: u32,
    /// Ready replicas without a usable sample.
    pub silent: u32,
    /// Replicas on their way that will help.
    pub starting: u32,
    /// Pods that will not help as things are.
    pub stuck: u32,
    /// When the first of the starting ones was created.
    pub earliest_start: Option<Moment>,
    /// Usable samples of ready replicas, by identity.
    pub samples: Vec<Sample>,
    /// Differences of ready and draining replicas, by identity.
    pub deltas: Vec<Delta>,
    /// Differences that may teach what a step costs.
    pub lessons: Vec<Delta>,
    /// The front door's gauges.
    pub front_door: Option<FrontDoor>,
    /// What arrived there since the last sample.
    pub arrived: Option<Arrived>,
}

impl Fresh {
    /// Whether anything at all was heard.
    pub fn is_blind(&self) -> bool {
        self.samples.is_empty() && self.front_door.is_none()
    }
}

/// Sorts an observation out and moves the cursors of `history` on.
pub fn fresh(observation: &Observation, policy: &Policy, history: &mut History, now: Moment) -> Fresh {
    let mut fresh = Fresh::default();
    let oldest = STALE_INTERVALS * policy.polling_interval;
    let usable = |at: Moment| (0.0..=oldest).contains(&now.since(at));
    let mut replicas: Vec<&Replica> = observation.replicas.iter().collect();
    replicas.sort_by_key(|replica| replica.id);
    replicas.dedup_by_key(|replica| replica.id);
    let mut cursors = Vec::with_capacity(replicas.len());
    for replica in replicas {
        let sample = replica.sample.filter(|sample| usable(sample.at) && is_sane(sample));
        match replica.state {
            State::Ready => fresh.ready += 1,
            State::Starting => {
                fresh.starting += 1;
                let earliest = fresh.earliest_start.map_or(replica.created, |at| at.min(replica.created));
                fresh.earliest_start = Some(earliest);
            }
            State::Unschedulable | State::Failed => fresh.stuck += 1,
            State::Draining => {}
        }
        if !matches!(replica.state, State::Ready | State::Draining) {
            continue;
        }
        let known = history.cursor(replica.id);
        let Some(sample) = sample else {
            fresh.silent += u32::from(replica.state == State::Ready);
            cursors.extend(known);
            continue;
        };
        if replica.state == State::Ready {
            fresh.samples.push(sample);
        }
        let before = known.or_else(|| first_cursor(replica, history));
        if let Some(delta) = before.and_then(|before| difference(replica.id, &before.sample, &sample)) {
            fresh.deltas.push(delta);
            let warm = replica.ready.is_some_and(|ready| {
                sample.at.since(ready) - delta.seconds >= policy.warm_up && replica.state == State::Ready
            });
            if warm {
                fresh.lessons.push(delta);
            }
        }
        // A sample that is older than the last one is late, and has been counted.
        let newest = known.filter(|known| known.sample.at > sample.at);
        cursors.push(newest.unwrap_or(Cursor { id: replica.id, sample }));
    }
    history.cursors = cursors;
    watch_front_door(&mut fresh, observation, history, usable);
    fresh
}

fn watch_front_door(
    fresh: &mut Fresh,
    observation: &Observation,
    history: &mut History,
    usable: impl Fn(Moment) -> bool,
) {
    let is_sane = |door: &FrontDoor| {
        [door.requests, door.prompt_tokens, door.held, door.held_prompt_tokens].iter().all(|value| is_count(*value))
    };
    fresh.front_door = observation.front_door.filter(|door| usable(door.at) && is_sane(door));
    let Some(door) = fresh.front_door else { return };
    if let Some(before) = history.front_door {
        if before.at >= door.at {
            return;
        }
        let (requests, prompt_tokens) = (door.requests - before.requests, door.prompt_tokens - before.prompt_tokens);
        if requests >= 0.0 && prompt_tokens >= 0.0 {
            fresh.arrived = Some(Arrived { to: door.at, seconds: door.at.since(before.at), requests, prompt_tokens });
        }
    }
    history.front_door = Some(door);
}

/// A replica that became ready since the last decision has counted from nothing.
fn first_cursor(replica: &Replica, history: &History) -> Option<Cursor> {
    let ready = replica.ready?;
    let is_new = history.decided.is_some_and(|decided| ready.after(WHOLE_SECOND) > decided);
    is_new.then(|| Cursor { id: replica.id, sample: Sample { at: ready, ..Sample::default() } })
}

/// A count that a program may have made: finite, not negative, and exact as a whole number.
fn is_count(value: f64) -> bool {
    (0.0..=9.0e15).contains(&value)
}

fn is_sane(sample: &Sample) -> bool {
    totals(sample)
        .iter()
        .chain(&[sample.running, sample.waiting, sample.kv_used, sample.kv_capacity, sample.max_num_seqs])
        .all(|value| is_count(*value))
        && sample.good <= sample.judged
}

fn totals(sample: &Sample) -> [f64; 12] {
    [
        sample.accepted,
        sample.rejected,
        sample.finished,
        sample.prompt_tokens,
        sample.output_tokens,
        sample.steps,
        sample.step_seconds,
        sample.prefill_tokens,
        sample.decode_tokens,
        sample.kv_token_steps,
        sample.judged,
        sample.good,
    ]
}

/// What happened between two samples; `None` when the later one is not later, or any total went backwards.
fn difference(id: ReplicaId, before: &Sample, after: &Sample) -> Option<Delta> {
    let seconds = after.at.since(before.at);
    let (then, now) = (totals(before), totals(after));
    if seconds <= 0.0 || then.iter().zip(&now).any(|(then, now)| now < then) {
        return None;
    }
    let [accepted, rejected, finished, prompt_tokens, output_tokens, steps, step_seconds, rest @ ..] =
        std::array::from_fn::<f64, 12, _>(|i| now[i] - then[i]);
    let [prefill_tokens, decode_tokens, kv_token_steps, judged, good] = rest;
    let arrivals = accepted + rejected;
    Some(Delta {
        id,
        to: after.at,
        seconds,
        arrivals,
        finished,
        prompt_tokens,
        output_tokens,
        steps,
        step_seconds,
        prefill_tokens,
        decode_tokens,
        kv_token_steps,
        judged,
        good: good.min(judged),
    })
}
