//! What was computed for the places of the cache, beside their keys and values: a sequence that finds its beginning in
//! the prefix cache finds the rows of it here.

use crate::executor::{BLOCK_TOKENS, ExecuteError, LogitRows};
use crate::model::trace::Trace;

use super::serving::Computed;

/// Rows by place: block · [`BLOCK_TOKENS`] + offset.
#[derive(Debug)]
pub(super) struct Places(Vec<Option<Row>>);

/// What was computed at a place.
#[derive(Clone, Debug)]
struct Row {
    /// `[vocab]`, or empty where no logits were asked for.
    logits: Vec<f32>,
    trace: Option<Trace>,
}

impl Places {
    /// Of a cache with so many blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self(vec![None; blocks * BLOCK_TOKENS])
    }

    /// Keeps the rows of one part of a step, in place of what was there.
    pub(super) fn keep(&mut self, computed: &Computed<'_>) {
        let Computed { step, logits, trace, .. } = computed;
        let count = step.tokens.len();
        let width = if step.logits == LogitRows::All { logits.len() / count } else { 0 };
        for row in 0..count {
            let logits = logits[row * width..(row + 1) * width].to_vec();
            let trace = trace.as_ref().map(|trace| trace.rows(row..row + 1, count));
            self.0[place(&step.blocks, step.start as usize + row)] = Some(Row { logits, trace });
        }
    }

    /// The rows of the first `count` tokens of a sequence with these blocks: logits `[count, vocab]` and trace.
    ///
    /// # Errors
    /// [`ExecuteError::Failed`] when one of them was never computed: a defect of the scheduler.
    pub(super) fn rows(&self, blocks: &[u32], count: usize) -> Result<(Vec<f32>, Trace), ExecuteError> {
        let (mut logits, mut trace) = (Vec::new(), Trace::default());
        for token in 0..count {
            let row = self.0[place(blocks, token)].as_ref();
            let row = row.ok_or_else(|| ExecuteError::Failed(format!("nothing was computed for token {token}")))?;
            logits.extend_from_slice(&row.logits);
            if let Some(row) = &row.trace {
                trace.append(row.clone());
            }
        }
        Ok((logits, trace))
    }
}

fn place(blocks: &[u32], token: usize) -> usize {
    blocks[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::SequenceStep;

    fn step(start: u32, tokens: usize, blocks: &[u32]) -> SequenceStep {
        let blocks = blocks.to_vec();
        SequenceStep {
            tokens: vec![7; tokens],
            start,
            position_ids: None,
            blocks,
            adapter: None,
            logits: LogitRows::All,
            reading: None,
        }
    }

    fn keep(places: &mut Places, step: &SequenceStep, logits: &[f32]) {
        places.keep(&Computed { index: 0, step, logits, trace: None, last: false });
    }

    #[test]
    fn a_sequence_finds_the_rows_of_a_block_that_another_one_filled() {
        let mut places = Places::new(3);
        keep(&mut places, &step(0, 32, &[2]), &[1.0; 64]);
        keep(&mut places, &step(32, 2, &[2, 0]), &[2.0, 2.5, 3.0, 3.5]);
        keep(&mut places, &step(32, 1, &[2, 1]), &[4.0, 4.5]);
        let (logits, _) = places.rows(&[2, 1], 33).expect("rows");
        assert_eq!(logits, [&[1.0; 64][..], &[4.0, 4.5]].concat());
        let (logits, _) = places.rows(&[2, 0], 34).expect("rows");
        assert_eq!(logits[64..], [2.0, 2.5, 3.0, 3.5]);
    }

    #[test]
    fn the_row_of_a_place_is_the_latest_and_none_is_made_up() {
        let mut places = Places::new(1);
        keep(&mut places, &step(0, 2, &[0]), &[1.0, 2.0]);
        keep(&mut places, &step(1, 1, &[0]), &[9.0]);
        assert_eq!(places.rows(&[0], 2).expect("rows").0, [1.0, 9.0]);
        assert!(places.rows(&[0], 3).is_err());
    }
}
