//! What is said of a model, cause by cause.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::api::{AutoscalingStatus, ErnieModel, ErnieModelStatus, Phase, ScalingDecision, condition};
use crate::desired::{Children, Obstacle, Workload};
use crate::observed::{Applied, Live, Outcome, Replica};

const TEMPLATE: &str = "new";

fn now() -> Timestamp {
    Timestamp::from_second(1_700_000_000).expect("a time")
}

fn model(spec: Value) -> ErnieModel {
    serde_json::from_value(json!({
        "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel",
        "metadata": {"name": "ernie", "namespace": "chat", "uid": "0f5c", "generation": 3},
        "spec": spec,
    }))
    .expect("an ErnieModel")
}

fn claimed() -> ErnieModel {
    model(json!({"model": {"uri": "pvc://models/ernie"},
        "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "2Gi"}}}))
}

fn live<K>(value: Value) -> Outcome<K> {
    Outcome::Live(Arc::new(serde_json::from_value::<Live<K>>(value).expect("a child")))
}

fn deployment(annotations: Value, status: Value) -> Outcome<Deployment> {
    live(json!({"metadata": {"name": "ernie", "annotations": annotations}, "status": status}))
}

fn children(deployment: Outcome<Deployment>) -> Children<Applied> {
    let child = || json!({"metadata": {"name": "ernie"}});
    Children {
        network_policy: live(child()),
        service: live(child()),
        workers: live(child()),
        disruption_budget: live(child()),
        workload: Workload::Deployment(deployment),
    }
}

fn settled() -> Children<Applied> {
    children(deployment(json!({"serving.ernie.io/template": TEMPLATE}), json!({})))
}

fn pod(name: &str, template: &str, status: Value) -> Arc<Replica> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "chat", "uid": format!("uid-{name}"),
            "labels": {"serving.ernie.io/model": "ernie"}, "annotations": {"serving.ernie.io/template": template}},
        "status": status,
    }))
    .expect("a pod");
    Arc::new(Replica::from(pod))
}

fn scheduled(state: Value, last: Value, ready: bool) -> Value {
    json!({
        "phase": "Running",
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": if ready { "True" } else { "False" }}],
        "containerStatuses": [{"name": "worker", "image": "", "imageID": "", "ready": ready, "restartCount": 2,
            "state": state, "lastState": last}],
    })
}

fn running(name: &str, template: &str) -> Arc<Replica> {
    pod(name, template, scheduled(json!({"running": {}}), json!({}), true))
}

fn loading(name: &str, template: &str) -> Arc<Replica> {
    pod(name, template, scheduled(json!({"running": {}}), json!({}), false))
}

fn waiting(reason: &str, message: &str) -> Arc<Replica> {
    let state = json!({"waiting": {"reason": reason, "message": message}});
    pod("ernie-1", TEMPLATE, scheduled(state, json!({}), false))
}

fn exited(code: i32, reason: &str, message: &str) -> Arc<Replica> {
    let last = json!({"terminated": {"exitCode": code, "reason": reason, "message": message}});
    let state = json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}});
    pod("ernie-1", TEMPLATE, scheduled(state, last, false))
}

fn unscheduled(message: &str) -> Arc<Replica> {
    let refused = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message});
    pod("ernie-1", TEMPLATE, json!({"phase": "Pending", "conditions": [refused]}))
}

fn judged(model: &ErnieModel, children: &Children<Applied>, replicas: Vec<Arc<Replica>>) -> ErnieModelStatus {
    status(model, children, &Facts { replicas, ..Facts::default() }, now())
}

fn of<'a>(status: &'a ErnieModelStatus, kind: &str) -> &'a Condition {
    status.conditions.iter().find(|condition| condition.type_ == kind).expect(kind)
}

fn verdict<'a>(status: &'a ErnieModelStatus, kind: &str) -> (&'a str, &'a str) {
    let condition = of(status, kind);
    (condition.status.as_str(), condition.reason.as_str())
}

#[test]
fn a_model_is_ready_when_a_worker_of_the_newest_template_answers() {
    let status = judged(&claimed(), &settled(), vec![running("ernie-1", TEMPLATE)]);
    assert_eq!(verdict(&status, condition::READY), ("True", "Answering"));
    assert_eq!(verdict(&status, condition::AVAILABLE), ("True", "Answering"));
    assert_eq!(verdict(&status, condition::PROGRESSING), ("False", "Complete"));
    assert_eq!(verdict(&status, condition::STALLED), ("False", "NotStalled"));
    assert_eq!(verdict(&status, condition::PLAN_FITS), ("True", "Fits"));
    assert_eq!(verdict(&status, condition::WORKERS_HEALTHY), ("True", "Healthy"));
    assert_eq!(verdict(&status, condition::MODEL_PINNED), ("False", "Mutable"));
    assert_eq!((status.phase, status.observed_generation), (Some(Phase::Ready), Some(3)));
    assert_eq!((status.replicas, status.ready_replicas, status.updated_replicas), (Some(1), Some(1), Some(1)));
    assert_eq!(status.grpc_url.as_deref(), Some("ernie.chat.svc:8033"));
    assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(3)));
}

#[test]
fn an_older_worker_that_answers_makes_it_available_and_not_ready() {
    let replicas = vec![running("ernie-1", "old"), loading("ernie-2", TEMPLATE)];
    let status = judged(&claimed(), &settled(), replicas);
    assert_eq!(verdict(&status, condition::READY), ("False", "Updating"));
    assert_eq!(verdict(&status, condition::AVAILABLE), ("True", "Answering"));
    assert_eq!(verdict(&status, condition::PROGRESSING), ("True", "RollingOut"));
    assert_eq!(status.phase, Some(Phase::Updating));
}

#[test]
fn loading_suspended_and_empty_models_say_so() {
    let status = judged(&claimed(), &settled(), vec![loading("ernie-1", TEMPLATE)]);
    assert_eq!(verdict(&status, condition::READY), ("False", "Loading"));
    assert_eq!(verdict(&status, condition::PLAN_FITS), ("Unknown", "Unknown"));
    assert_eq!(status.phase, Some(Phase::Loading));

    let mut suspended = claimed();
    suspended.spec.suspend = true;
    let status = judged(&suspended, &settled(), Vec::new());
    assert_eq!(verdict(&status, condition::READY), ("False", "Suspended"));
    assert_eq!(verdict(&status, condition::PROGRESSING), ("False", "Complete"));
    assert_eq!(status.phase, Some(Phase::Suspended));

    let mut empty = claimed();
    empty.spec.replicas = 0;
    let status = judged(&empty, &settled(), Vec::new());
    assert_eq!(verdict(&status, condition::READY), ("False", "NoReplicas"));
    assert!(of(&status, condition::READY).message.contains("kubectl scale"));

    let mut paused = claimed();
    paused.spec.paused = true;
    let status = judged(&paused, &settled(), vec![running("ernie-1", TEMPLATE)]);
    assert_eq!(verdict(&status, condition::PROGRESSING), ("False", "Paused"));
    assert_eq!(verdict(&status, condition::READY), ("True", "Answering"));
}

#[test]
fn a_draining_worker_does_not_count() {
    let mut draining = running("ernie-1", TEMPLATE).as_ref().clone();
    draining.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
    let status = judged(&claimed(), &settled(), vec![Arc::new(draining)]);
    assert_eq!(verdict(&status, condition::AVAILABLE), ("False", "NoReplicas"));
    assert_eq!(status.ready_replicas, Some(0));
}

/// One cause a line: what the cluster shows, the reason, and words that the message must hold.
#[test]
fn every_cause_gets_its_reason_the_object_and_the_remedy() {
    let image = model(json!({"model": {"uri": "oci://registry.example/ernie:1"}}));
    let claim = claimed();
    let said = |reason: &str| json!({"reason": reason, "message": "the sentence of the worker"}).to_string();
    let cases: Vec<(&ErnieModel, Arc<Replica>, &str, &[&str])> = vec![
        (
            &claim,
            unscheduled("0/1 nodes are available: persistentvolumeclaim \"models\" not found."),
            "VolumeNotFound",
            &["PersistentVolumeClaim models", "namespace chat", "create it"],
        ),
        (
            &claim,
            unscheduled("pod has unbound immediate PersistentVolumeClaims"),
            "VolumeNotFound",
            &["models", "StorageClass"],
        ),
        (
            &claim,
            unscheduled("0/3 nodes are available: 3 Insufficient cpu."),
            "InsufficientCPU",
            &["ernie-1", "2 cpu", "3 Insufficient cpu", "lower resources.requests.cpu"],
        ),
        (&claim, unscheduled("0/3 nodes are available: 3 Insufficient memory."), "InsufficientMemory", &["2Gi memory"]),
        (
            &claim,
            unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
            "InsufficientGPU",
            &["free GPU"],
        ),
        (
            &claim,
            unscheduled("0/1 nodes are available: 1 node(s) had untolerated taint {a: b}."),
            "Unschedulable",
            &["untolerated taint", "scheduling fields"],
        ),
        (
            &image,
            waiting("ImagePullBackOff", "Back-off pulling image \"registry.example/ernie:1\": not found"),
            "ImagePullFailed",
            &["model image registry.example/ernie:1", "spec.model.uri", "spec.imagePullSecrets"],
        ),
        (
            &image,
            waiting("ErrImagePull", "registry.example/worker:9: not found"),
            "ImagePullFailed",
            &["worker image", "chart"],
        ),
        (
            &image,
            waiting("CreateContainerError", "ImageVolumeMountFailed: x"),
            "ImageVolumeUnsupported",
            &["containerd 2.1", "pvc://"],
        ),
        (
            &claim,
            waiting("CreateContainerConfigError", "failed to prepare subPath for volumeMount \"model\""),
            "VolumeNotFound",
            &["folder ernie", "PersistentVolumeClaim models"],
        ),
        (
            &claim,
            waiting("CreateContainerError", "no such device"),
            "ContainerNotCreated",
            &["no such device", "kubectl describe"],
        ),
        (
            &claim,
            exited(10, "Error", &said("ModelNotFound")),
            "ModelNotFound",
            &["ernie-1", "the sentence of the worker"],
        ),
        (&claim, exited(12, "Error", &said("CorruptModel")), "CorruptModel", &["the sentence of the worker"]),
        (&claim, exited(14, "Error", &said("DeviceError")), "DeviceError", &["the sentence of the worker"]),
        (&claim, exited(15, "Error", &said("DigestMismatch")), "DigestMismatch", &["the sentence of the worker"]),
        (&claim, exited(12, "Error", "not the JSON of a worker"), "CorruptModel", &["ernie-1"]),
        (&claim, exited(2, "Error", &said("Usage")), "InvalidSpec", &["the sentence of the worker"]),
        (&claim, exited(2, "Error", ""), "CrashLoop", &["exit code 2", "kubectl logs --previous ernie-1"]),
        (&claim, exited(101, "Error", ""), "CrashLoop", &["exit code 101", "kubectl logs --previous ernie-1"]),
        (&claim, exited(137, "OOMKilled", ""), "OutOfMemory", &["limit 2 GiB", "raise resources.limits.memory"]),
        (&claim, exited(137, "Error", ""), "CrashLoop", &["killed", "137"]),
        (&claim, exited(0, "Completed", ""), "CrashLoop", &["2 times", "124 s"]),
    ];
    for (model, replica, reason, words) in cases {
        let status = judged(model, &settled(), vec![replica.clone()]);
        let condition = of(&status, condition::WORKERS_HEALTHY);
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", reason), "{condition:?}");
        for word in words {
            assert!(condition.message.contains(word), "{reason}: {} lacks {word:?}", condition.message);
        }
        assert_eq!(verdict(&status, condition::READY), ("False", reason));
        let info = status.model_status.and_then(|model| model.last_failure_info).expect("a failure");
        assert_eq!((info.reason.as_str(), info.pod_name.as_deref()), (reason, Some("ernie-1")));
        assert_eq!(status.phase, Some(Phase::Failed), "{reason}");

        let recovered = judged(model, &settled(), vec![running("ernie-1", TEMPLATE)]);
        assert_eq!(verdict(&recovered, condition::WORKERS_HEALTHY), ("True", "Healthy"));
        assert_eq!(recovered.model_status.expect("a model").last_failure_info, None, "cleared on recovery");
    }
}

#[test]
fn what_only_an_event_tells_is_told_too() {
    let creating = waiting("ContainerCreating", "");
    let facts = |reason: &str, message: &str| Facts {
        replicas: vec![creating.clone()],
        warnings: HashMap::from([("uid-ernie-1".to_owned(), (reason.to_owned(), message.to_owned()))]),
        ..Facts::default()
    };
    let status = status(&claimed(), &settled(), &facts("FailedMount", "MountVolume.SetUp failed: no such host"), now());
    assert_eq!(verdict(&status, condition::WORKERS_HEALTHY), ("False", "VolumeNotFound"));
    assert!(of(&status, condition::WORKERS_HEALTHY).message.contains("no such host"));
    let status = super::status(&claimed(), &settled(), &facts("FailedScheduling", "old news"), now());
    assert_eq!(verdict(&status, condition::WORKERS_HEALTHY), ("True", "Healthy"), "a pod with a node was scheduled");
}

#[test]
fn a_model_that_does_not_fit_shows_its_plan_and_is_stopped_for_good() {
    let detail = json!({"weightBytes": 3_000_000_000i64, "neededBytes": 3_300_000_000i64, "availableBytes": 2_147_483_648i64,
        "kvBytesPerToken": 18432, "dtype": "bfloat16", "quantization": "int8", "device": "cpu"});
    let message = json!({"reason": "InsufficientMemory", "message": "needs 3.1 GiB, limit is 2 GiB", "detail": detail});
    let replicas = vec![exited(13, "Error", &message.to_string())];
    let judgement = judged(&claimed(), &settled(), replicas.clone());
    for kind in [condition::PLAN_FITS, condition::WORKERS_HEALTHY, condition::READY] {
        assert_eq!(verdict(&judgement, kind), ("False", "InsufficientMemory"));
    }
    assert_eq!(verdict(&judgement, condition::STALLED), ("True", "InsufficientMemory"));
    let plan = judgement.plan.as_ref().expect("a plan");
    assert_eq!((plan.needed_bytes, plan.quantization.as_deref()), (Some(3_300_000_000), Some("int8")));

    let failure = of_replicas(&claimed(), &replicas, Some(TEMPLATE), &HashMap::new());
    let stopped = stop(failure.as_ref(), &replicas, TEMPLATE).expect("stopped");
    assert_eq!((stopped.template.as_str(), stopped.failure.exit_code), (TEMPLATE, Some(13)));
    assert_eq!(stop(failure.as_ref(), &replicas, "another template"), None);
    let mut beside_old = replicas.clone();
    beside_old.push(running("ernie-0", "old"));
    assert_eq!(stop(failure.as_ref(), &beside_old, TEMPLATE), None, "old workers go on serving");

    // The pods are gone, and the reason is still known.
    let annotations = json!({"serving.ernie.io/template": TEMPLATE,
        "serving.ernie.io/stopped": serde_json::to_string(&stopped).expect("JSON")});
    let later = judged(&claimed(), &children(deployment(annotations, json!({}))), Vec::new());
    assert_eq!(verdict(&later, condition::STALLED), ("True", "InsufficientMemory"));
    assert_eq!(verdict(&later, condition::PLAN_FITS), ("False", "InsufficientMemory"));
    assert_eq!(verdict(&later, condition::PROGRESSING), ("False", "InsufficientMemory"));
    assert_eq!(later.plan, judgement.plan);
    assert_eq!(later.phase, Some(Phase::Failed));
}

#[test]
fn an_image_that_cannot_be_served_stays_so_and_a_claim_may_be_repaired() {
    let image = model(json!({"model": {"uri": "oci://registry.example/ernie:1"}}));
    for (code, word, stops) in [
        (11, "UnsupportedModel", true),
        (10, "ModelNotFound", false),
        (12, "CorruptModel", false),
        (15, "DigestMismatch", false),
    ] {
        let replicas = vec![exited(code, "Error", &json!({"reason": word, "message": "m"}).to_string())];
        for (model, stays) in [(&image, true), (&claimed(), false)] {
            let failure = of_replicas(model, &replicas, Some(TEMPLATE), &HashMap::new());
            assert_eq!(stop(failure.as_ref(), &replicas, TEMPLATE).is_some(), stops && stays, "{word}");
            let status = judged(model, &settled(), replicas.clone());
            assert_eq!(of(&status, condition::PLAN_FITS).status == "False", stops, "{word}");
            assert_eq!(of(&status, condition::STALLED).status == "True", stays, "{word}");
        }
    }
}

#[test]
fn a_model_too_large_for_one_node_may_fit_another() {
    let message =
        json!({"reason": "InsufficientMemory", "message": "m", "detail": {"limitSource": "node"}}).to_string();
    let replicas = vec![exited(13, "Error", &message)];
    let failure = of_replicas(&claimed(), &replicas, Some(TEMPLATE), &HashMap::new());
    assert_eq!(stop(failure.as_ref(), &replicas, TEMPLATE), None);
    let status = judged(&claimed(), &settled(), replicas);
    assert_eq!(verdict(&status, condition::PLAN_FITS), ("False", "InsufficientMemory"));
    assert_eq!(of(&status, condition::STALLED).status, "False");
}

#[test]
fn one_failing_worker_beside_one_that_answers_degrades() {
    let replicas = vec![running("ernie-0", TEMPLATE), exited(137, "OOMKilled", "")];
    let mut model = claimed();
    model.spec.replicas = 2;
    let status = judged(&model, &settled(), replicas);
    assert_eq!(verdict(&status, condition::READY), ("True", "Answering"));
    assert_eq!(verdict(&status, condition::WORKERS_HEALTHY), ("False", "OutOfMemory"));
    assert_eq!(status.phase, Some(Phase::Degraded));
}

#[test]
fn a_taken_name_is_shown_and_never_ready() {
    let obstacle = Obstacle { reason: "NameConflict", message: "Service ernie exists".to_owned(), permanent: true };
    let mut children = settled();
    children.service = Outcome::Refused(obstacle);
    let status = judged(&claimed(), &children, vec![running("ernie-1", TEMPLATE)]);
    assert_eq!(verdict(&status, condition::READY), ("False", "NameConflict"));
    assert_eq!(verdict(&status, condition::STALLED), ("True", "NameConflict"));
    assert_eq!(verdict(&status, condition::AVAILABLE), ("True", "Answering"));
}

#[test]
fn a_quota_and_a_stuck_rollout_are_told_from_the_deployment() {
    let quota = json!({"conditions": [{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
        "message": "pods \"ernie-1\" is forbidden: exceeded quota: q, requested: cpu=2, used: cpu=3, limited: cpu=4"}]});
    let annotations = || json!({"serving.ernie.io/template": TEMPLATE});
    let status = judged(&claimed(), &children(deployment(annotations(), quota)), Vec::new());
    assert_eq!(verdict(&status, condition::WORKERS_HEALTHY), ("False", "QuotaExceeded"));
    assert!(of(&status, condition::WORKERS_HEALTHY).message.contains("requested: cpu=2"));

    let stuck = json!({"conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded",
        "message": "ReplicaSet has timed out progressing."}]});
    let status = judged(&claimed(), &children(deployment(annotations(), stuck)), vec![exited(10, "Error", "{}")]);
    assert_eq!(verdict(&status, condition::STALLED), ("True", "ProgressDeadlineExceeded"));
    assert!(of(&status, condition::STALLED).message.contains("ernie-1"), "the cause comes along");
}

#[test]
fn a_transition_keeps_its_time_until_the_status_changes() {
    let mut model = claimed();
    let first = judged(&model, &settled(), vec![loading("ernie-1", TEMPLATE)]);
    model.status = Some(first.clone());
    let later = now() + jiff::SignedDuration::from_secs(60);
    let facts = |replica| Facts { replicas: vec![replica], ..Facts::default() };
    let same = status(&model, &settled(), &facts(loading("ernie-1", TEMPLATE)), later);
    assert_eq!(same, first, "nothing to write");
    let ready = status(&model, &settled(), &facts(running("ernie-1", TEMPLATE)), later);
    assert_eq!(of(&ready, condition::READY).last_transition_time.0, later);
    assert_eq!(of(&ready, condition::STALLED).last_transition_time.0, now());
}

#[test]
fn each_transition_is_told_once_with_its_cause() {
    let reasons = |before: &ErnieModelStatus, after: &ErnieModelStatus| {
        let told = changed(&before.conditions, &after.conditions);
        told.into_iter().map(|transition| (transition.is_warning, transition.reason)).collect::<Vec<_>>()
    };
    let told = |list: &[(bool, &str)]| list.iter().map(|(bad, word)| (*bad, (*word).to_owned())).collect::<Vec<_>>();
    let nothing = ErnieModelStatus::default();
    let loading = judged(&claimed(), &settled(), vec![loading("ernie-1", TEMPLATE)]);
    let ready = judged(&claimed(), &settled(), vec![running("ernie-1", TEMPLATE)]);
    let message = json!({"reason": "InsufficientMemory", "message": "m"}).to_string();
    let broken = judged(&claimed(), &settled(), vec![exited(13, "Error", &message)]);
    assert_eq!(reasons(&nothing, &loading), told(&[]));
    assert_eq!(reasons(&loading, &ready), told(&[(false, "Ready")]));
    assert_eq!(reasons(&ready, &broken), told(&[(true, "InsufficientMemory")]), "one event for one cause");
    assert_eq!(reasons(&broken, &broken), told(&[]));
    assert_eq!(reasons(&broken, &ready), told(&[(false, "Recovered"), (false, "Ready")]));
}

fn any_replica() -> impl Strategy<Value = Arc<Replica>> {
    (0..8u8, any::<bool>(), 0..40i32, "[ -~]{0,80}").prop_map(|(kind, is_new, code, text)| {
        let template = if is_new { TEMPLATE } else { "old" };
        match kind {
            0 => running("ernie-0", template),
            1 => loading("ernie-1", template),
            2 => unscheduled(&text),
            3 => waiting("ContainerCreating", &text),
            4 => waiting("ImagePullBackOff", &text),
            5 => exited(code, "Error", &text),
            6 => exited(137, "OOMKilled", &text),
            _ => pod("ernie-9", template, json!({"phase": "Failed", "reason": "Evicted", "message": text})),
        }
    })
}

proptest! {
    #[test]
    fn the_conditions_never_contradict_each_other(
        replicas in prop::collection::vec(any_replica(), 0..5), suspend: bool, paused: bool, wanted in 0..4i32,
    ) {
        let mut model = claimed();
        (model.spec.suspend, model.spec.paused, model.spec.replicas) = (suspend, paused, wanted);
        let status = judged(&model, &settled(), replicas);
        let is = |kind: &str, word: &str| of(&status, kind).status == word;
        prop_assert!(!is(condition::READY, "True") || is(condition::AVAILABLE, "True"));
        prop_assert!(!is(condition::STALLED, "True") || is(condition::PROGRESSING, "False"));
        prop_assert!(status.ready_replicas <= status.replicas && status.updated_replicas <= status.replicas);
        prop_assert!(!is(condition::READY, "True") || status.ready_replicas > Some(0));
        for condition in &status.conditions {
            prop_assert!(!condition.message.is_empty() && condition.message.chars().count() <= 2000);
            prop_assert!(condition.reason.chars().all(|c| c.is_ascii_alphanumeric()) && !condition.reason.is_empty());
        }
        model.status = Some(status.clone());
        prop_assert!(serde_json::to_string(&status).expect("JSON").len() < 32 * 1024);
    }
}

fn scaled() -> ErnieModel {
    model(json!({"model": {"uri": "pvc://models/ernie"}, "autoscaling": {"maxReplicas": 5}}))
}

fn told(desired: i32, reason: &'static str) -> Scaling {
    let status = AutoscalingStatus { desired_replicas: desired, ..AutoscalingStatus::default() };
    let limited = (Some(false), "DesiredWithinRange", "fine".to_owned());
    Scaling { replicas: Some(desired), told: Some((status, (Some(false), reason, "because".to_owned()), limited)) }
}

#[test]
fn what_the_autoscaler_found_is_told_and_its_number_is_what_is_waited_for() {
    let replicas = vec![running("ernie-1", TEMPLATE), running("ernie-2", TEMPLATE)];
    let judge = |scaling: Scaling| {
        let facts = Facts { replicas: replicas.clone(), scaling, ..Facts::default() };
        status(&scaled(), &settled(), &facts, now())
    };
    let two = judge(told(2, "MetricsMissing"));
    assert_eq!(verdict(&two, condition::PROGRESSING), ("False", "Complete"));
    assert_eq!(verdict(&two, condition::SCALING_ACTIVE), ("False", "MetricsMissing"));
    assert_eq!(verdict(&two, condition::SCALING_LIMITED), ("False", "DesiredWithinRange"));
    assert_eq!(two.autoscaling.as_ref().map(|status| status.desired_replicas), Some(2));
    assert_eq!(verdict(&judge(told(3, "MetricsMissing")), condition::PROGRESSING), ("True", "RollingOut"));
    assert_eq!(verdict(&judge(Scaling::default()), condition::SCALING_ACTIVE), ("Unknown", "MetricsMissing"));

    // A new leader knows nothing yet.
    let mut known = scaled();
    known.status = Some(two.clone());
    let facts =
        Facts { replicas: replicas.clone(), scaling: Scaling { replicas: Some(2), told: None }, ..Facts::default() };
    let after = status(&known, &settled(), &facts, now());
    assert_eq!((&after.autoscaling, &after.conditions), (&two.autoscaling, &two.conditions));

    let plain = judged(&claimed(), &settled(), replicas);
    assert!(plain.autoscaling.is_none() && plain.conditions.iter().all(|c| !c.type_.starts_with("Scaling")));
}

#[test]
fn trouble_of_the_autoscaler_is_told_once_and_what_was_asked_for_is_not() {
    let of = |reason: &'static str| {
        let facts =
            Facts { replicas: vec![running("ernie-1", TEMPLATE)], scaling: told(1, reason), ..Facts::default() };
        status(&scaled(), &settled(), &facts, now()).conditions
    };
    let reasons = |before: &[Condition], after: &[Condition]| {
        changed(before, after).into_iter().map(|transition| transition.reason).collect::<Vec<_>>()
    };
    let quiet = of("Advisory");
    assert_eq!(reasons(&quiet, &of("SLOInfeasible")), ["SLOInfeasible"]);
    assert_eq!(reasons(&of("SLOInfeasible"), &of("SLOInfeasible")), [""; 0]);
    assert_eq!(reasons(&of("SLOInfeasible"), &of("Disabled")), [""; 0]);
}

#[test]
fn a_change_of_the_number_is_one_event_with_the_numbers() {
    let with = |desired: i32, decided: &[(i32, i32)]| {
        let decision = |&(from, to): &(i32, i32)| ScalingDecision {
            time: Time(now()),
            from,
            to,
            reason: "LoadGrew".to_owned(),
            message: format!("{from} to {to} replicas"),
        };
        let decisions = decided.iter().map(decision).collect();
        let autoscaling = AutoscalingStatus { desired_replicas: desired, decisions, ..AutoscalingStatus::default() };
        ErnieModelStatus { autoscaling: Some(autoscaling), ..ErnieModelStatus::default() }
    };
    let (event, at) = rescaled(&with(1, &[]), &with(3, &[(1, 3)])).expect("an event");
    assert_eq!((event.reason.as_str(), event.is_warning, at), ("SuccessfulRescale", false, now()));
    assert_eq!(event.message, "New size: 3; 1 to 3 replicas");
    assert_eq!(rescaled(&with(3, &[(1, 3)]), &with(3, &[(1, 3)])), None);
    assert_eq!(rescaled(&with(1, &[]), &with(1, &[(1, 3)])), None, "advice is no change");
    assert!(rescaled(&ErnieModelStatus::default(), &with(3, &[(1, 3)])).is_some(), "the first decision");
}
