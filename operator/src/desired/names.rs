//! Names, labels and annotations of children. Selectors are immutable choices: changing one strands existing objects.

use std::collections::BTreeMap;

use ernie_proto::contract::{MODEL_LABEL, RANK_LABEL, RANK_LEADER, TRACK_LABEL, TRACK_STABLE};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::{Resource, ResourceExt};

use crate::api::ErnieModel;

/// Hash of everything the operator last wrote to this child: finds fields that the spec no longer has.
pub const APPLIED_ANNOTATION: &str = "serving.ernie.io/applied";
/// On the Deployment: the pinned engine as JSON, for the day when status is lost.
pub const ENGINE_ANNOTATION: &str = "serving.ernie.io/engine";
/// On the Deployment: the failure for which the workers were stopped, as JSON.
pub const STOPPED_ANNOTATION: &str = "serving.ernie.io/stopped";
/// On the Deployment: the number of workers that the autoscaler decided on and the `spec.replicas` that it stands in for, as
/// JSON, for the day when status is lost or autoscaling is removed.
pub const AUTOSCALED_ANNOTATION: &str = "serving.ernie.io/autoscaled";
/// On pods: hash of the pod template they come from.
pub const TEMPLATE_ANNOTATION: &str = "serving.ernie.io/template";

/// Name of the headless Service.
pub fn workers_name(model: &ErnieModel) -> String {
    format!("{}-workers", model.name_any())
}

/// The model that an object with these labels belongs to.
pub fn model_of(labels: &BTreeMap<String, String>) -> Option<&str> {
    labels.get(MODEL_LABEL).map(String::as_str)
}

/// Selector of the model's Deployment.
pub(super) fn deployment_labels(model: &ErnieModel) -> BTreeMap<String, String> {
    labels([(MODEL_LABEL, model.name_any()), (TRACK_LABEL, TRACK_STABLE.to_owned())])
}

/// Selector of the model's Services: pods that clients talk to, of every track.
pub(super) fn service_labels(model: &ErnieModel) -> BTreeMap<String, String> {
    labels([(MODEL_LABEL, model.name_any()), (RANK_LABEL, RANK_LEADER.to_owned())])
}

/// Labels of worker pods.
pub(super) fn pod_labels(model: &ErnieModel) -> BTreeMap<String, String> {
    let mut all = child_labels(model);
    all.insert(TRACK_LABEL.to_owned(), TRACK_STABLE.to_owned());
    all.insert(RANK_LABEL.to_owned(), RANK_LEADER.to_owned());
    all
}

/// Selector of all pods of the model, as the policy and the disruption budget take it.
pub fn pod_selector(model: &ErnieModel) -> LabelSelector {
    selector(labels([(MODEL_LABEL, model.name_any())]))
}

/// Selector of the pods that the scale subresource counts.
pub fn scale_selector(model: &ErnieModel) -> String {
    format!("{MODEL_LABEL}={},{RANK_LABEL}={RANK_LEADER},{TRACK_LABEL}={TRACK_STABLE}", model.name_any())
}

pub(super) fn selector(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}

/// Metadata of a child: name, namespace, labels, and the model as its owner.
pub(super) fn metadata(model: &ErnieModel, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: model.namespace(),
        labels: Some(child_labels(model)),
        owner_references: model.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

fn child_labels(model: &ErnieModel) -> BTreeMap<String, String> {
    labels([
        ("app.kubernetes.io/component", "worker".to_owned()),
        ("app.kubernetes.io/instance", model.name_any()),
        ("app.kubernetes.io/managed-by", "ernie-operator".to_owned()),
        ("app.kubernetes.io/name", "ernie-worker".to_owned()),
        (MODEL_LABEL, model.name_any()),
    ])
}

fn labels<const N: usize>(pairs: [(&str, String); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
