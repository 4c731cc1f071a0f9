//! `ernie-worker bench`: how fast this machine serves a model, or how fast a running server answers.

pub mod figures;
mod local;
pub mod memory;
mod remote;
mod report;
pub mod synthetic;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ernie_kernels::Level;

use crate::cli::{duration, positive};
use crate::model::{DtypeChoice, Quantization};

use synthetic::Shape;

/// Flags of `bench`.
#[derive(Clone, Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true).args(["model", "synthetic", "grpc"]))]
#[command(group = clap::ArgGroup::new("arrivals").args(["rate", "trace"]).requires("grpc"))]
pub struct BenchArgs {
    /// Folder of the model as the hub lays it out.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Instead: random weights in a published shape, ernie-4.5-0.3b or ernie-4.5-21b-a3b, with :layers=N behind it for
    /// fewer layers. Written to the folder for temporary files, and removed.
    #[arg(long, value_name = "SHAPE")]
    pub synthetic: Option<Shape>,
    /// Instead: a running server.
    #[arg(long, value_name = "HOST:PORT", requires = "arrivals")]
    pub grpc: Option<String>,
    /// Threads that compute. Default: what the CPU quota and affinity allow.
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "grpc")]
    pub threads: Option<usize>,
    /// Tokens of each prompt: random ids, new in each repetition. Several, with commas between them, are measured in turn.
    #[arg(long, value_name = "P", default_value = "512", value_delimiter = ',', value_parser = positive)]
    pub prompt: Vec<usize>,
    /// Tokens of each answer; end of sequence is ignored.
    #[arg(long, value_name = "G", default_value_t = 128, value_parser = positive)]
    pub generate: usize,
    /// Answers asked for at once. Several, with commas between them, are measured in turn.
    #[arg(long, value_name = "C", default_value = "1", value_delimiter = ',', value_parser = concurrency, conflicts_with = "grpc")]
    pub concurrency: Vec<usize>,
    /// Answers that run side by side; the others wait. Default: all.
    #[arg(long, value_name = "N", value_parser = concurrency, conflicts_with = "grpc")]
    pub max_num_seqs: Option<usize>,
    /// Tokens that lie before each prompt and were read earlier.
    #[arg(long, value_name = "D", default_value_t = 0, conflicts_with = "grpc")]
    pub depth: usize,
    /// Measure so often; rates are the median.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = positive, conflicts_with = "grpc")]
    pub repetitions: usize,
    /// The same seed gives the same prompts, draws and arrivals.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Number format of the weights; `auto` is the checkpoint's own.
    #[arg(long, value_enum, default_value_t, conflicts_with = "grpc")]
    pub dtype: DtypeChoice,
    /// Quantise the linear maps while they are loaded.
    #[arg(long, value_enum, default_value_t, conflicts_with = "grpc")]
    pub quantization: Quantization,
    /// Instruction level of the kernels: scalar, avx2, avx512 or amx. Default: the best that this CPU has.
    #[arg(long, value_name = "LEVEL", conflicts_with = "grpc")]
    pub level: Option<Level>,
    /// Requests per second, at random moments (a Poisson process), whether the server keeps up or not.
    #[arg(long, value_name = "R", value_parser = rate)]
    pub rate: Option<f64>,
    /// Instead: requests as in a published trace, Azure's CSV or Mooncake's JSON lines.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// For so long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration, conflicts_with_all = ["model", "synthetic"])]
    pub duration: Duration,
    /// An answer is good when its first token came within this time …
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with_all = ["model", "synthetic"])]
    pub slo_ttft: Option<Duration>,
    /// … and the later ones came, on average, so soon after one another.
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with_all = ["model", "synthetic"])]
    pub slo_itl: Option<Duration>,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What of [`BenchArgs`] is measured in turn.
#[derive(Clone, Copy, Debug)]
struct Point {
    /// Tokens of each prompt.
    prompt: usize,
    /// Answers asked for at once.
    concurrency: usize,
}

impl BenchArgs {
    fn points(&self) -> impl Iterator<Item = Point> {
        let with = |&concurrency| self.prompt.iter().map(move |&prompt| Point { prompt, concurrency });
        self.concurrency.iter().flat_map(with)
    }
}

fn concurrency(text: &str) -> Result<usize, String> {
    match positive(text)? {
        number @ ..=4096 => Ok(number),
        _ => Err("must be at most 4096".to_owned()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|rate| (1e-3..=1e5).contains(rate));
    number.ok_or_else(|| "must be a number of requests per second, from 0.001 to 100000".to_owned())
}

/// Runs the command and prints its figures.
///
/// # Errors
/// A sentence for the terminal.
pub fn run(args: &BenchArgs) -> Result<(), String> {
    let tables = match (&args.grpc, &args.synthetic, &args.model) {
        (Some(server), _, _) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| format!("no thread for the streams: {error}"))?;
            vec![report::of_server(args, runtime.block_on(remote::run(args, server))?)]
        }
        (None, Some(shape), _) => {
            let folder = tempfile::Builder::new().prefix("ernie-bench-").tempdir();
            let folder = folder.map_err(|error| format!("no folder for the weights: {error}"))?;
            eprintln!("writing random weights to {} …", folder.path().display());
            shape.write(folder.path()).map_err(|error| format!("{}: {error}", folder.path().display()))?;
            let figures = of_engine(args, folder.path())?;
            folder.close().map_err(|error| format!("the weights are still there: {error}"))?;
            figures
        }
        (None, None, Some(folder)) => of_engine(args, folder)?,
        (None, None, None) => return Err("give --model, --synthetic or --grpc".to_owned()),
    };
    report::print(&tables, args.json).map_err(|error| format!("cannot write the figures: {error}"))
}

/// The figures of each point. The model is loaded anew for each, so that none finds what another left.
fn of_engine(args: &BenchArgs, folder: &Path) -> Result<Vec<report::Figures>, String> {
    let mut all = Vec::new();
    for point in args.points() {
        let mut measured = local::run(args, point, folder)?;
        if !all.is_empty() {
            // It would count the points before.
            measured.start_to_first_token_seconds = None;
        }
        all.push(report::of_engine(args, point, &measured));
    }
    Ok(all)
}

/// Seconds since this process was started, where the system tells; to a hundredth of a second.
fn started_before() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in parentheses, may hold anything; the fields behind it are numbers. Start is the 22nd of all.
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    // Linux tells every process hundredths, whatever it counts in itself.
    Some(uptime - ticks / 100.0)
}
