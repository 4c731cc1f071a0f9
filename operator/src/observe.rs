//! SHELL: all reads. Repeated ones come from caches that watches keep fresh; a write is always preceded by a look at the
//! API server itself.

mod caches;
mod shelf;
mod sync;

use std::future::Future;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::ListParams;
use kube::core::DeserializeGuard;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::api::ErnieModel;
use crate::context::CALL_TIMEOUT;
use crate::desired::{Children, Workload, workers_name};
use crate::observed::{Found, Live, Replica};
use ernie_proto::contract::MODEL_LABEL;

pub use caches::{Caches, Scope, Trigger};
pub use sync::Sync;

/// A read that failed.
#[derive(Debug, Error)]
pub enum Error {
    /// No answer in time.
    #[error("{0}: no answer from the API server within {seconds} s", seconds = CALL_TIMEOUT.as_secs())]
    Timeout(&'static str),
    /// An answer that is an error.
    #[error("{what}: {source}")]
    Api {
        /// What was asked for.
        what: &'static str,
        /// The answer.
        source: Box<kube::Error>,
    },
}

/// Waits for one answer of the API server, but not for ever.
///
/// # Errors
/// When the answer is an error, or does not come.
pub async fn within<T>(what: &'static str, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(Error::Api { what, source: Box::new(source) }),
        Err(_) => Err(Error::Timeout(what)),
    }
}

/// Where children and pods are read.
#[derive(Clone)]
pub enum Reads {
    /// At the API server, each time.
    Direct,
    /// From caches.
    Cached(Arc<Caches>),
}

impl Reads {
    /// True when what is read may lag behind.
    pub fn may_lag(&self) -> bool {
        matches!(self, Reads::Cached(_))
    }

    /// The children of a model.
    ///
    /// # Errors
    /// When the API server was asked and failed.
    pub async fn children(&self, client: &Client, model: &ErnieModel) -> Result<Children<Found>, Error> {
        let namespace = model.namespace().unwrap_or_default();
        let (name, workers) = (model.name_any(), workers_name(model));
        Ok(match self {
            Reads::Direct => Children {
                network_policy: get::<NetworkPolicy>(client, &namespace, &name).await?,
                service: get::<Service>(client, &namespace, &name).await?,
                workers: get::<Service>(client, &namespace, &workers).await?,
                disruption_budget: get::<PodDisruptionBudget>(client, &namespace, &name).await?,
                workload: Workload::Deployment(get::<Deployment>(client, &namespace, &name).await?),
            },
            Reads::Cached(caches) => Children {
                network_policy: caches.network_policies.get(&namespace, &name),
                service: caches.services.get(&namespace, &name),
                workers: caches.services.get(&namespace, &workers),
                disruption_budget: caches.disruption_budgets.get(&namespace, &name),
                workload: Workload::Deployment(caches.deployments.get(&namespace, &name)),
            },
        })
    }

    /// The pods of a model, oldest first.
    ///
    /// # Errors
    /// When the API server was asked and failed.
    pub async fn replicas(&self, client: &Client, model: &ErnieModel) -> Result<Vec<Arc<Replica>>, Error> {
        let namespace = model.namespace().unwrap_or_default();
        let mut replicas = match self {
            Reads::Direct => {
                let api = Api::<Replica>::namespaced(client.clone(), &namespace);
                let of_model = ListParams::default().labels(&format!("{MODEL_LABEL}={}", model.name_any())).limit(1000);
                within("list pods", api.list(&of_model)).await?.items.into_iter().map(Arc::new).collect::<Vec<_>>()
            }
            Reads::Cached(caches) => caches.replicas.of(&namespace, &model.name_any()),
        };
        replicas.sort_by(|a, b| {
            let key = |replica: &Replica| {
                (replica.metadata.creation_timestamp.as_ref().map(|time| time.0), replica.metadata.name.clone())
            };
            key(a).cmp(&key(b))
        });
        Ok(replicas)
    }
}

/// A child as the API server has it now.
///
/// # Errors
/// When the API server fails.
pub async fn get<K>(client: &Client, namespace: &str, name: &str) -> Result<Option<Arc<Live<K>>>, Error>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope> + 'static,
    Live<K>: DeserializeOwned,
{
    let api = Api::<Live<K>>::namespaced(client.clone(), namespace);
    Ok(within("get child", api.get_opt(name)).await?.map(Arc::new))
}

/// A model as the API server has it now.
///
/// # Errors
/// When the API server fails.
pub async fn model(
    client: &Client,
    namespace: &str,
    name: &str,
) -> Result<Option<DeserializeGuard<ErnieModel>>, Error> {
    let api = Api::<DeserializeGuard<ErnieModel>>::namespaced(client.clone(), namespace);
    within("get ErnieModel", api.get_opt(name)).await
}

/// The newest warning about a pod: what only the kubelet knows, such as a volume that cannot be mounted.
///
/// # Errors
/// When the API server fails.
pub async fn warning(client: &Client, namespace: &str, pod_uid: &str) -> Result<Option<(String, String)>, Error> {
    let api = Api::<Event>::namespaced(client.clone(), namespace);
    let about_pod = ListParams::default().fields(&format!("involvedObject.uid={pod_uid},type=Warning")).limit(500);
    let events = within("list events", api.list(&about_pod)).await?;
    let newest = events.items.into_iter().max_by_key(|event| {
        let seen = event.last_timestamp.as_ref().map(|time| time.0);
        seen.or(event.event_time.as_ref().map(|time| time.0)).or(event
            .metadata
            .creation_timestamp
            .as_ref()
            .map(|t| t.0))
    });
    Ok(newest.and_then(|event| Some((event.reason?, event.message.unwrap_or_default()))))
}
