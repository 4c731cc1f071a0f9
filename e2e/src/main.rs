//! `cluster`: a real Kubernetes on this machine, with no container engine and no registry.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use ernie_e2e::cache::ClusterName;
use ernie_e2e::lifecycle::{LocalCluster, Outcome, Status, cluster_program};

/// Exit status of `cluster status` when the cluster is not up, or is not healthy.
const NOT_HEALTHY: u8 = 3;

/// A real Kubernetes on this machine: API server, scheduler, kubelet, containerd, Service addresses and DNS.
#[derive(Parser)]
#[command(name = "cluster", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Named {
    /// Name of the cluster; several with different names run side by side.
    #[arg(long, env = "ERNIE_CLUSTER", default_value = "ernie")]
    name: ClusterName,
}

#[derive(Subcommand)]
enum Command {
    /// Bring the cluster up and wait until pods can run; builds Kubernetes first if it is not in the cache.
    Up {
        #[command(flatten)]
        named: Named,
    },
    /// End the cluster and remove all that it left: processes, mounts, links, cgroups, files.
    Down {
        #[command(flatten)]
        named: Named,
    },
    /// Say how the cluster is; exit status 3 unless it is up and healthy.
    Status {
        #[command(flatten)]
        named: Named,
    },
    /// Load container images into the cluster.
    Load {
        #[command(flatten)]
        named: Named,
        /// Docker-archives, as `buildah push IMAGE docker-archive:X.tar:IMAGE` or `docker save` writes them.
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Print the administrator's kubeconfig.
    Kubeconfig {
        #[command(flatten)]
        named: Named,
        /// Print the path of the file instead.
        #[arg(long)]
        path: bool,
    },
    /// Build Kubernetes if it is not in the cache, and print where it is.
    Build {
        #[command(flatten)]
        named: Named,
    },
    /// Be the first process of a cluster's namespaces.
    #[command(hide = true)]
    Init {
        #[arg(long)]
        state: PathBuf,
        #[arg(long)]
        components: PathBuf,
    },
}

fn main() -> ExitCode {
    start().unwrap_or_else(|error| {
        // Only what went wrong and why: a backtrace of this program helps nobody who brings a cluster up.
        eprintln!("cluster: {error:#}");
        ExitCode::FAILURE
    })
}

fn start() -> Result<ExitCode> {
    let command = match Cli::parse().command {
        // Before any runtime: it supervises with plain threads, as it must reap every child itself.
        Command::Init { state, components } => {
            ernie_e2e::init::main(&state, &components)?;
            return Ok(ExitCode::SUCCESS);
        }
        command => command,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(run(command))
}

async fn run(command: Command) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match command {
        Command::Up { named } => {
            let cluster = LocalCluster::new(named.name)?;
            let outcome = cluster.up(&cluster_program()?).await?;
            let name = cluster.name();
            match outcome {
                Outcome::AlreadyUp => writeln!(out, "cluster {name} is up and healthy")?,
                Outcome::Healed => writeln!(out, "cluster {name} is healthy again")?,
                Outcome::Made => writeln!(out, "cluster {name} is up")?,
            }
            writeln!(out, "export KUBECONFIG={}", cluster.paths().kubeconfig().display())?;
        }
        Command::Down { named } => {
            let cluster = LocalCluster::new(named.name)?;
            let there = cluster.down().await?;
            writeln!(out, "cluster {} {}", cluster.name(), if there { "is down" } else { "was not up" })?;
        }
        Command::Status { named } => return status(&LocalCluster::new(named.name)?, &mut out).await,
        Command::Load { named, archives } => {
            LocalCluster::new(named.name)?.load(&archives)?;
        }
        Command::Kubeconfig { named, path } => {
            let file = LocalCluster::new(named.name)?.paths().kubeconfig();
            let content = std::fs::read_to_string(&file)
                .with_context(|| format!("reading {}: is the cluster up?", file.display()))?;
            if path {
                writeln!(out, "{}", file.display())?;
            } else {
                write!(out, "{content}")?;
            }
        }
        Command::Build { named } => {
            let components = LocalCluster::new(named.name)?.components().await?;
            writeln!(out, "{}", components.program("").display())?;
        }
        Command::Init { .. } => unreachable!("handled before the runtime was started"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(cluster: &LocalCluster, out: &mut impl Write) -> Result<ExitCode> {
    let name = cluster.name();
    let Some(status) = cluster.status().await? else {
        writeln!(out, "cluster {name} is not up")?;
        return Ok(NOT_HEALTHY.into());
    };
    let Status { server, components, complaint } = status;
    writeln!(out, "cluster {name} at {server}: {}", complaint.as_deref().unwrap_or("healthy"))?;
    for component in components {
        write!(out, "  {:<24} {}", component.component.name(), component.state)?;
        if component.restarts > 0 {
            write!(out, ", restarted {} times, last {}", component.restarts, component.last_end.unwrap_or_default())?;
        }
        writeln!(out)?;
    }
    Ok(if complaint.is_none() { ExitCode::SUCCESS } else { NOT_HEALTHY.into() })
}
