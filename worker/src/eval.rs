//! `ernie-worker eval`: logits of given token ids through the serving path (scheduler, paged cache, prefix cache, the
//! same kernels), so that anyone can check a checkpoint against a reference.

pub mod evaluate;
mod perplexity;
mod places;
mod serving;
mod tensors;

use std::path::PathBuf;

use ernie_kernels::Level;
use ernie_proto::failure::{Reason, TerminationMessage};
use serde::Serialize;

use crate::engine::scheduler::Bounds;
use crate::executor::{BLOCK_TOKENS, ExecuteError, LogitRows};
use crate::model::digest::{Manifest, Reading};
use crate::model::{
    self, BackendChoice, Checkpoint, DeviceChoice, DtypeChoice, KvSize, LoadError, LoadOptions, ModelDigest,
    ModelExecutor, Quantization,
};

use evaluate::{Evaluation, Figures, Rows, Sequence, Settings, evaluate};

/// Most tokens in one step, unless a chunk is longer: what `serve` has when it is not told otherwise.
const STEP_TOKENS: usize = 2048;
/// Most logits that one step gives, where every row of it is asked for.
const LOGITS_AT_ONCE: usize = 32 << 20;

/// Flags of `eval`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["input", "perplexity"]))]
pub struct EvalArgs {
    /// Folder of the model as the hub lays it out.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Digest that the folder must have, as `ernie-worker digest` prints it.
    #[arg(long, value_name = "sha256:HEX", env = "ERNIE_MODEL_DIGEST")]
    pub model_digest: Option<ModelDigest>,
    /// Token ids as safetensors: `input_ids [T]` and optionally `position_ids [T]` as I64; or `input_ids.0`,
    /// `input_ids.1`, … which run as one batch.
    #[arg(long, value_name = "FILE", requires = "output")]
    pub input: Option<PathBuf>,
    /// Where the results go: `logits` [T, vocab] and what other flags ask for; in a batch each name ends in `.K`.
    #[arg(long, value_name = "FILE", requires = "input")]
    pub output: Option<PathBuf>,
    /// Instead: perplexity of the lines {"text": …} or {"ids": […]} of this file, which are scored one by one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["generate", "rows", "trace", "kv_blocks", "repeat"])]
    pub perplexity: Option<PathBuf>,
    /// Print the perplexity, or how each sequence was run, as JSON.
    #[arg(long)]
    pub json: bool,
    /// Number format of the weights; `auto` is the checkpoint's own.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
    /// Quantise the linear maps while they are loaded.
    #[arg(long, value_enum, default_value_t)]
    pub quantization: Quantization,
    /// Continue greedily by N tokens, end-of-sequence ignored: `greedy.tokens [N]`, `greedy.logits [N, vocab]`.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub generate: usize,
    /// Rows of `logits` that are written.
    #[arg(long, value_enum, default_value_t)]
    pub rows: Rows,
    /// Also write `embed`, `layer.N`, `norm` and `router.N.{logits,index,weight}`.
    #[arg(long)]
    pub trace: bool,
    /// Most tokens of one prompt in one step. Default: as many as a step has room for.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub chunk: Option<usize>,
    /// Blocks of the key-value cache, of 32 tokens each; with few, sequences of a batch are preempted and computed again.
    /// Default: as many as all sequences need at once.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub kv_blocks: Option<usize>,
    /// Run the same input so often, so that later runs find it in the prefix cache; the last is written.
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = positive)]
    pub repeat: usize,
    /// A low-rank adapter in PEFT's layout, applied to every sequence.
    #[arg(long, value_name = "NAME=DIR", value_parser = named_folder)]
    pub adapter: Option<(String, PathBuf)>,
    /// Threads that compute. Default: what the CPU quota and affinity allow.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Instruction level of the kernels: scalar, avx2, avx512 or amx. Default: the best that this CPU has.
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
    /// Where it computes; `auto` is a CUDA device in a build for CUDA where there is one, else the CPU.
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// What computes. Default: the kernels on the CPU, candle on CUDA.
    #[arg(long, value_enum)]
    pub backend: Option<BackendChoice>,
    /// Insist on the same bits in any batch, chunk, preemption and number of threads. The kernels give them anyway; candle
    /// is refused.
    #[arg(long)]
    pub deterministic: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

fn named_folder(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.to_owned(), PathBuf::from(folder))),
        _ => Err("must be NAME=DIR".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
/// What to write to the termination log and exit with.
pub fn run(args: &EvalArgs) -> Result<(), TerminationMessage> {
    if args.backend == Some(BackendChoice::Candle) {
        limit_candle_threads(args)?;
    }
    args.device.check().map_err(usage)?;
    let checkpoint = Checkpoint::inspect(&args.model).map_err(|error| error.termination())?;
    for warning in &checkpoint.warnings {
        eprintln!("warning: {warning}");
    }
    if let Some(expected) = args.model_digest {
        let threads = args.threads.unwrap_or_else(|| LoadOptions::default().threads);
        let how = Reading { threads, drop_pages: false, report: &|_| {} };
        let manifest = Manifest::of(&args.model, &how).and_then(|manifest| manifest.check(expected));
        manifest.map_err(|error| error.termination())?;
    }
    match (&args.input, &args.output, &args.perplexity) {
        (_, _, Some(file)) => perplexity::run(args, &checkpoint, file),
        (Some(input), Some(output), None) => {
            let tensors::Input { sequences, numbered } = tensors::read(input).map_err(usage)?;
            let vocab = checkpoint.config.vocab_size;
            let rows = if args.rows == Rows::All { LogitRows::All } else { LogitRows::Last };
            let settings = Settings {
                generate: args.generate,
                chunk: args.chunk.unwrap_or(usize::MAX),
                step_tokens: step_tokens(args.chunk, rows, vocab),
                repeat: args.repeat,
                rows: args.rows,
                trace: args.trace,
                adapter: args.adapter.is_some(),
            };
            let sizes = Sizes::new(&sequences, args, settings.bounds(sequences.len()))?;
            let mut executor = load(args, &checkpoint, &sizes)?;
            let results = evaluate(&mut executor, &sequences, &settings).map_err(|error| failed(&error))?;
            report(&sequences, &results, args);
            tensors::write(output, results, numbered, vocab).map_err(internal)
        }
        _ => Err(usage("give --input and --output, or --perplexity".to_owned())),
    }
}

/// Most tokens in one step.
fn step_tokens(chunk: Option<usize>, rows: LogitRows, vocab: usize) -> usize {
    let tokens = STEP_TOKENS.max(chunk.unwrap_or(0));
    if rows == LogitRows::All { tokens.min((LOGITS_AT_ONCE / vocab).max(1)) } else { tokens }
}

/// What the executor must have room for.
struct Sizes {
    /// Tokens of the longest sequence, continuation included.
    longest: usize,
    /// Blocks of the cache.
    blocks: usize,
    /// Limits of a step.
    bounds: Bounds,
}

impl Sizes {
    fn new(sequences: &[Sequence], args: &EvalArgs, bounds: Bounds) -> Result<Self, TerminationMessage> {
        let tokens = || sequences.iter().map(|sequence| sequence.ids.len().saturating_add(args.generate));
        let longest = tokens().max().unwrap_or(0);
        let needed = longest.div_ceil(BLOCK_TOKENS);
        // The scheduler starts a sequence when that leaves a block for each of those that run.
        let together = tokens().map(|tokens| tokens.div_ceil(BLOCK_TOKENS).saturating_add(1));
        let blocks = args.kv_blocks.unwrap_or_else(|| together.fold(0, usize::saturating_add));
        if blocks < needed {
            return Err(usage(format!(
                "--kv-blocks {blocks} holds {} tokens, fewer than the {longest} of the longest sequence with what \
                 --generate adds: give at least {needed}",
                blocks * BLOCK_TOKENS
            )));
        }
        Ok(Self { longest, blocks, bounds })
    }
}

/// Loads the model with room for `sizes`.
fn load(args: &EvalArgs, checkpoint: &Checkpoint, sizes: &Sizes) -> Result<ModelExecutor, TerminationMessage> {
    let Sizes { longest, blocks, bounds } = *sizes;
    let context = checkpoint.config.max_positions;
    if longest > context {
        return Err(usage(format!(
            "the longest sequence has {longest} tokens with what --generate adds, more than the context of {context} of \
             this model: shorten it"
        )));
    }
    let standard = LoadOptions::default();
    let (device, backend) = args.device.open(args.backend).map_err(|error| error.termination())?;
    if args.deterministic && backend == BackendChoice::Candle {
        let sentence = "--deterministic does not go with candle, whose sums depend on the batch: compute with --device cpu \
                        --backend cpu";
        return Err(usage(sentence.into()));
    }
    let memory_limit = device.memory_limit().map_err(|error| error.termination())?;
    let options = LoadOptions {
        dtype: args.dtype,
        quantization: args.quantization,
        device,
        backend,
        level: args.level,
        threads: args.threads.unwrap_or(standard.threads),
        kv: KvSize::Blocks(blocks),
        max_model_len: Some(longest),
        max_num_seqs: bounds.max_num_seqs,
        max_num_batched_tokens: bounds.max_num_batched_tokens.min(blocks.saturating_mul(BLOCK_TOKENS)),
        memory_limit,
        adapters: args.adapter.iter().cloned().collect(),
    };
    model::load(checkpoint, &options, &|_| {}).map_err(|error: LoadError| error.termination())
}

/// How one sequence was run, as JSON.
#[derive(Serialize)]
struct Report {
    tokens: usize,
    generated: usize,
    #[serde(flatten)]
    figures: Figures,
}

/// Says how the sequences were run: in one line on stderr, and one by one on stdout when asked for.
fn report(sequences: &[Sequence], results: &[Evaluation], args: &EvalArgs) {
    let sum = |figure: fn(&Figures) -> usize| results.iter().map(|result| figure(&result.figures)).sum::<usize>();
    eprintln!(
        "sequences {}, preemptions {}, tokens that ran again {}, tokens found in the prefix cache {}",
        results.len(),
        sum(|figures| figures.preemptions),
        sum(|figures| figures.recomputed_tokens),
        sum(|figures| figures.prefix_hit_tokens),
    );
    if args.json {
        let reports = sequences.iter().zip(results).map(|(sequence, result)| Report {
            tokens: sequence.ids.len(),
            generated: result.greedy_tokens.len(),
            figures: result.figures,
        });
        let reports: Vec<_> = reports.collect();
        println!("{}", serde_json::json!({ "sequences": reports }));
    }
}

/// Candle sizes its own pools by the machine's cores unless the environment says otherwise, and only reads that at
/// start: so this process starts itself again.
fn limit_candle_threads(args: &EvalArgs) -> Result<(), TerminationMessage> {
    use std::os::unix::process::CommandExt;
    const VARIABLE: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(VARIABLE).is_some() {
        return Ok(());
    }
    let threads = args.threads.unwrap_or_else(|| LoadOptions::default().threads).to_string();
    let binary = std::env::current_exe().map_err(|error| internal(format!("cannot find this binary: {error}")))?;
    let error = std::process::Command::new(binary)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, &threads)
        .env("RAYON_NUM_THREADS", &threads)
        .exec();
    Err(internal(format!("cannot start again with {VARIABLE}={threads}: {error}")))
}

fn message(reason: Reason, message: String) -> TerminationMessage {
    TerminationMessage { reason, message, detail: serde_json::Value::Null }
}

fn usage(what: String) -> TerminationMessage {
    message(Reason::Usage, what)
}

fn internal(what: String) -> TerminationMessage {
    message(Reason::Internal, what)
}

/// An input that the model cannot run is a mistake of whoever wrote it.
fn failed(error: &ExecuteError) -> TerminationMessage {
    match error {
        ExecuteError::InvalidPlan(what) => usage(format!("the input does not fit the model: {what}")),
        ExecuteError::Failed(_) => internal(error.to_string()),
    }
}
