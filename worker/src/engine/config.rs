//! Limits of the engine.

use std::time::Duration;

/// Limits and habits of an engine. Checked by [`EngineConfig::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Requests that may wait beside the `max_num_seqs` that run; more are refused.
    pub max_queued_requests: usize,
    /// Requests of one tenant in flight, running or waiting; `None`: no bound of its own.
    pub max_requests_per_tenant: Option<usize>,
    /// Prompt and answer together, in tokens; `None`: what model and key-value pool allow. Never more than those.
    pub max_model_len: Option<usize>,
    /// Reuses the keys and values of prompts that begin alike.
    pub enable_prefix_caching: bool,
    /// Secret under which cached prompts are indexed, drawn once per process.
    pub prefix_cache_key: [u8; 32],
    /// Digest of the model's weights and numeric settings; separates cached prompts.
    pub model_digest: [u8; 32],
    /// While answers are being generated, prompts are read in pieces so small that a step stays under this time.
    pub inter_token_target: Duration,
    /// A smaller priority by one is worth so much waiting time.
    pub priority_ageing: Duration,
    /// Tokens that wait for a reader before its request pauses.
    pub stream_capacity: usize,
    /// A request whose reader takes no token for so long is cancelled.
    pub stall_timeout: Duration,
    /// Time that `start` may spend measuring the cost of a step; zero: none, the
    /// engine learns from its first requests.
    pub warm_up: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            max_queued_requests: 256,
            max_requests_per_tenant: None,
            max_model_len: None,
            enable_prefix_caching: true,
            prefix_cache_key: [0; 32],
            model_digest: [0; 32],
            inter_token_target: Duration::from_millis(100),
            priority_ageing: Duration::from_secs(10),
            stream_capacity: 64,
            stall_timeout: Duration::from_secs(30),
            warm_up: Duration::from_millis(100),
        }
    }
}

/// A setting that no engine can run with.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{name} {value}: {remedy}")]
pub struct InvalidConfig {
    /// The setting.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What to do.
    pub remedy: String,
}

impl EngineConfig {
    /// Checks each setting and their relations.
    ///
    /// # Errors
    /// The first setting that is wrong, with the remedy.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let bounded = |name, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(InvalidConfig { name, value: value.to_string(), remedy: format!("choose from {least} to {most}") })
        };
        bounded("max_num_seqs", self.max_num_seqs, 1, 4096)?;
        bounded("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, 1 << 20)?;
        bounded("max_queued_requests", self.max_queued_requests, 0, 1 << 20)?;
        bounded("stream_capacity", self.stream_capacity, 1, 1 << 16)?;
        if let Some(most) = self.max_requests_per_tenant {
            bounded("max_requests_per_tenant", most, 1, 1 << 20)?;
        }
        if let Some(len) = self.max_model_len {
            bounded("max_model_len", len, 2, u32::MAX as usize / 2)?;
        }
        let positive = |name, value: Duration| {
            if value.is_zero() {
                let remedy = "choose a time longer than zero".to_owned();
                return Err(InvalidConfig { name, value: format!("{value:?}"), remedy });
            }
            Ok(())
        };
        positive("inter_token_target", self.inter_token_target)?;
        positive("stall_timeout", self.stall_timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(EngineConfig::default().validate(), Ok(()));
    }

    #[test]
    fn a_step_that_cannot_hold_every_sequence_is_refused_with_the_remedy() {
        let config = EngineConfig { max_num_seqs: 64, max_num_batched_tokens: 32, ..EngineConfig::default() };
        let error = config.validate().unwrap_err();
        assert_eq!(error.to_string(), "max_num_batched_tokens 32: choose from 64 to 1048576");
    }

    #[test]
    fn zero_sequences_zero_capacity_and_zero_times_are_refused_by_name() {
        let wrong = [
            EngineConfig { max_num_seqs: 0, ..EngineConfig::default() },
            EngineConfig { stream_capacity: 0, ..EngineConfig::default() },
            EngineConfig { max_requests_per_tenant: Some(0), ..EngineConfig::default() },
            EngineConfig { max_model_len: Some(1), ..EngineConfig::default() },
            EngineConfig { inter_token_target: Duration::ZERO, ..EngineConfig::default() },
            EngineConfig { stall_timeout: Duration::ZERO, ..EngineConfig::default() },
        ];
        let names: Vec<_> = wrong.iter().map(|config| config.validate().unwrap_err().name).collect();
        let expected = [
            "max_num_seqs",
            "stream_capacity",
            "max_requests_per_tenant",
            "max_model_len",
            "inter_token_target",
            "stall_timeout",
        ];
        assert_eq!(names, expected);
    }
}
