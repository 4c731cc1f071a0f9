//! Namespaces that belong to one test.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace as Object, Pod, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Cluster;
use crate::{command, wait};

/// Label that names the test process a namespace belongs to.
const OWNER: &str = "e2e.serving.ernie.io/owner";
/// Longest that making a namespace or a toolbox pod may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longest that a call may take while a test is being cleaned up.
const CLEAN_UP: Duration = Duration::from_secs(20);

/// A namespace that is deleted when this value goes.
///
/// If it goes because the test panics, first everything in it is printed: objects, events, descriptions, logs. With
/// `ERNIE_E2E_KEEP=1` it is kept for a look.
pub struct Namespace<'a> {
    cluster: &'a Cluster,
    name: String,
}

impl<'a> Namespace<'a> {
    pub(super) async fn create(cluster: &'a Cluster, prefix: &str, labels: &[(&str, &str)]) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{prefix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut object: Object = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let mut all: std::collections::BTreeMap<String, String> =
            labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        all.insert(OWNER.to_owned(), owner()?);
        object.metadata.labels = Some(all);
        let namespaces = Api::<Object>::all(cluster.client());
        // One of the same name may still be on its way out: process ids come round again.
        wait::until(&format!("namespace {name} to be made"), DEADLINE, async || {
            match namespaces.create(&PostParams::default(), &object).await {
                Ok(_) => Ok(Some(())),
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
                Err(error) => Err(error).context(format!("making namespace {name}")),
            }
        })
        .await?;
        let namespace = Self { cluster, name };
        let accounts = Api::<ServiceAccount>::namespaced(cluster.client(), &namespace.name);
        // Without it pods are refused.
        wait::until("the namespace's default ServiceAccount", DEADLINE, async || {
            Ok(accounts.get_opt("default").await.context("reading a ServiceAccount")?.map(drop))
        })
        .await?;
        Ok(namespace)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts a pod with busybox and grpcurl in it and waits until it is ready; it passes Pod Security `restricted`.
    pub async fn toolbox(&self, name: &str) -> Result<()> {
        let pod: Pod = serde_json::from_value(super::toolbox_pod(name))?;
        let pods = Api::<Pod>::namespaced(self.cluster.client(), &self.name);
        pods.create(&PostParams::default(), &pod).await.with_context(|| format!("making pod {name}"))?;
        self.cluster.wait_for_pod(&self.name, name, DEADLINE).await?;
        Ok(())
    }

    /// Applies manifests (YAML, several documents allowed) to the namespace.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        self.cluster.apply(&self.name, manifests).await
    }

    /// Runs a command in the first container of a pod of the namespace and returns its standard output.
    pub async fn exec(&self, pod: &str, argv: &[&str]) -> Result<String> {
        self.cluster.exec(&self.name, pod, argv).await
    }

    /// Runs `kubectl` for the namespace and returns what it printed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["--namespace", &self.name], args].concat()).await
    }

    /// Everything that helps to see why a test failed: objects, events, descriptions and logs of the pods.
    pub fn dump(&self) -> String {
        let mut text = format!("──── namespace {} ────\n", self.name);
        let tables: [&[&str]; 4] = [
            &["get", "all,configmaps,pvc,pdb,networkpolicies", "--output=wide"],
            &["get", "erniemodels", "--output=yaml", "--ignore-not-found"],
            &["get", "events", "--sort-by=.lastTimestamp"],
            &["describe", "pods"],
        ];
        for args in tables {
            text += &format!("$ kubectl {}\n{}\n", args.join(" "), self.look(args));
        }
        for pod in self.look(&["get", "pods", "--output=name"]).lines().filter(|line| line.starts_with("pod/")) {
            for previous in ["--previous=false", "--previous=true"] {
                let log = self.look(&["logs", pod, "--all-containers", "--prefix", "--tail=80", previous]);
                text += &format!("$ kubectl logs {pod} {previous}\n{log}\n");
            }
        }
        text
    }

    /// For a place where nothing may fail: an error is shown instead of what was asked for.
    fn look(&self, args: &[&str]) -> String {
        let mut kubectl = self.cluster.program("kubectl");
        kubectl.args(["--request-timeout=10s", "--namespace", &self.name]).args(args);
        command::run_within(&mut kubectl, Vec::new(), CLEAN_UP).unwrap_or_else(|error| format!("{error:#}"))
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.dump());
        }
        if std::env::var_os("ERNIE_E2E_KEEP").is_some_and(|keep| keep == "1") {
            eprintln!("namespace {} is kept, as ERNIE_E2E_KEEP=1 says", self.name);
            return;
        }
        // Whatever fails here is made good by the next test run.
        self.look(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}

/// Deletes the namespaces of test processes of this machine that are no more.
pub(super) async fn delete_abandoned(cluster: &Cluster) -> Result<()> {
    let namespaces = Api::<Object>::all(cluster.client());
    let found = namespaces.list(&ListParams::default().labels(OWNER)).await.context("listing namespaces")?;
    for namespace in found {
        let (Some(name), Some(labels)) = (namespace.metadata.name, namespace.metadata.labels) else { continue };
        let abandoned = labels.get(OWNER).is_some_and(|owner| !may_live(owner));
        if abandoned && namespace.metadata.deletion_timestamp.is_none() {
            match namespaces.delete(&name, &DeleteParams::background()).await {
                Ok(_) => {}
                // Another test process was faster.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                Err(error) => return Err(error).context(format!("deleting the abandoned namespace {name}")),
            }
        }
    }
    Ok(())
}

/// Label value for this process: machine, process id, and when it started, in the kernel's ticks since boot.
fn owner() -> Result<String> {
    let id = std::process::id();
    let started = started(id).context("reading when this process started")?;
    Ok(format!("{}-{id}-{started}", machine()))
}

/// Whether the process that an owner label names may still be there. Of other machines we know nothing.
fn may_live(owner: &str) -> bool {
    let parts: Vec<&str> = owner.split('-').collect();
    let [its_machine, id, its_start] = parts[..] else { return true };
    let Ok(id) = id.parse() else { return true };
    its_machine != machine() || started(id).is_some_and(|start| start == its_start)
}

/// Short name of this machine's present boot.
fn machine() -> String {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Sha256::digest(boot).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

fn started(id: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The program's name, in parentheses, may hold anything; the start is the 20th word after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_process_is_told_from_a_dead_one_and_from_another_that_has_its_id() {
        let mine = owner().unwrap();
        assert!(may_live(&mine));
        let (rest, _) = mine.rsplit_once('-').unwrap();
        assert!(!may_live(&format!("{rest}-1")), "another process with the same id was taken for the owner");
        assert!(!may_live(&format!("{}-4194304-1", machine())), "an id beyond the kernel's greatest");
        assert!(may_live("other-1-1"), "a process of another machine was called dead");
    }
}
