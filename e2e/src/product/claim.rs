//! A volume claim whose content a test writes.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::json;

use super::Images;
use crate::{Cluster, Namespace, images};

/// A bound PersistentVolumeClaim on the node's disk.
pub struct Claim<'a> {
    cluster: &'a Cluster,
    namespace: &'a Namespace<'a>,
    name: String,
    volume: String,
    jobs: AtomicU32,
}

impl<'a> Claim<'a> {
    /// Makes a claim `name`, and the volume for it.
    pub async fn create(cluster: &'a Cluster, namespace: &'a Namespace<'a>, name: &str) -> Result<Self> {
        let volume = format!("{}-{name}", namespace.name());
        let storage = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume}, "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany"],
                "persistentVolumeReclaimPolicy": "Delete",
                "storageClassName": "",
                "hostPath": {"path": format!("/run/cluster/volumes/{volume}"), "type": "DirectoryOrCreate"},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                    {"key": "kubernetes.io/hostname", "operator": "In", "values": [cluster.node().await?]}]}]}},
            }},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "volumeName": volume,
                "resources": {"requests": {"storage": "1Gi"}},
            }},
        ]});
        namespace.apply(&storage.to_string()).await.context("making a volume claim")?;
        Ok(Self { cluster, namespace, name: name.to_owned(), volume, jobs: AtomicU32::new(0) })
    }

    /// Runs a shell script as root in a Job, with the claim at `/claim` and the demo model at `/image`, to its end.
    pub async fn write(&self, images: &Images, script: &str) -> Result<()> {
        let job = format!("write-{}-{}", self.name, self.jobs.fetch_add(1, Ordering::Relaxed));
        let manifest = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job}, "spec": {
            "backoffLimit": 0,
            "template": {"spec": {
                "restartPolicy": "Never",
                "containers": [{
                    "name": "write",
                    "image": images::TOOLBOX,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-euc", script],
                    "securityContext": {"runAsUser": 0},
                    "volumeMounts": [
                        {"name": "image", "mountPath": "/image"},
                        {"name": "claim", "mountPath": "/claim"},
                    ],
                }],
                "volumes": [
                    {"name": "image", "image": {"reference": images.model, "pullPolicy": "IfNotPresent"}},
                    {"name": "claim", "persistentVolumeClaim": {"claimName": self.name}},
                ],
            }},
        }});
        // Only the Job, which makes folders on the node's disk, needs more than `restricted` allows.
        self.enforce("privileged").await?;
        let run = async {
            self.namespace.apply(&manifest.to_string()).await?;
            let job = format!("job/{job}");
            self.namespace.kubectl(&["wait", &job, "--for=condition=complete", "--timeout=60s"]).await
        };
        let written = run.await.context("writing to a volume claim");
        self.enforce("restricted").await?;
        written.map(drop)
    }

    async fn enforce(&self, level: &str) -> Result<()> {
        let label = format!("pod-security.kubernetes.io/enforce={level}");
        self.cluster.kubectl(&["label", "namespace", self.namespace.name(), "--overwrite", &label]).await.map(drop)
    }

    /// Lets the volume go with its claim.
    pub async fn release(self) -> Result<()> {
        self.cluster.kubectl(&["delete", "persistentvolume", &self.volume, "--wait=false"]).await.map(drop)
    }
}
