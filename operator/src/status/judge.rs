//! PURE: the conditions, in the order in which they explain each other.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DeploymentStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

use super::conditions::{Verdict, condition};
use super::failure::{Failure, of_replicas};
use super::scaling::{Scaling, autoscaling};
use crate::api::{EngineStatus, ErnieModel, ErnieModelStatus, ModelStatus, ModelUri, Phase, condition as name};
use crate::desired::{
    Children, Obstacle, STOPPED_ANNOTATION, Stopped, TEMPLATE_ANNOTATION, Workload, scale_selector, served_name,
};
use crate::observed::{Applied, Outcome, Replica};
use ernie_proto::contract::{GRPC_PORT, HTTP_PORT};

/// What is known of a model besides its children.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Its pods, oldest first.
    pub replicas: Vec<Arc<Replica>>,
    /// Newest warning events of pods that wait without saying why, by pod uid: reason and message.
    pub warnings: HashMap<String, (String, String)>,
    /// The engine pinned for it.
    pub engine: Option<EngineStatus>,
    /// How many workers there are to be.
    pub scaling: Scaling,
}

/// The status of a model whose children stand as `children` says.
pub fn status(model: &ErnieModel, children: &Children<Applied>, facts: &Facts, now: Timestamp) -> ErnieModelStatus {
    let view = View::new(model, children, facts);
    let before = model.status.as_ref().map_or(&[][..], |status| &status.conditions);

    let plan_fits = view.plan_fits(before);
    let workers_healthy = view.workers_healthy();
    let available = view.available();
    let ready = view.ready(&[&plan_fits, &workers_healthy, &available]);
    let stalled = view.stalled();
    let progressing = view.progressing(&ready, &stalled);
    let model_pinned = view.model_pinned();
    let phase = view.phase(&ready, &available, &workers_healthy, &stalled);

    let (scaled, scaling) = autoscaling(model, &facts.scaling, before);
    let generation = model.metadata.generation;
    let conditions = [
        (name::READY, ready),
        (name::AVAILABLE, available),
        (name::PROGRESSING, progressing),
        (name::STALLED, stalled),
        (name::PLAN_FITS, plan_fits),
        (name::WORKERS_HEALTHY, workers_healthy),
        (name::MODEL_PINNED, model_pinned),
    ]
    .into_iter()
    .chain(scaling)
    .map(|(kind, verdict)| condition(kind, verdict, before, generation, now));

    let host = format!("{}.{}.svc", model.name_any(), model.namespace().unwrap_or_default());
    let plan = view.failure.as_ref().and_then(|failure| failure.plan.clone());
    ErnieModelStatus {
        observed_generation: generation,
        replicas: Some(view.existing),
        ready_replicas: Some(view.answering),
        updated_replicas: Some(view.updated),
        selector: Some(scale_selector(model)),
        url: Some(format!("http://{host}:{HTTP_PORT}")),
        grpc_url: Some(format!("{host}:{GRPC_PORT}")),
        phase: Some(phase),
        conditions: conditions.collect(),
        model_status: Some(ModelStatus {
            name: served_name(model),
            last_failure_info: view.failure.map(|failure| failure.info),
        }),
        plan,
        engine: facts.engine.clone(),
        autoscaling: scaled,
    }
}

/// A model as it is judged.
struct View<'a> {
    model: &'a ErnieModel,
    /// What stands in the way, the first cause.
    failure: Option<Failure>,
    /// True when a child is not as the spec asks.
    obstructed: bool,
    deadline_exceeded: Option<String>,
    existing: i32,
    answering: i32,
    updated: i32,
    updated_answering: i32,
    /// How many there should be now.
    wanted: i32,
}

impl<'a> View<'a> {
    fn new(model: &'a ErnieModel, children: &Children<Applied>, facts: &Facts) -> Self {
        let Children { network_policy, service, workers, disruption_budget, workload } = children;
        let (deployment, withheld) = match workload {
            Workload::Deployment(outcome) => (outcome.live(), outcome.obstacle()),
            Workload::Withheld(obstacle) => (None, Some(obstacle)),
        };
        let obstacle = first_obstacle([
            obstacle_of(service),
            obstacle_of(workers),
            withheld,
            obstacle_of(disruption_budget),
            obstacle_of(network_policy),
        ]);
        let template = deployment.and_then(|deployment| deployment.annotation(TEMPLATE_ANNOTATION));
        let template = template.as_deref();
        let stopped = deployment
            .and_then(|deployment| deployment.annotation(STOPPED_ANNOTATION))
            .and_then(|text| serde_json::from_str::<Stopped>(&text).ok())
            .filter(|stopped| Some(stopped.template.as_str()) == template);
        let rollout = deployment.map(|deployment| deployment.status::<DeploymentStatus>()).unwrap_or_default();

        let alive = || facts.replicas.iter().filter(|replica| !replica.is_deleting() && replica.failed.is_none());
        let is_updated = |replica: &&Arc<Replica>| template.is_some() && replica.template.as_deref() == template;
        let failure = obstacle
            .map(Failure::from)
            .or_else(|| stopped.as_ref().map(Failure::from))
            .or_else(|| of_replicas(model, &facts.replicas, template, &facts.warnings))
            .or_else(|| replica_failure(model, &rollout));
        let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        Self {
            model,
            failure,
            obstructed: obstacle.is_some(),
            deadline_exceeded: rollout_condition(&rollout, "Progressing", "ProgressDeadlineExceeded"),
            existing: count(alive().count()),
            answering: count(alive().filter(|replica| replica.ready).count()),
            updated: count(alive().filter(is_updated).count()),
            updated_answering: count(alive().filter(is_updated).filter(|replica| replica.ready).count()),
            wanted: match model.spec.suspend || stopped.is_some() {
                true => 0,
                false => facts.scaling.replicas.unwrap_or(model.spec.replicas),
            },
        }
    }

    fn plan_fits(&self, before: &[Condition]) -> Verdict {
        let failure = self.failure.as_ref().filter(|failure| failure.is_about_plan());
        if let Some(failure) = failure {
            return Verdict::new(false, &failure.info.reason, &failure.info.message);
        }
        let fitted = before.iter().any(|condition| {
            condition.type_ == name::PLAN_FITS
                && condition.status == "True"
                && condition.observed_generation == self.model.metadata.generation
        });
        if self.updated_answering > 0 || fitted {
            return Verdict::new(true, "Fits", "weights and key-value cache fit the resources");
        }
        Verdict::unknown("Unknown", "no worker has read the model yet")
    }

    fn workers_healthy(&self) -> Verdict {
        match &self.failure {
            Some(failure) => Verdict::new(false, &failure.info.reason, &failure.info.message),
            None => Verdict::new(true, "Healthy", "no worker is failing"),
        }
    }

    fn available(&self) -> Verdict {
        let name = self.model.name_any();
        if self.answering > 0 {
            return Verdict::new(true, "Answering", format!("{} of {} workers answer", self.answering, self.existing));
        }
        if self.model.spec.suspend {
            let message = format!("ErnieModel {name} is suspended: set spec.suspend to false");
            return Verdict::new(false, "Suspended", message);
        }
        if self.model.spec.replicas == 0 && self.wanted == 0 {
            let message =
                format!("ErnieModel {name} has 0 replicas: scale it with `kubectl scale em {name} --replicas=1`");
            return Verdict::new(false, "NoReplicas", message);
        }
        if self.existing == 0 {
            return Verdict::new(false, "NoReplicas", "no worker exists yet");
        }
        Verdict::new(false, "Loading", format!("0 of {} workers answer yet", self.existing))
    }

    fn ready(&self, explaining: &[&Verdict]) -> Verdict {
        if self.updated_answering > 0 && !self.obstructed {
            return Verdict::new(true, "Answering", "a client can get a token now");
        }
        match explaining.iter().find(|verdict| verdict.is_false()) {
            Some(verdict) => Verdict::new(false, &verdict.reason, &verdict.message),
            None => Verdict::new(
                false,
                "Updating",
                format!("workers of the newest revision are loading; {} older ones answer", self.answering),
            ),
        }
    }

    fn stalled(&self) -> Verdict {
        if let Some(failure) = self.failure.as_ref().filter(|failure| failure.permanent) {
            return Verdict::new(true, &failure.info.reason, &failure.info.message);
        }
        if let Some(deadline) = &self.deadline_exceeded {
            let cause = self.failure.as_ref().map_or(deadline, |failure| &failure.info.message);
            return Verdict::new(true, "ProgressDeadlineExceeded", format!("no progress for too long: {cause}"));
        }
        Verdict::new(false, "NotStalled", "nothing waits for a person")
    }

    fn progressing(&self, ready: &Verdict, stalled: &Verdict) -> Verdict {
        if self.model.spec.paused {
            return Verdict::new(false, "Paused", "children are left as they are: set spec.paused to false");
        }
        if stalled.is_true() {
            return Verdict::new(false, &stalled.reason, &stalled.message);
        }
        let complete = self.updated == self.wanted
            && self.existing == self.wanted
            && self.updated_answering == self.wanted
            && !self.obstructed
            && (ready.is_true() || self.wanted == 0);
        if complete {
            return Verdict::new(
                false,
                "Complete",
                format!("{} of {} workers are up to date", self.updated, self.wanted),
            );
        }
        let message = format!(
            "{} of {} workers are up to date and answer, {} exist",
            self.updated_answering, self.wanted, self.existing
        );
        Verdict::new(true, "RollingOut", message)
    }

    fn model_pinned(&self) -> Verdict {
        let uri = &self.model.spec.model.uri;
        match uri.parse::<ModelUri>() {
            Ok(parsed) if parsed.is_pinned() => Verdict::new(true, "Digest", "the model is named by its digest"),
            Ok(ModelUri::Claim { .. }) => {
                Verdict::new(false, "Mutable", format!("whoever may write to {uri} can change the model"))
            }
            _ => Verdict::new(
                false,
                "Mutable",
                format!("{uri} can change: name the image by digest, as in oci://HOST/REPOSITORY@sha256:…"),
            ),
        }
    }

    fn phase(&self, ready: &Verdict, available: &Verdict, healthy: &Verdict, stalled: &Verdict) -> Phase {
        if self.model.spec.suspend {
            Phase::Suspended
        } else if ready.is_true() {
            if healthy.is_false() {
                Phase::Degraded
            } else if self.updated < self.existing {
                Phase::Updating
            } else {
                Phase::Ready
            }
        } else if available.is_true() {
            if healthy.is_false() { Phase::Degraded } else { Phase::Updating }
        } else if stalled.is_true() || healthy.is_false() {
            Phase::Failed
        } else if self.existing > 0 {
            Phase::Loading
        } else {
            Phase::Pending
        }
    }
}

fn obstacle_of<K>(outcome: &Outcome<K>) -> Option<&Obstacle> {
    outcome.obstacle()
}

/// A permanent one before one that may pass.
fn first_obstacle<const N: usize>(obstacles: [Option<&Obstacle>; N]) -> Option<&Obstacle> {
    let all = || obstacles.into_iter().flatten();
    all().find(|obstacle| obstacle.permanent).or_else(|| all().next())
}

/// Why the ReplicaSet controller cannot create pods: a quota, most often.
fn replica_failure(model: &ErnieModel, rollout: &DeploymentStatus) -> Option<Failure> {
    let condition = rollout.conditions.iter().flatten().find(|c| c.type_ == "ReplicaFailure" && c.status == "True")?;
    let cause = condition.message.clone().unwrap_or_default();
    let (reason, remedy) = if cause.contains("exceeded quota") {
        ("QuotaExceeded", "raise the ResourceQuota, lower resources.requests, or remove something else")
    } else {
        ("Rejected", "correct the ErnieModel or the admission rule")
    };
    Some(Failure::from(&Obstacle {
        reason,
        message: format!("pods of Deployment {} cannot be created: {cause}: {remedy}", model.name_any()),
        permanent: false,
    }))
}

fn rollout_condition(rollout: &DeploymentStatus, kind: &str, reason: &str) -> Option<String> {
    let mut conditions = rollout.conditions.iter().flatten();
    let found = conditions.find(|c| c.type_ == kind && c.reason.as_deref() == Some(reason))?;
    Some(found.message.clone().unwrap_or_default())
}
