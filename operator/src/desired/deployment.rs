//! The Deployment of a model.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::engine::Engine;
use super::{
    AUTOSCALED_ANNOTATION, ENGINE_ANNOTATION, Obstacle, Remembered, STOPPED_ANNOTATION, TEMPLATE_ANNOTATION, names,
    pod, replicas,
};
use crate::api::{ErnieModel, ModelUri};

/// Least seconds without progress before a rollout counts as stuck.
const PROGRESS_DEADLINE_SECONDS: i32 = 600;
/// Seconds for scheduling and pulling images, on top of the start-up budget.
const PLACEMENT_SECONDS: i32 = 300;

pub(super) fn deployment(
    model: &ErnieModel,
    uri: &ModelUri,
    engine: &Engine,
    remembered: &Remembered,
) -> Result<Deployment, Obstacle> {
    let template = pod::template(model, uri, engine)?;
    let hash = pod::template_hash(&template);
    // Suspending lifts the stop: resuming is another chance without any other change.
    let stopped = remembered.stopped.as_ref().filter(|stopped| stopped.template == hash && !model.spec.suspend);
    let is_stopped = model.spec.suspend || stopped.is_some();
    let replicas = if is_stopped { 0 } else { replicas::replicas(model, remembered) };

    let mut annotations =
        BTreeMap::from([(ENGINE_ANNOTATION.to_owned(), json(engine)), (TEMPLATE_ANNOTATION.to_owned(), hash.clone())]);
    if let Some(stopped) = stopped {
        annotations.insert(STOPPED_ANNOTATION.to_owned(), json(stopped));
    }
    if let Some(autoscaled) = replicas::autoscaled(model, remembered) {
        annotations.insert(AUTOSCALED_ANNOTATION.to_owned(), json(&autoscaled));
    }
    let mut metadata = names::metadata(model, model.name_any());
    metadata.annotations = Some(annotations);

    Ok(Deployment {
        metadata,
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector: names::selector(names::deployment_labels(model)),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            progress_deadline_seconds: Some(
                PROGRESS_DEADLINE_SECONDS.max(pod::startup_budget_seconds(model) + PLACEMENT_SECONDS),
            ),
            revision_history_limit: Some(2),
            template: pod::with_hash(template, hash),
            ..DeploymentSpec::default()
        }),
        status: None,
    })
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
