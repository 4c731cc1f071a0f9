//! The handle by which a test uses a cluster: local, or the user's own.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use crate::cache::ClusterName;
use crate::lifecycle::{LocalCluster, Outcome, cluster_program};
use crate::progress::say;
use crate::{command, components, health, images, wait};

mod audit;
mod faults;
mod namespace;
mod target;

pub use audit::{AuditEvent, AuditLog, Mark};
pub use faults::Faults;
pub use namespace::Namespace;
use target::Target;

/// Longest that a command of a client program may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// A test that breaks components may hold the cluster for this long.
const USE_DEADLINE: Duration = Duration::from_secs(600);

/// A cluster that answers, with the clients to use it.
///
/// While it lives, no test anywhere on this machine breaks components of the same local cluster (see
/// [`Cluster::connect_alone`]). A `Cluster` belongs to the async runtime in which it was made, so each test connects
/// for itself; with a running cluster that takes some 50 ms.
pub struct Cluster {
    client: Client,
    kubeconfig: Option<PathBuf>,
    local: Option<Local>,
}

struct Local {
    cluster: LocalCluster,
    programs: components::Components,
    alone: bool,
    /// Released last, when the handle goes.
    _use: std::fs::File,
}

impl Cluster {
    /// Connects to the cluster that the environment names, and brings a local one up if it is not.
    ///
    /// | `CLUSTER` | `KUBECONFIG` | gives |
    /// |---|---|---|
    /// | unset | unset | the local cluster `$ERNIE_CLUSTER`, by default `ernie` |
    /// | unset or `existing` | a local cluster's | that local cluster |
    /// | unset or `existing` | another | the user's own cluster |
    /// | `local` | another | the local cluster `$ERNIE_CLUSTER` |
    ///
    /// Namespaces that a killed test run left behind are deleted. An error is a failure of the test: nothing is skipped.
    pub async fn connect() -> Result<Self> {
        let cluster = match Target::from_environment()? {
            Target::Existing => Self::existing().await?,
            Target::Local(name) => Self::local(name, false).await?,
        };
        namespace::delete_abandoned(&cluster).await?;
        Ok(cluster)
    }

    /// As [`Cluster::connect`], after all others who use the cluster are done and before any other may: needed to
    /// break components. Holding another `Cluster` in the same test while calling this waits for ever.
    pub async fn connect_alone() -> Result<Self> {
        let cluster = match Target::from_environment()? {
            Target::Existing => Self::existing().await?,
            Target::Local(name) => Self::local(name, true).await?,
        };
        namespace::delete_abandoned(&cluster).await?;
        Ok(cluster)
    }

    /// Connects to the local cluster `name` whatever the environment says, and brings it up if it is not.
    pub async fn local(name: ClusterName, alone: bool) -> Result<Self> {
        let cluster = LocalCluster::new(name)?;
        let guard = cluster.lock_for_use(alone, USE_DEADLINE).await?;
        if cluster.up(&cluster_program()?).await? != Outcome::AlreadyUp {
            say(&format!("cluster {} stays up for the next tests; `cluster down` ends it", cluster.name()));
        }
        let programs = cluster.components().await?;
        let kubeconfig = cluster.paths().kubeconfig();
        let client = health::client(&kubeconfig).await?;
        Ok(Self { client, kubeconfig: Some(kubeconfig), local: Some(Local { cluster, programs, alone, _use: guard }) })
    }

    async fn existing() -> Result<Self> {
        let client = Client::try_default().await.context("reading the kubeconfig of the existing cluster")?;
        client.apiserver_version().await.context("the existing cluster does not answer")?;
        Ok(Self { client, kubeconfig: None, local: None })
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whether it is a local cluster, whose components can be broken and whose audit log can be read.
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Refuses what only a local cluster can do.
    fn require_local(&self, what: &str) -> Result<&Local> {
        self.local.as_ref().with_context(|| {
            format!("{what} needs a local cluster, and this is an existing one: unset KUBECONFIG or set CLUSTER=local")
        })
    }

    /// `kubectl`, `helm` or `grpcurl` for this cluster, for a test that wants the process itself (to stream from it or
    /// to port-forward). Those of an existing cluster are looked up in `PATH`.
    pub fn program(&self, name: &str) -> Command {
        let mut command = match &self.local {
            Some(local) => command::new(local.programs.program(name)),
            None => command::new(name),
        };
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        command
    }

    /// Runs `kubectl` to its end, at most two minutes, and returns what it printed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.run("kubectl", args, "").await
    }

    /// Runs `helm` to its end, at most two minutes, and returns what it printed.
    pub async fn helm(&self, args: &[&str]) -> Result<String> {
        self.run("helm", args, "").await
    }

    /// Runs `grpcurl` on this machine to its end, at most two minutes, and returns what it printed. From inside the
    /// cluster it runs in a toolbox pod: [`Namespace::toolbox`].
    pub async fn grpcurl(&self, args: &[&str]) -> Result<String> {
        self.run("grpcurl", args, "").await
    }

    /// Applies manifests (YAML, several documents allowed) to `namespace`, as `kubectl apply` does.
    pub async fn apply(&self, namespace: &str, manifests: &str) -> Result<String> {
        self.run("kubectl", &["--namespace", namespace, "apply", "--filename=-"], manifests).await
    }

    /// Runs a command in the first container of a pod, at most two minutes, and returns its standard output.
    pub async fn exec(&self, namespace: &str, pod: &str, argv: &[&str]) -> Result<String> {
        let args = [&["--namespace", namespace, "exec", "--stdin", pod, "--"], argv].concat();
        self.run("kubectl", &args, "").await
    }

    async fn run(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        let mut command = self.program(program);
        command.args(args);
        let input = input.as_bytes().to_vec();
        let run = tokio::task::spawn_blocking(move || command::run_within(&mut command, input, COMMAND_DEADLINE));
        run.await.context("a command's thread failed")?
    }

    /// Loads images from docker-archives; into an existing cluster they go through the user's registry instead.
    pub async fn load_images(&self, archives: &[PathBuf]) -> Result<()> {
        self.require_local("loading images from files")?.cluster.load(archives)
    }

    /// Names of the images that pods can use without pulling.
    pub async fn images(&self) -> Result<Vec<String>> {
        let mut ctr = self.require_local("listing the node's images")?.cluster.ctr()?;
        Ok(command::run(ctr.args(["images", "list", "--quiet"]))?.lines().map(str::to_owned).collect())
    }

    /// Kills (SIGKILL) all processes of a container, given the id that containerd knows it by.
    pub async fn kill_container(&self, id: &str) -> Result<()> {
        let mut ctr = self.require_local("killing a container")?.cluster.ctr()?;
        command::run(ctr.args(["tasks", "kill", "--all", "--signal", "SIGKILL", id])).map(drop)
    }

    /// Makes a namespace that is deleted when the returned value goes, with a unique name that starts with `prefix`.
    ///
    /// Pod Security `restricted` is enforced in it, as it is where the product says it runs.
    pub async fn namespace(&self, prefix: &str) -> Result<Namespace<'_>> {
        self.namespace_with(prefix, &[("pod-security.kubernetes.io/enforce", "restricted")]).await
    }

    /// As [`Cluster::namespace`], with these labels and no others but the ones that mark it as a test's.
    pub async fn namespace_with(&self, prefix: &str, labels: &[(&str, &str)]) -> Result<Namespace<'_>> {
        Namespace::create(self, prefix, labels).await
    }

    /// The API server's record of who did what.
    pub fn audit(&self) -> Result<AuditLog> {
        let local = self.require_local("reading the audit log")?;
        Ok(AuditLog::new(local.cluster.paths().audit_log(), self.client()))
    }

    /// The means to break components. Refused unless the cluster is local and this handle is its only user
    /// ([`Cluster::connect_alone`]).
    pub fn faults(&self) -> Result<Faults<'_>> {
        let local = self.require_local("breaking components")?;
        ensure!(local.alone, "breaking components disturbs every other test: use Cluster::connect_alone");
        Ok(Faults::new(&local.cluster))
    }

    /// Name of the cluster's first node; a local cluster has one.
    pub async fn node(&self) -> Result<String> {
        let nodes = Api::<Node>::all(self.client()).list(&ListParams::default()).await.context("listing nodes")?;
        nodes.into_iter().find_map(|node| node.metadata.name).context("the cluster has no node")
    }

    /// Makes the node offer `quantity` of an extended resource such as `nvidia.com/gpu`, as a device plugin would, or
    /// stop offering it (`None`), and waits until the scheduler can see it. The node forgets it when the kubelet starts
    /// anew.
    pub async fn set_extended_resource(&self, resource: &str, quantity: Option<u32>) -> Result<()> {
        let node = self.node().await?;
        let nodes = Api::<Node>::all(self.client());
        let value = quantity.map(|quantity| quantity.to_string());
        let patch = json!({"status": {"capacity": {resource: value}, "allocatable": {resource: value}}});
        wait::until(&format!("node {node} to offer {resource}"), Duration::from_secs(30), async || {
            let patched = nodes.patch_status(&node, &PatchParams::default(), &Patch::Merge(&patch)).await;
            let status = patched.with_context(|| format!("offering {resource} on node {node}"))?.status;
            let offered = status.and_then(|status| status.allocatable?.get(resource).cloned());
            Ok((offered.map(|offered| offered.0) == value).then_some(()))
        })
        .await
    }

    /// Waits until the pod is ready, and returns it.
    pub async fn wait_for_pod(&self, namespace: &str, pod: &str, deadline: Duration) -> Result<Pod> {
        let pods = Api::<Pod>::namespaced(self.client(), namespace);
        wait::until(&format!("pod {namespace}/{pod} to be ready"), deadline, async || {
            let found = pods.get_opt(pod).await.context("reading a pod")?;
            Ok(found.filter(is_ready))
        })
        .await
    }
}

/// Whether the pod has the condition Ready and is not on its way out.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    pod.metadata.deletion_timestamp.is_none()
        && conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Manifest of a pod that passes Pod Security `restricted` and runs `image`, with `volumes` mounted read-only: name,
/// volume source, mount path.
fn toolbox_pod(name: &str) -> serde_json::Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "toolbox"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "toolbox",
                "image": images::TOOLBOX,
                "imagePullPolicy": "IfNotPresent",
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    })
}
