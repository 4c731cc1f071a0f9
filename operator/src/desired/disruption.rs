//! The PodDisruptionBudget of a model: drains go on, a few workers at a time.

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;

use super::names;
use crate::api::{Disruption, ErnieModel};

pub(super) fn budget(model: &ErnieModel) -> PodDisruptionBudget {
    let Disruption { max_unavailable } = model.spec.disruption;
    PodDisruptionBudget {
        metadata: names::metadata(model, model.name_any()),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(max_unavailable)),
            selector: Some(names::pod_selector(model)),
            // A worker that never becomes ready must not hold up a drain.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
