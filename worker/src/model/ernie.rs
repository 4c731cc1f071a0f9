//! The decoder of ERNIE 4.5: embedding, layers of attention and feed-forward around a residual stream, norm, head.

use super::attention::Attention;
use super::backend::{Affine, Backend, Result, Step};
use super::batch::Batch;
use super::config::{Architecture, ModelConfig};
use super::error::LoadResult;
use super::mlp::Mlp;
use super::moe::Moe;
use super::pack::{Layout, MatrixSource, Pack, Precision};
use super::projection::Projection;
use super::trace::Trace;
use super::weights::{Part, Weights};
use crate::executor::Readout;

/// A decoder with its weights.
pub struct Decoder<P: Pack> {
    embedding: P::Matrix,
    /// The decoder layers, in order.
    pub(super) layers: Vec<Layer<P>>,
    norm: P::Vector,
    /// `None` when the embedding is the head.
    head: Option<Affine<P>>,
    eps: f32,
}

/// What a forward pass gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forwarded {
    /// Logits of the batch's `logit_rows`, `[rows, vocab]`.
    pub logits: Vec<f32>,
    /// What was read off other rows, one for each of the batch's `readings`.
    pub readings: Vec<Readout>,
}

/// One decoder layer.
pub(super) struct Layer<P: Pack> {
    input_norm: P::Vector,
    pub(super) attention: Attention<P>,
    post_attention_norm: P::Vector,
    pub(super) feed_forward: FeedForward<P>,
}

/// The second half of a layer.
pub(super) enum FeedForward<P: Pack> {
    Dense(Mlp<P>),
    Experts(Moe<P>),
}

impl<P: Pack> Decoder<P> {
    /// Takes a decoder's weights out of a checkpoint.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError) when a tensor is missing, of another shape or dtype, or cannot be read.
    pub fn assemble(config: &ModelConfig, tensors: &Weights<'_>, pack: &P) -> LoadResult<Self> {
        let hidden = config.hidden_size;
        let table = [config.vocab_size, hidden];
        let embedding = tensors.whole("model.embed_tokens.weight", &table)?;
        let is_head = config.tie_word_embeddings;
        let embedding = pack.matrix(&plain(embedding, if is_head { Precision::Head } else { Precision::Working }))?;
        let layers = (0..config.layers).map(|layer| Layer::assemble(config, layer, tensors, pack));
        let layers = layers.collect::<LoadResult<Vec<_>>>()?;
        let norm = vector(pack, tensors.whole("model.norm.weight", &[hidden])?)?;
        let head = if is_head {
            None
        } else {
            // only the MoE class of transformers gives the head a bias
            let biased = config.use_bias && matches!(config.architecture, Architecture::Moe(_));
            let bias = biased.then(|| tensors.whole("lm_head.bias", &[config.vocab_size])).transpose()?;
            Some(Affine {
                weight: pack.matrix(&plain(tensors.whole("lm_head.weight", &table)?, Precision::Head))?,
                bias: bias.map(|bias| vector(pack, bias)).transpose()?,
            })
        };
        Ok(Self { embedding, layers, norm, head, eps: config.rms_norm_eps })
    }
}

impl<P: Pack> Layer<P> {
    fn assemble(config: &ModelConfig, layer: usize, tensors: &Weights<'_>, pack: &P) -> LoadResult<Self> {
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str| vector(pack, tensors.whole(&format!("{prefix}.{name}.weight"), &[config.hidden_size])?);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            attention: Attention::assemble(config, layer, &format!("{prefix}.self_attn"), tensors, pack)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: match config.moe_layer(layer) {
                None => {
                    let (prefix, inner) = (format!("{prefix}.mlp"), config.intermediate_size);
                    FeedForward::Dense(Mlp::assemble(config, &prefix, inner, tensors, pack)?)
                }
                Some(moe) => FeedForward::Experts(Moe::assemble(config, moe, &format!("{prefix}.mlp"), tensors, pack)?),
            },
        })
    }
}

impl<B: Backend> Decoder<B> {
    /// Runs a batch through the model; returns the logits of its `logit_rows`, and what is read off others.
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError).
    pub fn forward(&self, backend: &mut B, batch: &Batch, mut trace: Option<&mut Trace>) -> Result<Forwarded> {
        let step = Step { batch, state: backend.prepare(batch)? };
        let mut stream = backend.embed(&self.embedding, &batch.tokens)?;
        Trace::record(&mut trace, backend, "embed", &stream)?;
        for (number, layer) in self.layers.iter().enumerate() {
            layer.forward(backend, number, self.eps, &mut stream, &step, &mut trace)?;
            Trace::record(&mut trace, backend, &format!("layer.{number}"), &stream)?;
        }
        if trace.is_some() {
            Trace::record(&mut trace, backend, "norm", &backend.rms_norm(&stream, &self.norm, self.eps)?)?;
        }
        // One after the other: the memory plan has room for either.
        let readings = self.read_out(backend, &stream, batch)?;
        let logits = self.logits(backend, &stream, &batch.logit_rows)?;
        Ok(Forwarded { logits, readings })
    }

    /// The logits of some rows of the residual stream, `[rows, vocab]`.
    pub(super) fn logits(&self, backend: &B, stream: &B::Rows, rows: &[u32]) -> Result<Vec<f32>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let normed = self.normed(backend, stream, rows)?;
        let (head, bias) = match &self.head {
            Some(head) => (&head.weight, head.bias.as_ref()),
            None => (&self.embedding, None),
        };
        backend.into_f32(backend.linear(&normed, head, bias)?)
    }

    /// Some rows of the residual stream after the last norm.
    pub(super) fn normed(&self, backend: &B, stream: &B::Rows, rows: &[u32]) -> Result<B::Rows> {
        backend.rms_norm(&backend.select(stream, rows)?, &self.norm, self.eps)
    }
}

impl<B: Backend> Layer<B> {
    /// x += attention(norm(x)); x += feed_forward(norm(x)).
    fn forward(
        &self,
        backend: &mut B,
        number: usize,
        eps: f32,
        stream: &mut B::Rows,
        step: &Step<'_, B::State>,
        trace: &mut Option<&mut Trace>,
    ) -> Result<()> {
        let normed = backend.rms_norm(stream, &self.input_norm, eps)?;
        self.attention.forward(backend, number, &normed, stream, step)?;
        let normed = backend.rms_norm(stream, &self.post_attention_norm, eps)?;
        match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.forward(backend, &normed, stream, step.batch),
            FeedForward::Experts(moe) => moe.forward(backend, number, &normed, stream, step.batch, trace),
        }
    }
}

/// A matrix of one tensor.
fn plain(part: Part<'_>, precision: Precision) -> MatrixSource<'_> {
    MatrixSource { parts: vec![part], layout: Layout::Plain, precision }
}

/// A norm's weight.
fn vector<P: Pack>(pack: &P, part: Part<'_>) -> LoadResult<P::Vector> {
    pack.vector(&[part])
}

/// Takes projections of one input out of a checkpoint, fused into one matrix: `names` with their numbers of outputs.
pub(super) fn projection<P: Pack>(
    tensors: &Weights<'_>,
    pack: &P,
    prefix: &str,
    names: &[(&str, usize)],
    inputs: usize,
    layout: Layout,
    biased: bool,
) -> LoadResult<Projection<P>> {
    let mut parts = Vec::new();
    let mut biases = Vec::new();
    for &(name, outputs) in names {
        parts.push(tensors.whole(&format!("{prefix}.{name}.weight"), &[outputs, inputs])?);
        if biased {
            biases.push(tensors.whole(&format!("{prefix}.{name}.bias"), &[outputs])?);
        }
    }
    let weight = pack.matrix(&MatrixSource { parts, layout, precision: Precision::Linear })?;
    let bias = biased.then(|| pack.vector(&biases)).transpose()?;
    Ok(Projection::new(Affine { weight, bias }))
}
