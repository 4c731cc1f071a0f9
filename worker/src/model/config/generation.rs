//! `generation_config.json`: the sampling defaults that a checkpoint's makers recommend.

use std::path::Path;

use super::ModelConfig;
use crate::model::error::LoadError;
use crate::model::json::Fields;

/// Sampling defaults of a checkpoint; `None` where it recommends nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Whether to sample; greedy otherwise.
    pub do_sample: Option<bool>,
    /// Divides logits, > 0 (0 means greedy).
    pub temperature: Option<f32>,
    /// Nucleus mass, in (0, 1].
    pub top_p: Option<f32>,
    /// Most likely tokens kept; 0 keeps all.
    pub top_k: Option<u32>,
    /// Smallest probability kept, relative to the largest, in [0, 1].
    pub min_p: Option<f32>,
    /// Divides (or multiplies) logits of tokens seen, > 0.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens generated.
    pub presence_penalty: Option<f32>,
    /// Subtracted from logits per occurrence of tokens generated.
    pub frequency_penalty: Option<f32>,
    /// Tokens to generate when the request does not say.
    pub max_new_tokens: Option<usize>,
    /// Tokens that end a sequence; those of `config.json` when the file names none.
    pub eos_token_ids: Vec<u32>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Keys that this version does not know, for the log.
    pub unknown_keys: Vec<String>,
}

/// Keys that do not concern sampling here.
const IGNORED: [&str; 7] = [
    "_from_model_config",
    "max_length",
    "min_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "transformers_version",
];

impl GenerationDefaults {
    /// What a checkpoint without the file recommends: the ids of its config, and nothing else.
    pub fn of_config(config: &ModelConfig) -> Self {
        Self { eos_token_ids: config.eos_token_ids.clone(), bos_token_id: config.bos_token_id, ..Self::default() }
    }

    /// Reads `generation_config.json` beside a config.
    ///
    /// # Errors
    /// [`LoadError`] that names the key, its value and what it must be.
    pub fn read(path: &Path, config: &ModelConfig) -> Result<Self, LoadError> {
        Self::from_fields(Fields::read(path)?, config)
    }

    /// Reads the text of the file; `file` is what errors call it.
    ///
    /// # Errors
    /// As [`GenerationDefaults::read`].
    pub fn parse(file: &str, text: &str, config: &ModelConfig) -> Result<Self, LoadError> {
        Self::from_fields(Fields::parse(file, text)?, config)
    }

    fn from_fields(mut fields: Fields, config: &ModelConfig) -> Result<Self, LoadError> {
        let single = |number: Option<f64>| number.map(|number| number as f32);
        let mut defaults = Self {
            do_sample: fields.flag("do_sample")?,
            temperature: single(fields.number("temperature", 0.0..=100.0)?),
            top_p: single(fields.number("top_p", 1e-6..=1.0)?),
            top_k: fields.count("top_k", 0..=u64::from(u32::MAX))?.map(|number| number as u32),
            min_p: single(fields.number("min_p", 0.0..=1.0)?),
            repetition_penalty: single(fields.number("repetition_penalty", 1e-3..=1e3)?),
            presence_penalty: single(fields.number("presence_penalty", -100.0..=100.0)?),
            frequency_penalty: single(fields.number("frequency_penalty", -100.0..=100.0)?),
            max_new_tokens: fields.count("max_new_tokens", 1..=1 << 24)?,
            eos_token_ids: fields.token_ids("eos_token_id", config.vocab_size)?,
            bos_token_id: fields.token_ids("bos_token_id", config.vocab_size)?.first().copied(),
            unknown_keys: Vec::new(),
        };
        if defaults.eos_token_ids.is_empty() {
            defaults.eos_token_ids.clone_from(&config.eos_token_ids);
        }
        defaults.bos_token_id = defaults.bos_token_id.or(config.bos_token_id);
        for key in IGNORED {
            fields.take(key);
        }
        Ok(Self { unknown_keys: fields.left(), ..defaults })
    }
}
