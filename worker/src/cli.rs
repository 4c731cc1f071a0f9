//! The command line: `serve | eval | bench | ask | digest | version`.
//!
//! Every flag of `serve` is also an environment variable `ERNIE_…`, so that a pod template needs no shell; an empty one
//! counts as unset. Values are parsed into their final types here; a flag that contradicts another is refused before anything is opened.

use std::{
    ffi::{OsStr, OsString},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use ernie_proto::contract::{DEFAULT_MAX_NUM_SEQS, GRPC_PORT, HTTP_PORT, TERMINATION_LOG};

use crate::model::{DeviceChoice, DtypeChoice, ModelDigest, Quantization};

/// Build version, as `version` and `/version` show it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Tokens in one forward pass, unless told otherwise.
pub(crate) const BATCHED_TOKENS: usize = 2048;

/// Inference worker for ERNIE 4.5.
#[derive(Debug, Parser)]
#[command(name = "ernie-worker", version, max_term_width = 100)]
#[command(after_help = "Try:\n  ernie-worker serve --model models/austen-2.6m\n  \
    ernie-worker ask --server localhost:8033 \"It is a truth universally acknowledged,\"")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over gRPC until told to stop.
    #[command(args_override_self = true)]
    Serve(Box<ServeArgs>),
    /// Compute logits of given token ids, to check a checkpoint against a reference.
    Eval(Box<crate::eval::EvalArgs>),
    /// Measure how fast this machine serves a model, or how fast a server answers.
    Bench(Box<crate::bench::BenchArgs>),
    /// Ask a running server and stream its answer to the terminal.
    Ask(AskArgs),
    /// Print the digest of a model folder, for --model-digest.
    Digest(DigestArgs),
    /// Print the version.
    Version,
}

/// Flags of `serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Folder of the model as the hub lays it out: config.json, *.safetensors, tokenizer, chat template.
    #[arg(long, value_name = "DIR", env = "ERNIE_MODEL")]
    pub model: PathBuf,
    /// Digest that the folder must have, as `ernie-worker digest` prints it; no weight is read before it was compared.
    #[arg(long, value_name = "sha256:HEX", env = "ERNIE_MODEL_DIGEST")]
    pub model_digest: Option<ModelDigest>,
    /// Name that clients send as `model`. Default: the folder's name.
    #[arg(long, value_name = "NAME", env = "ERNIE_SERVED_MODEL_NAME", value_parser = model_name)]
    pub served_model_name: Option<String>,
    /// Where the model computes; `auto` is a CUDA device in a build for CUDA where there is one, else the CPU.
    #[arg(long, value_enum, default_value_t, env = "ERNIE_DEVICE")]
    pub device: DeviceChoice,
    /// Number format of the weights; `auto` is the checkpoint's own.
    #[arg(long, value_enum, default_value_t, env = "ERNIE_DTYPE")]
    pub dtype: DtypeChoice,
    /// Quantise the linear maps while they are loaded: less memory and faster answers from slightly other weights.
    #[arg(long, value_enum, default_value_t, env = "ERNIE_QUANTIZATION")]
    pub quantization: Quantization,
    /// A low-rank adapter in PEFT's layout, and the name that clients send as `model` to get it. May be given again; in the
    /// environment variable separated by commas.
    #[arg(long = "adapter", value_name = "NAME=DIR", env = "ERNIE_ADAPTER", value_delimiter = ',', value_parser = adapter)]
    pub adapters: Vec<(String, PathBuf)>,
    /// Memory of the key-value cache, for instance 2Gi. Default: what the memory limit, or the device, leaves.
    #[arg(long, value_name = "SIZE", env = "ERNIE_KV_CACHE_MEMORY", value_parser = bytes)]
    pub kv_cache_memory: Option<u64>,
    /// Longest prompt and answer together, in tokens. Default: the checkpoint's, as far as the cache holds it.
    #[arg(long, value_name = "TOKENS", env = "ERNIE_MAX_MODEL_LEN", allow_negative_numbers = true, value_parser = positive)]
    pub max_model_len: Option<usize>,
    /// Most requests that run at once.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_NUM_SEQS, env = "ERNIE_MAX_NUM_SEQS",
        allow_negative_numbers = true, value_parser = positive)]
    pub max_num_seqs: usize,
    /// Most tokens in one forward pass. Default: 2048, or as many as requests that run at once.
    #[arg(long, value_name = "TOKENS", env = "ERNIE_MAX_NUM_BATCHED_TOKENS", allow_negative_numbers = true,
        value_parser = positive)]
    pub max_num_batched_tokens: Option<usize>,
    /// Most requests that wait; further ones are refused with RESOURCE_EXHAUSTED.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 256,
        env = "ERNIE_MAX_QUEUED_REQUESTS",
        allow_negative_numbers = true
    )]
    pub max_queued_requests: usize,
    /// Threads that compute. Default: what the CPU quota and affinity allow.
    #[arg(long, value_name = "N", env = "ERNIE_THREADS", allow_negative_numbers = true, value_parser = positive)]
    pub threads: Option<usize>,
    /// Instruction level of the kernels: scalar, avx2, avx512 or amx. Default: the best that this machine has. Part of the
    /// `numerics` of answers.
    #[arg(long, value_name = "LEVEL", env = "ERNIE_LEVEL", value_parser = level)]
    pub level: Option<ernie_kernels::Level>,
    /// Reuse keys and values of prompts that begin alike.
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
        action = ArgAction::Set, env = "ERNIE_ENABLE_PREFIX_CACHING")]
    pub enable_prefix_caching: bool,
    /// Insist on the same answer to the same request and seed, whatever runs beside it: computes on the CPU, whose kernels
    /// keep that promise anyway.
    #[arg(long, env = "ERNIE_DETERMINISTIC")]
    pub deterministic: bool,
    /// Metadata key that names the tenant, set by a trusted front. Default: one tenant.
    #[arg(long, value_name = "KEY", env = "ERNIE_TENANT_HEADER", value_parser = metadata_key)]
    pub tenant_header: Option<String>,
    /// Address to listen on. Default: all, IPv6 and IPv4.
    #[arg(long, value_name = "IP", env = "ERNIE_HOST")]
    pub host: Option<IpAddr>,
    /// Port of the gRPC services; 0 picks a free one.
    #[arg(long, default_value_t = GRPC_PORT, env = "ERNIE_PORT")]
    pub port: u16,
    /// Port of /livez /readyz /metrics /version /plan; 0 picks a free one.
    #[arg(long, default_value_t = HTTP_PORT, env = "ERNIE_HTTP_PORT")]
    pub http_port: u16,
    /// Offer gRPC server reflection, which grpcurl and Postman use.
    #[arg(long, value_name = "BOOL", default_value_t = true, default_missing_value = "true", num_args = 0..=1,
        action = ArgAction::Set, env = "ERNIE_REFLECTION")]
    pub reflection: bool,
    /// After SIGTERM: how long the worker keeps accepting, for clients that have not heard yet.
    #[arg(long, value_name = "TIME", default_value = "5s", env = "ERNIE_LAME_DUCK", value_parser = duration)]
    pub lame_duck: Duration,
    /// After that: how long running streams may finish before they end UNAVAILABLE.
    #[arg(long, value_name = "TIME", default_value = "120s", env = "ERNIE_DRAIN_TIMEOUT", value_parser = duration)]
    pub drain_timeout: Duration,
    /// File for the reason of a failure, as JSON. Default: /dev/termination-log where it exists.
    #[arg(long, value_name = "FILE", env = "ERNIE_TERMINATION_LOG")]
    pub termination_log: Option<PathBuf>,
    /// Form of the log lines on stderr. What is logged: ERNIE_LOG, for instance `info,ernie_worker=debug`.
    #[arg(long, value_enum, default_value_t, env = "ERNIE_LOG_FORMAT")]
    pub log_format: LogFormat,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Flags of `ask`.
#[derive(Args, Clone, Debug)]
pub struct AskArgs {
    /// The server's gRPC address.
    #[arg(long, value_name = "HOST:PORT", env = "ERNIE_SERVER", default_value = "localhost:8033")]
    pub server: String,
    /// Name of the model. Default: the one that the server has.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Instructions that come before the question.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Continue the text as it is, without the chat template.
    #[arg(long)]
    pub raw: bool,
    /// Most tokens of the answer.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// 0 always takes the most probable token; higher is more varied.
    #[arg(long, value_name = "0..2", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Same seed, same answer.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// File with a JSON Schema that the answer must fit.
    #[arg(long, value_name = "FILE", conflicts_with = "regex")]
    pub json_schema: Option<PathBuf>,
    /// Regular expression that the whole answer must match.
    #[arg(long, value_name = "REGEX")]
    pub regex: Option<String>,
    /// Give up after so long.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration)]
    pub timeout: Duration,
    /// Print one JSON object at the end instead of the text as it comes.
    #[arg(long)]
    pub json: bool,
    /// The question; `-` reads it from standard input.
    #[arg(value_name = "TEXT", allow_hyphen_values = true)]
    pub text: String,
}

/// Flags of `digest`.
#[derive(Args, Clone, Debug)]
pub struct DigestArgs {
    /// Folder of the model as the hub lays it out.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Print the SHA-256 of each file instead: the lines whose SHA-256 is the digest.
    #[arg(long)]
    pub files: bool,
}

impl Cli {
    /// Parses a command line, program name first, beside the environment of this process.
    ///
    /// # Errors
    /// clap's, which is also how help and version are told.
    pub fn parse_line(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let command = without_empty_variables(Self::command(), |name| std::env::var_os(name));
        Self::from_arg_matches(&command.try_get_matches_from(line)?)
    }
}

/// The command, of which no argument reads an environment variable that is set to nothing: pod templates and compose
/// files leave those behind for what was not chosen.
fn without_empty_variables(command: clap::Command, variable: fn(&OsStr) -> Option<OsString>) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let keep = |argument: clap::Arg| {
        let empty = argument.get_env().and_then(variable).is_some_and(|value| value.is_empty());
        if empty { argument.env(None::<&'static str>) } else { argument }
    };
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, |command| command.mut_args(keep)))
}

impl ServeArgs {
    /// Where the model is to compute.
    pub fn device(&self) -> DeviceChoice {
        if self.deterministic { DeviceChoice::Cpu } else { self.device }
    }

    /// Checks flags against each other.
    ///
    /// # Errors
    /// A sentence that names the flags.
    pub fn check(&self) -> Result<(), String> {
        if self.port == self.http_port && self.port != 0 {
            return Err(format!("--port and --http-port are both {}; choose two ports", self.port));
        }
        self.device.check()?;
        if self.deterministic && self.device == DeviceChoice::Cuda {
            return Err(
                "--deterministic does not go with --device cuda, whose sums depend on what runs beside a request; \
                        leave one of them out"
                    .to_owned(),
            );
        }
        if self.quantization != Quantization::None && self.device == DeviceChoice::Cuda {
            return Err(format!(
                "--quantization {} is computed on the CPU only; leave out --device cuda, or the quantisation",
                self.quantization
            ));
        }
        if let Some(tokens) = self.max_num_batched_tokens.filter(|&tokens| tokens < self.max_num_seqs) {
            return Err(format!(
                "--max-num-batched-tokens {tokens} is less than --max-num-seqs {}: each running request needs a token of \
                 every step; raise the first or lower the second",
                self.max_num_seqs
            ));
        }
        if self.max_num_seqs > 4096 {
            return Err(format!("--max-num-seqs {} is more than 4096", self.max_num_seqs));
        }
        if self.max_queued_requests > 1 << 20 {
            return Err(format!("--max-queued-requests {} is more than 1048576", self.max_queued_requests));
        }
        let base = self.model_name();
        for (number, (name, _)) in self.adapters.iter().enumerate() {
            if *name == base {
                return Err(format!("--adapter {name}: the model itself has this name; choose another one"));
            }
            if self.adapters[..number].iter().any(|(known, _)| known == name) {
                return Err(format!("--adapter {name} is given twice; choose two names"));
            }
        }
        Ok(())
    }

    /// Most tokens in one forward pass.
    pub fn batched_tokens(&self) -> usize {
        self.max_num_batched_tokens.unwrap_or_else(|| BATCHED_TOKENS.max(self.max_num_seqs))
    }

    /// The name that clients send.
    pub fn model_name(&self) -> String {
        let folder = || {
            let path = self.model.canonicalize().unwrap_or_else(|_| self.model.clone());
            path.file_name().map(|name| name.to_string_lossy().into_owned())
        };
        self.served_model_name.clone().or_else(folder).unwrap_or_else(|| "model".to_owned())
    }

    /// Where the reason of a failure is written, if anywhere.
    pub fn termination_log(&self) -> Option<PathBuf> {
        self.termination_log.clone().or_else(|| Path::new(TERMINATION_LOG).exists().then(|| TERMINATION_LOG.into()))
    }
}

/// A level that this machine has.
fn level(name: &str) -> Result<ernie_kernels::Level, ernie_kernels::LevelError> {
    name.parse::<ernie_kernels::Level>()?.checked()
}

pub(crate) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("must be a whole number of at least 1".into()),
    }
}

/// A number of bytes with an optional Kubernetes suffix: `1500000000`, `1500M`, `2Gi`.
fn bytes(text: &str) -> Result<u64, String> {
    let at = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[at..] {
        "" => 1,
        "k" => 1000,
        "M" => 1000 * 1000,
        "G" => 1000 * 1000 * 1000,
        "T" => 1000 * 1000 * 1000 * 1000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err("must be a number with k, M, G, T, Ki, Mi, Gi, Ti or nothing behind it".into()),
    };
    let number: u64 = text[..at].parse().map_err(|_| "must begin with a whole number")?;
    number.checked_mul(unit).filter(|&bytes| bytes > 0).ok_or_else(|| "must be from 1 byte to 16 EiB".into())
}

/// A time: `90`, `90s`, `1500ms`, `2m`, `1h`. At most a day.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let at = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let millis = match &text[at..] {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("must be a number with ms, s, m or h behind it".into()),
    };
    let number: u64 = text[..at].parse().map_err(|_| "must begin with a whole number")?;
    let time = number.checked_mul(millis).map(Duration::from_millis);
    time.filter(|&time| time <= Duration::from_secs(86_400)).ok_or_else(|| "must be at most a day (24h)".into())
}

fn model_name(text: &str) -> Result<String, String> {
    let known = |character: char| character.is_ascii_alphanumeric() || "._-/:@".contains(character);
    match text {
        "" => Err("must not be empty".into()),
        _ if text.len() > 128 => Err("must have at most 128 characters".into()),
        _ if !text.chars().all(known) => Err("must consist of letters, digits and . _ - / : @".into()),
        _ => Ok(text.to_owned()),
    }
}

/// `NAME=DIR`.
fn adapter(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !folder.is_empty() => Ok((model_name(name)?, PathBuf::from(folder))),
        _ => Err("must be NAME=DIR".into()),
    }
}

fn metadata_key(text: &str) -> Result<String, String> {
    let key = text.to_ascii_lowercase();
    let known = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
    if key.is_empty() || !key.chars().all(known) || key.starts_with("grpc-") || key.ends_with("-bin") {
        return Err("must be a text metadata key such as x-tenant".into());
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn serve(more: &[&str]) -> Result<ServeArgs, String> {
        let arguments = ["ernie-worker", "serve", "--model", "/m"].iter().chain(more);
        match Cli::try_parse_from(arguments).map_err(|error| error.to_string())?.command {
            Command::Serve(serve) => serve.check().map(|()| *serve),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_serve_is_an_environment_variable_of_its_name() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("serve");
        for argument in serve.get_arguments().filter(|argument| argument.get_long() != Some("help")) {
            let long = argument.get_long().expect("only long flags");
            let expected = format!("ERNIE_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(argument.get_env().and_then(|name| name.to_str()), Some(expected.as_str()), "--{long}");
        }
    }

    #[test]
    fn sizes_and_times_are_read_with_their_units() {
        let args =
            serve(&["--kv-cache-memory", "2Gi", "--drain-timeout", "3m", "--lame-duck", "250ms"]).expect("parses");
        assert_eq!(args.kv_cache_memory, Some(2 << 30));
        assert_eq!((args.drain_timeout, args.lame_duck), (Duration::from_secs(180), Duration::from_millis(250)));
        assert_eq!(serve(&["--drain-timeout", "90"]).expect("parses").drain_timeout, Duration::from_secs(90));
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let args = serve(&[]).expect("parses");
        assert_eq!((args.port, args.http_port, args.reflection), (8033, 8080, true));
        assert_eq!(args.lame_duck.as_secs(), ernie_proto::contract::LAME_DUCK_SECONDS);
        assert_eq!(args.drain_timeout.as_secs(), ernie_proto::contract::DEFAULT_DRAIN_SECONDS);
        assert_eq!(args.model_name(), "m");
    }

    #[test]
    fn a_flag_given_twice_has_its_last_value() {
        assert_eq!(serve(&["--port", "1", "--port", "2"]).expect("parses").port, 2);
    }

    #[test]
    fn every_adapter_given_is_kept_under_a_name_of_its_own() {
        let args = serve(&["--adapter", "a=/x", "--adapter", "b=/y=z"]).expect("parses");
        let named = |name: &str, folder: &str| (name.to_owned(), PathBuf::from(folder));
        assert_eq!(args.adapters, [named("a", "/x"), named("b", "/y=z")]);
        assert_eq!(serve(&["--adapter", "a=/x,b=/y"]).expect("parses").adapters.len(), 2);
        assert!(serve(&["--adapter", "a=/x", "--adapter", "a=/y"]).expect_err("twice").contains("twice"));
        assert!(serve(&["--adapter", "m=/x"]).expect_err("the model's").contains("the model itself"));
    }

    #[test]
    fn switches_take_a_value_or_none() {
        assert!(!serve(&["--reflection=false"]).expect("parses").reflection);
        assert!(!serve(&["--reflection", "false"]).expect("parses").reflection);
        assert!(serve(&["--reflection", "--port", "1"]).expect("parses").reflection);
    }

    #[test]
    fn wrong_values_are_refused_by_flag_value_and_remedy() {
        for (flag, value, remedy) in [
            ("--kv-cache-memory", "2GB", "Gi"),
            ("--kv-cache-memory", "99999999Ti", "16 EiB"),
            ("--max-num-seqs", "0", "at least 1"),
            ("--max-num-seqs", "-1", "--max-num-seqs"),
            ("--drain-timeout", "2d", "ms, s, m or h"),
            ("--drain-timeout", "25h", "a day"),
            ("--served-model-name", "a b", "letters, digits"),
            ("--tenant-header", "grpc-timeout", "x-tenant"),
            ("--dtype", "int8", "bfloat16"),
            ("--quantization", "int3", "int4"),
            ("--model-digest", "sha256:0123", "64 hexadecimal digits"),
            ("--adapter", "folder", "NAME=DIR"),
            ("--adapter", "a b=folder", "letters, digits"),
            ("--host", "localhost", "--host"),
        ] {
            let error = serve(&[flag, value]).expect_err(value);
            assert!(error.contains(remedy) && error.contains(flag), "{flag} {value}: {error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn the_promise_of_equal_answers_chooses_the_cpu() {
        assert_eq!(serve(&["--deterministic"]).expect("parses").device(), DeviceChoice::Cpu);
        assert_eq!(serve(&[]).expect("parses").device(), DeviceChoice::Auto);
        assert!(serve(&["--deterministic", "--device", "cuda"]).is_err());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_this_binary_was_not_built_for_is_refused() {
        assert!(serve(&["--device", "cuda"]).expect_err("no CUDA").contains("--features cuda"));
        assert_eq!(serve(&["--device", "cpu"]).expect("parses").device, DeviceChoice::Cpu);
        assert_eq!(serve(&[]).expect("parses").device, DeviceChoice::Auto);
    }

    #[test]
    fn flags_that_contradict_each_other_are_refused() {
        assert!(serve(&["--port", "9", "--http-port", "9"]).expect_err("same").contains("choose two ports"));
        let error = serve(&["--max-num-seqs", "64", "--max-num-batched-tokens", "8"]).expect_err("too few");
        assert!(error.contains("raise the first or lower the second"), "{error}");
        assert_eq!(serve(&["--max-num-seqs", "4096"]).expect("parses").batched_tokens(), 4096);
    }
}
