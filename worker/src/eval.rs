//! `ernie-worker eval`: logits of given token ids through the serving path (paged cache, flat batches, the same
//! kernels), so that anyone can check a checkpoint against a reference.

pub mod evaluate;
mod perplexity;
mod tensors;

use std::path::PathBuf;

use ernie_kernels::Level;
use ernie_proto::failure::{Reason, TerminationMessage};

use crate::executor::{BLOCK_TOKENS, ExecuteError};
use crate::model::{self, BackendChoice, Checkpoint, DtypeChoice, KvSize, LoadError, LoadOptions, ModelExecutor};
use crate::plan::MemoryLimit;

use evaluate::{Rows, Settings, evaluate};

/// Flags of `eval`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["input", "perplexity"]))]
pub struct EvalArgs {
    /// Folder of the model as the hub lays it out.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Token ids as safetensors: `input_ids [T]` and optionally `position_ids [T]` as I64; or `input_ids.0`,
    /// `input_ids.1`, … which run as one batch.
    #[arg(long, value_name = "FILE", requires = "output")]
    pub input: Option<PathBuf>,
    /// Where the results go: `logits` [T, vocab] and what other flags ask for; in a batch each name ends in `.K`.
    #[arg(long, value_name = "FILE", requires = "input")]
    pub output: Option<PathBuf>,
    /// Instead: perplexity of the lines {"text": …} or {"ids": […]} of this file, which are scored one by one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["generate", "rows", "trace"])]
    pub perplexity: Option<PathBuf>,
    /// Print the perplexity as JSON.
    #[arg(long, requires = "perplexity")]
    pub json: bool,
    /// Number format of the weights; `auto` is the checkpoint's own.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
    /// Continue greedily by N tokens, end-of-sequence ignored: `greedy.tokens [N]`, `greedy.logits [N, vocab]`.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub generate: usize,
    /// Rows of `logits` that are written.
    #[arg(long, value_enum, default_value_t)]
    pub rows: Rows,
    /// Also write `embed`, `layer.N`, `norm` and `router.N.{logits,index,weight}`.
    #[arg(long)]
    pub trace: bool,
    /// Tokens of a prompt that run in one step.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = positive)]
    pub chunk: usize,
    /// A low-rank adapter in PEFT's layout, applied to every sequence.
    #[arg(long, value_name = "NAME=DIR", value_parser = named_folder)]
    pub adapter: Option<(String, PathBuf)>,
    /// Threads that compute. Default: what the CPU quota and affinity allow.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Instruction level of the kernels: scalar, avx2 or avx512. Default: the best that this CPU has.
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
    /// What computes.
    #[arg(long, value_enum, default_value_t)]
    pub backend: BackendChoice,
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
    if args.backend == BackendChoice::Candle {
        limit_candle_threads(args)?;
    }
    let checkpoint = Checkpoint::inspect(&args.model).map_err(|error| error.termination())?;
    for warning in &checkpoint.warnings {
        eprintln!("warning: {warning}");
    }
    match (&args.input, &args.output, &args.perplexity) {
        (_, _, Some(file)) => perplexity::run(args, &checkpoint, file),
        (Some(input), Some(output), None) => {
            let sequences = tensors::read(input).map_err(usage)?;
            let longest = sequences.iter().map(|sequence| sequence.ids.len() + args.generate).max().unwrap_or(0);
            let blocks =
                sequences.iter().map(|sequence| (sequence.ids.len() + args.generate).div_ceil(BLOCK_TOKENS)).sum();
            let mut executor = load(args, &checkpoint, longest, blocks, sequences.len())?;
            let settings = Settings {
                generate: args.generate,
                chunk: args.chunk,
                rows: args.rows,
                trace: args.trace,
                adapter: args.adapter.is_some(),
            };
            let results = evaluate(&mut executor, &sequences, &settings).map_err(|error| failed(&error))?;
            tensors::write(output, results, checkpoint.config.vocab_size).map_err(usage)
        }
        _ => Err(usage("give --input and --output, or --perplexity".to_owned())),
    }
}

/// Loads the model with a cache of `blocks` for `sequences` of at most `longest` tokens.
fn load(
    args: &EvalArgs,
    checkpoint: &Checkpoint,
    longest: usize,
    blocks: usize,
    sequences: usize,
) -> Result<ModelExecutor, TerminationMessage> {
    let standard = LoadOptions::default();
    let options = LoadOptions {
        dtype: args.dtype,
        backend: args.backend,
        level: args.level,
        threads: args.threads.unwrap_or(standard.threads),
        kv: KvSize::Blocks(blocks),
        max_model_len: Some(longest),
        max_num_seqs: sequences,
        max_num_batched_tokens: args.chunk.min(longest).saturating_mul(sequences),
        memory_limit: MemoryLimit::of_this_process(),
        adapters: args.adapter.iter().cloned().collect(),
    };
    model::load(checkpoint, &options, &|_| {}).map_err(|error: LoadError| error.termination())
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
