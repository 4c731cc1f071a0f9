//! Making a cluster: the box, then the components in it in an order in which none has to wait long for another.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{LocalCluster, Record};
use crate::components::Components;
use crate::control::{self, ComponentStatus, Request};
use crate::health::{self, Health};
use crate::plan::{Component, Plan};
use crate::progress::say;
use crate::{host, pki, sandbox, wait};

/// Longest that one step of bringing a cluster up may take on a busy machine.
const STEP_DEADLINE: Duration = Duration::from_secs(90);
/// So many ends by itself show that a component cannot run.
const CRASHES: u32 = 3;

impl LocalCluster {
    /// Makes the cluster where nothing of it is.
    pub(super) async fn make(&self, components: &Components, program: &Path) -> Result<()> {
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
