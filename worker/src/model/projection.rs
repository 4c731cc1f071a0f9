//! A linear map with the low-rank adapters that were loaded for it.

use std::ops::Range;

use super::backend::{Affine, Backend, Result};
use super::batch::Batch;
use super::pack::Pack;

/// An adapter's share in one projection: W + B·A on some output columns, the scale folded into B.
pub struct LowRank<P: Pack + ?Sized> {
    /// Index of the adapter, as sequences name it.
    pub adapter: u32,
    /// A `[r, inputs]`.
    pub a: P::Matrix,
    /// B `[columns, r]`.
    pub b: P::Matrix,
    /// The output columns it adds to.
    pub columns: Range<usize>,
}

/// y = x·Wᵀ + b, and for the rows of sequences with an adapter + x·Aᵀ·Bᵀ.
pub struct Projection<P: Pack> {
    /// The base model's map.
    pub base: Affine<P>,
    /// What adapters add to it.
    pub low_rank: Vec<LowRank<P>>,
}

impl<P: Pack> Projection<P> {
    /// A projection without adapters.
    pub fn new(base: Affine<P>) -> Self {
        Self { base, low_rank: Vec::new() }
    }
}

impl<B: Backend> Projection<B> {
    /// The projection of every row.
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError), as below.
    pub fn forward(&self, backend: &B, x: &B::Rows, batch: &Batch) -> Result<B::Rows> {
        let mut out = backend.linear(x, &self.base.weight, self.base.bias.as_ref())?;
        self.adapt(backend, x, batch, &mut out)?;
        Ok(out)
    }

    /// Adds the projection of every row to `out`.
    ///
    /// # Errors
    /// As [`Projection::forward`].
    pub fn forward_add(&self, backend: &B, x: &B::Rows, batch: &Batch, out: &mut B::Rows) -> Result<()> {
        backend.linear_add(x, &self.base.weight, self.base.bias.as_ref(), out)?;
        self.adapt(backend, x, batch, out)
    }

    /// Whether an adapter changes a row of the batch here.
    pub fn is_adapted(&self, batch: &Batch) -> bool {
        self.low_rank.iter().any(|part| batch.adapter_rows(part.adapter).next().is_some())
    }

    /// Adds what the adapters of the batch's sequences change.
    fn adapt(&self, backend: &B, x: &B::Rows, batch: &Batch, out: &mut B::Rows) -> Result<()> {
        for part in &self.low_rank {
            for rows in batch.adapter_rows(part.adapter) {
                backend.low_rank_add(x, rows, &part.a, &part.b, part.columns.clone(), out)?;
            }
        }
        Ok(())
    }
}
