//! A step as the model sees it: rows of several sequences below each other, without padding.

use std::ops::Range;

use crate::executor::{BLOCK_TOKENS, ExecuteError, Geometry, LogitRows, Reading, SequenceStep, StepPlan};

/// The first rotary position that is not exact in single precision, and so is refused.
pub const POSITION_LIMIT: u32 = 1 << 24;

/// The rows of one sequence in a batch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Span {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Its tokens that are in the cache already; the first row has this place.
    pub start: usize,
    /// Its blocks, in order.
    pub blocks: Vec<u32>,
    /// The adapter that applies to it.
    pub adapter: Option<u32>,
    /// Its rows among the rows that go through the output head.
    pub logits: Range<usize>,
}

/// A flat batch of T rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids `[T]`.
    pub tokens: Vec<u32>,
    /// Rotary positions `[T]`.
    pub positions: Vec<u32>,
    /// Places in the cache `[T]`: block · [`BLOCK_TOKENS`] + offset.
    pub slots: Vec<u32>,
    /// Rows that go through the output head, ascending.
    pub logit_rows: Vec<u32>,
    /// The sequences, in the order of their rows.
    pub spans: Vec<Span>,
    /// What is read off rows beside their logits, with the first of those rows in the batch, in order.
    pub readings: Vec<(usize, Reading)>,
}

impl Batch {
    /// Lays out a plan, checked against the sizes of the executor and the number of its adapters.
    ///
    /// # Errors
    /// [`ExecuteError::InvalidPlan`] that names the sequence and what is wrong with it.
    pub fn new(plan: &StepPlan, geometry: &Geometry, adapters: usize) -> Result<Self, ExecuteError> {
        let mut batch = Batch::default();
        let mut written = std::collections::HashSet::new();
        for (index, sequence) in plan.sequences.iter().enumerate() {
            let invalid = |what: String| ExecuteError::InvalidPlan(format!("sequence {index}: {what}"));
            check(sequence, geometry, adapters).map_err(invalid)?;
            let (first, start) = (batch.tokens.len(), sequence.start as usize);
            let rows = first..first + sequence.tokens.len();
            for place in start..start + rows.len() {
                let slot = sequence.blocks[place / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (place % BLOCK_TOKENS) as u32;
                if !written.insert(slot) {
                    return Err(invalid(format!("place {place} is written by another sequence too")));
                }
                batch.slots.push(slot);
            }
            batch.tokens.extend(&sequence.tokens);
            match &sequence.position_ids {
                Some(positions) => batch.positions.extend(positions),
                None => batch.positions.extend((start..start + rows.len()).map(|place| place as u32)),
            }
            let wanted = match sequence.logits {
                LogitRows::None => rows.end..rows.end,
                LogitRows::Last => rows.end - 1..rows.end,
                LogitRows::All => rows.clone(),
            };
            let logits = batch.logit_rows.len()..batch.logit_rows.len() + wanted.len();
            batch.logit_rows.extend(wanted.map(|row| row as u32));
            let reading = sequence.reading.as_ref();
            batch.readings.extend(reading.map(|reading| (rows.start + reading.rows().start, reading.clone())));
            batch.spans.push(Span { rows, start, blocks: sequence.blocks.clone(), adapter: sequence.adapter, logits });
        }
        if batch.tokens.is_empty() {
            return Err(ExecuteError::InvalidPlan("no sequences".to_owned()));
        }
        Ok(batch)
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The runs of rows to which an adapter applies.
    pub fn adapter_rows(&self, adapter: u32) -> impl Iterator<Item = Range<usize>> + '_ {
        self.spans.iter().filter(move |span| span.adapter == Some(adapter)).map(|span| span.rows.clone())
    }
}

fn check(sequence: &SequenceStep, geometry: &Geometry, adapters: usize) -> Result<(), String> {
    let rows = sequence.tokens.len();
    let end = sequence.start as usize + rows;
    if rows == 0 {
        return Err("no tokens".to_owned());
    }
    if end > geometry.max_model_len {
        return Err(format!("{end} tokens, more than the context of {}", geometry.max_model_len));
    }
    if sequence.blocks.len() * BLOCK_TOKENS < end {
        return Err(format!("{} blocks cannot hold {end} tokens", sequence.blocks.len()));
    }
    if let Some(block) = sequence.blocks.iter().find(|&&block| block as usize >= geometry.blocks) {
        return Err(format!("block {block} of {}", geometry.blocks));
    }
    if let Some(token) = sequence.tokens.iter().find(|&&token| token as usize >= geometry.vocab) {
        return Err(format!("token {token} of a vocabulary of {}", geometry.vocab));
    }
    match &sequence.position_ids {
        Some(positions) if positions.len() != rows => {
            return Err(format!("{} positions for {rows} tokens", positions.len()));
        }
        Some(positions) => {
            if let Some(position) = positions.iter().find(|&&position| position >= POSITION_LIMIT) {
                return Err(format!("position {position} is not exact in single precision"));
            }
        }
        None => {}
    }
    if let Some(reading) = &sequence.reading {
        let read = reading.rows();
        if read.is_empty() || read.end > rows {
            return Err(format!("rows {} to {} are read of {rows}", read.start, read.end));
        }
        if let Reading::Scores { targets, .. } = reading
            && let Some(target) = targets.iter().find(|&&target| target as usize >= geometry.vocab)
        {
            return Err(format!("token {target} is scored of a vocabulary of {}", geometry.vocab));
        }
        if let Reading::HiddenSum { onto, .. } = reading
            && ![0, geometry.hidden].contains(&onto.len())
        {
            return Err(format!("a sum of {} numbers for hidden states of {}", onto.len(), geometry.hidden));
        }
    }
    match sequence.adapter {
        Some(adapter) if adapter as usize >= adapters => Err(format!("adapter {adapter} of {adapters}")),
        _ => Ok(()),
    }
}
