//! The command line. Everything is checked before anything starts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clap::{Args, Parser, Subcommand};
use ernie_proto::contract::HTTP_PORT;

use crate::autoscale::Fetch;
use crate::desired::{Defaults, Release};
use crate::leader::Election;
use crate::observe::Scope;
use crate::run::Config;
use crate::simulate::Simulate;
use crate::telemetry::LogFormat;

/// Kubernetes operator that serves ERNIE 4.5 models.
#[derive(Debug, Parser)]
#[command(name = "ernie-operator", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch ErnieModels and run workers for them.
    Run(Box<Run>),
    /// Print the CustomResourceDefinition as YAML, for `kubectl apply --server-side -f -`.
    Crd,
    /// Show what the autoscaler, or a rule of somebody else, makes of a scenario or a trace.
    Simulate(Box<Simulate>),
}

/// Flags of `run`. The cluster is the one of KUBECONFIG, or the one the process runs in.
#[derive(Args, Debug)]
pub struct Run {
    /// Image of the worker for processors.
    #[arg(long, value_name = "IMAGE", env = "ERNIE_WORKER_IMAGE", value_parser = image)]
    pub worker_image: String,
    /// Image of the worker for NVIDIA GPUs. Without it, models that ask for a GPU report NoDeviceImage.
    #[arg(long, value_name = "IMAGE", env = "ERNIE_WORKER_IMAGE_CUDA", value_parser = image)]
    pub worker_image_cuda: Option<String>,
    /// Version of these images: new models are pinned to it.
    #[arg(long, value_name = "VERSION", env = "ERNIE_WORKER_VERSION", default_value = env!("CARGO_PKG_VERSION"),
        value_parser = version)]
    pub worker_version: String,
    /// Namespaces whose models are served, repeated or with commas; all of them by default.
    #[arg(long, visible_alias = "namespace", value_name = "NAMESPACE", env = "ERNIE_WATCH_NAMESPACES", value_delimiter = ',',
        value_parser = label)]
    pub watch_namespaces: Vec<String>,
    /// Namespace of the Lease by which several operators agree on one that writes; by default the pod's own.
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE", value_parser = label)]
    pub lease_namespace: Option<String>,
    /// Name of that Lease.
    #[arg(long, value_name = "NAME", env = "ERNIE_LEASE_NAME", default_value = "ernie-operator", value_parser = label)]
    pub lease_name: String,
    /// This process's name on the Lease; by default the pod's name, or the process id outside of a cluster.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub identity: Option<String>,
    /// Write without a Lease: for a process that has no rival.
    #[arg(long, env = "ERNIE_NO_LEADER_ELECTION")]
    pub no_leader_election: bool,
    /// Models that are worked on at the same time.
    #[arg(long, value_name = "N", env = "ERNIE_CONCURRENCY", default_value_t = 16,
        value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,
    /// GPUs that autoscaling may give to the workers of all models together; what is free goes first to those that have the
    /// fewest. Without it, as many as are wanted.
    #[arg(long, value_name = "N", env = "ERNIE_GPU_BUDGET")]
    pub gpu_budget: Option<u64>,
    /// Address for probes and metrics.
    #[arg(long, value_name = "IP", env = "ERNIE_HTTP_HOST", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub http_host: IpAddr,
    /// Port for probes and metrics: /livez, /readyz, /metrics.
    #[arg(long, value_name = "PORT", env = "ERNIE_HTTP_PORT", default_value_t = 8080)]
    pub http_port: u16,
    /// Least severe log lines: error, warn, info, debug or trace; or module=level pairs with commas.
    #[arg(long, value_name = "LEVEL", env = "ERNIE_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// How log lines are written.
    #[arg(long, value_enum, env = "ERNIE_LOG_FORMAT", default_value_t)]
    pub log_format: LogFormat,
}

impl Run {
    /// What `run` needs to know. `own_namespace` is the one of the kubeconfig or of the pod.
    pub fn config(&self, own_namespace: &str) -> Config {
        let scope = match self.watch_namespaces.as_slice() {
            [] => Scope::Cluster,
            some => {
                let mut names = some.to_vec();
                names.sort();
                names.dedup();
                Scope::Namespaces(names)
            }
        };
        let election = (!self.no_leader_election).then(|| Election {
            namespace: self.lease_namespace.clone().unwrap_or_else(|| own_namespace.to_owned()),
            name: self.lease_name.clone(),
            identity: self.identity.clone().unwrap_or_else(|| format!("ernie-operator-{}", std::process::id())),
        });
        Config {
            defaults: Defaults {
                release: Release {
                    version: self.worker_version.clone(),
                    image: self.worker_image.clone(),
                    image_cuda: self.worker_image_cuda.clone(),
                },
            },
            scope,
            election,
            http: SocketAddr::new(self.http_host, self.http_port),
            concurrency: self.concurrency,
            fetch: Fetch::http(HTTP_PORT),
            gpu_budget: self.gpu_budget,
        }
    }
}

fn image(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/@".contains(c);
    if text.is_empty() || text.len() > 1024 || !text.chars().all(plain) || text.contains("//") {
        return Err("not an image reference: write HOST/REPOSITORY:TAG or HOST/REPOSITORY@sha256:DIGEST".to_owned());
    }
    Ok(text.to_owned())
}

fn version(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+".contains(c);
    if text.is_empty() || text.len() > 64 || !text.chars().all(plain) {
        return Err("not a version: up to 64 letters, digits, '.', '-', '_' and '+'".to_owned());
    }
    Ok(text.to_owned())
}

/// A namespace or an object name made of one label.
fn label(text: &str) -> Result<String, String> {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |c: char| inside(c) && c != '-';
    if text.len() > 63 || !text.starts_with(edge) || !text.ends_with(edge) || !text.chars().all(inside) {
        return Err("not a name: up to 63 characters of a-z, 0-9 and '-', no '-' at the ends".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(flags: &[&str]) -> Result<Box<Run>, clap::Error> {
        let cli =
            Cli::try_parse_from(["ernie-operator", "run", "--worker-image=example/worker:1"].iter().chain(flags))?;
        match cli.command {
            Command::Run(run) => Ok(run),
            Command::Crd | Command::Simulate(_) => unreachable!("run was asked for"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn namespaces_come_repeated_or_with_commas_and_all_by_default() {
        let scope = |flags: &[&str]| run(flags).expect("parses").config("own").scope;
        assert_eq!(scope(&[]), Scope::Cluster);
        let both = Scope::Namespaces(vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(scope(&["--watch-namespaces=b,a"]), both);
        assert_eq!(scope(&["--namespace=a", "--namespace=b", "--namespace=a"]), both);
    }

    #[test]
    fn the_lease_is_in_the_pods_namespace_unless_told_otherwise() {
        let election = |flags: &[&str]| run(flags).expect("parses").config("own").election;
        assert_eq!(election(&[]).expect("elects").namespace, "own");
        assert_eq!(election(&["--lease-namespace=other"]).expect("elects").namespace, "other");
        assert!(election(&["--no-leader-election"]).is_none());
    }

    #[test]
    fn nonsense_is_refused_with_the_flag_and_the_form() {
        for (flag, hint) in [
            ("--worker-image-cuda=a b", "HOST/REPOSITORY:TAG"),
            ("--worker-version=", "not a version"),
            ("--watch-namespaces=A", "a-z, 0-9"),
            ("--concurrency=0", "1..=256"),
            ("--http-port=70000", "70000"),
            ("--log-format=xml", "json"),
        ] {
            let error = run(&[flag]).expect_err(flag).to_string();
            let name = flag.split('=').next().expect("a flag");
            assert!(error.contains(hint) && error.contains(name), "{flag}: {error}");
        }
    }
}
