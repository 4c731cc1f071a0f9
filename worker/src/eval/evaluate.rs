//! Runs sequences as a server would, prompts in chunks, then greedy continuations, all in one batch, and keeps what is
//! computed.

use serde::Serialize;

use crate::engine::scheduler::Bounds;
use crate::executor::{BLOCK_TOKENS, ExecuteError, Executor, Geometry, LogitRows};
use crate::model::ModelExecutor;
use crate::model::batch::POSITION_LIMIT;
use crate::model::trace::Trace;

use super::places::Places;
use super::serving::{Computed, Continuation, Serving, Wanted};

/// Rows of logits that are kept.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum Rows {
    /// One for each token of the prompt.
    #[default]
    All,
    /// That of the prompt's last token.
    Last,
}

/// A prompt.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sequence {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// Rotary positions, one for each id; 0, 1, 2, … when not given. Those of a continuation count on from the largest.
    pub positions: Option<Vec<u32>>,
}

/// What is computed, and in which steps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Tokens to continue by.
    pub generate: usize,
    /// Most tokens of one prompt in one step.
    pub chunk: usize,
    /// Most tokens in one step; each sequence that decodes has one all the same.
    pub step_tokens: usize,
    /// How often all of it runs, with what is in the prefix cache kept; the last run counts. At least 1.
    pub repeat: usize,
    /// Rows of the prompt's logits.
    pub rows: Rows,
    /// Whether to keep intermediate results of the prompt.
    pub trace: bool,
    /// Whether the first adapter applies.
    pub adapter: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            generate: 0,
            chunk: usize::MAX,
            step_tokens: 2048,
            repeat: 1,
            rows: Rows::All,
            trace: false,
            adapter: false,
        }
    }
}

impl Settings {
    /// The scheduler's limits for so many sequences. All may run at once, up to the most that a server may be given.
    pub(super) fn bounds(&self, sequences: usize) -> Bounds {
        let max_num_seqs = sequences.clamp(1, MAX_NUM_SEQS);
        Bounds {
            max_num_seqs,
            max_num_batched_tokens: self.step_tokens.max(max_num_seqs),
            long_prefill_token_threshold: self.chunk.max(1),
            prefix_caching: true,
        }
    }
}

/// Sequences that run at once, at most.
pub(super) const MAX_NUM_SEQS: usize = 4096;

/// How a sequence was run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Figures {
    /// Steps that it took part in.
    pub steps: usize,
    /// Tokens of its prompt that were found in the prefix cache.
    pub prefix_hit_tokens: usize,
    /// How often it gave its blocks to another sequence and had to start again.
    pub preemptions: usize,
    /// Tokens that ran again after that.
    pub recomputed_tokens: usize,
}

/// What came out of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Of the prompt, `[rows, vocab]`: for each token the row that was computed last. For a token found in the prefix
    /// cache it is that of the sequence that put it there.
    pub logits: Vec<f32>,
    /// The continuation.
    pub greedy_tokens: Vec<u32>,
    /// The row that each token of the continuation was picked from, `[generate, vocab]`.
    pub greedy_logits: Vec<f32>,
    /// Intermediate results of the prompt.
    pub trace: Trace,
    /// How it was run.
    pub figures: Figures,
}

/// Runs all sequences side by side until each has its continuation, as often as the settings say.
///
/// # Errors
/// [`ExecuteError::InvalidPlan`] when a sequence does not fit the executor, before anything runs.
pub fn evaluate(
    executor: &mut ModelExecutor,
    sequences: &[Sequence],
    settings: &Settings,
) -> Result<Vec<Evaluation>, ExecuteError> {
    let geometry = executor.geometry();
    for (index, sequence) in sequences.iter().enumerate() {
        check(sequence, settings.generate, &geometry)
            .map_err(|what| ExecuteError::InvalidPlan(format!("sequence {index}: {what}")))?;
    }
    let all = settings.rows == Rows::All;
    let wanted = Wanted {
        generate: settings.generate,
        rows: if all { LogitRows::All } else { LogitRows::Last },
        trace: settings.trace,
        adapter: settings.adapter,
    };
    let mut places = (all || settings.trace).then(|| Places::new(geometry.blocks));
    let mut serving = Serving::new(executor, settings.bounds(sequences.len()), wanted);
    let mut results = Vec::new();
    for _ in 0..settings.repeat.max(1) {
        results = vec![Evaluation::default(); sequences.len()];
        let continuations = serving.round(sequences, &mut |computed: Computed<'_>| {
            let prompt = sequences[computed.index].ids.len();
            let result = &mut results[computed.index];
            // A prompt's last token never comes from the cache, and the first step that ends with it has its row.
            let ends_prompt = computed.step.start as usize + computed.step.tokens.len() == prompt;
            if !all && ends_prompt && !computed.logits.is_empty() {
                result.logits = computed.logits.to_vec();
            }
            let Some(places) = &mut places else { return Ok(()) };
            places.keep(&computed);
            if computed.last {
                let (logits, trace) = places.rows(&computed.step.blocks, prompt)?;
                result.trace = trace;
                if all {
                    result.logits = logits;
                }
            }
            Ok(())
        })?;
        for (result, Continuation { tokens, logits, figures }) in results.iter_mut().zip(continuations) {
            (result.greedy_tokens, result.greedy_logits, result.figures) = (tokens, logits, figures);
        }
    }
    Ok(results)
}

/// Whether a sequence and its continuation fit the executor. Errors are sentences.
fn check(sequence: &Sequence, generate: usize, geometry: &Geometry) -> Result<(), String> {
    let Sequence { ids, positions } = sequence;
    let tokens = ids.len().saturating_add(generate);
    if ids.is_empty() {
        return Err("no tokens".to_owned());
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= geometry.vocab) {
        return Err(format!("token {id} is beyond the vocabulary of {}", geometry.vocab));
    }
    if tokens > geometry.max_model_len {
        return Err(format!("{tokens} tokens are more than the context of {}", geometry.max_model_len));
    }
    if tokens.div_ceil(BLOCK_TOKENS) > geometry.blocks {
        return Err(format!("{tokens} tokens are more than {} blocks of {BLOCK_TOKENS} hold", geometry.blocks));
    }
    let Some(positions) = positions else { return Ok(()) };
    if positions.len() != ids.len() {
        return Err(format!("{} positions for {} tokens", positions.len(), ids.len()));
    }
    let largest = positions.iter().copied().max().unwrap_or(0) as usize + generate;
    if largest >= POSITION_LIMIT as usize {
        return Err(format!("position {largest} is not exact in single precision: stay below {POSITION_LIMIT}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { vocab: 10, hidden: 4, blocks: 2, max_model_len: 60 };

    fn refusal(ids: &[u32], positions: Option<&[u32]>, generate: usize) -> String {
        let sequence = Sequence { ids: ids.to_vec(), positions: positions.map(<[u32]>::to_vec) };
        check(&sequence, generate, &GEOMETRY).expect_err("refused")
    }

    #[test]
    fn sequences_that_do_not_fit_are_refused_by_what_does_not() {
        assert!(refusal(&[], None, 1).contains("no tokens"));
        assert!(refusal(&[3, 10], None, 1).contains("token 10 is beyond the vocabulary of 10"));
        assert!(refusal(&[3], None, 60).contains("61 tokens are more than the context of 60"));
        assert!(refusal(&[3], None, usize::MAX).contains("the context of 60"));
        assert!(refusal(&[3, 4], Some(&[1]), 1).contains("1 positions for 2 tokens"));
        assert!(refusal(&[3, 4], Some(&[1, (1 << 24) - 3]), 3).contains("single precision"));
        let small = Geometry { blocks: 1, ..GEOMETRY };
        let sequence = Sequence { ids: vec![1; 30], positions: None };
        assert!(check(&sequence, 3, &small).expect_err("refused").contains("more than 1 blocks of 32"));
        assert_eq!(check(&sequence, 2, &small), Ok(()));
    }

    #[test]
    fn a_step_has_room_for_a_token_of_every_sequence() {
        let settings = Settings { chunk: 1, step_tokens: 4, ..Settings::default() };
        let bounds = settings.bounds(9);
        assert_eq!((bounds.max_num_seqs, bounds.max_num_batched_tokens), (9, 9));
        assert_eq!(bounds.long_prefill_token_threshold, 1);
        assert_eq!(settings.bounds(100_000).max_num_seqs, MAX_NUM_SEQS);
    }
}
