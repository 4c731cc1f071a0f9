//! PURE: an `ErnieModel` and what is pinned for it, to the children it should have. No clock, no client, no IO.

mod deployment;
mod disruption;
mod engine;
mod names;
mod network;
mod pod;
mod replicas;
mod service;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;

use crate::api::{Device, ErnieModel, ModelUri};

pub use engine::{Defaults, Engine, Release};
pub use names::{
    APPLIED_ANNOTATION, AUTOSCALED_ANNOTATION, ENGINE_ANNOTATION, STOPPED_ANNOTATION, TEMPLATE_ANNOTATION, model_of,
    pod_selector, scale_selector, workers_name,
};
pub(crate) use pod::digest;
pub use pod::{CONTAINER, TEMPLATE_REVISION, startup_budget_seconds, template_hash};
pub use replicas::{Autoscaled, replicas};

/// How far a set of children has come: [`Prepared`], or written to the cluster.
pub trait Stage {
    /// What stands for a child of kind `K` at this stage.
    type Of<K>;
}

/// Children as they should be.
#[derive(Clone, Debug)]
pub struct Prepared;

impl Stage for Prepared {
    type Of<K> = Box<K>;
}

/// The children of one model. Taken apart without `..` wherever they are written or judged, so that a new child which
/// somebody forgets does not compile.
pub struct Children<S: Stage> {
    /// Who may talk to the workers, and that they talk to nobody.
    pub network_policy: S::Of<NetworkPolicy>,
    /// The address of the model.
    pub service: S::Of<Service>,
    /// The addresses of the single workers.
    pub workers: S::Of<Service>,
    /// How many workers may be evicted at once.
    pub disruption_budget: S::Of<PodDisruptionBudget>,
    /// What runs the workers.
    pub workload: Workload<S>,
}

/// What runs the workers of a model.
pub enum Workload<S: Stage> {
    /// A Deployment.
    Deployment(S::Of<Deployment>),
    /// Nothing can be written for this spec; whatever runs already is left alone.
    Withheld(Obstacle),
}

/// Why a child cannot be had as the spec asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Obstacle {
    /// Reason for the conditions.
    pub reason: &'static str,
    /// The object, the value and the remedy.
    pub message: String,
    /// True when nothing will move without a change by a person.
    pub permanent: bool,
}

/// What a model was found to be pinned to, wherever that was recorded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remembered {
    /// The engine pinned at creation.
    pub engine: Option<Engine>,
    /// The failure for which the workers were stopped.
    pub stopped: Option<Stopped>,
    /// What the autoscaler decided on.
    pub autoscaled: Option<Autoscaled>,
    /// Workers that the live Deployment asks for, when it asks for any.
    pub live_replicas: Option<i32>,
}

/// A failure that no restart can cure, kept on the Deployment: its pods are gone by then.
#[derive(Clone, Debug, PartialEq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stopped {
    /// Hash of the pod template that failed: another template gets another chance.
    pub template: String,
    /// The failure.
    pub failure: crate::api::FailureInfo,
    /// The worker's plan, when it gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<crate::api::Plan>,
}

/// The children that `model` should have.
pub fn desired(model: &ErnieModel, defaults: &Defaults, remembered: &Remembered) -> Children<Prepared> {
    Children {
        network_policy: Box::new(network::policy(model)),
        service: Box::new(service::service(model)),
        workers: Box::new(service::workers(model)),
        disruption_budget: Box::new(disruption::budget(model)),
        workload: workload(model, defaults, remembered),
    }
}

/// The name that clients send for this model.
pub fn served_name(model: &ErnieModel) -> String {
    model.spec.model.name.clone().unwrap_or_else(|| model.name_any())
}

fn workload(model: &ErnieModel, defaults: &Defaults, remembered: &Remembered) -> Workload<Prepared> {
    match prepare(model, defaults, remembered) {
        Ok(deployment) => Workload::Deployment(Box::new(deployment)),
        Err(obstacle) => Workload::Withheld(obstacle),
    }
}

fn prepare(model: &ErnieModel, defaults: &Defaults, remembered: &Remembered) -> Result<Deployment, Obstacle> {
    let uri = model.spec.model.uri.parse::<ModelUri>().map_err(|error| Obstacle {
        reason: "InvalidSpec",
        message: error.to_string(),
        permanent: true,
    })?;
    let engine = engine::choose(model, defaults, remembered.engine.as_ref())?;
    deployment::deployment(model, &uri, &engine, remembered)
}

/// The device that the model's resources ask for.
///
/// # Errors
/// An obstacle for a device that no worker image exists for.
pub fn device(model: &ErnieModel) -> Result<Device, Obstacle> {
    engine::device(model)
}

#[cfg(test)]
mod tests;
