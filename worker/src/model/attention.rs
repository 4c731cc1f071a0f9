//! Grouped-query attention with rotary positions over the paged cache.

mod sliding_window;

use super::backend::{AttentionShape, Backend, Result, Step};
use super::config::ModelConfig;
use super::ernie::projection;
use super::error::LoadResult;
use super::pack::{Layout, Pack};
use super::projection::Projection;
use super::weights::Weights;

pub use sliding_window::SlidingWindow;

/// The attention of one layer.
pub struct Attention<P: Pack> {
    /// q, k and v below each other `[(heads + 2 · kv_heads) · head_dim, hidden]`.
    pub(super) qkv: Projection<P>,
    /// `[hidden, heads · head_dim]`.
    pub(super) output: Projection<P>,
    pub(super) shape: AttentionShape,
}

impl<P: Pack> Attention<P> {
    /// Takes the attention of a layer at `prefix` out of a checkpoint.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError), as [`Weights::whole`].
    pub fn assemble(
        config: &ModelConfig,
        layer: usize,
        prefix: &str,
        tensors: &Weights<'_>,
        pack: &P,
    ) -> LoadResult<Self> {
        let (hidden, query, kv) = (config.hidden_size, config.query_width(), config.kv_width());
        let names = [("q_proj", query), ("k_proj", kv), ("v_proj", kv)];
        Ok(Self {
            qkv: projection(tensors, pack, prefix, &names, hidden, Layout::Plain, config.use_bias)?,
            output: projection(tensors, pack, prefix, &[("o_proj", hidden)], query, Layout::Plain, config.use_bias)?,
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window: config.sliding_window.as_ref().and_then(|window| window.of_layer(layer)),
            },
        })
    }
}

impl<B: Backend> Attention<B> {
    /// `stream` += o(softmax(q·kᵀ / √d, causal)·v) with q, k and v of `x`, q and k rotated.
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError).
    pub fn forward(
        &self,
        backend: &mut B,
        layer: usize,
        x: &B::Rows,
        stream: &mut B::Rows,
        step: &Step<'_, B::State>,
    ) -> Result<()> {
        let mut qkv = self.qkv.forward(backend, x, step.batch)?;
        backend.rope(&mut qkv, self.shape.query().start..self.shape.key().end, step)?;
        backend.write_kv(layer, &qkv, &self.shape, step)?;
        let mixed = backend.attend(layer, &qkv, &self.shape, step)?;
        self.output.forward_add(backend, &mixed, step.batch, stream)
    }
}
