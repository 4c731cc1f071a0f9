//! Attention over the cache in tensor operations: one sequence after the other, a long one in groups of rows.

use std::ops::Range;

use candle_core::{D, DType, Tensor};

use super::CandleBackend;
use crate::executor::BLOCK_TOKENS;
use crate::model::backend::{AttentionShape, Result};
use crate::model::batch::{Batch, Span};

/// The most scores that attention has in memory at once, over all heads: a long prompt is attended in groups of rows. A
/// quarter of a gigabyte in single precision.
pub const ATTENTION_SCORES: usize = 1 << 26;

/// What the candle backend prepares of a batch.
#[derive(Debug)]
pub struct Prepared {
    /// `[T, 1, head_dim / 2, 1]`, f32.
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    /// Each row's slot, once for each column of a key: `[T, kv_heads · head_dim]`.
    pub(super) slots: Tensor,
    /// 0, 1, 2, … to the end of the longest sequence, f32.
    pub(super) places: Tensor,
    pub(super) sequences: Vec<Sequence>,
}

/// What attention needs of one sequence.
#[derive(Debug)]
pub(super) struct Sequence {
    rows: Range<usize>,
    /// Slots of the tokens seen by any of its rows, in order.
    seen: Tensor,
    /// Its tokens that were in the cache before; the first row has this place.
    start: usize,
}

impl Sequence {
    /// Its tokens, those of the step included.
    pub(super) fn length(&self) -> usize {
        self.start + self.rows.len()
    }
}

/// Slots of a sequence's tokens, those of the step included.
fn slots(span: &Span) -> impl Iterator<Item = u32> + '_ {
    let slot = |place: usize| span.blocks[place / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (place % BLOCK_TOKENS) as u32;
    (0..span.start + span.rows.len()).map(slot)
}

impl CandleBackend {
    /// The sequences of a batch; their slots go to the device as one tensor.
    pub(super) fn sequences(&self, batch: &Batch) -> Result<Vec<Sequence>> {
        let seen = self.indices(&batch.spans.iter().flat_map(slots).collect::<Vec<_>>())?;
        let mut first = 0;
        let sequence = |span: &Span| {
            let length = span.start + span.rows.len();
            let seen = seen.narrow(0, first, length)?;
            first += length;
            Ok(Sequence { rows: span.rows.clone(), seen, start: span.start })
        };
        batch.spans.iter().map(sequence).collect()
    }

    /// 0 where the rows at `places` of a sequence see one of its first `length` tokens, −∞ elsewhere, `[places, length]`;
    /// `None` where they see all of them.
    fn mask(
        &self,
        order: &Tensor,
        places: Range<usize>,
        length: usize,
        window: Option<usize>,
    ) -> Result<Option<Tensor>> {
        let window = window.filter(|&window| window < length);
        if places.start + 1 == length && window.is_none() {
            return Ok(None);
        }
        let shape = (places.len(), length);
        let seen = order.narrow(0, 0, length)?.unsqueeze(0)?;
        let places = order.narrow(0, places.start, places.len())?.unsqueeze(1)?;
        let mut visible = seen.broadcast_le(&places)?;
        if let Some(window) = window {
            visible = (visible * (seen + window as f64)?.broadcast_gt(&places)?)?;
        }
        Ok(Some(visible.where_cond(&self.visible.broadcast_as(shape)?, &self.hidden.broadcast_as(shape)?)?))
    }

    /// Attention of one sequence's rows, `[rows, heads · head_dim]` for each group of rows that is computed at once.
    pub(super) fn attend_sequence(
        &self,
        (keys, values): &(Tensor, Tensor),
        qkv: &Tensor,
        shape: &AttentionShape,
        sequence: &Sequence,
        order: &Tensor,
        mixed: &mut Vec<Tensor>,
    ) -> Result<()> {
        let &AttentionShape { heads, kv_heads, head_dim, window } = shape;
        let (group, length) = (heads / kv_heads, sequence.length());
        let gather = |cache: &Tensor| {
            let seen = cache.index_select(&sequence.seen, 0)?.to_dtype(qkv.dtype())?;
            seen.reshape((length, kv_heads, head_dim))?.transpose(0, 1)?.contiguous()
        };
        let (keys, values) = (gather(keys)?.transpose(1, 2)?, gather(values)?);
        let most = (self.scores / (heads * length)).max(1);
        for first in (0..sequence.rows.len()).step_by(most) {
            let count = most.min(sequence.rows.len() - first);
            let query = qkv.narrow(0, sequence.rows.start + first, count)?.narrow(1, 0, shape.query().len())?;
            // the queries that share a key head lie below each other
            let query = query.reshape((count, kv_heads, group, head_dim))?.permute((1, 2, 0, 3))?;
            let query = query.contiguous()?.reshape((kv_heads, group * count, head_dim))?;
            let scores = (query.matmul(&keys)?.to_dtype(DType::F32)? / (head_dim as f64).sqrt())?;
            let mut scores = scores.reshape((kv_heads, group, count, length))?;
            let place = sequence.start + first;
            if let Some(mask) = self.mask(order, place..place + count, length, window)? {
                scores = scores.broadcast_add(&mask)?;
            }
            let weights = softmax(&scores)?.to_dtype(qkv.dtype())?.reshape((kv_heads, group * count, length))?;
            let out = weights.matmul(&values)?.reshape((kv_heads, group, count, head_dim))?;
            mixed.push(out.permute((2, 0, 1, 3))?.reshape((count, shape.query().len()))?);
        }
        Ok(())
    }
}

/// Softmax over the last dimension, in differentiable steps.
fn softmax(scores: &Tensor) -> candle_core::Result<Tensor> {
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::CandleShape;
    use super::*;
    use crate::executor::{Geometry, LogitRows, SequenceStep, StepPlan};
    use crate::model::backend::{Backend, Step};
    use crate::model::dtype::Dtype;
    use crate::model::quantization::Quantization;

    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 4, window: None };

    fn backend() -> CandleBackend {
        let shape = CandleShape {
            dtype: Dtype::Float32,
            quantization: Quantization::None,
            kv_cache_dtype: Dtype::Float32,
            rope_theta: 10_000.0,
            head_dim: SHAPE.head_dim,
            kv_width: SHAPE.key().len(),
            layers: 1,
            blocks: 8,
        };
        CandleBackend::new(Device::Cpu, &shape).expect("a cache")
    }

    /// A sequence of 40 tokens in blocks out of order, and one of 3.
    fn batch() -> Batch {
        let sequence = |tokens: u32, blocks: &[u32]| SequenceStep {
            tokens: (0..tokens).collect(),
            start: 0,
            position_ids: None,
            blocks: blocks.to_vec(),
            adapter: None,
            logits: LogitRows::Last,
            reading: None,
        };
        let plan = StepPlan { sequences: vec![sequence(40, &[5, 2]), sequence(3, &[7])] };
        Batch::new(&plan, &Geometry { vocab: 64, hidden: 8, blocks: 8, max_model_len: 64 }, 0).expect("fits")
    }

    /// Different numbers for every place.
    fn qkv(rows: usize) -> Tensor {
        let width = SHAPE.value().end;
        let numbers = (0..rows * width).map(|place| ((place * 37 % 101) as f32 - 50.0) / 25.0).collect();
        Tensor::from_vec(numbers, (rows, width), &Device::Cpu).expect("a tensor")
    }

    fn attended(scores: usize, window: Option<usize>) -> Vec<f32> {
        let (mut backend, batch) = (backend(), batch());
        backend.scores = scores;
        let (shape, rows) = (AttentionShape { window, ..SHAPE }, qkv(batch.rows()));
        let step = Step { state: backend.prepare(&batch).expect("prepared"), batch: &batch };
        backend.write_kv(0, &rows, &shape, &step).expect("written");
        let out = backend.attend(0, &rows, &shape, &step).expect("attended");
        backend.into_f32(out).expect("numbers")
    }

    /// Attention by its definition, row by row.
    fn expected(window: Option<usize>) -> Vec<f32> {
        let batch = batch();
        let rows = qkv(batch.rows()).to_vec2::<f32>().expect("numbers");
        let mut out = Vec::new();
        for span in &batch.spans {
            for row in span.rows.clone() {
                let first =
                    window.map_or(span.rows.start, |window| (row + 1).saturating_sub(window).max(span.rows.start));
                for head in 0..SHAPE.heads {
                    let of = |columns: Range<usize>, head: usize, row: usize| {
                        rows[row][columns.start + head * SHAPE.head_dim..][..SHAPE.head_dim].to_vec()
                    };
                    let (query, shared) = (of(SHAPE.query(), head, row), head / (SHAPE.heads / SHAPE.kv_heads));
                    let score = |seen: usize| -> f32 {
                        let key = of(SHAPE.key(), shared, seen);
                        query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() / (SHAPE.head_dim as f32).sqrt()
                    };
                    let weights: Vec<f32> = (first..=row).map(|seen| score(seen).exp()).collect();
                    let sum: f32 = weights.iter().sum();
                    for column in 0..SHAPE.head_dim {
                        let value = |seen: usize| of(SHAPE.value(), shared, seen)[column];
                        let mixed = (first..=row).zip(&weights).map(|(seen, weight)| weight * value(seen));
                        out.push(mixed.sum::<f32>() / sum);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn attention_in_groups_of_any_size_is_attention_by_its_definition() {
        for window in [None, Some(1), Some(7), Some(40), Some(1000)] {
            let expected = expected(window);
            for scores in [0, 4 * 40 * 7, ATTENTION_SCORES] {
                let attended = attended(scores, window);
                assert_eq!(attended.len(), expected.len());
                for (place, (a, b)) in attended.iter().zip(&expected).enumerate() {
                    assert!((a - b).abs() < 1e-5, "window {window:?}, {scores} scores, number {place}: {a} and {b}");
                }
            }
        }
    }
}
