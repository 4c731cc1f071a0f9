//! Installing the chart with the images that `make images` wrote.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use tokio::sync::Mutex;

use crate::{Cluster, is_ready, wait};

/// Namespace and release name under which tests and `make demo` install the operator.
const NAMESPACE: &str = "ernie-system";
const RELEASE: &str = "ernie-operator";
/// Labels of the operator's pods.
const SELECTOR: &str = "app.kubernetes.io/name=ernie-operator,app.kubernetes.io/component=operator";

/// Tests of one process install one after the other: Helm refuses two at once.
static INSTALLING: Mutex<()> = Mutex::const_new(());

/// References of the images under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// The operator's.
    pub operator: String,
    /// The worker's; it also holds the client `ernie-worker ask`.
    pub worker: String,
    /// The demo model's.
    pub model: String,
}

impl Images {
    /// Reads `dist/images.env`.
    ///
    /// # Errors
    /// When `make images` has not been run.
    pub fn built() -> Result<Self> {
        let path = repository().join("dist/images.env");
        let text = fs::read_to_string(&path)
            .with_context(|| format!("reading {}: the images are not built; run `make images`", path.display()))?;
        let values: BTreeMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        let value = |key: &str| {
            values.get(key).map(|value| (*value).to_owned()).with_context(|| format!("{} lacks {key}", path.display()))
        };
        Ok(Self { operator: value("OPERATOR_IMAGE")?, worker: value("WORKER_IMAGE")?, model: value("MODEL_IMAGE")? })
    }

    /// Loads into a local cluster what it does not have yet.
    async fn deliver(&self, cluster: &Cluster) -> Result<()> {
        if !cluster.is_local() {
            return Ok(());
        }
        let present = cluster.images().await?;
        let missing = [&self.operator, &self.worker, &self.model].into_iter().filter(|image| !present.contains(image));
        let archives: Vec<PathBuf> = missing
            .map(|image| {
                let file = image.rsplit('/').next().unwrap_or(image).replacen(':', "-", 1);
                repository().join("dist/images").join(file).with_added_extension("tar")
            })
            .collect();
        if archives.is_empty() { Ok(()) } else { cluster.load_images(&archives).await }
    }
}

/// The operator, installed by its chart.
pub struct Product<'a> {
    /// Where it is installed.
    pub cluster: &'a Cluster,
    /// What it runs.
    pub images: Images,
}

impl<'a> Product<'a> {
    /// Installs the chart, or upgrades it, with the images built last, and waits until the operator is ready.
    pub async fn install(cluster: &'a Cluster) -> Result<Self> {
        Self::install_with(cluster, &[]).await
    }

    /// As [`Product::install`], with further values in the form of `helm --set`.
    pub async fn install_with(cluster: &'a Cluster, values: &[&str]) -> Result<Self> {
        let _guard = INSTALLING.lock().await;
        let images = Images::built()?;
        images.deliver(cluster).await?;
        let namespace = format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}, \
             labels: {{pod-security.kubernetes.io/enforce: restricted}}}}}}"
        );
        cluster.apply("default", &namespace).await?;
        let product = Self { cluster, images };
        product.upgrade(values).await?;
        Ok(product)
    }

    /// `helm upgrade --install` with these further values; how long it took until the operator was ready.
    pub async fn upgrade(&self, values: &[&str]) -> Result<Duration> {
        let chart = repository().join("charts/ernie-operator");
        let (registry, _) = self.images.operator.rsplit_once('/').context("the operator's image has no registry")?;
        let mut sets = vec![
            format!("image.registry={registry}"),
            format!("operator.image.tag={}", tag(&self.images.operator)?),
            format!("worker.image.tag={}", tag(&self.images.worker)?),
            format!("test.model.uri=oci://{}", self.images.model),
        ];
        sets.extend(values.iter().map(|value| (*value).to_owned()));
        let chart = chart.to_str().context("the checkout's path is not UTF-8")?;
        let mut args = vec!["upgrade", "--install", RELEASE, chart, "--namespace", NAMESPACE, "--hide-notes"];
        args.extend(["--wait", "--timeout", "90s"]);
        for set in &sets {
            args.extend(["--set", set]);
        }
        let start = Instant::now();
        self.cluster.helm(&args).await?;
        Ok(start.elapsed())
    }

    /// `helm uninstall`, waiting until the operator's pods are gone.
    pub async fn uninstall(&self) -> Result<()> {
        self.cluster.helm(&["uninstall", RELEASE, "--namespace", NAMESPACE, "--wait"]).await?;
        self.wait_for_operators(0).await.map(drop)
    }

    /// `helm test`; what it printed.
    pub async fn helm_test(&self) -> Result<String> {
        self.cluster.helm(&["test", RELEASE, "--namespace", NAMESPACE, "--logs"]).await
    }

    /// Namespace of the operator.
    pub fn namespace(&self) -> &'static str {
        NAMESPACE
    }

    /// User name of the operator's requests in the audit log.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{NAMESPACE}:{RELEASE}")
    }

    /// Runs so many operators, waiting until they are ready, or gone.
    pub async fn scale_operator(&self, replicas: usize) -> Result<Vec<Pod>> {
        let replicas_flag = format!("--replicas={replicas}");
        let deployment = format!("deployment/{RELEASE}");
        self.cluster.kubectl(&["--namespace", NAMESPACE, "scale", &deployment, &replicas_flag]).await?;
        self.wait_for_operators(replicas).await
    }

    /// Kills every operator pod without grace, as a lost node would.
    pub async fn kill_operators(&self) -> Result<()> {
        let pods = Api::<Pod>::namespaced(self.cluster.client(), NAMESPACE);
        let parameters = DeleteParams::default().grace_period(0);
        pods.delete_collection(&parameters, &ListParams::default().labels(SELECTOR))
            .await
            .context("killing the operator's pods")?;
        Ok(())
    }

    /// Waits until exactly so many operator pods exist and all are ready.
    pub async fn wait_for_operators(&self, replicas: usize) -> Result<Vec<Pod>> {
        let pods = Api::<Pod>::namespaced(self.cluster.client(), NAMESPACE);
        wait::until(&format!("{replicas} operators to be ready"), Duration::from_secs(60), async || {
            let found = pods.list(&ListParams::default().labels(SELECTOR)).await.context("listing operators")?.items;
            Ok((found.len() == replicas && found.iter().all(is_ready)).then_some(found))
        })
        .await
    }

    /// Logs of the operator, for a test that failed.
    pub async fn logs(&self) -> Result<String> {
        self.cluster
            .kubectl(&["--namespace", NAMESPACE, "logs", "--selector", SELECTOR, "--tail=100", "--prefix"])
            .await
    }

    /// The operator's own Deployment.
    pub async fn deployment(&self) -> Result<Deployment> {
        let deployments = Api::<Deployment>::namespaced(self.cluster.client(), NAMESPACE);
        deployments.get(RELEASE).await.context("reading the operator's Deployment")
    }
}

/// The checkout's root.
pub(super) fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn tag(image: &str) -> Result<&str> {
    match image.rsplit_once(':') {
        Some((_, tag)) if !tag.contains('/') => Ok(tag),
        _ => bail!("image {image} has no tag"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_not_mistaken_for_a_port() {
        assert_eq!(tag("registry.example:5000/team/worker:0.1.0-abc").unwrap(), "0.1.0-abc");
        assert!(tag("registry.example:5000/worker").is_err());
    }
}
