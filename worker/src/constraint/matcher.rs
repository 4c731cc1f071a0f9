//! One place in one answer.

use std::sync::Arc;

use llguidance::TokenParser;

use super::vocabulary::Vocabulary;
use crate::sampling::Mask;

/// What may come at a place of an answer.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// These tokens; those that end the answer are among them where it may end.
    Within(Arc<Mask>),
    /// Nothing but the end.
    Over,
}

impl Place {
    /// Whether a token may come.
    pub(super) fn allows(&self, token: u32) -> bool {
        matches!(self, Self::Within(mask) if mask.allows(token))
    }
}

/// Why a matcher goes no further.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Stuck {
    /// The grammar leads nowhere from here.
    #[error("no token of this model may come next")]
    Nothing,
    /// It is too complex, or its interpreter failed. A sentence.
    #[error("{0}")]
    Failed(String),
}

/// Follows an answer through a grammar.
pub(super) struct Matcher(Box<llguidance::Matcher>);

impl Matcher {
    pub(super) fn new(parser: TokenParser) -> Self {
        Self(Box::new(llguidance::Matcher::new(Ok(parser))))
    }

    /// A matcher at the same place that shares nothing with this one, so that no answer depends on another.
    pub(super) fn fork(&self) -> Self {
        Self(Box::new(self.0.deep_clone()))
    }

    /// Takes tokens, none of which ends the answer.
    ///
    /// # Errors
    /// [`Stuck`] when one of them is not allowed, or the grammar is too complex.
    pub(super) fn advance(&mut self, tokens: &[u32]) -> Result<(), Stuck> {
        self.0.consume_tokens(tokens).map_err(|error| stuck(&error.to_string()))
    }

    /// Whether these tokens may come, in order. It stays where it is. Also `false` when a step's work does not suffice to
    /// know; then it cannot go on.
    pub(super) fn allows(&mut self, tokens: &[u32]) -> bool {
        self.0.validate_tokens(tokens).is_ok_and(|fits| fits == tokens.len())
    }

    /// What may come next.
    ///
    /// # Errors
    /// [`Stuck`] when that is nothing, or the grammar is too complex.
    pub(super) fn look(&mut self, vocabulary: &Vocabulary) -> Result<Place, Stuck> {
        if self.0.is_stopped() {
            return match self.0.get_error() {
                None => Ok(Place::Over),
                Some(error) => Err(stuck(&error)),
            };
        }
        let mask = self.0.compute_mask().map_err(|error| stuck(&error.to_string()))?;
        let mut mask = Mask::from_words(mask.into());
        // A grammar may name tokens by their ids.
        mask.retain(&vocabulary.known);
        if mask.is_empty() {
            return Err(Stuck::Nothing);
        }
        Ok(if mask.is_within(&vocabulary.ends) { Place::Over } else { Place::Within(Arc::new(mask)) })
    }
}

/// What llguidance says, as far as it is for the caller; a state or a backtrace follows it.
fn stuck(error: &str) -> Stuck {
    match error.lines().next().unwrap_or_default() {
        // The name of the reason for which llguidance stopped.
        "NoExtensionBias" => Stuck::Nothing,
        line => Stuck::Failed(line.to_owned()),
    }
}
