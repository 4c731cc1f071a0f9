//! The executor of one loaded model: checks a plan, lays it out, runs it, and hands the logits back by sequence.

use super::adapter::LoadedAdapter;
use super::backend::Result;
use super::backend::candle::CandleBackend;
use super::backend::cpu::CpuBackend;
use super::batch::Batch;
use super::ernie::{Decoder, Forwarded};
use super::trace::Trace;
use crate::executor::{ExecuteError, Executor, Geometry, StepOutput, StepPlan};
use crate::plan::MemoryPlan;

/// A decoder with the backend that it runs on.
pub(super) trait Forward: Send {
    /// The logits `[logit rows, vocab]` of a batch, and what is read off other rows.
    fn forward(&mut self, batch: &Batch, trace: Option<&mut Trace>) -> Result<Forwarded>;
}

/// A decoder on this project's kernels.
pub(super) struct CpuModel {
    pub(super) decoder: Decoder<CpuBackend>,
    pub(super) backend: CpuBackend,
}

impl Forward for CpuModel {
    fn forward(&mut self, batch: &Batch, trace: Option<&mut Trace>) -> Result<Forwarded> {
        self.decoder.forward(&mut self.backend, batch, trace)
    }
}

/// A decoder on candle, with the threads that it may use on the CPU.
pub(super) struct CandleModel {
    pub(super) decoder: Decoder<CandleBackend>,
    pub(super) backend: CandleBackend,
    pub(super) pool: Option<rayon::ThreadPool>,
}

impl Forward for CandleModel {
    fn forward(&mut self, batch: &Batch, trace: Option<&mut Trace>) -> Result<Forwarded> {
        let Self { decoder, backend, pool } = self;
        match pool {
            Some(pool) => pool.install(|| decoder.forward(backend, batch, trace)),
            None => decoder.forward(backend, batch, trace),
        }
    }
}

/// A loaded model.
pub struct ModelExecutor {
    forward: Box<dyn Forward>,
    geometry: Geometry,
    identity: String,
    plan: MemoryPlan,
    adapters: Vec<LoadedAdapter>,
}

impl ModelExecutor {
    pub(super) fn new(
        forward: Box<dyn Forward>,
        geometry: Geometry,
        identity: String,
        plan: MemoryPlan,
        adapters: Vec<LoadedAdapter>,
    ) -> Self {
        Self { forward, geometry, identity, plan, adapters }
    }

    /// The adapters; a sequence's `adapter` is an index into them.
    pub fn adapters(&self) -> &[LoadedAdapter] {
        &self.adapters
    }

    /// What decides the numbers that come out: model class, a fingerprint of the weights, formats, instruction level.
    /// Executors with the same identity continue each other's streams.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The memory plan that the model was loaded by.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Runs a step as [`Executor::execute`] does, and keeps what happens on the way.
    ///
    /// # Errors
    /// As [`Executor::execute`].
    pub fn execute_traced(
        &mut self,
        plan: &StepPlan,
        trace: Option<&mut Trace>,
    ) -> std::result::Result<StepOutput, ExecuteError> {
        let batch = Batch::new(plan, &self.geometry, self.adapters.len())?;
        let forwarded = self.forward.forward(&batch, trace);
        let Forwarded { logits, readings } = forwarded.map_err(|error| ExecuteError::Failed(error.to_string()))?;
        Ok(StepOutput { logits: split(logits, &batch, self.geometry.vocab), readings })
    }
}

impl Executor for ModelExecutor {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn execute(&mut self, plan: &StepPlan) -> std::result::Result<StepOutput, ExecuteError> {
        self.execute_traced(plan, None)
    }
}

/// Cuts the logits of a batch at its sequences.
fn split(logits: Vec<f32>, batch: &Batch, vocab: usize) -> Vec<Vec<f32>> {
    if let [_] = &batch.spans[..] {
        return vec![logits];
    }
    let rows = |span: &super::batch::Span| logits[span.logits.start * vocab..span.logits.end * vocab].to_vec();
    batch.spans.iter().map(rows).collect()
}
