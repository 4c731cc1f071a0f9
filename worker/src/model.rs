//! The model: from a folder in the layout of the model hub to an executor of steps.
//!
//! [`Checkpoint::inspect`] looks at configuration and headers in milliseconds; [`MemoryPlan`]
//! says what it will take; [`load`] reads the weights. Knows no request, no protobuf.

pub mod adapter;
pub mod attention;
pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod digest;
pub mod dtype;
pub mod ernie;
pub mod error;
pub mod executor;
pub mod inventory;
mod json;
pub mod mlp;
pub mod moe;
pub mod pack;
pub mod projection;
pub mod quantization;
mod readout;
pub mod rope;
pub mod safetensors;
pub mod trace;
pub mod weights;

use std::path::PathBuf;

use ernie_kernels::{Cpu, KvShape, Level};
use ernie_proto::failure::Reason;

use self::adapter::{Adapter, LoadedAdapter};
use self::backend::candle::{CandleBackend, CandleShape};
use self::backend::cpu::{CpuBackend, CpuShape, kv_format};
use self::ernie::Decoder;
use self::executor::{CandleModel, CpuModel, Forward};
use self::pack::Pack;
use self::weights::Weights;
use crate::executor::Geometry;
use crate::plan::{MemoryLimit, MemoryPlan};

pub use self::checkpoint::Checkpoint;
pub use self::config::{GenerationDefaults, ModelConfig};
pub use self::device::{ComputeDevice, DeviceChoice};
pub use self::digest::ModelDigest;
pub use self::dtype::{Dtype, DtypeChoice};
pub use self::error::{LoadError, LoadResult};
pub use self::executor::ModelExecutor;
pub use self::quantization::Quantization;
pub use self::readout::SCORED_AT_ONCE;
pub use self::weights::Progress;

/// What computes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum BackendChoice {
    /// This project's kernels.
    #[default]
    Cpu,
    /// candle: what computes on CUDA; slow on the CPU, for comparison.
    Candle,
}

/// How large the key-value cache is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum KvSize {
    /// What the memory limit leaves, but no more than can be used.
    #[default]
    Auto,
    /// This many bytes.
    Bytes(u64),
    /// This many blocks.
    Blocks(usize),
}

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The format of the weights in memory.
    pub dtype: DtypeChoice,
    /// How linear maps are quantised.
    pub quantization: Quantization,
    /// Where it computes.
    pub device: ComputeDevice,
    /// What computes.
    pub backend: BackendChoice,
    /// The kernels' instruction level; the best that the CPU has when not set.
    pub level: Option<Level>,
    /// Threads that compute, at least 1.
    pub threads: usize,
    /// Size of the key-value cache.
    pub kv: KvSize,
    /// The longest sequence; the model's own limit, as far as memory allows, when not set.
    pub max_model_len: Option<usize>,
    /// Sequences that may run at once; bounds what the cache can use.
    pub max_num_seqs: usize,
    /// Rows of a step; bounds the memory of activations.
    pub max_num_batched_tokens: usize,
    /// The memory that the model may take on its device, when known.
    pub memory_limit: Option<MemoryLimit>,
    /// Low-rank adapters: a name and a folder in PEFT's layout each.
    pub adapters: Vec<(String, PathBuf)>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DtypeChoice::Auto,
            quantization: Quantization::None,
            device: ComputeDevice::Cpu,
            backend: BackendChoice::default(),
            level: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            kv: KvSize::Auto,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 2048,
            memory_limit: None,
            adapters: Vec::new(),
        }
    }
}

impl LoadOptions {
    /// The format of the key-value cache beside weights of `dtype`, in heads of `head_dim` dimensions. Tiles multiply
    /// bfloat16, which is worth more on long contexts than the bits that float16 keeps; quantised models are computed in
    /// single precision throughout.
    pub fn kv_cache_dtype(&self, dtype: Dtype, head_dim: usize) -> Dtype {
        let level = self.level.unwrap_or_else(Level::best);
        let kernels = self.device.is_cpu() && self.backend == BackendChoice::Cpu;
        let rounds = kernels && dtype == Dtype::Bfloat16 && self.quantization == Quantization::None;
        if rounds && kv_format(dtype).on_tiles(level, head_dim) { dtype } else { self.device.kv_cache(dtype) }
    }
}

/// Loads a model: plans its memory, reads its weights, and sets up an empty cache. `progress` is told every few
/// megabytes.
///
/// # Errors
/// [`LoadError`]; [`Reason::InsufficientMemory`], with the plan as detail, before any weight is read.
pub fn load(checkpoint: &Checkpoint, options: &LoadOptions, progress: &dyn Fn(Progress)) -> LoadResult<ModelExecutor> {
    let plan = MemoryPlan::new(checkpoint, options)?;
    plan.check()?;
    let adapters = Adapter::inspect_all(&options.adapters)?;
    inventory::check_adapters(checkpoint, &adapters)?;
    let weights = Weights::new(&checkpoint.tensors, progress);
    let weights = if plan.is_tight(checkpoint.tensors.bytes()) { weights.dropping_pages() } else { weights };
    let (forward, adapters, level) = match options.backend {
        BackendChoice::Cpu if !options.device.is_cpu() => {
            return Err(LoadError::new(Reason::Usage, "the kernels of the CPU do not compute on another device"));
        }
        BackendChoice::Cpu => load_cpu(checkpoint, options, &plan, &weights, &adapters)?,
        BackendChoice::Candle => load_candle(checkpoint, options, &plan, &weights, &adapters)?,
    };
    let geometry = Geometry {
        vocab: checkpoint.config.vocab_size,
        hidden: checkpoint.config.hidden_size,
        blocks: plan.kv_blocks,
        max_model_len: plan.max_model_len,
    };
    let quantization = match plan.quantization {
        Quantization::None => String::new(),
        quantization => format!("-{quantization}"),
    };
    let identity = format!(
        "{}-{}-{}{quantization}-kv_{}-{level}",
        checkpoint.config.model_type(),
        &weights.fingerprint()[..16],
        plan.dtype,
        plan.kv_cache_dtype
    );
    Ok(ModelExecutor::new(forward, geometry, identity, plan, adapters))
}

/// A decoder that can run, its adapters, and what computes it.
type Loaded = (Box<dyn Forward>, Vec<LoadedAdapter>, String);

/// Adds the adapters to a model, in order.
fn attach<P: Pack>(
    adapters: &[Adapter],
    config: &ModelConfig,
    decoder: &mut Decoder<P>,
    pack: &P,
) -> LoadResult<Vec<LoadedAdapter>> {
    let attach = |(adapter, index): (&Adapter, u32)| {
        adapter.attach(index, config, decoder, &Weights::new(&adapter.tensors, &|_| {}), pack)
    };
    adapters.iter().zip(0..).map(attach).collect()
}

fn load_cpu(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    plan: &MemoryPlan,
    weights: &Weights<'_>,
    adapters: &[Adapter],
) -> LoadResult<Loaded> {
    let config = &checkpoint.config;
    let level = options.level.unwrap_or_else(Level::best);
    let cpu = Cpu::new(level, options.threads).map_err(|error| LoadError::new(Reason::Usage, error.to_string()))?;
    let shape = CpuShape {
        dtype: plan.dtype,
        quantization: plan.quantization,
        rope_theta: config.rope_theta,
        kv: KvShape {
            layers: config.layers,
            blocks: plan.kv_blocks,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            format: kv_format(plan.kv_cache_dtype),
        },
    };
    let backend = CpuBackend::new(cpu, &shape)?;
    let mut decoder = Decoder::assemble(config, weights, &backend)?;
    let adapters = attach(adapters, config, &mut decoder, &backend)?;
    Ok((Box::new(CpuModel { decoder, backend }), adapters, level.name().to_owned()))
}

fn load_candle(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    plan: &MemoryPlan,
    weights: &Weights<'_>,
    adapters: &[Adapter],
) -> LoadResult<Loaded> {
    let config = &checkpoint.config;
    let shape = CandleShape {
        dtype: plan.dtype,
        quantization: plan.quantization,
        kv_cache_dtype: plan.kv_cache_dtype,
        rope_theta: config.rope_theta,
        head_dim: config.head_dim,
        kv_width: config.kv_width(),
        layers: config.layers,
        blocks: plan.kv_blocks,
    };
    // candle multiplies in whatever rayon pool it is called from; its own would have a thread for each core of the node
    let pool = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads.max(1)).build();
        pool.map_err(|error| LoadError::new(Reason::Internal, format!("cannot start threads: {error}")))
    };
    let pool = options.device.is_cpu().then(pool).transpose()?;
    let backend = CandleBackend::new(options.device.candle(), &shape)?;
    let mut decoder = Decoder::assemble(config, weights, &backend)?;
    let adapters = attach(adapters, config, &mut decoder, &backend)?;
    Ok((Box::new(CandleModel { decoder, backend, pool }), adapters, options.device.level()))
}
