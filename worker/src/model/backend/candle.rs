//! The backend on candle: plain tensor operations in the working format, on the CPU or on CUDA.
//!
//! Slower than the kernels on the CPU (candle multiplies one row by one thread, and widens bf16 weights anew each
//! time), so it serves there as the reference; its operations are differentiable.

use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use half::{bf16, f16};

use super::{AttentionShape, Backend, ComputeError, GatedMlp, Result, Routes, Step};
use crate::executor::BLOCK_TOKENS;
use crate::model::batch::{Batch, Span};
use crate::model::dtype::Dtype;
use crate::model::error::LoadResult;
use crate::model::pack::{MatrixSource, Pack, Precision};
use crate::model::rope::Frequencies;
use crate::model::safetensors::widen;
use crate::model::weights::Part;

impl From<candle_core::Error> for ComputeError {
    fn from(error: candle_core::Error) -> Self {
        ComputeError(error.to_string())
    }
}

/// What the candle backend needs to know of a model.
#[derive(Clone, Copy, Debug)]
pub struct CandleShape {
    /// The format that weights are kept in.
    pub dtype: Dtype,
    /// The format of the key-value cache.
    pub kv_cache_dtype: Dtype,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of all key heads together.
    pub kv_width: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Blocks of the key-value cache.
    pub blocks: usize,
}

/// Computes with candle.
pub struct CandleBackend {
    device: Device,
    /// The format of weights.
    stored: DType,
    /// The format of activations.
    working: DType,
    frequencies: Frequencies,
    /// Keys and values of each layer, `[blocks · 32, kv_heads · head_dim]`.
    cache: Vec<(Tensor, Tensor)>,
}

impl CandleBackend {
    /// A backend with an empty cache.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError) when the device has no room for the cache.
    pub fn new(device: Device, shape: &CandleShape) -> LoadResult<Self> {
        let stored = dtype(shape.dtype);
        // candle's CPU operations round half precision after each step: single precision keeps what the weights have
        let working = if device.is_cpu() { DType::F32 } else { stored };
        let cached = dtype(shape.kv_cache_dtype);
        let slots = shape.blocks * BLOCK_TOKENS;
        let empty = || Tensor::zeros((slots, shape.kv_width), cached, &device).map_err(ComputeError::from);
        let cache = (0..shape.layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        let frequencies = Frequencies::new(shape.rope_theta, shape.head_dim);
        Ok(Self { device, stored, working, frequencies, cache })
    }

    fn tensor(&self, part: &Part<'_>, single: bool) -> LoadResult<Tensor> {
        let shape = (part.rows.len(), part.inputs);
        let kept = if single { DType::F32 } else { self.stored };
        let tensor = match kept {
            DType::BF16 => Tensor::from_vec(read(part, |value| Some(bf16::from_f32(value)))?, shape, &self.device),
            DType::F16 => {
                let narrow = |value: f32| {
                    let half = f16::from_f32(value);
                    (half.is_finite() || !value.is_finite()).then_some(half)
                };
                Tensor::from_vec(read(part, narrow)?, shape, &self.device)
            }
            _ => Tensor::from_vec(read(part, Some)?, shape, &self.device),
        };
        tensor.map_err(|error| ComputeError::from(error).into())
    }

    /// x·Wᵀ, in the format of x.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let weight = if weight.dtype() == x.dtype() { weight.clone() } else { weight.to_dtype(x.dtype())? };
        Ok(x.matmul(&weight.t()?)?)
    }

    fn indices(&self, indices: &[u32]) -> Result<Tensor> {
        Ok(Tensor::new(indices, &self.device)?)
    }
}

/// candle's name of a weight format.
fn dtype(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Float32 => DType::F32,
        Dtype::Bfloat16 => DType::BF16,
        Dtype::Float16 => DType::F16,
    }
}

/// Reads a part's numbers in another format; `narrow` says `None` of a value that it cannot hold.
fn read<T>(part: &Part<'_>, narrow: impl Fn(f32) -> Option<T>) -> LoadResult<Vec<T>> {
    let mut numbers = Vec::with_capacity(part.numbers());
    part.stream(|_, bytes| {
        for value in widen(part.dtype, bytes) {
            let place = numbers.len();
            numbers
                .push(narrow(value).ok_or_else(|| part.beyond_half(value, place / part.inputs, place % part.inputs))?);
        }
        Ok(())
    })?;
    Ok(numbers)
}

impl Pack for CandleBackend {
    type Matrix = Tensor;
    type Vector = Tensor;

    fn matrix(&self, source: &MatrixSource<'_>) -> LoadResult<Tensor> {
        let single = source.precision == Precision::Single;
        let parts = source.parts.iter().map(|part| self.tensor(part, single)).collect::<LoadResult<Vec<_>>>()?;
        if let [only] = &parts[..] {
            return Ok(only.clone());
        }
        Ok(Tensor::cat(&parts, 0).map_err(ComputeError::from)?)
    }

    fn matrix_of(&self, numbers: Vec<f32>, inputs: usize) -> LoadResult<Tensor> {
        let shape = (numbers.len() / inputs, inputs);
        Ok(Tensor::from_vec(numbers, shape, &self.device).map_err(ComputeError::from)?)
    }

    fn vector(&self, parts: &[Part<'_>]) -> LoadResult<Tensor> {
        let numbers = parts.iter().map(Part::read).collect::<LoadResult<Vec<_>>>()?.concat();
        let vector = Tensor::new(numbers, &self.device).and_then(|vector| vector.to_dtype(self.working));
        Ok(vector.map_err(ComputeError::from)?)
    }

    fn numbers(&self, part: &Part<'_>) -> LoadResult<Vec<f32>> {
        part.read()
    }
}

/// What the candle backend prepares of a batch.
#[derive(Debug)]
pub struct Prepared {
    /// `[T, 1, head_dim / 2, 1]`, f32.
    cos: Tensor,
    sin: Tensor,
    /// Each row's slot, once for each column of a key: `[T, kv_heads · head_dim]`.
    slots: Tensor,
    sequences: Vec<Sequence>,
}

/// What attention needs of one sequence.
#[derive(Debug)]
struct Sequence {
    rows: Range<usize>,
    /// Slots of the tokens seen by any of its rows, in order.
    seen: Tensor,
    /// For each window: 0 where row i sees token j, −∞ elsewhere, `[rows, seen]`.
    masks: Vec<(Option<usize>, Tensor)>,
}

impl CandleBackend {
    fn sequence(&self, span: &Span, windows: &[Option<usize>]) -> Result<Sequence> {
        let length = span.start + span.rows.len();
        let slot =
            |place: usize| span.blocks[place / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (place % BLOCK_TOKENS) as u32;
        let masks = windows.iter().map(|&window| Ok((window, self.mask(span, window)?)));
        Ok(Sequence {
            rows: span.rows.clone(),
            seen: self.indices(&(0..length).map(slot).collect::<Vec<_>>())?,
            masks: masks.collect::<Result<_>>()?,
        })
    }

    fn mask(&self, span: &Span, window: Option<usize>) -> Result<Tensor> {
        let length = span.start + span.rows.len();
        let mut mask = Vec::with_capacity(span.rows.len() * length);
        for place in span.start..length {
            let first = window.map_or(0, |window| (place + 1).saturating_sub(window));
            mask.extend((0..length).map(|seen| if (first..=place).contains(&seen) { 0.0 } else { f32::NEG_INFINITY }));
        }
        Ok(Tensor::from_vec(mask, (span.rows.len(), length), &self.device)?)
    }
}

impl Backend for CandleBackend {
    type Rows = Tensor;
    type State = Prepared;

    fn prepare(&self, batch: &Batch, windows: &[Option<usize>]) -> Result<Prepared> {
        let (cos, sin) = self.frequencies.angles(&batch.positions);
        let shape = (batch.rows(), 1, self.frequencies.pairs(), 1);
        let width = self.cache.first().map_or(0, |(keys, _)| keys.dims()[1]);
        Ok(Prepared {
            cos: Tensor::from_vec(cos, shape, &self.device)?,
            sin: Tensor::from_vec(sin, shape, &self.device)?,
            slots: self.indices(&batch.slots)?.unsqueeze(1)?.broadcast_as((batch.rows(), width))?.contiguous()?,
            sequences: batch.spans.iter().map(|span| self.sequence(span, windows)).collect::<Result<_>>()?,
        })
    }

    fn embed(&self, table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
        Ok(table.index_select(&self.indices(tokens)?, 0)?.to_dtype(self.working)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let wide = x.to_dtype(DType::F32)?;
        let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = wide.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?;
        Ok(normed.to_dtype(x.dtype())?.broadcast_mul(weight)?)
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let out = self.product(x, weight)?;
        Ok(match bias {
            Some(bias) => out.broadcast_add(bias)?,
            None => out,
        })
    }

    fn linear_add(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        *out = (&*out + self.linear(x, weight, bias)?)?;
        Ok(())
    }

    fn swiglu(&self, x: &Tensor, gate_up: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.silu_mul(&self.linear(x, gate_up, bias)?)
    }

    fn silu_mul(&self, gate_up: &Tensor) -> Result<Tensor> {
        let inner = gate_up.dim(1)? / 2;
        let (gate, up) = (gate_up.narrow(1, 0, inner)?, gate_up.narrow(1, inner, inner)?);
        // in single precision: candle's half-precision silu rounds after each of its steps
        Ok((gate.to_dtype(DType::F32)?.silu()?.to_dtype(up.dtype())? * up)?)
    }

    fn rope(&self, x: &mut Tensor, columns: Range<usize>, step: &Step<'_, Prepared>) -> Result<()> {
        let (rows, width) = x.dims2()?;
        let Prepared { cos, sin, .. } = &step.state;
        let pairs = self.frequencies.pairs();
        let heads = columns.len() / (2 * pairs);
        let wide = x.narrow(1, columns.start, columns.len())?.to_dtype(DType::F32)?;
        let wide = wide.reshape((rows, heads, pairs, 2))?;
        let (even, odd) = (wide.narrow(3, 0, 1)?, wide.narrow(3, 1, 1)?);
        let turned = Tensor::cat(
            &[
                (even.broadcast_mul(cos)? - odd.broadcast_mul(sin)?)?,
                (odd.broadcast_mul(cos)? + even.broadcast_mul(sin)?)?,
            ],
            3,
        )?;
        let turned = turned.reshape((rows, columns.len()))?.to_dtype(x.dtype())?;
        let before = x.narrow(1, 0, columns.start)?;
        let after = x.narrow(1, columns.end, width - columns.end)?;
        *x = Tensor::cat(&[before, turned, after], 1)?;
        Ok(())
    }

    fn write_kv(
        &mut self,
        layer: usize,
        qkv: &Tensor,
        shape: &AttentionShape,
        step: &Step<'_, Prepared>,
    ) -> Result<()> {
        let (keys, values) = &self.cache[layer];
        let slice =
            |columns: Range<usize>| qkv.narrow(1, columns.start, columns.len())?.contiguous()?.to_dtype(keys.dtype());
        keys.scatter_set(&step.state.slots, &slice(shape.key())?, 0)?;
        values.scatter_set(&step.state.slots, &slice(shape.value())?, 0)?;
        Ok(())
    }

    fn attend(&self, layer: usize, qkv: &Tensor, shape: &AttentionShape, step: &Step<'_, Prepared>) -> Result<Tensor> {
        let (keys, values) = &self.cache[layer];
        let &AttentionShape { kv_heads, head_dim, .. } = shape;
        let group = shape.heads / kv_heads;
        let mut mixed = Vec::with_capacity(step.state.sequences.len());
        for Sequence { rows, seen, masks } in &step.state.sequences {
            let Some((_, mask)) = masks.iter().find(|(window, _)| *window == shape.window) else {
                return Err(ComputeError(format!("no mask was prepared for the window {:?}", shape.window)));
            };
            let (count, length) = mask.dims2()?;
            let gather = |cache: &Tensor| {
                let seen = cache.index_select(seen, 0)?.to_dtype(qkv.dtype())?;
                seen.reshape((length, kv_heads, head_dim))?.transpose(0, 1)?.contiguous()
            };
            let query = qkv.narrow(0, rows.start, count)?.narrow(1, 0, shape.query().len())?;
            // the queries that share a key head lie below each other
            let query = query.reshape((count, kv_heads, group, head_dim))?.permute((1, 2, 0, 3))?;
            let query = query.contiguous()?.reshape((kv_heads, group * count, head_dim))?;
            let scores = query.matmul(&gather(keys)?.transpose(1, 2)?.contiguous()?)?.to_dtype(DType::F32)?;
            let scores = (scores / (head_dim as f64).sqrt())?.reshape((kv_heads, group, count, length))?;
            let scores = scores.broadcast_add(mask)?;
            let weights = softmax(&scores)?.to_dtype(qkv.dtype())?.reshape((kv_heads, group * count, length))?;
            let out = weights.matmul(&gather(values)?)?.reshape((kv_heads, group, count, head_dim))?;
            mixed.push(out.permute((2, 0, 1, 3))?.reshape((count, shape.query().len()))?);
        }
        Ok(Tensor::cat(&mixed, 0)?)
    }

    fn router_logits(&self, x: &Tensor, weight: &Tensor) -> Result<Vec<f32>> {
        self.into_f32(self.product(&x.to_dtype(DType::F32)?, weight)?)
    }

    fn moe(&self, x: &Tensor, experts: &[GatedMlp<Self>], routes: &Routes, out: &mut Tensor) -> Result<()> {
        let mut sum = out.zeros_like()?;
        for (number, expert) in experts.iter().enumerate() {
            let chosen = (0..routes.index.len()).filter(|&place| routes.index[place] as usize == number);
            let (rows, shares): (Vec<u32>, Vec<f32>) =
                chosen.map(|place| ((place / routes.active) as u32, routes.weight[place])).unzip();
            if rows.is_empty() {
                continue;
            }
            let rows = self.indices(&rows)?;
            let shares = Tensor::new(shares, &self.device)?.unsqueeze(1)?.to_dtype(x.dtype())?;
            let inner = self.swiglu(&x.index_select(&rows, 0)?, &expert.gate_up.weight, None)?;
            let result = self.product(&inner, &expert.down.weight)?.broadcast_mul(&shares)?;
            sum = sum.index_add(&rows, &result, 0)?;
        }
        *out = (&*out + sum)?;
        Ok(())
    }

    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        Ok(x.index_select(&self.indices(rows)?, 0)?)
    }

    fn low_rank_add(
        &self,
        x: &Tensor,
        rows: Range<usize>,
        a: &Tensor,
        b: &Tensor,
        columns: Range<usize>,
        out: &mut Tensor,
    ) -> Result<()> {
        let (height, width) = out.dims2()?;
        let inner = self.product(&x.narrow(0, rows.start, rows.len())?, a)?;
        let change = self.product(&inner, b)?;
        let change = change.pad_with_zeros(0, rows.start, height - rows.end)?;
        *out = (&*out + change.pad_with_zeros(1, columns.start, width - columns.end)?)?;
        Ok(())
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], shares: &[f32], out: &mut Tensor) -> Result<()> {
        let shares = Tensor::new(shares, &self.device)?.unsqueeze(1)?.to_dtype(x.dtype())?;
        *out = out.index_add(&self.indices(rows)?, &x.broadcast_mul(&shares)?, 0)?;
        Ok(())
    }

    fn into_f32(&self, x: Tensor) -> Result<Vec<f32>> {
        Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Softmax over the last dimension, in differentiable steps.
fn softmax(scores: &Tensor) -> candle_core::Result<Tensor> {
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}
