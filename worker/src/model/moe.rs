//! The mixture of experts: a router in f32 chooses experts for each token; shared experts see every token.

use super::backend::{Affine, Backend, GatedMlp, Result, Routes};
use super::batch::Batch;
use super::config::{ModelConfig, MoeConfig};
use super::error::LoadResult;
use super::mlp::Mlp;
use super::pack::{Layout, MatrixSource, Pack, Precision};
use super::projection::LowRank;
use super::trace::Trace;
use super::weights::{Part, Weights};

/// The experts of one layer.
pub struct Moe<P: Pack> {
    /// `[experts, hidden]`, f32.
    router: P::Matrix,
    /// `[experts]`: added to a probability for the choice, never for the weight.
    correction: Vec<f32>,
    experts: Vec<GatedMlp<P>>,
    /// The shared experts as one network of their widths together.
    pub(super) shared: Option<Mlp<P>>,
    /// Inner width of a routed expert.
    pub(super) intermediate_size: usize,
    /// Inner width of the shared experts together.
    pub(super) shared_size: usize,
    /// What adapters change in routed experts.
    pub(super) adapters: Vec<ExpertAdapter<P>>,
    active: usize,
    norm_min: f32,
}

/// An adapter's share in the routed experts of a layer.
pub(super) struct ExpertAdapter<P: Pack> {
    /// Index of the adapter, as sequences name it.
    pub(super) adapter: u32,
    /// Its share in each expert.
    pub(super) experts: Vec<GatedLowRank<P>>,
}

/// An adapter's share in a gated network.
pub(super) struct GatedLowRank<P: Pack> {
    /// Added to the gate and up projections.
    pub(super) gate_up: Vec<LowRank<P>>,
    /// Added to the down projection.
    pub(super) down: Vec<LowRank<P>>,
}

impl<P: Pack> Moe<P> {
    /// Takes the experts at `prefix` out of a checkpoint, in the published names or fused as some tools write them.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError), as [`Weights::whole`].
    pub fn assemble(
        config: &ModelConfig,
        moe: &MoeConfig,
        prefix: &str,
        tensors: &Weights<'_>,
        pack: &P,
    ) -> LoadResult<Self> {
        let router = tensors.whole(&format!("{prefix}.gate.weight"), &[moe.experts, config.hidden_size])?;
        let shared = moe.shared.unwrap_or(0);
        Ok(Self {
            router: pack.matrix(&MatrixSource {
                parts: vec![router],
                layout: Layout::Plain,
                precision: Precision::Single,
            })?,
            correction: pack.numbers(&correction(tensors, prefix, moe.experts)?)?,
            experts: (0..moe.experts)
                .map(|expert| assemble_expert(config, moe, prefix, expert, tensors, pack))
                .collect::<LoadResult<_>>()?,
            shared: if shared == 0 {
                None
            } else {
                let inner = moe.intermediate_size * shared;
                Some(Mlp::assemble(config, &format!("{prefix}.shared_experts"), inner, tensors, pack)?)
            },
            intermediate_size: moe.intermediate_size,
            shared_size: moe.intermediate_size * shared,
            adapters: Vec::new(),
            active: moe.active,
            norm_min: moe.norm_min,
        })
    }

    /// Routed experts.
    pub(super) fn experts(&self) -> usize {
        self.experts.len()
    }
}

/// The correction bias, under either of its names.
fn correction<'a>(tensors: &'a Weights<'_>, prefix: &str, experts: usize) -> LoadResult<Part<'a>> {
    let fused = format!("{prefix}.gate.moe_statics.e_score_correction_bias");
    let published = format!("{prefix}.moe_statics.e_score_correction_bias");
    tensors.whole(if tensors.has(&fused) { &fused } else { &published }, &[1, experts])
}

/// One expert: three tensors of its own, or its rows of the tensors of all experts.
fn assemble_expert<P: Pack>(
    config: &ModelConfig,
    moe: &MoeConfig,
    prefix: &str,
    expert: usize,
    tensors: &Weights<'_>,
    pack: &P,
) -> LoadResult<GatedMlp<P>> {
    let (hidden, inner, count) = (config.hidden_size, moe.intermediate_size, moe.experts);
    let fused = format!("{prefix}.experts.gate_up_proj");
    let (gate_up, down) = if tensors.has(&fused) {
        let (height, first) = (2 * inner, expert * 2 * inner);
        let down = format!("{prefix}.experts.down_proj");
        (
            vec![tensors.rows(&fused, &[count, height, hidden], first..first + height)?],
            tensors.rows(&down, &[count, hidden, inner], expert * hidden..(expert + 1) * hidden)?,
        )
    } else {
        let part =
            |name: &str, shape: [usize; 2]| tensors.whole(&format!("{prefix}.experts.{expert}.{name}.weight"), &shape);
        (
            vec![part("gate_proj", [inner, hidden])?, part("up_proj", [inner, hidden])?],
            part("down_proj", [hidden, inner])?,
        )
    };
    let matrix = |parts, layout| pack.matrix(&MatrixSource { parts, layout, precision: Precision::Linear });
    Ok(GatedMlp {
        gate_up: Affine { weight: matrix(gate_up, Layout::GateUp)?, bias: None },
        down: Affine { weight: matrix(vec![down], Layout::Plain)?, bias: None },
    })
}

impl<B: Backend> Moe<B> {
    /// `stream` += Σ weight · expert(x) over the chosen experts + shared(x).
    ///
    /// # Errors
    /// [`ComputeError`](super::backend::ComputeError).
    pub fn forward(
        &self,
        backend: &B,
        layer: usize,
        x: &B::Rows,
        stream: &mut B::Rows,
        batch: &Batch,
        trace: &mut Option<&mut Trace>,
    ) -> Result<()> {
        let logits = backend.router_logits(x, &self.router)?;
        let routes = route(&logits, &self.correction, self.active, self.norm_min);
        if let Some(trace) = trace {
            trace.record_routes(layer, logits, &routes);
        }
        let adapters: Vec<&ExpertAdapter<B>> =
            self.adapters.iter().filter(|part| batch.adapter_rows(part.adapter).next().is_some()).collect();
        if adapters.is_empty() {
            backend.moe(x, &self.experts, &routes, stream)?;
        } else {
            self.adapted(backend, x, &routes, batch, &adapters, stream)?;
        }
        match &self.shared {
            Some(shared) => shared.forward(backend, x, stream, batch),
            None => Ok(()),
        }
    }
}

impl<B: Backend> Moe<B> {
    /// What [`Backend::moe`] computes, expert by expert, with what adapters add for the rows of their sequences.
    fn adapted(
        &self,
        backend: &B,
        x: &B::Rows,
        routes: &Routes,
        batch: &Batch,
        adapters: &[&ExpertAdapter<B>],
        stream: &mut B::Rows,
    ) -> Result<()> {
        for (number, expert) in self.experts.iter().enumerate() {
            let chosen = (0..routes.index.len()).filter(|&place| routes.index[place] as usize == number);
            let (rows, shares): (Vec<u32>, Vec<f32>) =
                chosen.map(|place| ((place / routes.active) as u32, routes.weight[place])).unzip();
            if rows.is_empty() {
                continue;
            }
            let own = backend.select(x, &rows)?;
            let mut gate_up = backend.linear(&own, &expert.gate_up.weight, None)?;
            for part in adapters.iter().flat_map(|adapter| &adapter.experts[number].gate_up) {
                add_low_rank(backend, part, &own, &rows, batch, &mut gate_up)?;
            }
            let inner = backend.silu_mul(&gate_up)?;
            let mut out = backend.linear(&inner, &expert.down.weight, None)?;
            for part in adapters.iter().flat_map(|adapter| &adapter.experts[number].down) {
                add_low_rank(backend, part, &inner, &rows, batch, &mut out)?;
            }
            backend.add_rows(&out, &rows, &shares, stream)?;
        }
        Ok(())
    }
}

/// Adds an adapter's product to those of an expert's `rows` (ascending rows of the batch) whose sequences have it.
fn add_low_rank<B: Backend>(
    backend: &B,
    part: &LowRank<B>,
    x: &B::Rows,
    rows: &[u32],
    batch: &Batch,
    out: &mut B::Rows,
) -> Result<()> {
    for span in batch.adapter_rows(part.adapter) {
        let place = |row: usize| rows.partition_point(|&known| (known as usize) < row);
        let own = place(span.start)..place(span.end);
        if !own.is_empty() {
            backend.low_rank_add(x, own, &part.a, &part.b, part.columns.clone(), out)?;
        }
    }
    Ok(())
}

/// Chooses experts for rows of router logits `[T, experts]`: p = softmax over all experts; the `active` largest of p +
/// `correction`, equals by ascending number; weights p / max(Σ of the chosen p, `norm_min`).
pub fn route(logits: &[f32], correction: &[f32], active: usize, norm_min: f32) -> Routes {
    let experts = correction.len();
    let rows = logits.len() / experts.max(1);
    let mut routes =
        Routes { active, index: Vec::with_capacity(rows * active), weight: Vec::with_capacity(rows * active) };
    let mut order = Vec::with_capacity(experts);
    for row in logits.chunks_exact(experts) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut probability: Vec<f32> = row.iter().map(|logit| (logit - max).exp()).collect();
        let sum: f32 = probability.iter().sum();
        probability.iter_mut().for_each(|p| *p /= sum);
        order.clear();
        order.extend(probability.iter().zip(correction).map(|(p, correction)| p + correction).zip(0u32..));
        order.sort_by(|(a, i), (b, j)| b.total_cmp(a).then(i.cmp(j)));
        let chosen = || order[..active].iter().map(|&(_, expert)| expert);
        let mass = chosen().map(|expert| probability[expert as usize]).sum::<f32>().max(norm_min);
        routes.weight.extend(chosen().map(|expert| probability[expert as usize] / mass));
        routes.index.extend(chosen());
    }
    routes
}
