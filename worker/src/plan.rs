//! The memory plan: what a model takes, against what this process may use, before any weight is touched.

mod limit;

use ernie_proto::failure::Reason;
use serde::{Deserialize, Serialize};

use crate::executor::BLOCK_TOKENS;
use crate::model::adapter::Adapter;
use crate::model::backend::candle::ATTENTION_SCORES;
use crate::model::inventory::{Keeping, weight_bytes};
use crate::model::{
    Checkpoint, Dtype, KvSize, LoadError, LoadOptions, LoadResult, ModelConfig, Quantization, SCORED_AT_ONCE,
};
use crate::server::{ARRIVING_BYTES, calls::MAX_REQUEST_BYTES};

pub use limit::{LimitSource, MemoryLimit};

/// What the process takes beside weights, cache, activations and tokenizer: code, stacks, server, buffers.
const OVERHEAD: u64 = 48 << 20;
/// Requests that arrive, each twice at most while it is decoded, are a small part of that.
const _: () = assert!(2 * ARRIVING_BYTES as u64 <= OVERHEAD / 4);
/// What tokenising takes at its worst for each byte of text: 174 bytes, measured with a megabyte of one-letter tokens.
const TEXT_FACTOR: u64 = 176;
/// Bytes of text for each token of the context, at most; usual text has 3 to 5.
const TEXT_BYTES_PER_TOKEN: usize = 32;
/// A text may have so many bytes however short the context is.
const LEAST_TEXT: usize = 64 << 10;
/// What a tokenizer takes in memory for each byte of its file.
const TOKENIZER_FACTOR: u64 = 8;
/// What constraints take for each token of the vocabulary once there is one: the trie, its slices and masks.
const CONSTRAINT_FACTOR: u64 = 640;
/// What each answer that follows one takes beside that, again for each token of the vocabulary: an interpreter of its own, with
/// what it has worked out so far. 134 to 922 KiB, measured at a vocabulary of 103,424 by the bench `constraint -- memory`.
const CONSTRAINED_ANSWER_FACTOR: u64 = 10;
/// What is taken on a CUDA device beside what the plan counts: the workspace of cuBLAS, candle's kernels, and what the
/// allocator rounds up. An estimate.
const DEVICE_OVERHEAD: u64 = 512 << 20;
/// A cache for fewer tokens than this, or than the context if that is less, is of no use.
const USEFUL_TOKENS: usize = 2048;
/// The largest cache that is taken unasked where no limit was set for this process.
const UNLIMITED_KV: u64 = 4 << 30;

/// The longest text that a worker takes with this context, and all text that it works on at once, in bytes.
pub fn longest_text(context: usize) -> usize {
    context.saturating_mul(TEXT_BYTES_PER_TOKEN).clamp(LEAST_TEXT, MAX_REQUEST_BYTES)
}

/// What a model takes where it computes: of this process's memory, or of a device's. All sizes in bytes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// What computes: `cpu` or `cuda`.
    pub device: String,
    /// The format of the weights that are not quantised.
    pub dtype: Dtype,
    /// How the others are quantised.
    #[serde(default)]
    pub quantization: Quantization,
    /// The format of the key-value cache.
    pub kv_cache_dtype: Dtype,
    /// Weights, those of adapters included.
    pub weight_bytes: u64,
    /// Cache for one token, all layers.
    pub kv_bytes_per_token: u64,
    /// Tokens that the cache holds.
    pub kv_tokens: usize,
    /// Blocks that the cache holds.
    pub kv_blocks: usize,
    /// The cache.
    pub kv_bytes: u64,
    /// Activations and logits of the largest step.
    pub activation_bytes: u64,
    /// The rest of the process, or what a device takes for itself.
    pub overhead_bytes: u64,
    /// All of it together.
    pub needed_bytes: u64,
    /// What this process may use, or what is free on the device, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Who says so, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_source: Option<LimitSource>,
    /// The longest sequence.
    pub max_model_len: usize,
}

impl MemoryPlan {
    /// Plans the memory of a model. Where no context was asked for and the model's own does not fit, it is shortened, but
    /// not below what is useful.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::Usage`] when the options contradict the model, and as [`Adapter::inspect`]. A plan
    /// that does not fit is no error here: see [`MemoryPlan::check`].
    pub fn new(checkpoint: &Checkpoint, options: &LoadOptions) -> LoadResult<Self> {
        let config = &checkpoint.config;
        let dtype = options.dtype.resolve(checkpoint.dtype);
        options.device.check(dtype)?;
        let quantization = options.quantization;
        if quantization != Quantization::None && !options.device.is_cpu() {
            return Err(LoadError::new(
                Reason::Usage,
                format!(
                    "--quantization {quantization} is computed on the CPU only, not on {}: leave it out, or use --device cpu",
                    options.device.kind()
                ),
            ));
        }
        let keeping = Keeping { dtype, quantization, backend: options.backend };
        let kv_cache_dtype = options.kv_cache_dtype(dtype, config.head_dim);
        let adapters = Adapter::inspect_all(&options.adapters)?;
        let longest = longest(config, options.max_model_len)?;
        let kv_bytes_per_token = (2 * config.layers * config.kv_width() * kv_cache_dtype.bytes()) as u64;
        let mut plan = Self {
            device: options.device.kind().to_owned(),
            dtype,
            quantization,
            kv_cache_dtype,
            weight_bytes: weight_bytes(checkpoint, keeping)? + adapters.iter().map(Adapter::bytes).sum::<u64>(),
            kv_bytes_per_token,
            kv_tokens: 0,
            kv_blocks: 0,
            kv_bytes: 0,
            activation_bytes: 0,
            overhead_bytes: 0,
            needed_bytes: 0,
            available_bytes: options.memory_limit.map(|limit| limit.bytes),
            limit_source: options.memory_limit.map(|limit| limit.source),
            max_model_len: longest,
        };
        // Answers that wait for their turn take nothing yet.
        let answers = CONSTRAINED_ANSWER_FACTOR * options.max_num_seqs as u64;
        let constraints = (CONSTRAINT_FACTOR + answers) * config.vocab_size as u64;
        let fixed = OVERHEAD + TOKENIZER_FACTOR * tokenizer_bytes(checkpoint) + constraints;
        let mut context = longest;
        loop {
            plan.activation_bytes = activation_bytes(config, options);
            if options.device.is_cpu() {
                plan.overhead_bytes = fixed + TEXT_FACTOR * longest_text(context) as u64;
            } else {
                plan.activation_bytes += attention_bytes(config, kv_cache_dtype, context);
                plan.overhead_bytes = DEVICE_OVERHEAD;
            }
            let useful = context.min(if options.max_model_len.is_some() { context } else { USEFUL_TOKENS });
            plan.set_blocks(plan.choose_blocks(options, useful, context));
            let fits = plan.available_bytes.is_none_or(|available| plan.needed_bytes <= available);
            if fits || options.max_model_len.is_some() || context <= USEFUL_TOKENS {
                break;
            }
            // The texts of a shorter context take less.
            context = (context / 2).max(USEFUL_TOKENS);
        }
        if options.max_model_len.is_none() {
            plan.max_model_len = context.min(plan.kv_tokens);
        }
        Ok(plan)
    }

    /// Whether the plan fits.
    ///
    /// # Errors
    /// [`LoadError`] with [`Reason::InsufficientMemory`], the numbers in its sentence, and as its detail the plan, whose
    /// `limitSource` is what was too small.
    pub fn check(&self) -> LoadResult<()> {
        if self.kv_tokens < self.max_model_len {
            let message = format!(
                "a key-value cache of {} holds {} tokens, fewer than the context of {}: raise --kv-cache-memory or lower \
                 --max-model-len",
                size(self.kv_bytes),
                self.kv_tokens,
                self.max_model_len
            );
            return Err(Self { limit_source: Some(LimitSource::Flag), ..self.clone() }.insufficient(message));
        }
        match self.available_bytes {
            Some(available) if self.needed_bytes > available => {
                let (limit, remedy) = self.limit_and_remedy(available);
                Err(self.insufficient(format!(
                    "needs {} of memory ({} of {} weights, {} of key-value cache for {} tokens, {} for the rest), \
                     {limit}: {remedy}",
                    size(self.needed_bytes),
                    size(self.weight_bytes),
                    self.weights(),
                    size(self.kv_bytes),
                    self.kv_tokens,
                    size(self.activation_bytes + self.overhead_bytes),
                )))
            }
            _ => Ok(()),
        }
    }

    /// The formats of the weights, as people say them.
    pub fn weights(&self) -> String {
        match self.quantization {
            Quantization::None => self.dtype.to_string(),
            quantization => format!("{quantization} and {}", self.dtype),
        }
    }

    /// What bounds the memory, and what can be done about it.
    fn limit_and_remedy(&self, available: u64) -> (String, String) {
        let (limit, remedy) = match self.limit_source {
            Some(LimitSource::Node) => (
                format!("the node has {} and no limit is set", size(available)),
                format!(
                    "set spec.resources.requests.memory to {}Mi or more, so that a node with as much is chosen",
                    self.needed_bytes.div_ceil(1 << 20)
                ),
            ),
            Some(LimitSource::Device) => (
                format!("the {} device has {} free", self.device, size(available)),
                "take a device with more memory, or end what else runs on it".to_owned(),
            ),
            _ => (format!("limit is {}", size(available)), "raise spec.resources.limits.memory".to_owned()),
        };
        // A shorter context takes less cache and has shorter texts, which helps only where the rest fits.
        let texts = match self.limit_source {
            Some(LimitSource::Device) => 0,
            _ => TEXT_FACTOR * (longest_text(self.max_model_len) - LEAST_TEXT) as u64,
        };
        if self.needed_bytes.saturating_sub(self.kv_bytes + texts) < available {
            return (limit, format!("{remedy}, or lower --max-model-len or --kv-cache-memory"));
        }
        (limit, remedy)
    }

    fn insufficient(&self, message: String) -> LoadError {
        LoadError::new(Reason::InsufficientMemory, message).with_detail(serde_json::to_value(self).unwrap_or_default())
    }

    /// Whether files of `stored` bytes would not fit the limit beside the model.
    pub(crate) fn is_tight(&self, stored: u64) -> bool {
        self.available_bytes.is_some_and(|available| self.needed_bytes.saturating_add(stored) > available)
    }

    fn set_blocks(&mut self, blocks: usize) {
        self.kv_blocks = blocks;
        self.kv_tokens = blocks * BLOCK_TOKENS;
        self.kv_bytes = self.kv_tokens as u64 * self.kv_bytes_per_token;
        self.needed_bytes = self.weight_bytes + self.kv_bytes + self.activation_bytes + self.overhead_bytes;
    }

    /// Blocks of the cache: as asked for, or what the limit leaves between what is useful and what can be used.
    fn choose_blocks(&self, options: &LoadOptions, useful: usize, longest: usize) -> usize {
        let block_bytes = self.kv_bytes_per_token * BLOCK_TOKENS as u64;
        let in_bytes = |bytes: u64| usize::try_from(bytes / block_bytes.max(1)).unwrap_or(usize::MAX);
        let usable = longest.div_ceil(BLOCK_TOKENS).saturating_mul(options.max_num_seqs.max(1));
        match options.kv {
            KvSize::Blocks(blocks) => blocks,
            KvSize::Bytes(bytes) => in_bytes(bytes).min(usable),
            KvSize::Auto => {
                let rest = self.weight_bytes + self.activation_bytes + self.overhead_bytes;
                let room = match options.memory_limit {
                    // a thirty-second stays free for what no plan knows
                    Some(limit) => (limit.bytes - limit.bytes / 32).saturating_sub(rest).min(match limit.source {
                        LimitSource::Cgroup | LimitSource::Flag | LimitSource::Device => u64::MAX,
                        LimitSource::Node => UNLIMITED_KV,
                    }),
                    None => UNLIMITED_KV,
                };
                in_bytes(room).min(usable).max(useful.div_ceil(BLOCK_TOKENS))
            }
        }
    }
}

/// The longest sequence that is asked for, or that the model allows.
fn longest(config: &ModelConfig, asked: Option<usize>) -> LoadResult<usize> {
    match asked {
        Some(asked) if asked == 0 || asked > config.max_positions => Err(LoadError::new(
            Reason::Usage,
            format!("--max-model-len {asked} must be in 1..={}, the context of this model", config.max_positions),
        )),
        Some(asked) => Ok(asked),
        None => Ok(config.max_positions),
    }
}

/// Activations of the largest step, in f32: the residual stream, its norm, q, k and v, the heads' results, and both
/// halves of the widest network; and two rows of logits for each sequence, or for
/// each of the prompt's rows that are scored at once.
fn activation_bytes(config: &ModelConfig, options: &LoadOptions) -> u64 {
    let attention = 2 * config.query_width() + 2 * config.kv_width();
    let row = 3 * config.hidden_size + attention + 2 * config.intermediate_size;
    let logits = 2 * options.max_num_seqs.max(SCORED_AT_ONCE) * config.vocab_size;
    4 * (options.max_num_batched_tokens as u64 * row as u64 + logits as u64)
}

/// What attention takes beside that on a device: scores in four states, and keys and values of a sequence of `context`
/// tokens, gathered from the cache and turned.
fn attention_bytes(config: &ModelConfig, kv_cache_dtype: Dtype, context: usize) -> u64 {
    4 * 4 * ATTENTION_SCORES as u64 + 4 * (context * config.kv_width() * kv_cache_dtype.bytes()) as u64
}

/// Bytes of the tokenizer's file.
fn tokenizer_bytes(checkpoint: &Checkpoint) -> u64 {
    let length = |name: &str| std::fs::metadata(checkpoint.path.join(name)).ok().map(|metadata| metadata.len());
    length("tokenizer.json").or_else(|| length("tokenizer.model")).unwrap_or(0)
}

/// A size as people read it.
fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests;
