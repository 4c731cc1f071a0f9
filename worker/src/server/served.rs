//! A loaded model, and what its names stand for.

use std::sync::Arc;

use tonic::Status;

use super::{arrival::TextBudget, status};
use crate::{
    chat::ChatTemplate,
    constraint::Grammars,
    engine::{self, EngineHandle},
    sampling::SamplingParams,
    tokenizer::Tokenizer,
};

/// A loaded model, as the services see it.
pub struct Served {
    /// The name that clients send.
    pub name: String,
    /// `model_type` of config.json.
    pub architecture: String,
    /// Number format of the weights.
    pub dtype: String,
    /// How linear maps are quantised.
    pub quantization: &'static str,
    /// Identifies weights, formats and kernels: equal seeds give equal answers where this is equal.
    pub numerics: String,
    /// The adapters, which clients ask for as models of their own.
    pub adapters: Vec<ServedAdapter>,
    /// Tokens that end an answer.
    pub eos_token_ids: Arc<[u32]>,
    /// What requests leave out.
    pub defaults: SamplingParams,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Conversation to text, when the model has a template.
    pub template: Option<ChatTemplate>,
    /// What answers can be constrained to.
    pub grammars: Grammars,
    /// How much text is worked on at once.
    pub text: TextBudget,
    /// Where requests go.
    pub engine: EngineHandle,
}

/// A loaded adapter, as the services see it.
pub struct ServedAdapter {
    /// The name that clients send.
    pub name: String,
    /// As [`Served::numerics`], of the model with this adapter.
    pub numerics: String,
    /// What the engine knows it by.
    pub adapter: engine::Adapter,
}

/// What a client's model name stands for.
pub(super) struct Asked<'a> {
    /// The name that answers carry.
    pub(super) name: &'a str,
    /// See [`Served::numerics`].
    pub(super) numerics: &'a str,
    /// The adapter that applies.
    pub(super) adapter: Option<engine::Adapter>,
}

impl Served {
    /// The model of that name, with or without an adapter; an empty name is the model itself.
    pub(super) fn find(&self, asked: &str) -> Result<Asked<'_>, Status> {
        if asked.is_empty() || asked == self.name {
            return Ok(Asked { name: &self.name, numerics: &self.numerics, adapter: None });
        }
        let adapter = self.adapters.iter().find(|adapter| adapter.name == asked).ok_or_else(|| {
            let names = std::iter::once(&self.name).chain(self.adapters.iter().map(|adapter| &adapter.name));
            status::unknown_model(asked, names.map(String::as_str))
        })?;
        Ok(Asked { name: &adapter.name, numerics: &adapter.numerics, adapter: Some(adapter.adapter) })
    }
}
