//! PURE: pods and what their workers said, to what a decision takes.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::workers::Told;
use crate::api::ErnieModel;
use crate::desired::startup_budget_seconds;
use crate::observed::{ContainerState, Replica, Scheduling};
use crate::scale::observation::ReplicaId;
use crate::scale::{self, Moment, Observation, State};

/// Seconds for scheduling and pulling images, on top of the start-up budget, after which a pod is not counted on.
const PLACEMENT_SECONDS: i32 = 300;
/// Restarts after which a worker that does not come up is not counted on.
const RESTARTS: i32 = 3;

/// A time of Kubernetes.
pub(super) fn moment(time: &Time) -> Moment {
    Moment(time.0.as_microsecond())
}

/// When a pod was created; the epoch when that is not known.
fn created(pod: &Replica) -> Moment {
    pod.metadata.creation_timestamp.as_ref().map(moment).unwrap_or_default()
}

/// What is known of a model's workers, and the ready ones that said nothing, by name, with the reason. `told` is in the order
/// of `pods`; the replicas that are asked for are not known here.
pub(super) fn observation(
    model: &ErnieModel,
    pods: &[Arc<Replica>],
    told: &[Option<Told>],
    now: Moment,
) -> (Observation, Vec<(String, String)>) {
    let mut observation = Observation::default();
    let mut silent = Vec::new();
    let budget = f64::from(startup_budget_seconds(model).saturating_add(PLACEMENT_SECONDS));
    for (pod, told) in pods.iter().zip(told) {
        let state = state(pod, budget, now);
        let absence = told.as_ref().and_then(|told| told.absence.as_ref());
        if let Some(absence) = absence.filter(|_| state == State::Ready) {
            silent.push((pod.name().to_owned(), absence.to_string()));
        }
        observation.replicas.push(scale::Replica {
            id: identity(pod, told.as_ref()),
            state,
            created: created(pod),
            ready: told.as_ref().and_then(|told| told.ready),
            sample: told.as_ref().and_then(|told| told.sample),
        });
    }
    (observation, silent)
}

/// The pod and the process in it: a worker that starts again counts from nothing, as another one.
fn identity(pod: &Replica, told: Option<&Told>) -> ReplicaId {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).map(|digit| (digit as char).to_digit(16).unwrap_or(0));
    let uid = digits.fold(0, |number: ReplicaId, digit| number.wrapping_mul(16).wrapping_add(digit.into()));
    uid ^ told.map_or(0, |told| ReplicaId::from(told.process))
}

fn state(pod: &Replica, budget: f64, now: Moment) -> State {
    if pod.is_deleting() {
        return State::Draining;
    }
    let crashes = !matches!(pod.state, ContainerState::Running) && pod.restarts >= RESTARTS;
    if pod.failed.is_some() || crashes {
        return State::Failed;
    }
    if pod.ready {
        return State::Ready;
    }
    let late = now.since(created(pod)) > budget;
    if late || matches!(pod.scheduling, Scheduling::Refused(_)) { State::Unschedulable } else { State::Starting }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::autoscale::Absence;
    use crate::observed::{Exit, Waiting};
    use crate::scale::Sample;

    fn model() -> ErnieModel {
        serde_json::from_value(json!({
            "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": "m", "namespace": "n"},
            "spec": {"model": {"uri": "pvc://m"}},
        }))
        .expect("an ErnieModel")
    }

    fn pod(ready: bool) -> Replica {
        let mut pod = Replica { ready, state: ContainerState::Running, ..Replica::default() };
        pod.metadata.name = Some("m-1".to_owned());
        pod.metadata.uid = Some("0f5c6a1e-0000-4000-8000-000000000001".to_owned());
        pod.metadata.creation_timestamp = Some(Time("2026-01-01T00:00:00Z".parse().expect("a time")));
        pod
    }

    fn told(process: u64, absence: Option<Absence>) -> Told {
        Told { ready: None, sample: Some(Sample::default()), process, absence }
    }

    fn state_of(pod: Replica, seconds: f64) -> State {
        let now = created(&pod).after(seconds);
        observation(&model(), &[Arc::new(pod)], &[None], now).0.replicas[0].state
    }

    #[test]
    fn pods_are_counted_on_as_far_as_they_have_come() {
        assert_eq!(state_of(pod(true), 5.0), State::Ready);
        assert_eq!(state_of(pod(false), 5.0), State::Starting);
        assert_eq!(state_of(pod(false), 1e6), State::Unschedulable, "past every deadline");
        let refused = Replica { scheduling: Scheduling::Refused("no room".to_owned()), ..pod(false) };
        assert_eq!(state_of(refused, 5.0), State::Unschedulable);
        let failed = Waiting { reason: "Evicted".to_owned(), message: String::new() };
        assert_eq!(state_of(Replica { failed: Some(failed), ..pod(false) }, 5.0), State::Failed);
        let exit = Exit { code: 1, reason: "Error".to_owned(), message: String::new(), time: None };
        let crashing = Replica { state: ContainerState::Terminated(exit), restarts: 3, ..pod(false) };
        assert_eq!(state_of(crashing, 5.0), State::Failed);
        let mut leaving = pod(true);
        leaving.metadata.deletion_timestamp = leaving.metadata.creation_timestamp.clone();
        assert_eq!(state_of(leaving, 5.0), State::Draining);
    }

    #[test]
    fn another_process_in_the_same_pod_is_another_replica() {
        let of = |process| {
            let told = [Some(told(process, None))];
            observation(&model(), &[Arc::new(pod(true))], &told, Moment::default()).0.replicas[0].id
        };
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
    }

    #[test]
    fn ready_workers_that_are_silent_are_named_with_the_reason() {
        let pods = [Arc::new(pod(true)), Arc::new(pod(false))];
        let told = [Some(told(7, Some(Absence::Timeout))), Some(told(7, Some(Absence::NotAsked)))];
        let (_, silent) = observation(&model(), &pods, &told, Moment::default());
        assert_eq!(silent, [("m-1".to_owned(), "no answer within 4 s".to_owned())]);
    }
}
