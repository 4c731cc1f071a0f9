//! The binary: parse, run, and end with the exit code and the last words that say why.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
};

use ernie_proto::{
    contract::TERMINATION_LOG,
    failure::{Reason, TerminationMessage},
};
use ernie_worker::{
    ask::{self, AskError},
    bench::{self, BenchArgs},
    cli::{AskArgs, Cli, Command, DigestArgs, ServeArgs, VERSION},
    eval::{self, EvalArgs},
    model::{
        LoadError, LoadOptions,
        digest::{Manifest, Reading},
    },
    serve::Worker,
    server::connection::ConnectionLimits,
    shutdown, telemetry, termination,
};

fn main() -> ExitCode {
    let cli = match Cli::parse_line(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    match cli.command {
        Command::Serve(args) => serve(*args),
        Command::Eval(args) => evaluate(&args),
        Command::Bench(args) => measure(&args),
        Command::Ask(args) => ask(args),
        Command::Digest(args) => digest(&args),
        Command::Version => {
            println!("ernie-worker {VERSION}");
            ExitCode::SUCCESS
        }
    }
}

/// Prints help, or what is wrong with the command line; `serve` also leaves it in the termination log.
fn misused(error: &clap::Error) -> ExitCode {
    // A terminal that is gone cannot be told.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if std::env::args().nth(1).as_deref() == Some("serve") {
        let message = error.to_string();
        // What follows the first paragraph is advice for a terminal.
        let message = message.strip_prefix("error: ").unwrap_or(&message);
        let message = message.split("\n\n").next().unwrap_or(message).trim().to_owned();
        let message = TerminationMessage { reason: Reason::Usage, message, detail: serde_json::Value::Null };
        termination::write(termination_log().as_deref(), &message);
    }
    ExitCode::from(Reason::Usage.exit_code())
}

/// The termination log of a command line that could not be parsed.
fn termination_log() -> Option<PathBuf> {
    let arguments: Vec<String> = std::env::args().collect();
    let flag = arguments.iter().enumerate().find_map(|(index, argument)| {
        let rest = argument.strip_prefix("--termination-log")?;
        rest.strip_prefix('=').map(str::to_owned).or_else(|| arguments.get(index + 1).cloned())
    });
    let standard = || Path::new(TERMINATION_LOG).exists().then(|| TERMINATION_LOG.into());
    let variable = || std::env::var("ERNIE_TERMINATION_LOG").ok();
    flag.or_else(variable).filter(|path| !path.is_empty()).map(PathBuf::from).or_else(standard)
}

fn serve(args: ServeArgs) -> ExitCode {
    termination::install_panic_hook();
    let log = args.termination_log();
    let outcome = catch_unwind(AssertUnwindSafe(|| run(args))).unwrap_or_else(|_panic| Err(termination::of_panic()));
    let code = match outcome {
        Ok(()) => 0,
        Err(message) => {
            tracing::error!("{}: {}", message.reason.as_str(), message.message);
            termination::write(log.as_deref(), &message);
            message.reason.exit_code()
        }
    };
    // Threads that still read weights, or a connection that does not end, must not keep the process.
    std::process::exit(i32::from(code))
}

fn evaluate(args: &EvalArgs) -> ExitCode {
    match eval::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {}: {}", message.reason.as_str(), message.message);
            termination::write(termination_log().as_deref(), &message);
            ExitCode::from(message.reason.exit_code())
        }
    }
}

fn measure(args: &BenchArgs) -> ExitCode {
    match bench::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("error: {}", ask::printable(&sentence));
            ExitCode::FAILURE
        }
    }
}

fn digest(args: &DigestArgs) -> ExitCode {
    let how = Reading { threads: LoadOptions::default().threads, drop_pages: false, report: &|_| {} };
    match Manifest::of(&args.model, &how) {
        Ok(manifest) if args.files => print!("{manifest}"),
        Ok(manifest) => println!("{}", manifest.digest()),
        Err(error) => return failed(&error),
    }
    ExitCode::SUCCESS
}

fn failed(error: &LoadError) -> ExitCode {
    eprintln!("error: {}: {error}", error.reason().as_str());
    ExitCode::from(error.reason().exit_code())
}

fn run(args: ServeArgs) -> Result<(), TerminationMessage> {
    let because = |reason, message: String| TerminationMessage { reason, message, detail: serde_json::Value::Null };
    telemetry::start(args.log_format).map_err(|sentence| because(Reason::Usage, sentence))?;
    let runtime = runtime(threads()).map_err(|error| because(Reason::Internal, error.to_string()))?;
    let ended = runtime.block_on(async {
        let stops = shutdown::signals().map_err(|error| because(Reason::Internal, error.to_string()))?;
        Worker::bind(args, ConnectionLimits::default()).await?.run(stops).await
    });
    runtime.shutdown_background();
    ended.map(|_| ())
}

/// Threads for connections: few, because the cores belong to the engine.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8)
}

fn runtime(threads: usize) -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(16)
        .thread_name("ernie-io")
        .enable_all()
        .build()
}

fn ask(args: AskArgs) -> ExitCode {
    let runtime = match runtime(1) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(ask::run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the answer has had enough of it.
        Err(AskError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", ask::printable(&error.to_string()));
            ExitCode::from(if matches!(error, AskError::Usage(_)) { Reason::Usage.exit_code() } else { 1 })
        }
    }
}
