//! PURE: a planned step.

use crate::executor::{BLOCK_TOKENS, LogitRows, Reading, SequenceStep, StepPlan};

use super::cost::Shape;
use super::sequence::{Sequence, SequenceId};

/// A planned step, and what planning it changed. Its memory is used again from step to step.
#[derive(Debug, Default)]
pub struct Step {
    /// For the executor.
    pub plan: StepPlan,
    /// One for each sequence of the plan, in order.
    pub parts: Vec<Part>,
    /// Sequences that left the queue.
    pub started: Vec<Started>,
    /// Sequences that went back to it.
    pub preempted: Vec<SequenceId>,
    /// Its size.
    pub shape: Shape,
    /// Rows of sequences that decode; the others read prompts.
    pub decode_rows: usize,
    /// Parts of earlier steps, to be filled again.
    spare: Vec<SequenceStep>,
}

/// The part of one sequence in a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// Which sequence.
    pub id: SequenceId,
    /// Rows it runs.
    pub rows: usize,
    /// Whether its next token is to be sampled from the last row.
    pub samples: bool,
    /// How many of its rows something is read off.
    pub reads: usize,
    /// Whether this was all that it asked for: it generates nothing.
    pub ends: bool,
}

/// A sequence that left the queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Started {
    /// Which sequence.
    pub id: SequenceId,
    /// Tokens found in the prefix cache.
    pub cached: usize,
    /// Whether it runs for the first time, not after a preemption.
    pub first: bool,
}

impl Step {
    /// Whether nothing runs.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Rows of sequences that read prompts.
    pub fn prompt_rows(&self) -> usize {
        self.shape.tokens - self.decode_rows
    }

    pub(super) fn clear(&mut self) {
        self.spare.append(&mut self.plan.sequences);
        self.parts.clear();
        self.started.clear();
        self.preempted.clear();
        self.shape = Shape::default();
        self.decode_rows = 0;
    }

    /// Adds the next `rows` tokens of a running sequence.
    pub(super) fn push(&mut self, id: SequenceId, sequence: &Sequence, rows: usize) {
        let start = sequence.computed();
        let end = start + rows;
        let complete = end == sequence.tokens.len();
        let (samples, ends) = (complete && sequence.generates, complete && !sequence.generates);
        let mut part = self.spare.pop().unwrap_or_default();
        part.tokens.clear();
        part.tokens.extend_from_slice(&sequence.tokens[start..end]);
        part.blocks.clear();
        part.blocks.extend_from_slice(&sequence.blocks()[..end.div_ceil(BLOCK_TOKENS)]);
        // Bounded by the context, which fits.
        part.start = start as u32;
        part.position_ids = sequence.positions.as_ref().map(|positions| positions.range(start, rows));
        part.adapter = sequence.adapter;
        part.logits = if samples { LogitRows::Last } else { LogitRows::None };
        part.reading = sequence.reading.as_ref().and_then(|reading| reading.of_step(start, end, &sequence.tokens));
        let reads = part.reading.as_ref().map_or(0, |reading| reading.rows().len());
        let scored = if matches!(part.reading, Some(Reading::Scores { .. })) { reads } else { 0 };
        self.plan.sequences.push(part);
        self.parts.push(Part { id, rows, samples, reads, ends });
        self.shape = self.shape.plus(Shape::of_rows(start, rows, samples, scored));
    }
}
