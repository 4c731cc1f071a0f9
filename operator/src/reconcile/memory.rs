//! What is known of a model besides its objects: what was recorded, and what the autoscaler found.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::api::ErnieModel;
use crate::context::Context;
use crate::desired::{
    AUTOSCALED_ANNOTATION, Autoscaled, Children, ENGINE_ANNOTATION, Engine, Remembered, STOPPED_ANNOTATION, Stopped,
    TEMPLATE_ANNOTATION, Workload, replicas,
};
use crate::observed::{Found, Live, Replica};
use crate::scale::Finding;
use crate::status::{Facts, Scaling, of_replicas, stop};

/// What was recorded of a model, wherever that was: status is a cache, and the live Deployment outlives it.
pub(super) fn remember(
    model: &ErnieModel,
    found: &Children<Found>,
    facts: &Facts,
    finding: Option<&Finding>,
) -> Remembered {
    let deployment = match &found.workload {
        Workload::Deployment(deployment) => deployment.as_deref(),
        Workload::Withheld(_) => None,
    };
    let deployment =
        deployment.filter(|live| live.controller().is_some_and(|o| Some(&o.uid) == model.metadata.uid.as_ref()));
    let recorded = |key: &str| deployment.and_then(|live: &Live<_>| live.annotation(key));
    let in_status = model.status.as_ref().and_then(|status| status.engine.as_ref()).map(Engine::from);
    let engine = in_status.or_else(|| serde_json::from_str(&recorded(ENGINE_ANNOTATION)?).ok());
    let stopped = recorded(STOPPED_ANNOTATION).and_then(|text| serde_json::from_str::<Stopped>(&text).ok());
    let stopped = stopped.or_else(|| {
        let template = recorded(TEMPLATE_ANNOTATION)?;
        let failure = of_replicas(model, &facts.replicas, Some(&template), &facts.warnings);
        stop(failure.as_ref(), &facts.replicas, &template)
    });
    let recorded = recorded(AUTOSCALED_ANNOTATION).and_then(|text| serde_json::from_str::<Autoscaled>(&text).ok());
    let autoscaled = decided(model, finding).or_else(|| recorded?.kept(model));
    let is_unknown = model.spec.autoscaling.is_some() && autoscaled.is_none();
    let live = deployment.filter(|_| is_unknown).and_then(|live| live.value().pointer("/spec/replicas")?.as_i64());
    let live_replicas = live.and_then(|count| i32::try_from(count).ok()).filter(|count| *count > 0);
    Remembered { engine, stopped, autoscaled, live_replicas }
}

/// What the autoscaler decided on last, as this process or the status knows.
fn decided(model: &ErnieModel, finding: Option<&Finding>) -> Option<Autoscaled> {
    model.spec.autoscaling.as_ref()?;
    let in_status = model.status.as_ref().and_then(|status| status.autoscaling.as_ref());
    let status = finding.map(|finding| &finding.status).or(in_status)?;
    Some(Autoscaled { desired: status.desired_replicas, replicas: model.spec.replicas })
}

/// What the autoscaler found, when the model asks for it.
pub(super) fn finding(context: &Context, model: &ErnieModel) -> Option<Finding> {
    let uid = model.metadata.uid.as_deref().unwrap_or_default();
    if model.spec.autoscaling.is_none() {
        context.findings.forget(uid);
        return None;
    }
    context.findings.get(uid)
}

/// Tells the autoscaler how many workers there are to be and what its decision depends on, and the status what it found.
pub(super) fn scaling(
    context: &Context,
    model: &ErnieModel,
    remembered: &Remembered,
    finding: Option<Finding>,
    pods: &[Arc<Replica>],
) -> Scaling {
    let replicas = replicas(model, remembered);
    let Some(uid) = model.metadata.uid.as_deref().filter(|_| model.spec.autoscaling.is_some()) else {
        return Scaling { replicas: Some(replicas), told: None };
    };
    // Begins a decision when the spec is another, or when a worker becomes ready or goes.
    let mut print = std::hash::DefaultHasher::new();
    model.metadata.generation.hash(&mut print);
    pods.iter().filter(|pod| pod.answers()).for_each(|pod| pod.metadata.uid.hash(&mut print));
    context.findings.register(uid, replicas, print.finish());
    let told = finding.map(|Finding { status, active, limited }| {
        let verdict = |verdict: crate::scale::Verdict| (verdict.status, verdict.reason, verdict.message);
        (status, verdict(active), verdict(limited))
    });
    Scaling { replicas: Some(replicas), told }
}
