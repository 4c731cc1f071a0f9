//! Requests under way while something else happens.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Model;
use crate::lifecycle::sibling_program;
use crate::{Cluster, Namespace, images, wait};

/// Image of the program `load`.
const IMAGE: &str = "docker.io/local/load:e2e";

/// What a load program saw.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct LoadReport {
    /// Requests that ended with their last message and status OK.
    pub completed: u64,
    /// Requests that ended otherwise, by status and sentence.
    pub failed: Vec<Failure>,
    /// Tokens received.
    pub tokens: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
}

/// Requests that ended in the same way.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Failure {
    /// The gRPC status code's name.
    pub code: String,
    /// Its sentence.
    pub message: String,
    /// How many.
    pub count: u64,
}

/// A pod that keeps streams open to a model.
pub struct Load<'a> {
    namespace: &'a Namespace<'a>,
    pod: String,
}

impl<'a> Load<'a> {
    /// Starts a pod that keeps `streams` chats of `max_tokens` under way at all times, each on a connection of its own
    /// to the model's Service, and waits until the first have been answered.
    pub async fn start(
        cluster: &Cluster,
        namespace: &'a Namespace<'a>,
        model: &Model<'_>,
        streams: u32,
        max_tokens: u32,
    ) -> Result<Self> {
        Self::start_paused(cluster, namespace, model, streams, max_tokens, Duration::ZERO).await
    }

    /// As [`start`](Self::start), with a pause between the chats of a stream.
    pub async fn start_paused(
        cluster: &Cluster,
        namespace: &'a Namespace<'a>,
        model: &Model<'_>,
        streams: u32,
        max_tokens: u32,
        pause: Duration,
    ) -> Result<Self> {
        if !cluster.images().await?.iter().any(|image| image == IMAGE) {
            load_image(cluster).await?;
        }
        let pod = format!("load-{}", model.name());
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": false,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "load",
                    "image": IMAGE,
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["run", "--server", model.address(), "--streams", streams.to_string(),
                             "--max-tokens", max_tokens.to_string(), "--pause", pause.as_millis().to_string()],
                    "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                }],
            },
        });
        namespace.apply(&manifest.to_string()).await?;
        let load = Self { namespace, pod };
        wait::until("the load to be under way", Duration::from_secs(60), async || {
            let log = load.log().await.unwrap_or_default();
            Ok((log.lines().count() > 1).then_some(()))
        })
        .await?;
        Ok(load)
    }

    async fn log(&self) -> Result<String> {
        self.namespace.kubectl(&["logs", &self.pod]).await
    }

    /// How many requests have been completed by now.
    pub async fn completed(&self) -> Result<u64> {
        let log = self.log().await?;
        let last = log.lines().rev().find_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(last.and_then(|line| line["completed"].as_u64()).unwrap_or(0))
    }

    /// Waits until so many more requests have been completed.
    pub async fn wait_for_more(&self, requests: u64, deadline: Duration) -> Result<()> {
        let before = self.completed().await?;
        wait::until(&format!("{requests} more requests to be completed"), deadline, async || {
            Ok((self.completed().await? >= before + requests).then_some(()))
        })
        .await
    }

    /// Starts no more requests, waits for the last answers, and tells what was seen. Another load may follow.
    pub async fn stop(self) -> Result<LoadReport> {
        self.namespace.exec(&self.pod, &["/load", "stop"]).await?;
        let report = wait::until("the load's report", Duration::from_secs(120), async || {
            let log = self.log().await?;
            Ok(log.lines().last().and_then(|line| serde_json::from_str::<LoadReport>(line).ok()))
        })
        .await?;
        self.namespace.kubectl(&["delete", "pod", &self.pod, "--grace-period=1"]).await?;
        ensure!(report.completed > 0, "the load saw no answer at all: {report:?}");
        Ok(report)
    }
}

async fn load_image(cluster: &Cluster) -> Result<()> {
    let folder = tempfile::tempdir().context("making a folder for the load image")?;
    let root = folder.path().join("root");
    std::fs::create_dir(&root).context("making the load image's root")?;
    std::fs::copy(sibling_program("load")?, root.join("load")).context("copying the program `load`")?;
    let archive = folder.path().join("load.tar");
    images::archive(&root, IMAGE, json!({"Entrypoint": ["/load"], "User": "65532:65532"}), &archive)?;
    cluster.load_images(&[archive]).await
}
