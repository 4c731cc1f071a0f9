//! One `ErnieModel` as its user sees it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Resource};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Cluster, Namespace, is_ready, wait};

/// A condition of a model.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Such as `Ready`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// An applied `ErnieModel`.
pub struct Model<'a> {
    cluster: &'a Cluster,
    namespace: &'a Namespace<'a>,
    name: String,
}

impl<'a> Model<'a> {
    /// Applies a model with `kubectl apply`, as a user does.
    ///
    /// # Errors
    /// What kubectl printed, when the API server refused it.
    pub async fn apply(cluster: &'a Cluster, namespace: &'a Namespace<'a>, name: &str, spec: Value) -> Result<Self> {
        let model = Self { cluster, namespace, name: name.to_owned() };
        model.edit(spec).await?;
        Ok(model)
    }

    /// Applies another spec to it.
    pub async fn edit(&self, spec: Value) -> Result<()> {
        let manifest = json!({
            "apiVersion": "serving.ernie.io/v1alpha1",
            "kind": "ErnieModel",
            "metadata": {"name": self.name},
            "spec": spec,
        });
        self.namespace.apply(&manifest.to_string()).await.map(drop)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where clients in the cluster reach it.
    pub fn address(&self) -> String {
        format!("{}.{}.svc:8033", self.name, self.namespace.name())
    }

    fn api(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("serving.ernie.io", "v1alpha1", "ErnieModel");
        let resource = ApiResource::from_gvk_with_plural(&kind, "erniemodels");
        Api::namespaced_with(self.cluster.client(), self.namespace.name(), &resource)
    }

    /// The whole resource as JSON.
    pub async fn get(&self) -> Result<Value> {
        let object = self.api().get(&self.name).await.with_context(|| format!("reading ErnieModel {}", self.name))?;
        serde_json::to_value(object).context("an ErnieModel that is no JSON")
    }

    /// Its conditions.
    pub async fn conditions(&self) -> Result<Vec<Condition>> {
        let object = self.get().await?;
        match object.pointer("/status/conditions") {
            Some(conditions) => Vec::deserialize(conditions).context("conditions of another shape"),
            None => Ok(Vec::new()),
        }
    }

    /// Waits until a condition has this status (and reason, when given), and returns it.
    pub async fn wait_for(
        &self,
        kind: &str,
        status: &str,
        reason: Option<&str>,
        deadline: Duration,
    ) -> Result<Condition> {
        let mut last = Vec::new();
        let what =
            format!("{kind}={status}{} of model {}", reason.map_or(String::new(), |r| format!("/{r}")), self.name);
        let found = wait::until(&what, deadline, async || {
            last = self.conditions().await?;
            Ok(last
                .iter()
                .find(|condition| {
                    condition.kind == kind
                        && condition.status == status
                        && reason.is_none_or(|reason| reason == condition.reason)
                })
                .cloned())
        })
        .await;
        found.with_context(|| format!("conditions at last: {last:#?}"))
    }

    /// Waits until it is ready and exactly so many replicas answer and exist.
    pub async fn wait_ready(&self, replicas: u64, deadline: Duration) -> Result<()> {
        let what = format!("model {} to be ready with {replicas} replicas", self.name);
        let mut last = Value::Null;
        let ready = wait::until(&what, deadline, async || {
            last = self.get().await?["status"].clone();
            let observed = last["observedGeneration"] == self.get().await?["metadata"]["generation"];
            let ready = last["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
            let count = |field: &str| last[field].as_u64().unwrap_or(0);
            Ok((observed && ready && count("replicas") == replicas && count("readyReplicas") == replicas).then_some(()))
        })
        .await;
        ready.with_context(|| format!("status at last: {last:#}"))
    }

    /// `kubectl scale`.
    pub async fn scale(&self, replicas: u32) -> Result<()> {
        let target = format!("erniemodel/{}", self.name);
        self.namespace.kubectl(&["scale", &target, &format!("--replicas={replicas}")]).await.map(drop)
    }

    /// `kubectl delete`, without waiting for children.
    pub async fn delete(&self) -> Result<()> {
        self.namespace.kubectl(&["delete", &format!("erniemodel/{}", self.name), "--wait=true"]).await.map(drop)
    }

    /// Its worker pods, those on their way out included.
    pub async fn pods(&self) -> Result<Vec<Pod>> {
        Ok(self.list::<Pod>().await?.items)
    }

    /// Names of the pods that are ready.
    pub async fn ready_pods(&self) -> Result<BTreeSet<String>> {
        let pods = self.pods().await?;
        Ok(pods.into_iter().filter(is_ready).filter_map(|pod| pod.metadata.name).collect())
    }

    async fn list<K>(&self) -> Result<kube::core::ObjectList<K>>
    where
        K: Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned
            + Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        let selector = ListParams::default().labels(&format!("serving.ernie.io/model={}", self.name));
        Api::<K>::namespaced(self.cluster.client(), self.namespace.name())
            .list(&selector)
            .await
            .with_context(|| format!("listing children of model {}", self.name))
    }

    /// Kind, name and uid of everything that belongs to it, sorted.
    pub async fn children(&self) -> Result<Vec<String>> {
        fn names<K: Resource + Clone>(kind: &str, list: kube::core::ObjectList<K>, into: &mut Vec<String>) {
            into.extend(list.items.into_iter().map(|object| {
                let meta = object.meta();
                let name = meta.name.clone().unwrap_or_default();
                format!("{kind}/{name} {}", meta.uid.clone().unwrap_or_default())
            }));
        }
        let mut children = Vec::new();
        names("Deployment", self.list::<Deployment>().await?, &mut children);
        names("ReplicaSet", self.list::<ReplicaSet>().await?, &mut children);
        names("Pod", self.list::<Pod>().await?, &mut children);
        names("Service", self.list::<Service>().await?, &mut children);
        names("PodDisruptionBudget", self.list::<PodDisruptionBudget>().await?, &mut children);
        names("NetworkPolicy", self.list::<k8s_openapi::api::networking::v1::NetworkPolicy>().await?, &mut children);
        children.sort();
        Ok(children)
    }

    /// Waits until nothing of it is left.
    pub async fn wait_gone(&self, deadline: Duration) -> Result<()> {
        let mut left = Vec::new();
        let gone = wait::until(&format!("children of model {} to be gone", self.name), deadline, async || {
            left = self.children().await?;
            Ok(left.is_empty().then_some(()))
        })
        .await;
        gone.with_context(|| format!("left: {left:#?}"))
    }

    /// Kills the worker process of a pod (SIGKILL), and returns once the kubelet has started it again.
    pub async fn kill_worker(&self, pod: &str) -> Result<()> {
        let pods = Api::<Pod>::namespaced(self.cluster.client(), self.namespace.name());
        let container = async || -> Result<(String, i32)> {
            let status = pods.get(pod).await.with_context(|| format!("reading pod {pod}"))?.status;
            let container = status.and_then(|status| status.container_statuses?.into_iter().next());
            let container = container.with_context(|| format!("pod {pod} has no container"))?;
            Ok((container.container_id.unwrap_or_default(), container.restart_count))
        };
        let (id, restarts) = container().await?;
        let id = id.strip_prefix("containerd://").context("the container has not started")?.to_owned();
        self.cluster.kill_container(&id).await?;
        wait::until(&format!("the worker of pod {pod} to be started again"), Duration::from_secs(60), async || {
            Ok((container().await?.1 > restarts).then_some(()))
        })
        .await
    }

    /// Asks the model one thing through its Service with grpcurl, from the toolbox pod `client`, and returns the text
    /// and the finish reason.
    pub async fn chat(&self, client: &str, text: &str, max_tokens: u32) -> Result<(String, String)> {
        let request = json!({
            "messages": [{"role": "ROLE_USER", "content": [{"text": text}]}],
            "sampling": {"maxTokens": max_tokens, "temperature": 0},
        });
        let output = self
            .namespace
            .exec(
                client,
                &[
                    "grpcurl",
                    "-plaintext",
                    "-max-time",
                    "60",
                    "-d",
                    &request.to_string(),
                    &self.address(),
                    "ernie.v1.Inference/Chat",
                ],
            )
            .await?;
        let mut answer = String::new();
        let mut finish = None;
        for message in serde_json::Deserializer::from_str(&output).into_iter::<Value>() {
            let message = message.with_context(|| format!("grpcurl printed {output:?}"))?;
            ensure!(finish.is_none(), "a message after the last: {message}");
            answer.push_str(message["delta"]["text"].as_str().unwrap_or_default());
            finish = message["done"]["finishReason"].as_str().map(str::to_owned);
        }
        match finish {
            Some(finish) => Ok((answer, finish)),
            None => bail!("the stream ended without `done`: {output:?}"),
        }
    }
}
