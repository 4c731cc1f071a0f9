//! What is read off the rows of a batch beside logits: scores of given tokens, and sums of hidden states.

use std::ops::Range;

use super::backend::{Backend, ComputeError, Result};
use super::batch::Batch;
use super::ernie::Decoder;
use crate::executor::{Reading, Readout, RowScore};
use crate::sampling::{Scratch, score};

/// Rows whose logits are in memory at once while they are scored.
pub const SCORED_AT_ONCE: usize = 16;
/// Rows whose hidden states are copied at once.
const SUMMED_AT_ONCE: usize = 64;

impl<B: Backend> Decoder<B> {
    /// What the batch's readings give, from the residual stream behind the last layer.
    pub(super) fn read_out(&self, backend: &B, stream: &B::Rows, batch: &Batch) -> Result<Vec<Readout>> {
        let mut scratch = Scratch::default();
        let read = |(first, reading): &(usize, Reading)| match reading {
            Reading::Scores { targets, top, .. } => {
                self.scores(backend, stream, *first, (targets, *top as usize), &mut scratch).map(Readout::Scores)
            }
            Reading::HiddenSum { rows, onto, .. } => {
                self.hidden_sum(backend, stream, *first..first + *rows as usize, onto).map(Readout::HiddenSum)
            }
        };
        batch.readings.iter().map(read).collect()
    }

    /// Scores a token in each of the rows from `first` on, a few rows at a time.
    fn scores(
        &self,
        backend: &B,
        stream: &B::Rows,
        first: usize,
        (targets, top): (&[u32], usize),
        scratch: &mut Scratch,
    ) -> Result<Vec<RowScore>> {
        let mut scores = Vec::with_capacity(targets.len());
        for slice in targets.chunks(SCORED_AT_ONCE) {
            let begin = first + scores.len();
            let logits = self.logits(backend, stream, &numbers(begin..begin + slice.len()))?;
            let rows = logits.chunks_exact(logits.len() / slice.len());
            scores.extend(rows.zip(slice).map(|(row, &target)| score(row, target, top, scratch)));
        }
        Ok(scores)
    }

    /// Adds rows to a sum, one after the other, so that it does not depend on how they are spread over steps.
    fn hidden_sum(&self, backend: &B, stream: &B::Rows, rows: Range<usize>, onto: &[f64]) -> Result<Vec<f64>> {
        let mut sum = onto.to_vec();
        let mut begin = rows.start;
        while begin < rows.end {
            let end = rows.end.min(begin + SUMMED_AT_ONCE);
            let hidden = backend.into_f32(self.normed(backend, stream, &numbers(begin..end))?)?;
            let width = hidden.len() / (end - begin);
            if sum.is_empty() {
                sum.resize(width, 0.0);
            }
            if sum.len() != width {
                return Err(ComputeError(format!("a sum of {} numbers for hidden states of {width}", sum.len())));
            }
            for row in hidden.chunks_exact(width) {
                sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
            }
            begin = end;
        }
        Ok(sum)
    }
}

/// Rows by number. A batch has far fewer than 2³² of them.
fn numbers(rows: Range<usize>) -> Vec<u32> {
    rows.map(|row| row as u32).collect()
}
