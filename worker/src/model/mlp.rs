//! The gated feed-forward network.

use super::backend::{Backend, Result};
use super::batch::Batch;
use super::config::ModelConfig;
use super::ernie::projection;
use super::error::LoadResult;
use super::pack::{Layout, Pack};
use super::projection::Projection;
use super::weights::Weights;

/// down(silu(gate(x)) · up(x)).
pub struct Mlp<P: Pack> {
    /// Gate above up `[2 · inner, hidden]`.
    pub(super) gate_up: Projection<P>,
    /// `[hidden, inner]`.
    pub(super) down: Projection<P>,
}

impl<P: Pack> Mlp<P> {
    /// Takes the network at `prefix` with `inner` hidden units out of a checkpoint.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError), as [`Weights::whole`].
    pub fn assemble(
        config: &ModelConfig,
        prefix: &str,
        inner: usize,
        tensors: &Weights<'_>,
        pack: &P,
    ) -> LoadResult<Self> {
        let hidden = config.hidden_size;
        let names = [("gate_proj", inner), ("up_proj", inner)];
        Ok(Self {
            gate_up: projection(tensors, pack, prefix, &names, hidden, Layout::GateUp, config.use_bias)?,
            down: projection(tensors, pack, prefix, &[("down_proj", hidden)], inner, Layout::Plain, config.use_bias)?,
        })
    }
}

impl<B: Backend> Mlp<B> {
    /// `stream` += the network of `x`.
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError).
    pub fn forward(&self, backend: &B, x: &B::Rows, stream: &mut B::Rows, batch: &Batch) -> Result<()> {
        let inner = if self.gate_up.is_adapted(batch) {
            backend.silu_mul(&self.gate_up.forward(backend, x, batch)?)?
        } else {
            backend.swiglu(x, &self.gate_up.base.weight, self.gate_up.base.bias.as_ref())?
        };
        self.down.forward_add(backend, &inner, batch, stream)
    }
}
