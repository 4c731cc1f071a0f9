//! How long a step takes in the simulated engine: the model that `decide` assumes, and others that it does not.

use serde::{Deserialize, Serialize};

use crate::scale::step_cost::StepCost;

/// A replica's engine.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Engine {
    /// What a step costs.
    pub cost: StepCost,
    /// Which law it follows.
    pub law: Law,
    /// Most prompt tokens in one step.
    pub chunk: u32,
    /// Tokens that fit the key-value cache.
    pub kv_tokens: u32,
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Requests that wait in a replica before more are refused.
    pub max_num_queued: u32,
    /// Relative deviation of a step's time.
    pub noise: f64,
}

/// The law that a step's time follows.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Law {
    /// `θ0 + θ1·p + θ2·b + θ3·K`, as `decide` assumes.
    #[default]
    Linear,
    /// `max(θ0, θ1·p) + θ2·b + θ3·K`: memory and arithmetic overlap.
    Roofline,
    /// Linear, and attention over a long prompt costs up to as much again at 32,768 tokens.
    Quadratic,
    /// Linear, and the first replica is 20 % slower, the second 20 % faster, in turn.
    Uneven,
    /// Linear, and all replicas slow down and recover by 20 % within an hour.
    Drifting,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            cost: StepCost::default(),
            law: Law::Linear,
            chunk: 1024,
            kv_tokens: 350_000,
            max_num_seqs: 256,
            max_num_queued: 256,
            noise: 0.03,
        }
    }
}

/// Tokens at which attention over the prompt doubles its cost under `Law::Quadratic`.
const QUADRATIC_AT: f64 = 32_768.0;

impl Engine {
    /// A device with so many times less arithmetic: each token costs more, and chunks are as small as the time between
    /// tokens asks for.
    pub fn slower(self, factor: f64) -> Self {
        let [base, prompt, sequence, resident] = self.cost.coefficients();
        let cost = StepCost::from_coefficients([base, prompt * factor, sequence * factor, resident * factor]);
        Self { cost, chunk: (f64::from(self.chunk) / factor) as u32, ..self }
    }

    /// Seconds of a step with `prompt` prompt tokens that follow `done` others of their prompt.
    pub fn step(&self, prompt: f64, done: f64, sequences: f64, resident: f64) -> f64 {
        let cost = &self.cost;
        let linear = cost.step(prompt, sequences, resident);
        match self.law {
            Law::Roofline => linear - cost.base.min(cost.prefill_token * prompt),
            Law::Quadratic => linear + cost.prefill_token * prompt * (done + prompt / 2.0) / QUADRATIC_AT,
            _ => linear,
        }
    }

    /// How much longer a replica's steps take than the law says.
    pub fn pace(&self, replica: usize, seconds: f64) -> f64 {
        match self.law {
            Law::Uneven => [1.2, 0.8][replica % 2],
            Law::Drifting => 1.1 - 0.1 * (seconds * std::f64::consts::TAU / 3600.0).cos(),
            _ => 1.0,
        }
    }

    /// Seconds to the first token of a request that has a replica for itself.
    pub fn first_token_alone(&self, prompt: u32) -> f64 {
        let mut done = 0;
        let mut seconds = 0.0;
        while done < prompt {
            let chunk = self.chunk.min(prompt - done);
            seconds += self.step(f64::from(chunk), f64::from(done), 0.0, f64::from(done));
            done += chunk;
        }
        seconds
    }
}
