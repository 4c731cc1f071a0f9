//! The backend on this project's kernels: f32 activations, weights in their own format, one thread pool.

mod scratch;

use std::ops::Range;

use ernie_kernels::{
    Angles, Attention, Cpu, Expert, Format, KvCache, KvFormat, KvShape, Layout, Matrix, Rotary, Span, Write, linear,
    moe, rms_norm, rope, silu_mul, swiglu,
};
use ernie_proto::failure::Reason;

use super::{AttentionShape, Backend, GatedMlp, Result, Routes, Step};
use crate::model::batch::Batch;
use crate::model::dtype::Dtype;
use crate::model::error::{LoadError, LoadResult};
use crate::model::pack::{MatrixSource, Pack, Precision};
use crate::model::quantization::Quantization;
use crate::model::weights::Part;

pub use scratch::Rows;
use scratch::Scratch;

/// What the CPU backend needs to know of a model.
#[derive(Clone, Copy, Debug)]
pub struct CpuShape {
    /// The format that weights are kept in.
    pub dtype: Dtype,
    /// What becomes of those that are quantised.
    pub quantization: Quantization,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// The key-value cache.
    pub kv: KvShape,
}

/// Computes on the CPU.
pub struct CpuBackend {
    cpu: Cpu,
    format: Format,
    quantization: Quantization,
    rotary: Rotary,
    kv: KvCache,
    scratch: Scratch,
}

impl CpuBackend {
    /// A backend with an empty cache.
    ///
    /// # Errors
    /// [`LoadError`] when the cache's memory cannot be had.
    pub fn new(cpu: Cpu, shape: &CpuShape) -> LoadResult<Self> {
        let kv =
            KvCache::new(shape.kv).map_err(|error| out_of_memory("the key-value cache", shape.kv.bytes(), &error))?;
        Ok(Self {
            cpu,
            format: format(shape.dtype),
            quantization: shape.quantization,
            rotary: Rotary::new(shape.rope_theta, shape.kv.head_dim),
            kv,
            scratch: Scratch::default(),
        })
    }
}

/// The error when memory cannot be had although the plan fitted.
fn out_of_memory(what: &str, bytes: usize, error: &std::io::Error) -> LoadError {
    LoadError::new(Reason::InsufficientMemory, format!("cannot allocate {bytes} bytes for {what}: {error}"))
}

/// The kernels' name of a weight format.
fn format(dtype: Dtype) -> Format {
    match dtype {
        Dtype::Float32 => Format::F32,
        Dtype::Bfloat16 => Format::Bf16,
        Dtype::Float16 => Format::F16,
    }
}

/// The kernels' name of a cache format.
pub fn kv_format(dtype: Dtype) -> KvFormat {
    match dtype {
        Dtype::Float32 => KvFormat::F32,
        Dtype::Bfloat16 => KvFormat::Bf16,
        Dtype::Float16 => KvFormat::F16,
    }
}

impl Pack for CpuBackend {
    type Matrix = Matrix;
    type Vector = Vec<f32>;

    fn matrix(&self, source: &MatrixSource<'_>) -> LoadResult<Matrix> {
        let plain = if source.precision == Precision::Single { Format::F32 } else { self.format };
        let kept = self.quantization.format(source.precision).unwrap_or(plain.into());
        let (layout, outputs, inputs) = (source.layout, source.outputs(), source.inputs());
        let mut builder = Matrix::builder(kept, layout, outputs, inputs)
            .map_err(|error| out_of_memory("a weight matrix", kept.bytes(layout, outputs, inputs), &error))?;
        let mut first = 0;
        for part in &source.parts {
            part.stream(|row, bytes| {
                builder
                    .write_rows(&self.cpu, first + row, format(part.dtype), bytes)
                    .map_err(|error| part.out_of_range(error.value, error.row - first, error.column))
            })?;
            first += part.rows.len();
        }
        Ok(builder.finish())
    }

    fn matrix_of(&self, numbers: Vec<f32>, inputs: usize) -> LoadResult<Matrix> {
        let outputs = numbers.len() / inputs;
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let failed = |error| out_of_memory("an adapter", bytes.len(), &error);
        let mut builder = Matrix::builder(Format::F32, Layout::Plain, outputs, inputs).map_err(failed)?;
        // single precision holds every value of itself
        builder
            .write_rows(&self.cpu, 0, Format::F32, &bytes)
            .map_err(|error| LoadError::new(Reason::Internal, error.to_string()))?;
        Ok(builder.finish())
    }

    fn vector(&self, parts: &[Part<'_>]) -> LoadResult<Vec<f32>> {
        let parts = parts.iter().map(Part::read).collect::<LoadResult<Vec<_>>>()?;
        Ok(parts.concat())
    }

    fn numbers(&self, part: &Part<'_>) -> LoadResult<Vec<f32>> {
        part.read()
    }
}

/// The sequences of a batch as the kernels name them.
fn spans(batch: &Batch) -> Vec<Span<'_>> {
    batch
        .spans
        .iter()
        .map(|span| Span { row: span.rows.start, rows: span.rows.len(), start: span.start, blocks: &span.blocks })
        .collect()
}

impl Backend for CpuBackend {
    type Rows = Rows;
    type State = Angles;

    fn prepare(&self, batch: &Batch) -> Result<Angles> {
        Ok(self.rotary.angles(&batch.positions))
    }

    fn embed(&self, table: &Matrix, tokens: &[u32]) -> Result<Rows> {
        let mut out = self.scratch.rows(tokens.len(), table.inputs());
        for (row, &token) in tokens.iter().enumerate() {
            table.read_row(token as usize, out.view_mut().row_mut(row));
        }
        Ok(out)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows> {
        let mut out = self.scratch.rows(x.rows(), x.width());
        rms_norm(&self.cpu, x.view(), weight, eps, out.view_mut());
        Ok(out)
    }

    fn linear(&self, x: &Rows, weight: &Matrix, bias: Option<&Vec<f32>>) -> Result<Rows> {
        let mut out = self.scratch.rows(x.rows(), weight.outputs());
        linear(&self.cpu, x.view(), weight, bias.map(Vec::as_slice), Write::Store, out.view_mut());
        Ok(out)
    }

    fn linear_add(&self, x: &Rows, weight: &Matrix, bias: Option<&Vec<f32>>, out: &mut Rows) -> Result<()> {
        linear(&self.cpu, x.view(), weight, bias.map(Vec::as_slice), Write::Add, out.view_mut());
        Ok(())
    }

    fn swiglu(&self, x: &Rows, gate_up: &Matrix, bias: Option<&Vec<f32>>) -> Result<Rows> {
        let mut out = self.scratch.rows(x.rows(), gate_up.outputs() / 2);
        swiglu(&self.cpu, x.view(), gate_up, bias.map(Vec::as_slice), out.view_mut());
        Ok(out)
    }

    fn silu_mul(&self, gate_up: &Rows) -> Result<Rows> {
        let inner = gate_up.width() / 2;
        let mut out = self.scratch.rows(gate_up.rows(), inner);
        let both = gate_up.view();
        silu_mul(&self.cpu, both.columns(0..inner), both.columns(inner..2 * inner), out.view_mut());
        Ok(out)
    }

    fn rope(&self, x: &mut Rows, columns: Range<usize>, step: &Step<'_, Angles>) -> Result<()> {
        rope(&self.cpu, x.view_mut().columns(columns), &step.state);
        Ok(())
    }

    fn write_kv(&mut self, layer: usize, qkv: &Rows, shape: &AttentionShape, step: &Step<'_, Angles>) -> Result<()> {
        let (keys, values) = (qkv.view().columns(shape.key()), qkv.view().columns(shape.value()));
        self.kv.write(&self.cpu, layer, &step.batch.slots, keys, values);
        Ok(())
    }

    fn attend(&self, layer: usize, qkv: &Rows, shape: &AttentionShape, step: &Step<'_, Angles>) -> Result<Rows> {
        let mut out = self.scratch.rows(qkv.rows(), shape.query().len());
        let attention =
            Attention { heads: shape.heads, scale: 1.0 / (shape.head_dim as f32).sqrt(), window: shape.window };
        let query = qkv.view().columns(shape.query());
        self.kv.attend(&self.cpu, layer, &attention, query, &spans(step.batch), out.view_mut());
        Ok(out)
    }

    fn router_logits(&self, x: &Rows, weight: &Matrix) -> Result<Vec<f32>> {
        self.into_f32(self.linear(x, weight, None)?)
    }

    fn moe(&self, x: &Rows, experts: &[GatedMlp<Self>], routes: &Routes, out: &mut Rows) -> Result<()> {
        let experts: Vec<Expert<'_>> = experts
            .iter()
            .map(|expert| Expert { gate_up: &expert.gate_up.weight, down: &expert.down.weight })
            .collect();
        let routes =
            ernie_kernels::Routes { top_k: routes.active, index: routes.index.clone(), weight: routes.weight.clone() };
        moe(&self.cpu, x.view(), &experts, &routes, out.view_mut());
        Ok(())
    }

    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows> {
        let mut out = self.scratch.rows(rows.len(), x.width());
        for (to, &from) in rows.iter().enumerate() {
            out.view_mut().row_mut(to).copy_from_slice(x.view().row(from as usize));
        }
        Ok(out)
    }

    fn low_rank_add(
        &self,
        x: &Rows,
        rows: Range<usize>,
        a: &Matrix,
        b: &Matrix,
        columns: Range<usize>,
        out: &mut Rows,
    ) -> Result<()> {
        let mut inner = self.scratch.rows(rows.len(), a.outputs());
        linear(&self.cpu, x.view().slice(rows.clone()), a, None, Write::Store, inner.view_mut());
        linear(&self.cpu, inner.view(), b, None, Write::Add, out.view_mut().slice(rows).columns(columns));
        Ok(())
    }

    fn add_rows(&self, x: &Rows, rows: &[u32], shares: &[f32], out: &mut Rows) -> Result<()> {
        let (x, mut out) = (x.view(), out.view_mut());
        for ((from, &to), share) in rows.iter().enumerate().zip(shares) {
            out.row_mut(to as usize).iter_mut().zip(x.row(from)).for_each(|(out, x)| *out += share * x);
        }
        Ok(())
    }

    fn into_f32(&self, x: Rows) -> Result<Vec<f32>> {
        Ok(x.into_vec())
    }
}
