//! Bias, bans and penalties, each applied to the few tokens it names.

use std::collections::HashMap;

use super::params::{BAN, SamplingParams};

/// What was seen of each token, in so far as penalties need it.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// Occurrences in the output. Zero: in the prompt only.
    output: u32,
}

/// The tokens of prompt and output that penalties look at.
#[derive(Debug)]
pub(super) struct History {
    /// Absent while no penalty needs it.
    seen: Option<HashMap<u32, Seen>>,
    /// The latest output tokens, for `bad_words`.
    recent: Vec<u32>,
    /// How many of the latest tokens a bad word may look at.
    memory: usize,
}

impl History {
    /// After `prompt` and `emitted`.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32], emitted: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let needed = repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let mut seen = needed.then(HashMap::new);
        if let Some(seen) = seen.as_mut().filter(|_| repetition) {
            seen.extend(prompt.iter().map(|&token| (token, Seen::default())));
        }
        let memory = params.bad_words.iter().map(|word| word.len() - 1).max().unwrap_or(0);
        let mut history = Self { seen, recent: Vec::new(), memory };
        for &token in emitted {
            history.push(token);
        }
        history
    }

    /// Remembers an output token.
    pub(super) fn push(&mut self, token: u32) {
        if let Some(seen) = &mut self.seen {
            seen.entry(token).or_default().output += 1;
        }
        if self.memory > 0 {
            if self.recent.len() == self.memory {
                self.recent.remove(0);
            }
            self.recent.push(token);
        }
    }

    /// Changes `logits` `[vocab]` in place. Ids were checked against the vocabulary; a prompt's may exceed the row.
    pub(super) fn apply(&self, params: &SamplingParams, logits: &mut [f32]) {
        for (&token, seen) in self.seen.iter().flatten() {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let repeated =
                if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
            let present = if seen.output > 0 { params.presence_penalty } else { 0.0 };
            *logit = repeated - present - params.frequency_penalty * seen.output as f32;
        }
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if bias <= BAN { f32::NEG_INFINITY } else { *logit + bias };
            }
        }
        for token in self.completing(&params.bad_words) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The tokens that would complete one of these words.
    pub(super) fn completing(&self, words: &[Vec<u32>]) -> impl Iterator<Item = u32> {
        let ends = words.iter().filter_map(|word| word.split_last());
        ends.filter(|(_, start)| self.recent.ends_with(start)).map(|(&last, _)| last)
    }
}
