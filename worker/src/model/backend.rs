//! What the decoder computes with: the operations of the paper over flat batches.
//!
//! Two backends: [`cpu`] on this project's kernels, which is the default, and [`candle`], which is the reference on the
//! CPU and the way to CUDA.

pub mod candle;
pub mod cpu;

use std::ops::Range;

use super::batch::Batch;
use super::error::LoadError;
use super::pack::Pack;

/// A computation that failed: an accelerator's or an allocator's error.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ComputeError(pub String);

impl From<ComputeError> for LoadError {
    fn from(error: ComputeError) -> Self {
        LoadError::new(ernie_proto::failure::Reason::DeviceError, error.0)
    }
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, ComputeError>;

/// A batch with what the backend prepared for it once, for all layers.
#[derive(Debug)]
pub struct Step<'a, S> {
    /// The batch.
    pub batch: &'a Batch,
    /// The backend's own.
    pub state: S,
}

/// A linear map with its bias: y = x·Wᵀ + b.
pub struct Affine<P: Pack + ?Sized> {
    /// W `[outputs, inputs]`.
    pub weight: P::Matrix,
    /// b `[outputs]`.
    pub bias: Option<P::Vector>,
}

/// A gated feed-forward network: down(silu(gate(x)) · up(x)).
pub struct GatedMlp<P: Pack + ?Sized> {
    /// Gate above up `[2 · inner, hidden]`.
    pub gate_up: Affine<P>,
    /// `[hidden, inner]`.
    pub down: Affine<P>,
}

/// A router's choice for each row of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// Experts of a row.
    pub active: usize,
    /// `[T, active]`, by descending biased score.
    pub index: Vec<u32>,
    /// `[T, active]`: their shares.
    pub weight: Vec<f32>,
}

/// How queries see keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, each shared by `heads / kv_heads` consecutive query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How many places back a query sees, its own included; `None` for all.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The columns of q in rows of q, k and v side by side.
    pub fn query(&self) -> Range<usize> {
        0..self.heads * self.head_dim
    }

    /// The columns of k.
    pub fn key(&self) -> Range<usize> {
        let start = self.query().end;
        start..start + self.kv_heads * self.head_dim
    }

    /// The columns of v.
    pub fn value(&self) -> Range<usize> {
        let start = self.key().end;
        start..start + self.kv_heads * self.head_dim
    }
}

/// The operations of a decoder. Rows are tokens of the batch, in order; T is their number.
pub trait Backend: Pack {
    /// Activations `[T, width]`.
    type Rows: Clone;
    /// What [`Backend::prepare`] makes of a batch.
    type State;

    /// Prepares a batch: rotary angles, and what a device needs of the layout.
    ///
    /// # Errors
    /// [`ComputeError`], as in every operation.
    fn prepare(&self, batch: &Batch) -> Result<Self::State>;

    /// The tokens' rows of the embedding.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn embed(&self, table: &Self::Matrix, tokens: &[u32]) -> Result<Self::Rows>;

    /// RMSNorm: x · rsqrt(mean(x²) + eps) in f32, then · weight.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn rms_norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Result<Self::Rows>;

    /// x·Wᵀ + b.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn linear(&self, x: &Self::Rows, weight: &Self::Matrix, bias: Option<&Self::Vector>) -> Result<Self::Rows>;

    /// `out` += x·Wᵀ + b.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn linear_add(
        &self,
        x: &Self::Rows,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Rows,
    ) -> Result<()>;

    /// silu(gate(x)) · up(x), from one matrix that has the gate's rows above those of up.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn swiglu(&self, x: &Self::Rows, gate_up: &Self::Matrix, bias: Option<&Self::Vector>) -> Result<Self::Rows>;

    /// silu(left half) · right half of the columns.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn silu_mul(&self, gate_up: &Self::Rows) -> Result<Self::Rows>;

    /// Rotates the heads in `columns` by the angles of the step, pairs (2i, 2i + 1), in f32.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn rope(&self, x: &mut Self::Rows, columns: Range<usize>, step: &Step<'_, Self::State>) -> Result<()>;

    /// Puts the keys and values of every row into its slot of the cache.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn write_kv(
        &mut self,
        layer: usize,
        qkv: &Self::Rows,
        shape: &AttentionShape,
        step: &Step<'_, Self::State>,
    ) -> Result<()>;

    /// Causal attention of the batch's queries over the cache: `[T, heads · head_dim]`. Causal by place in the
    /// sequence, whatever the rotary positions are.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn attend(
        &self,
        layer: usize,
        qkv: &Self::Rows,
        shape: &AttentionShape,
        step: &Step<'_, Self::State>,
    ) -> Result<Self::Rows>;

    /// The router's scores x·Wᵀ in f32, `[T, experts]`.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn router_logits(&self, x: &Self::Rows, weight: &Self::Matrix) -> Result<Vec<f32>>;

    /// `out` += Σ weight · expert(x) over each row's experts, in ascending order of the expert.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn moe(&self, x: &Self::Rows, experts: &[GatedMlp<Self>], routes: &Routes, out: &mut Self::Rows) -> Result<()>;

    /// The rows of an ascending list.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn select(&self, x: &Self::Rows, rows: &[u32]) -> Result<Self::Rows>;

    /// Adds a low-rank product: `out[rows, columns] += (x[rows]·Aᵀ)·Bᵀ`, A `[r, inputs]`, B `[columns, r]`.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn low_rank_add(
        &self,
        x: &Self::Rows,
        rows: Range<usize>,
        a: &Self::Matrix,
        b: &Self::Matrix,
        columns: Range<usize>,
        out: &mut Self::Rows,
    ) -> Result<()>;

    /// `out[rows[i]]` += `shares[i]` · `x[i]`; no row twice.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn add_rows(&self, x: &Self::Rows, rows: &[u32], shares: &[f32], out: &mut Self::Rows) -> Result<()>;

    /// The numbers, widened, `[T, width]` row-major.
    ///
    /// # Errors
    /// [`ComputeError`].
    #[allow(clippy::wrong_self_convention, reason = "the rows are what is turned into numbers")]
    fn into_f32(&self, x: Self::Rows) -> Result<Vec<f32>>;
}
