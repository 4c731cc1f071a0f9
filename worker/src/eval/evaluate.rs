//! Runs sequences through an executor: prompts in chunks, then greedy continuations, all in one batch.

use crate::executor::{BLOCK_TOKENS, ExecuteError, LogitRows, SequenceStep, StepOutput, StepPlan};
use crate::model::ModelExecutor;
use crate::model::trace::Trace;

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
    /// Rotary positions, one for each id; 0, 1, 2, … when not given.
    pub positions: Option<Vec<u32>>,
}

/// What is computed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Tokens to continue by.
    pub generate: usize,
    /// Tokens of a prompt in one step.
    pub chunk: usize,
    /// Rows of the prompt's logits.
    pub rows: Rows,
    /// Whether to keep intermediate results of the prompt.
    pub trace: bool,
    /// Whether the first adapter applies.
    pub adapter: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { generate: 0, chunk: usize::MAX, rows: Rows::All, trace: false, adapter: false }
    }
}

/// What came out of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Of the prompt, `[rows, vocab]`.
    pub logits: Vec<f32>,
    /// The continuation.
    pub greedy_tokens: Vec<u32>,
    /// The row that each token of the continuation was picked from, `[generate, vocab]`.
    pub greedy_logits: Vec<f32>,
    /// Intermediate results of the prompt.
    pub trace: Trace,
}

/// Where a sequence is.
struct Running<'a> {
    sequence: &'a Sequence,
    blocks: Vec<u32>,
    done: usize,
    result: Evaluation,
}

/// Runs all sequences side by side until each has its continuation.
///
/// # Errors
/// [`ExecuteError::InvalidPlan`] when a sequence does not fit the executor.
pub fn evaluate(
    executor: &mut ModelExecutor,
    sequences: &[Sequence],
    settings: &Settings,
) -> Result<Vec<Evaluation>, ExecuteError> {
    let mut next_block = 0;
    let mut running: Vec<Running<'_>> = sequences
        .iter()
        .map(|sequence| {
            let blocks = (sequence.ids.len() + settings.generate).div_ceil(BLOCK_TOKENS) as u32;
            next_block += blocks;
            let blocks = (next_block - blocks..next_block).collect();
            Running { sequence, blocks, done: 0, result: Evaluation::default() }
        })
        .collect();
    loop {
        let mut taking_part = Vec::new();
        let mut plan = StepPlan::default();
        for (index, sequence) in running.iter().enumerate() {
            if let Some(step) = sequence.next(settings) {
                plan.sequences.push(step);
                taking_part.push(index);
            }
        }
        if taking_part.is_empty() {
            return Ok(running.into_iter().map(|sequence| sequence.result).collect());
        }
        let mut trace = settings.trace.then(Trace::default);
        let StepOutput { logits } = executor.execute_traced(&plan, trace.as_mut())?;
        let mut rows = 0;
        for ((&index, step), logits) in taking_part.iter().zip(&plan.sequences).zip(logits) {
            let range = rows..rows + step.tokens.len();
            rows = range.end;
            let part = trace.as_ref().map(|trace| trace.rows(range, plan.tokens()));
            running[index].take(settings, step, logits, part);
        }
    }
}

impl Running<'_> {
    /// The next step of the sequence: a chunk of its prompt, or its last token.
    fn next(&self, settings: &Settings) -> Option<SequenceStep> {
        let prompt = &self.sequence.ids;
        let (tokens, logits) = if self.done < prompt.len() {
            let end = self.done.saturating_add(settings.chunk.max(1)).min(prompt.len());
            let logits = match settings.rows {
                Rows::All => LogitRows::All,
                Rows::Last if end == prompt.len() => LogitRows::Last,
                Rows::Last => LogitRows::None,
            };
            (prompt[self.done..end].to_vec(), logits)
        } else if self.done < prompt.len() + settings.generate.saturating_sub(1) {
            (vec![*self.result.greedy_tokens.last()?], LogitRows::Last)
        } else {
            return None;
        };
        let place = self.done..self.done + tokens.len();
        let position_ids = self.sequence.positions.as_ref().map(|positions| {
            // past the prompt positions go on from its last
            let last = positions.last().copied().unwrap_or(0);
            let after = |place: usize| last + (place + 1 - positions.len()) as u32;
            place.map(|place| positions.get(place).copied().unwrap_or_else(|| after(place))).collect()
        });
        Some(SequenceStep {
            tokens,
            start: self.done as u32,
            position_ids,
            blocks: self.blocks.clone(),
            adapter: settings.adapter.then_some(0),
            logits,
        })
    }

    /// Takes what a step of this sequence gave.
    fn take(&mut self, settings: &Settings, step: &SequenceStep, logits: Vec<f32>, trace: Option<Trace>) {
        let in_prompt = self.done < self.sequence.ids.len();
        self.done += step.tokens.len();
        if in_prompt && let Some(trace) = trace {
            self.result.trace.append(trace);
        }
        if self.done >= self.sequence.ids.len() && self.result.greedy_tokens.len() < settings.generate {
            let rows = if step.logits == LogitRows::All { step.tokens.len() } else { 1 };
            let row = &logits[(rows - 1) * (logits.len() / rows)..];
            self.result.greedy_tokens.push(argmax(row));
            self.result.greedy_logits.extend(row);
        }
        if in_prompt {
            if self.result.logits.is_empty() {
                self.result.logits = logits;
            } else {
                self.result.logits.extend(logits);
            }
        }
    }
}

/// The first of the largest; not-a-number is smaller than everything.
fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &value) in row.iter().enumerate() {
        if value > row[best] || row[best].is_nan() {
            best = index;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest_is_picked_and_not_a_number_never() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, f32::NAN, 3.0, 2.0]), 2);
        assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NEG_INFINITY]), 0);
    }

    #[test]
    fn positions_go_on_after_the_prompt_from_its_last_one() {
        let sequence = Sequence { ids: vec![5, 6, 7], positions: Some(vec![10, 11, 100]) };
        let mut running = Running { sequence: &sequence, blocks: vec![0], done: 2, result: Evaluation::default() };
        let settings = Settings { generate: 4, chunk: 8, ..Settings::default() };
        assert_eq!(running.next(&settings).and_then(|step| step.position_ids), Some(vec![100]));
        running.done = 4;
        running.result.greedy_tokens = vec![1, 2];
        assert_eq!(running.next(&settings).and_then(|step| step.position_ids), Some(vec![102]));
    }
}
