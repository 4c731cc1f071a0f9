//! Bringing a local cluster up and down, and saying how it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

mod start;

use crate::cache::{self, ClusterName, ClusterPaths};
use crate::components::{self, Components};
use crate::control::{self, ComponentStatus, Ending, Request, State};
use crate::health::Health;
use crate::plan::Plan;
use crate::progress::say;
use crate::{command, host, sandbox, wait};

/// A cluster that exists and is not healthy gets this long to become so before it is made anew.
const HEAL_DEADLINE: Duration = Duration::from_secs(20);
/// Another process may be bringing the same cluster up.
const LOCK_DEADLINE: Duration = Duration::from_secs(600);

/// What is written to `cluster.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    plan: Plan,
    fingerprint: String,
}

/// A local cluster that may or may not be up.
#[derive(Debug, Clone)]
pub struct LocalCluster {
    name: ClusterName,
    root: PathBuf,
    paths: ClusterPaths,
}

/// What [`LocalCluster::up`] found or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was up and healthy already.
    AlreadyUp,
    /// It was up, and what was stopped or frozen in it runs again.
    Healed,
    /// It was made.
    Made,
}

/// How a cluster is.
#[derive(Debug)]
pub struct Status {
    /// The API server's URL.
    pub server: String,
    /// Each component; empty when the cluster is not up.
    pub components: Vec<ComponentStatus>,
    /// What is wrong, if anything.
    pub complaint: Option<String>,
}

impl LocalCluster {
    /// The cluster `name` in the user's cache.
    pub fn new(name: ClusterName) -> Result<Self> {
        let root = cache::root()?;
        let paths = ClusterPaths::new(&root, &name)?;
        Ok(Self { name, root, paths })
    }

    /// The cluster's name.
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// Where its files are.
    pub fn paths(&self) -> &ClusterPaths {
        &self.paths
    }

    /// The compiled components; built first where they are missing.
    pub async fn components(&self) -> Result<Components> {
        host::require_prerequisites()?;
        components::ensure(&self.root).await
    }

    /// Brings the cluster up and waits until pods can run, Services answer and names resolve.
    ///
    /// A healthy one is left as it is. One with stopped or frozen components is healed. What a killed run left, or what
    /// another version of this code made, is removed and made anew. `program` is the `cluster` executable.
    pub async fn up(&self, program: &Path) -> Result<Outcome> {
        let components = self.components().await?;
        let _lock = self.lock().await?;
        if let Some(plan) = self.current(&components) {
            if self.healthy(&plan, Duration::from_secs(3)).await.is_ok() && !self.has_unusual_arguments() {
                return Ok(Outcome::AlreadyUp);
            }
            say(&format!("cluster {} is up but not healthy: healing it", self.name));
            match self.heal(&plan).await {
                Ok(()) => return Ok(Outcome::Healed),
                Err(error) => say(&format!("it does not heal ({error:#}); making it anew")),
            }
        }
        sandbox::destroy(&self.paths).context("removing what is left of an earlier run")?;
        let made = self.make(&components, program).await;
        if made.is_err() {
            // The files stay for whoever looks into the failure; the next `up` or `down` removes them.
            sandbox::end_processes(&self.paths)?;
        }
        made.map(|()| Outcome::Made)
    }

    /// Ends the cluster and removes everything that it left anywhere; whether there was anything.
    pub async fn down(&self) -> Result<bool> {
        let _lock = self.lock().await?;
        let there = self.paths.state().exists() || sandbox::lives(&self.paths);
        sandbox::destroy(&self.paths)?;
        let _network = self.network_lock().await?;
        if self.is_last() {
            host::restore_settings(&self.root)?;
        }
        Ok(there)
    }

    /// This host's id of the first process of the cluster's namespaces; `None` when the cluster is not up.
    pub fn first_process(&self) -> Option<u32> {
        sandbox::first_process(&self.paths).and_then(|pid| u32::try_from(pid.as_raw_pid()).ok())
    }

    /// How the cluster is; `None` when it is not up.
    pub async fn status(&self) -> Result<Option<Status>> {
        if !sandbox::lives(&self.paths) {
            return Ok(None);
        }
        let Some(record) = self.record() else {
            return Ok(None);
        };
        let components = control::status(&self.paths.control_socket()).unwrap_or_default();
        let complaint =
            self.healthy(&record.plan, Duration::from_secs(3)).await.err().map(|error| format!("{error:#}"));
        Ok(Some(Status { server: record.plan.server(), components, complaint }))
    }

    /// Loads images from docker-archives into the running cluster.
    pub fn load(&self, archives: &[PathBuf]) -> Result<()> {
        for archive in archives {
            let file = fs::File::open(archive).with_context(|| format!("opening {}", archive.display()))?;
            let mut ctr = self.ctr()?;
            ctr.args(["images", "import", "--all-platforms", "-"]).stdin(file);
            command::run(&mut ctr)
                .with_context(|| format!("loading {} into cluster {}", archive.display(), self.name))?;
        }
        Ok(())
    }

    /// Runs in the box, so that it needs neither this host's paths nor a short socket path.
    pub(crate) fn ctr(&self) -> Result<std::process::Command> {
        let mut ctr = sandbox::enter(&self.paths, "/run/components/bin/ctr")?;
        ctr.args(["--address", "/run/cluster/run/containerd.sock", "--namespace", "k8s.io"]);
        Ok(ctr)
    }

    async fn lock(&self) -> Result<fs::File> {
        cache::lock(&self.root, &format!("cluster-{}", self.name), LOCK_DEADLINE).await
    }

    /// Guards the choice of a subnet and the host's settings, which all clusters share.
    async fn network_lock(&self) -> Result<fs::File> {
        cache::lock(&self.root, "network", LOCK_DEADLINE).await
    }

    /// Whether no other cluster of this cache has any state.
    fn is_last(&self) -> bool {
        fs::read_dir(self.root.join("clusters")).map_or(true, |mut entries| entries.next().is_none())
    }

    fn record(&self) -> Option<Record> {
        serde_json::from_str(&fs::read_to_string(self.paths.record()).ok()?).ok()
    }

    /// The plan of the running cluster, if it is the one that this code would make now.
    fn current(&self, components: &Components) -> Option<Plan> {
        let record = self.record()?;
        let plan = Plan { components: components.key().to_owned(), ..record.plan };
        let same = plan.fingerprint() == record.fingerprint;
        if !self.paths.complete().exists() || sandbox::first_process(&self.paths).is_none() {
            say(&format!("an earlier run of cluster {} was cut off; removing what it left", self.name));
            return None;
        }
        if !same {
            say(&format!("cluster {} was made by another version; making it anew", self.name));
        }
        same.then_some(plan)
    }

    async fn health(&self, plan: &Plan) -> Result<Health> {
        Health::new(&self.paths, plan).await
    }

    /// An error that says what is wrong.
    async fn healthy(&self, plan: &Plan, deadline: Duration) -> Result<()> {
        let check = async {
            for status in control::status(&self.paths.control_socket())? {
                if status.state != State::Running {
                    bail!("{} is {}", status.component, status.state);
                }
            }
            self.health(plan).await?.all().await
        };
        tokio::time::timeout(deadline, check).await.unwrap_or_else(|_| Err(anyhow!("the API server does not answer")))
    }

    /// Whether a test that was killed left a component running with arguments of its own.
    fn has_unusual_arguments(&self) -> bool {
        let states = control::status(&self.paths.control_socket()).unwrap_or_default();
        states.iter().any(|status| !status.extra_args.is_empty())
    }

    async fn heal(&self, plan: &Plan) -> Result<()> {
        self.mend()?;
        wait::until("the cluster to be healthy", HEAL_DEADLINE, async || {
            Ok(self.healthy(plan, Duration::from_secs(3)).await.ok())
        })
        .await
    }

    /// Starts what is down, lets go on what is frozen, and restarts what runs with unusual arguments.
    pub(crate) fn mend(&self) -> Result<()> {
        let socket = self.paths.control_socket();
        for status in control::status(&socket)? {
            let component = status.component;
            let start = Request::Start { component, extra_args: Vec::new() };
            if status.state == State::Paused {
                control::ask(&socket, &Request::Resume { component })?;
            }
            if !status.extra_args.is_empty() {
                control::ask(&socket, &Request::Stop { component, by: Ending::Asked })?;
            }
            if status.state == State::Down || !status.extra_args.is_empty() {
                control::ask(&socket, &start)?;
            }
        }
        Ok(())
    }

    /// Waits until every component runs and the cluster can be used.
    pub(crate) async fn wait_until_healthy(&self, deadline: Duration) -> Result<()> {
        let plan = self.record().context("the cluster is not up")?.plan;
        let mut last = None;
        let waited = wait::until("the cluster to be healthy", deadline, async || {
            match self.healthy(&plan, Duration::from_secs(3)).await {
                Ok(()) => Ok(Some(())),
                Err(error) => {
                    last = Some(error);
                    Ok(None)
                }
            }
        });
        waited.await.map_err(|error| match last {
            Some(last) => last.context(error),
            None => error,
        })
    }

    /// Says that somebody uses the cluster: many at once, or one alone, until the returned file is dropped.
    pub(crate) async fn lock_for_use(&self, alone: bool, deadline: Duration) -> Result<fs::File> {
        let name = format!("use-{}", self.name);
        if alone {
            cache::lock(&self.root, &name, deadline).await
        } else {
            cache::lock_shared(&self.root, &name, deadline).await
        }
    }
}

/// The `cluster` executable that belongs to the running program: itself, or for a test the one cargo built beside it.
pub fn cluster_program() -> Result<PathBuf> {
    let current = std::env::current_exe().context("finding the running program")?;
    if current.file_name().is_some_and(|name| name == "cluster") {
        return Ok(current);
    }
    sibling_program("cluster")
}

/// A program of this crate, beside the running program or test.
pub(crate) fn sibling_program(name: &str) -> Result<PathBuf> {
    let current = std::env::current_exe().context("finding the running program")?;
    let beside = current.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    beside.with_context(|| {
        format!("no `{name}` program beside {}; build it: cargo build --release -p ernie-e2e", current.display())
    })
}

impl Status {
    /// Whether everything is as it should be.
    pub fn is_healthy(&self) -> bool {
        self.complaint.is_none()
    }
}
