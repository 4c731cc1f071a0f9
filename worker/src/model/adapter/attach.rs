//! The place of an adapter's tensors in the model.

use std::ops::Range;

use super::{Adapter, LoadedAdapter};
use crate::model::config::ModelConfig;
use crate::model::ernie::{Decoder, FeedForward, Layer};
use crate::model::error::{LoadError, LoadResult};
use crate::model::mlp::Mlp;
use crate::model::moe::{ExpertAdapter, GatedLowRank, Moe};
use crate::model::pack::Pack;
use crate::model::projection::LowRank;
use crate::model::weights::Weights;

/// What PEFT writes before a module's name.
const PREFIX: &str = "base_model.model.";

/// An adapter that is being taken apart.
struct Source<'a, P: Pack> {
    adapter: &'a Adapter,
    weights: &'a Weights<'a>,
    pack: &'a P,
    index: u32,
}

/// A linear map that may be adapted: its module's name, its columns among the outputs, and its inputs.
struct Target<'a> {
    module: &'a str,
    columns: Range<usize>,
    inputs: usize,
}

impl Adapter {
    /// Adds this adapter to a model as number `index`.
    ///
    /// # Errors
    /// [`LoadError`] when a tensor has no place in the model, has another shape, or its pair is missing.
    pub(in crate::model) fn attach<P: Pack>(
        &self,
        index: u32,
        config: &ModelConfig,
        decoder: &mut Decoder<P>,
        weights: &Weights<'_>,
        pack: &P,
    ) -> LoadResult<LoadedAdapter> {
        let source = Source { adapter: self, weights, pack, index };
        for (number, layer) in decoder.layers.iter_mut().enumerate() {
            source.layer(config, &format!("model.layers.{number}"), layer)?;
        }
        let unclaimed = weights.unclaimed();
        match unclaimed.first() {
            None => Ok(LoadedAdapter { name: self.name.clone(), digest: self.digest(weights) }),
            Some(name) => Err(LoadError::unsupported(format!(
                "adapter {:?}: tensor {name:?} has no place: only LoRA of q, k, v, o, gate, up and down projections of this \
                 model is computed",
                self.name
            ))),
        }
    }
}

impl<P: Pack> Source<'_, P> {
    fn layer(&self, config: &ModelConfig, prefix: &str, layer: &mut Layer<P>) -> LoadResult<()> {
        let (hidden, query, kv) = (config.hidden_size, config.query_width(), config.kv_width());
        let qkv = [("q_proj", 0..query), ("k_proj", query..query + kv), ("v_proj", query + kv..query + 2 * kv)];
        for (name, columns) in qkv {
            let module = format!("{prefix}.self_attn.{name}");
            layer.attention.qkv.low_rank.extend(self.linear(&Target { module: &module, columns, inputs: hidden })?);
        }
        let module = format!("{prefix}.self_attn.o_proj");
        let output = Target { module: &module, columns: 0..hidden, inputs: query };
        layer.attention.output.low_rank.extend(self.linear(&output)?);
        let prefix = format!("{prefix}.mlp");
        match &mut layer.feed_forward {
            FeedForward::Dense(mlp) => self.mlp(&prefix, hidden, config.intermediate_size, mlp),
            FeedForward::Experts(moe) => self.moe(&prefix, hidden, moe),
        }
    }

    fn mlp(&self, prefix: &str, hidden: usize, inner: usize, mlp: &mut Mlp<P>) -> LoadResult<()> {
        let GatedLowRank { gate_up, down } = self.gated(prefix, hidden, inner)?;
        mlp.gate_up.low_rank.extend(gate_up);
        mlp.down.low_rank.extend(down);
        Ok(())
    }

    /// The adapters of a gated network whose three maps are modules of their own.
    fn gated(&self, prefix: &str, hidden: usize, inner: usize) -> LoadResult<GatedLowRank<P>> {
        let part = |name: &str, columns: Range<usize>, inputs: usize| {
            self.linear(&Target { module: &format!("{prefix}.{name}"), columns, inputs })
        };
        let gate = part("gate_proj", 0..inner, hidden)?;
        let up = part("up_proj", inner..2 * inner, hidden)?;
        let down = part("down_proj", 0..hidden, inner)?;
        Ok(GatedLowRank { gate_up: gate.into_iter().chain(up).collect(), down: down.into_iter().collect() })
    }

    fn moe(&self, prefix: &str, hidden: usize, moe: &mut Moe<P>) -> LoadResult<()> {
        let (count, inner) = (moe.experts(), moe.intermediate_size);
        if let Some(shared) = &mut moe.shared {
            self.mlp(&format!("{prefix}.shared_experts"), hidden, moe.shared_size, shared)?;
        }
        let mut experts = (0..count)
            .map(|expert| self.gated(&format!("{prefix}.experts.{expert}"), hidden, inner))
            .collect::<LoadResult<Vec<_>>>()?;
        // PEFT on transformers 5 adapts the tensors of all experts together; the outer wrapper is the later parameter
        let fused = [("experts.base_layer", "experts.gate_up_proj"), ("experts", "experts.down_proj")];
        for (place, (module, parameter)) in fused.into_iter().enumerate() {
            let (columns, inputs) = if place == 0 { (2 * inner, hidden) } else { (hidden, inner) };
            let names = (format!("{prefix}.{module}"), format!("{prefix}.{parameter}"));
            let parts = self.fused(&names.0, &names.1, count, columns, inputs)?;
            for (expert, part) in experts.iter_mut().zip(parts) {
                if place == 0 { expert.gate_up.push(part) } else { expert.down.push(part) }
            }
        }
        if experts.iter().any(|expert| !expert.gate_up.is_empty() || !expert.down.is_empty()) {
            moe.adapters.push(ExpertAdapter { adapter: self.index, experts });
        }
        Ok(())
    }

    /// The names of A and B of a module.
    fn pair(&self, module: &str) -> (String, String) {
        let name = |letter: &str| format!("{PREFIX}{module}.lora_{letter}.weight");
        (name("A"), name("B"))
    }

    /// The rank of a pair whose A has `rows` rows for each of `experts`; `None` when neither is there.
    fn rank(&self, module: &str, pattern_name: &str, experts: usize) -> LoadResult<Option<usize>> {
        let (a, b) = self.pair(module);
        let found = match (self.adapter.tensors.places.get(&a), self.weights.has(&b)) {
            (None, false) => return Ok(None),
            (Some(place), true) => place.shape.first().map_or(0, |rows| rows / experts),
            (found, _) => {
                let (there, missing) = if found.is_some() { (a, b) } else { (b, a) };
                return Err(LoadError::corrupt(format!(
                    "adapter {:?} has the tensor {there:?} without {missing:?}",
                    self.adapter.name
                )));
            }
        };
        let wanted = self.adapter.scale.rank(pattern_name);
        if found == wanted {
            return Ok(Some(found));
        }
        Err(LoadError::corrupt(format!(
            "adapter {:?}: tensor {a:?} has rank {found}, adapter_config.json says {wanted}",
            self.adapter.name
        )))
    }

    /// The adapter of one linear map, if there is one.
    fn linear(&self, target: &Target<'_>) -> LoadResult<Option<LowRank<P>>> {
        let Target { module, columns, inputs } = target;
        let Some(rank) = self.rank(module, module, 1)? else { return Ok(None) };
        let (a, b) = self.pair(module);
        let scale = self.adapter.scale.of(module);
        let a = self.pack.numbers(&self.weights.whole(&a, &[rank, *inputs])?)?;
        let b = self.pack.numbers(&self.weights.whole(&b, &[columns.len(), rank])?)?;
        self.low_rank(a, b.into_iter().map(|value| value * scale).collect(), columns.clone(), rank).map(Some)
    }

    /// The adapters of the tensor of all experts: A `[experts · r, inputs]` with the expert slowest, B
    /// `[columns, r · experts]` with the expert fastest.
    fn fused(
        &self,
        module: &str,
        parameter: &str,
        experts: usize,
        columns: usize,
        inputs: usize,
    ) -> LoadResult<Vec<LowRank<P>>> {
        let Some(rank) = self.rank(module, parameter, experts)? else { return Ok(Vec::new()) };
        let (a, b) = self.pair(module);
        let scale = self.adapter.scale.of(parameter);
        let a = self.pack.numbers(&self.weights.whole(&a, &[experts * rank, inputs])?)?;
        let b = self.pack.numbers(&self.weights.whole(&b, &[columns, rank * experts])?)?;
        (0..experts)
            .map(|expert| {
                let a = a[expert * rank * inputs..(expert + 1) * rank * inputs].to_vec();
                let own = b.iter().skip(expert).step_by(experts).map(|value| value * scale).collect();
                self.low_rank(a, own, 0..columns, rank)
            })
            .collect()
    }

    fn low_rank(&self, a: Vec<f32>, b: Vec<f32>, columns: Range<usize>, rank: usize) -> LoadResult<LowRank<P>> {
        let inputs = a.len() / rank;
        Ok(LowRank {
            adapter: self.index,
            a: self.pack.matrix_of(a, inputs)?,
            b: self.pack.matrix_of(b, rank)?,
            columns,
        })
    }
}
