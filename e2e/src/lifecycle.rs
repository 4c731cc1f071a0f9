//! Bringing a local cluster up and down, and saying how it is.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::cache::{self, ClusterName, ClusterPaths};
use crate::components::{self, Components};
use crate::control::{self, ComponentStatus, Ending, Request, State};
use crate::health::{self, Health};
use crate::plan::{Component, Plan};
use crate::progress::say;
use crate::{command, host, pki, sandbox, wait};

/// Longest that one step of bringing a cluster up may take on a busy machine.
const STEP_DEADLINE: Duration = Duration::from_secs(90);
/// A cluster that exists and is not healthy gets this long to become so before it is made anew.
const HEAL_DEADLINE: Duration = Duration::from_secs(20);
/// So many ends by itself show that a component cannot run.
const CRASHES: u32 = 3;
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

    async fn make(&self, components: &Components, program: &Path) -> Result<()> {
        let begin = Instant::now();
        let plan = self.launch(components, program).await?;
        self.start_components(&plan, components).await?;
        let complete = self.paths.complete();
        fs::write(&complete, "").with_context(|| format!("writing {}", complete.display()))?;
        say(&format!(
            "cluster {} is ready at {} after {:.1} s",
            self.name,
            plan.server(),
            begin.elapsed().as_secs_f32()
        ));
        Ok(())
    }

    /// Everything up to an empty box with a network.
    async fn launch(&self, components: &Components, program: &Path) -> Result<Plan> {
        let state = self.paths.state();
        for folder in ["config/cni", "etcd", "kubelet", "log", "run"] {
            let folder = state.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let _network = self.network_lock().await?;
        host::prepare_settings(&self.root)?;
        let plan = Plan {
            name: self.name.as_str().to_owned(),
            subnet: host::free_subnet()?,
            cgroup: format!("/{}", self.paths.kernel_name()),
            components: components.key().to_owned(),
        };
        say(&format!("starting cluster {} on network {}", self.name, plan.subnet));
        pki::write(&plan, state)?;
        for (path, content) in plan.files() {
            let path = state.join(path);
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        }
        let record = Record { fingerprint: plan.fingerprint(), plan };
        let text = serde_json::to_string_pretty(&record).context("encoding the plan")?;
        fs::write(self.paths.record(), text).with_context(|| format!("writing {}", self.paths.record().display()))?;
        sandbox::make_cgroups(&self.paths.kernel_name())?;
        sandbox::launch(&self.paths, components, program).map_err(|error| self.with_log(error, sandbox::INIT))?;
        sandbox::attach(&self.paths, record.plan.subnet)?;
        Ok(record.plan)
    }

    async fn start_components(&self, plan: &Plan, components: &Components) -> Result<()> {
        let start = |component: Component| -> Result<()> {
            control::ask(&self.paths.control_socket(), &Request::Start { component, extra_args: Vec::new() })
                .with_context(|| format!("starting {component}"))?;
            Ok(())
        };
        start(Component::Etcd)?;
        start(Component::Containerd)?;
        sandbox::wait_for_port(&self.paths, "etcd", SocketAddr::from(([127, 0, 0, 1], 2379)), STEP_DEADLINE)
            .map_err(|error| self.explain(error, &[Component::Etcd]))?;
        start(Component::KubeApiserver)?;
        // While the API server gets ready.
        self.load_own_images(components).map_err(|error| self.explain(error, &[Component::Containerd]))?;

        let health = self.health(plan).await?;
        self.attend(health.wait_for_api(STEP_DEADLINE), &[Component::KubeApiserver, Component::Etcd]).await?;
        for component in [Component::KubeControllerManager, Component::KubeScheduler, Component::Kubelet] {
            start(component)?;
        }
        health::grant(health.client()).await.context("granting rights to the DNS server and to logs and exec")?;
        start(Component::KubeProxy)?;
        start(Component::Coredns)?;
        self.wait_for_rest(&health).await
    }

    fn load_own_images(&self, components: &Components) -> Result<()> {
        let socket = self.paths.state().join("run/containerd.sock");
        wait::until_blocking("containerd to listen", STEP_DEADLINE, || {
            Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
        })?;
        let own = ["pause.tar", "toolbox.tar"].map(|file| components.folder().join("images").join(file));
        self.load(&own)
    }

    async fn wait_for_rest(&self, health: &Health) -> Result<()> {
        let node = [Component::Kubelet, Component::Containerd, Component::KubeControllerManager];
        self.attend(health.wait_for_node(STEP_DEADLINE), &node).await?;
        self.attend(health.wait_for_service_account(STEP_DEADLINE), &[Component::KubeControllerManager]).await?;
        self.attend(health.wait_for_dns(STEP_DEADLINE), &[Component::Coredns]).await?;
        self.attend(health.wait_for_proxy(STEP_DEADLINE), &[Component::KubeProxy]).await
    }

    /// Waits for `condition`, but no longer than until one of `suspects` has shown that it cannot run. A failure
    /// comes with the end of the right log.
    async fn attend(&self, condition: impl Future<Output = Result<()>>, suspects: &[Component]) -> Result<()> {
        let socket = self.paths.control_socket();
        let crash = wait::until("a crash", 2 * STEP_DEADLINE, async || {
            let states = control::status(&socket)?;
            let crashing =
                |status: &&ComponentStatus| status.restarts >= CRASHES && suspects.contains(&status.component);
            Ok(states.iter().find(crashing).map(|status| status.component))
        });
        let ended = tokio::select! {
            ended = condition => ended,
            crashed = crash => crashed.and_then(|component| Err(anyhow!("{component} ended {CRASHES} times"))),
        };
        ended.map_err(|error| self.explain(error, suspects))
    }

    /// Adds the end of the right log: of the first of `suspects` that ended by itself, else of the first.
    fn explain(&self, error: anyhow::Error, suspects: &[Component]) -> anyhow::Error {
        let states = control::status(&self.paths.control_socket()).unwrap_or_default();
        let ended = states.iter().find(|status| suspects.contains(&status.component) && status.last_end.is_some());
        let Some(suspect) = ended.map(|status| status.component).or(suspects.first().copied()) else {
            return error;
        };
        let error = match ended.and_then(|status| status.last_end.clone()) {
            Some(end) => error.context(format!("{suspect} ended by itself: {end}")),
            None => error,
        };
        self.with_log(error, suspect.name())
    }

    fn with_log(&self, error: anyhow::Error, name: &str) -> anyhow::Error {
        let path = self.paths.log(name);
        let tail = tail(&path, 25);
        error.context(format!("the end of {}:\n{tail}\n", path.display()))
    }
}

/// The last `lines` lines of a file; empty where it cannot be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
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
