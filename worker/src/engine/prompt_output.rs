//! PURE: what a request may ask of its prompt, beside an answer to it.

use crate::sampling::{InvalidSampling, TokenLogprobs};

use super::scheduler::{RowReading, RowReadingKind};

/// What is read off a prompt.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PromptOutput {
    /// The log-probability of each prompt token from `first` on, as [`Event::PromptLogprobs`].
    ///
    /// [`Event::PromptLogprobs`]: super::Event::PromptLogprobs
    Logprobs {
        /// Place of the first token, at least 1: nothing precedes the token at 0. Before it the prefix cache is used.
        first: usize,
        /// How many of the best tokens come beside each; at most 20.
        top: u32,
    },
    /// The prompt's hidden states behind the last norm, as one [`Event::Embedding`].
    ///
    /// [`Event::Embedding`]: super::Event::Embedding
    Embedding(Pooling),
}

/// How the hidden states of a prompt become one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Pooling {
    /// That of the last token.
    #[default]
    Last,
    /// Their mean: the sum in f64, one after the other, whatever the steps.
    Mean,
}

/// The log-probability of one prompt token, in the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprob {
    /// The token.
    pub id: u32,
    /// Its log-probability, and the best tokens of its place.
    pub logprobs: TokenLogprobs,
}

impl PromptOutput {
    /// Checks the numbers in it.
    ///
    /// # Errors
    /// What would be accepted.
    pub(super) fn check(self) -> Result<(), InvalidSampling> {
        let wrong = |name, value: String, remedy| Err(InvalidSampling { name, value, remedy });
        match self {
            Self::Logprobs { top, .. } if top > 20 => wrong("prompt_logprobs", top.to_string(), "choose from 0 to 20"),
            Self::Logprobs { first: 0, .. } => {
                wrong("prompt_logprobs", "from token 0".to_owned(), "begin with token 1, which has one before it")
            }
            _ => Ok(()),
        }
    }

    /// What the rows of a prompt of so many tokens are read for. `None`: for nothing.
    pub(super) fn rows(self, prompt: usize) -> Option<RowReading> {
        let (rows, kind) = match self {
            // A row tells of the token that follows it.
            Self::Logprobs { first, top } => {
                (first.saturating_sub(1)..prompt.saturating_sub(1), RowReadingKind::Scores { top })
            }
            Self::Embedding(pooling) => {
                let first = if pooling == Pooling::Last { prompt.saturating_sub(1) } else { 0 };
                (first..prompt, RowReadingKind::HiddenSum { sum: Vec::new() })
            }
        };
        (!rows.is_empty()).then_some(RowReading { rows, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_before_the_tokens_are_read_and_the_last_row_or_all_for_an_embedding() {
        let rows = |output: PromptOutput, prompt| output.rows(prompt).map(|reading| reading.rows);
        assert_eq!(rows(PromptOutput::Logprobs { first: 1, top: 0 }, 9), Some(0..8));
        assert_eq!(rows(PromptOutput::Logprobs { first: 5, top: 0 }, 9), Some(4..8));
        assert_eq!(rows(PromptOutput::Logprobs { first: 1, top: 0 }, 1), None);
        assert_eq!(rows(PromptOutput::Logprobs { first: 30, top: 0 }, 9), None);
        assert_eq!(rows(PromptOutput::Embedding(Pooling::Last), 9), Some(8..9));
        assert_eq!(rows(PromptOutput::Embedding(Pooling::Mean), 9), Some(0..9));
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name_value_and_remedy() {
        let refused = |first, top| PromptOutput::Logprobs { first, top }.check().unwrap_err().to_string();
        assert_eq!(refused(1, 21), "prompt_logprobs is 21; choose from 0 to 20");
        assert!(refused(0, 1).starts_with("prompt_logprobs is from token 0; begin with token 1"));
        assert_eq!(PromptOutput::Logprobs { first: 1, top: 20 }.check(), Ok(()));
    }
}
