//! The backend on candle: plain tensor operations in the working format, on the CPU or on CUDA.
//!
//! Slower than the kernels on the CPU (candle multiplies one row by one thread, and widens bf16 weights anew each
//! time), so it serves there as the reference; its operations are differentiable.
//!
//! All that is computed with stays on the device: weights, the cache, activations and indices. What crosses over in a step
//! is its layout (tokens, slots, angles), the logits, and for each layer with experts the router's scores, whose choice is
//! made on the host as for every backend.

mod attention;

use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use ernie_kernels::WeightFormat;
use half::{bf16, f16};

use self::attention::Sequence;
use super::{AttentionShape, Backend, ComputeError, GatedMlp, Result, Routes, Step};
use crate::executor::BLOCK_TOKENS;
use crate::model::batch::Batch;
use crate::model::dtype::Dtype;
use crate::model::error::LoadResult;
use crate::model::pack::{MatrixSource, Pack, Precision};
use crate::model::quantization::Quantization;
use crate::model::rope::Frequencies;
use crate::model::safetensors::widen;
use crate::model::weights::Part;

pub use self::attention::{ATTENTION_SCORES, Prepared};

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
    /// What those that are quantised are rounded to; they are kept in single precision, which holds the rounded numbers.
    pub quantization: Quantization,
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
    quantization: Quantization,
    frequencies: Frequencies,
    /// Keys and values of each layer, `[blocks · 32, kv_heads · head_dim]`.
    cache: Vec<(Tensor, Tensor)>,
    /// What is added to a score that counts, 0, and to one that does not, −∞; f32 scalars.
    visible: Tensor,
    hidden: Tensor,
    /// The most scores at once: [`ATTENTION_SCORES`].
    scores: usize,
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
        let scalar = |value: f32| Tensor::new(value, &device).map_err(ComputeError::from);
        let (visible, hidden) = (scalar(0.0)?, scalar(f32::NEG_INFINITY)?);
        let frequencies = Frequencies::new(shape.rope_theta, shape.head_dim);
        let (quantization, scores) = (shape.quantization, ATTENTION_SCORES);
        Ok(Self { device, stored, working, quantization, frequencies, cache, visible, hidden, scores })
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

    /// A part, rounded to what a quantised format keeps of it.
    fn rounded(&self, part: &Part<'_>, format: WeightFormat) -> LoadResult<Tensor> {
        let mut numbers = read(part, Some)?;
        for (row, numbers) in numbers.chunks_exact_mut(part.inputs).enumerate() {
            format.round(numbers).map_err(|error| part.out_of_range(error.value, row, error.column))?;
        }
        let tensor = Tensor::from_vec(numbers, (part.rows.len(), part.inputs), &self.device);
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
                .push(narrow(value).ok_or_else(|| part.out_of_range(value, place / part.inputs, place % part.inputs))?);
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
        let quantised = self.quantization.format(source.precision);
        let parts = source.parts.iter().map(|part| match quantised {
            Some(format) => self.rounded(part, format),
            None => self.tensor(part, single),
        });
        let parts = parts.collect::<LoadResult<Vec<_>>>()?;
        if let [only] = &parts[..] {
            return Ok(only.clone());
        }
        Ok(Tensor::cat(&parts, 0).map_err(ComputeError::from)?)
    }

    fn matrix_of(&self, numbers: Vec<f32>, inputs: usize) -> LoadResult<Tensor> {
        let shape = (numbers.len() / inputs, inputs);
        let matrix = Tensor::from_vec(numbers, shape, &self.device).and_then(|matrix| matrix.to_dtype(self.working));
        Ok(matrix.map_err(ComputeError::from)?)
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

/// Rows and shares of experts.
#[derive(Debug, Default, PartialEq)]
struct Assignments {
    /// The rows of each expert, ascending, expert after expert.
    rows: Vec<u32>,
    /// Their shares.
    shares: Vec<f32>,
    /// Where the rows of an expert end.
    ends: Vec<usize>,
}

impl Assignments {
    /// Sorts routes by expert, of which there are `experts`.
    fn of(routes: &Routes, experts: usize) -> Self {
        let mut order: Vec<usize> = (0..routes.index.len()).collect();
        order.sort_by_key(|&place| routes.index[place]);
        Self {
            rows: order.iter().map(|&place| (place / routes.active) as u32).collect(),
            shares: order.iter().map(|&place| routes.weight[place]).collect(),
            ends: (0..experts)
                .map(|expert| order.partition_point(|&place| routes.index[place] as usize <= expert))
                .collect(),
        }
    }
}

impl Backend for CandleBackend {
    type Rows = Tensor;
    type State = Prepared;

    fn prepare(&self, batch: &Batch) -> Result<Prepared> {
        let (cos, sin) = self.frequencies.angles(&batch.positions);
        let shape = (batch.rows(), 1, self.frequencies.pairs(), 1);
        let width = self.cache.first().map_or(0, |(keys, _)| keys.dims()[1]);
        let sequences = self.sequences(batch)?;
        let longest = sequences.iter().map(Sequence::length).max().unwrap_or(0);
        Ok(Prepared {
            cos: Tensor::from_vec(cos, shape, &self.device)?,
            sin: Tensor::from_vec(sin, shape, &self.device)?,
            slots: self.indices(&batch.slots)?.unsqueeze(1)?.broadcast_as((batch.rows(), width))?.contiguous()?,
            // exact: a context has at most 2²⁴ tokens
            places: Tensor::from_vec((0..longest).map(|place| place as f32).collect(), longest, &self.device)?,
            sequences,
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
        let mut parts = vec![turned];
        // a device has nothing to launch for no columns
        if columns.start > 0 {
            parts.insert(0, x.narrow(1, 0, columns.start)?);
        }
        if columns.end < width {
            parts.push(x.narrow(1, columns.end, width - columns.end)?);
        }
        *x = Tensor::cat(&parts, 1)?;
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
        let mut mixed = Vec::with_capacity(step.state.sequences.len());
        for sequence in &step.state.sequences {
            self.attend_sequence(&self.cache[layer], qkv, shape, sequence, &step.state.places, &mut mixed)?;
        }
        Ok(Tensor::cat(&mixed, 0)?)
    }

    fn router_logits(&self, x: &Tensor, weight: &Tensor) -> Result<Vec<f32>> {
        self.into_f32(self.product(&x.to_dtype(DType::F32)?, weight)?)
    }

    fn moe(&self, x: &Tensor, experts: &[GatedMlp<Self>], routes: &Routes, out: &mut Tensor) -> Result<()> {
        let Assignments { rows, shares, ends } = Assignments::of(routes, experts.len());
        if rows.is_empty() {
            return Ok(());
        }
        let rows = self.indices(&rows)?;
        let shares = Tensor::new(shares, &self.device)?.unsqueeze(1)?.to_dtype(x.dtype())?;
        let mut sum = out.zeros_like()?;
        let mut first = 0;
        for (expert, end) in experts.iter().zip(ends) {
            let (place, count) = (first, end - first);
            first = end;
            if count == 0 {
                continue;
            }
            let rows = rows.narrow(0, place, count)?;
            let inner = self.swiglu(&x.index_select(&rows, 0)?, &expert.gate_up.weight, None)?;
            let result = self.product(&inner, &expert.down.weight)?.broadcast_mul(&shares.narrow(0, place, count)?)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_stay_in_order_within_one() {
        let routes = Routes { active: 2, index: vec![3, 0, 0, 3, 3, 1], weight: vec![0.1, 0.9, 0.4, 0.6, 0.7, 0.3] };
        let sorted = Assignments::of(&routes, 5);
        assert_eq!(sorted.rows, [0, 1, 2, 0, 1, 2]);
        assert_eq!(sorted.shares, [0.9, 0.4, 0.3, 0.1, 0.6, 0.7]);
        assert_eq!(sorted.ends, [2, 3, 3, 6, 6]);
    }
}
