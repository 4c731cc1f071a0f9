//! The operator's binary: parse, log, connect, run, stop.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use ernie_operator::cli::{Cli, Command, Run};
use ernie_operator::{api, run, simulate, telemetry};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Crd => print(&api::crd_yaml()),
        Command::Run(flags) => start(&flags),
        Command::Simulate(flags) => simulate::run(&flags).and_then(|text| print(&text)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if tracing::dispatcher::has_been_set() {
                error!("{error:#}");
            } else {
                eprintln!("ernie-operator: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Prints to standard output; a reader that has seen enough is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to standard output"),
    }
}

fn start(flags: &Run) -> anyhow::Result<()> {
    telemetry::start(flags.log_format, &flags.log_level)?;
    // A few threads are plenty, and each costs memory.
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(connect_and_run(flags))
}

async fn connect_and_run(flags: &Run) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: stopping"),
            _ = interrupt.recv() => info!("SIGINT: stopping"),
        }
        told.cancel();
    });

    let mut kube =
        kube::Config::infer().await.context("no cluster: set KUBECONFIG, or run in a pod with an API token")?;
    // Retries are ours: a repeated write would be reported as a conflict with ourselves.
    kube.default_retry = false;
    kube.connect_timeout = Some(Duration::from_secs(5));
    let config = flags.config(&kube.default_namespace);
    info!(version = env!("CARGO_PKG_VERSION"), api_server = %kube.cluster_url, ?config, "ernie-operator");
    let client = kube::Client::try_from(kube).context("cannot talk to the cluster")?;
    run::run(client, config, stop).await?;
    Ok(())
}
