//! What a forward pass costs, and how much of it one replica can take in.
//!
//! With continuous batching the time of a step is close to linear in what is in it, which gives a replica's capacity in
//! closed form: at `λ` requests per second with the work `g` each, a step takes `T = θ0 / (1 − λ·g)`, and `λ·O·T` sequences
//! with `λ·A·T` tokens are resident. The stability limit by memory is that of arXiv 2605.04595.

use serde::{Deserialize, Serialize};

use super::policy::Slo;

/// Coefficients of `step = θ0 + θ1·p + θ2·b + θ3·K`, in seconds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StepCost {
    /// θ0: of any step.
    pub base: f64,
    /// θ1: for each prompt token in it.
    pub prefill_token: f64,
    /// θ2: for each sequence that decodes in it.
    pub sequence: f64,
    /// θ3: for each token that is resident in the key-value cache.
    pub resident_token: f64,
}

impl Default for StepCost {
    /// A 32-billion-parameter model on two H100, from llm-d's published 15,928 prompt tokens per second; only a beginning,
    /// since a replica's first steps correct it.
    fn default() -> Self {
        Self { base: 0.016, prefill_token: 1.0 / 15_928.0, sequence: 50e-6, resident_token: 40e-9 }
    }
}

impl StepCost {
    /// The coefficients in the order θ0, θ1, θ2, θ3.
    pub fn coefficients(&self) -> [f64; 4] {
        [self.base, self.prefill_token, self.sequence, self.resident_token]
    }

    /// From coefficients in that order.
    pub fn from_coefficients([base, prefill_token, sequence, resident_token]: [f64; 4]) -> Self {
        Self { base, prefill_token, sequence, resident_token }
    }

    /// Seconds of a step with `prompt` prompt tokens, `sequences` decoding and `resident` tokens in the cache.
    pub fn step(&self, prompt: f64, sequences: f64, resident: f64) -> f64 {
        self.base + self.prefill_token * prompt + self.sequence * sequences + self.resident_token * resident
    }

    /// Work of a mean request, in seconds of one replica: what it adds to the steps that it is in.
    pub fn work(&self, request: &RequestShape) -> f64 {
        self.prefill_token * request.prompt + self.decode_work(request)
    }

    /// The part of the work that follows the prompt.
    pub fn decode_work(&self, request: &RequestShape) -> f64 {
        self.sequence * request.output + self.resident_token * request.residency
    }
}

/// A mean request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestShape {
    /// Prompt tokens that must be computed.
    pub prompt: f64,
    /// Tokens generated.
    pub output: f64,
    /// Tokens resident in the cache, summed over its steps: for a prompt `I` and an answer `O` about `O·(I + O/2)`.
    pub residency: f64,
}

impl RequestShape {
    /// The shape of a request of `prompt` and `output` tokens.
    pub fn new(prompt: f64, output: f64) -> Self {
        Self { prompt, output, residency: output * (prompt + output / 2.0) }
    }
}

/// Limits of a replica beside its speed; 0 where one is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Room {
    /// Tokens that fit the key-value cache.
    pub kv_tokens: f64,
    /// Sequences that run at once.
    pub sequences: f64,
}

/// Part of the key-value cache that may be planned for: lengths vary, and preemption is dear.
const KV_SHARE: f64 = 0.9;
/// Part of the time that a replica can work at most.
const BUSY_SHARE: f64 = 0.97;

/// Least share of its time that a replica must be allowed to work: an objective that leaves less would ask for any number of
/// replicas, and counts as one that cannot be met.
const LEAST_USE: f64 = 0.2;

/// How much work one replica takes in, in replica-seconds per second.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Capacity {
    /// ρ*: with every promise kept.
    pub planned: f64,
    /// The throughput at which it saturates; never below `planned`.
    pub ceiling: f64,
    /// The objective cannot be met by any number of replicas, so that latency has no part in `planned`.
    pub infeasible: bool,
    /// What binds.
    pub bound: Bound,
}

/// What binds the capacity.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Bound {
    /// `targetUtilization`.
    Utilization,
    /// The time between tokens.
    InterTokenLatency,
    /// Memory for keys and values.
    KeyValueCache,
    /// `maxNumSeqs`.
    Sequences,
}

/// Seconds between two tokens, and to the first one, of a request that a replica has to itself: what no number of replicas
/// betters.
pub fn alone(cost: &StepCost, request: &RequestShape) -> (f64, f64) {
    let between = cost.base + cost.sequence + cost.resident_token * request.prompt;
    (between, cost.base + cost.prefill_token * request.prompt)
}

/// The capacity of a replica for requests of this shape.
pub fn capacity(cost: &StepCost, request: &RequestShape, room: Room, slo: &Slo, target_utilization: f64) -> Capacity {
    let work = cost.work(request).max(f64::MIN_POSITIVE);
    let (alone, first) = alone(cost, request);
    // Each limit as work per second, λ·g.
    let by_latency = 1.0 - cost.base / slo.itl;
    let infeasible = alone > slo.itl || first > slo.ttft || by_latency < LEAST_USE;
    let by_latency = if infeasible { f64::INFINITY } else { by_latency };
    let limited = |most: f64, per_request: f64| match most > 0.0 && per_request > 0.0 {
        true => most * work / (per_request * cost.base + most * work),
        false => f64::INFINITY,
    };
    let by_memory = limited(KV_SHARE * room.kv_tokens, request.residency);
    let by_sequences = limited(room.sequences, request.output);
    let (planned, bound) =
        [(by_latency, Bound::InterTokenLatency), (by_memory, Bound::KeyValueCache), (by_sequences, Bound::Sequences)]
            .into_iter()
            .fold((target_utilization, Bound::Utilization), |least, next| if next.0 < least.0 { next } else { least });
    let planned = planned.max(0.01);
    let ceiling = limited(room.kv_tokens, request.residency).min(by_sequences).min(BUSY_SHARE).max(planned);
    Capacity { planned, ceiling, infeasible, bound }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLO: Slo = Slo { ttft: 3.0, itl: 0.1, attainment: 0.99 };
    const H100: Room = Room { kv_tokens: 350_000.0, sequences: 256.0 };

    #[test]
    fn the_capacity_of_the_published_episode_is_what_was_measured_there() {
        let cost = StepCost::default();
        let shape = RequestShape::new(4000.0, 1000.0);
        let found = capacity(&cost, &shape, H100, &SLO, 0.85);
        let per_second = found.planned / cost.work(&shape);
        assert!((1.38..1.44).contains(&per_second), "llm-d reports 1.4 to 1.5 requests/s, this is {per_second}");
        assert_eq!(found.bound, Bound::KeyValueCache);
        assert!(found.ceiling > found.planned);
    }

    #[test]
    fn an_objective_below_the_unloaded_latency_is_infeasible_and_leaves_the_throughput() {
        let cost = StepCost::default();
        let shape = RequestShape::new(500.0, 100.0);
        let free = capacity(&cost, &shape, H100, &SLO, 0.85);
        let absurd = capacity(&cost, &shape, H100, &Slo { itl: 1e-9, ..SLO }, 0.85);
        assert!(absurd.infeasible && !free.infeasible);
        assert!(absurd.planned >= free.planned, "{absurd:?} {free:?}");
        assert!(capacity(&cost, &shape, H100, &Slo { ttft: 1e-9, ..SLO }, 0.85).infeasible);
    }

    #[test]
    fn each_limit_binds_when_it_is_the_tightest() {
        let cost = StepCost::default();
        let shape = RequestShape::new(100.0, 100.0);
        let bound = |room, slo: &Slo| capacity(&cost, &shape, room, slo, 0.85).bound;
        assert_eq!(bound(H100, &SLO), Bound::Sequences);
        assert_eq!(bound(Room::default(), &SLO), Bound::InterTokenLatency);
        assert_eq!(bound(Room::default(), &Slo { itl: 1.0, ..SLO }), Bound::Utilization);
        assert_eq!(bound(Room { kv_tokens: 500.0, ..H100 }, &SLO), Bound::KeyValueCache);
    }
}
