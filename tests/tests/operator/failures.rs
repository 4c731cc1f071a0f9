//! What stands in the way of a model, from the pods to its conditions: which pod, which number, what to do; cleared when
//! it is over.

use ernie_tests::scenario::{NAMESPACE, World, model};
use ernie_tests::simulation::Behaviour;
use serde_json::{Value, json};

/// A worker that ends with a termination message.
fn gave_up(reason: &str, exit_code: i32, message: &str) -> Behaviour {
    let text = json!({"reason": reason, "message": message}).to_string();
    Behaviour::Crashing { exit_code, reason: "Error".into(), message: text, restarts: 2 }
}

fn died(exit_code: i32, reason: &str) -> Behaviour {
    Behaviour::Crashing { exit_code, reason: reason.into(), message: String::new(), restarts: 3 }
}

/// A cause, the reason it is shown under, words of its message, and whether it waits for a person.
struct Case {
    behaviour: Behaviour,
    spec: Value,
    reason: &'static str,
    words: &'static [&'static str],
    stalled: bool,
}

fn case(behaviour: Behaviour, reason: &'static str, words: &'static [&'static str], stalled: bool) -> Case {
    Case { behaviour, spec: json!({}), reason, words, stalled }
}

fn cases() -> Vec<Case> {
    let unschedulable = |text: &str| Behaviour::Unschedulable(format!("0/3 nodes are available: {text}"));
    let waiting = |reason: &str, message: &str| Behaviour::Waiting(reason.into(), message.into());
    let claim = json!({"model": {"uri": "pvc://models/ernie"}});
    vec![
        case(
            unschedulable("3 Insufficient memory."),
            "InsufficientMemory",
            &["3 Insufficient memory", "2Gi memory"],
            false,
        ),
        case(unschedulable("3 Insufficient cpu."), "InsufficientCPU", &["Insufficient cpu"], false),
        case(unschedulable("3 node(s) had untolerated taint {a: b}."), "Unschedulable", &["untolerated taint"], false),
        Case {
            spec: claim.clone(),
            ..case(
                unschedulable("persistentvolumeclaim \"models\" not found."),
                "VolumeNotFound",
                &["models", "chat", "spec.model.uri"],
                false,
            )
        },
        case(
            waiting("ImagePullBackOff", "Back-off pulling image \"registry.test/worker:1.0.0\": not found"),
            "ImagePullFailed",
            &["not found", "worker image"],
            false,
        ),
        case(
            waiting("ErrImagePull", "failed to pull \"registry.test/ernie-4.5-0.3b:1\": unauthorized"),
            "ImagePullFailed",
            &["unauthorized", "spec.imagePullSecrets"],
            false,
        ),
        Case {
            spec: claim.clone(),
            ..case(
                Behaviour::Warned("FailedMount".into(), "MountVolume.SetUp failed for volume \"model\"".into()),
                "VolumeNotFound",
                &["MountVolume.SetUp failed", "models"],
                false,
            )
        },
        // An image stays as it is, a claim may be filled or repaired.
        case(gave_up("ModelNotFound", 10, "config.json is absent"), "ModelNotFound", &["config.json is absent"], true),
        Case {
            spec: claim.clone(),
            ..case(gave_up("ModelNotFound", 10, "config.json is absent"), "ModelNotFound", &["config.json"], false)
        },
        case(gave_up("CorruptModel", 12, "tensor x has a wrong shape"), "CorruptModel", &["tensor x"], true),
        Case {
            spec: claim,
            ..case(gave_up("CorruptModel", 12, "tensor x has a wrong shape"), "CorruptModel", &["tensor x"], false)
        },
        case(gave_up("DigestMismatch", 15, "/model has the digest"), "DigestMismatch", &["has the digest"], true),
        case(gave_up("UnsupportedModel", 11, "architecture Llama"), "UnsupportedModel", &["architecture Llama"], true),
        case(
            gave_up("InsufficientMemory", 13, "needs 3.1 GiB, limit is 2 GiB"),
            "InsufficientMemory",
            &["3.1 GiB"],
            true,
        ),
        case(died(137, "OOMKilled"), "OutOfMemory", &["2 GiB", "resources.limits.memory"], false),
        case(died(1, "Error"), "CrashLoop", &["exit code 1", "kubectl logs"], false),
        case(died(139, "Error"), "CrashLoop", &["139"], false),
        case(
            waiting("CreateContainerConfigError", "secret \"x\" not found"),
            "ContainerNotCreated",
            &["secret \"x\" not found"],
            false,
        ),
    ]
}

#[tokio::test]
async fn every_cause_is_named_with_its_pod_its_number_and_a_remedy_and_clears() {
    for Case { behaviour, spec, reason, words, stalled } in cases() {
        let mut world = World::new();
        world.cluster.behave("m-", behaviour.clone());
        world.apply(&model("m", &spec)).await;
        world.converge().await;
        // Some causes are told by events only, which are asked for after a while.
        world.wait(10);
        world.converge().await;
        let what = format!("{behaviour:?}");
        assert_eq!(world.state("m", "WorkersHealthy"), format!("False/{reason}"), "{what}");
        assert_eq!(world.state("m", "Ready"), format!("False/{reason}"), "{what}");
        let is_stalled = world.state("m", "Stalled").starts_with("True");
        assert_eq!(is_stalled, stalled, "{what}: Stalled is {}", world.state("m", "Stalled"));
        let message = world.message("m", "Ready");
        for word in words.iter().chain(&["m-"]) {
            assert!(message.contains(word), "{what}: '{word}' is not in: {message}");
        }
        let failure = &world.model("m").expect("stored")["status"]["modelStatus"]["lastFailureInfo"];
        assert_eq!(failure["reason"], reason, "{what}");

        world.cluster.behave("m-", Behaviour::Ready);
        world.edit("m", &json!({"spec": {"resources": {"limits": {"memory": "8Gi"}}}})).await;
        world.converge().await;
        world.wait(10);
        world.converge().await;
        assert_eq!(world.state("m", "Ready"), "True/Answering", "{what} is over");
        assert_eq!(world.state("m", "WorkersHealthy"), "True/Healthy", "{what} is over");
        assert!(world.state("m", "Stalled").starts_with("False"), "{what} is over");
    }
}

#[tokio::test]
async fn a_model_that_cannot_fit_is_stopped_and_stays_stopped_without_its_status() {
    let mut world = World::new();
    world.cluster.behave("m-", gave_up("InsufficientMemory", 13, "needs 3.1 GiB, limit is 2 GiB"));
    world.apply(&model("m", &json!({"replicas": 2}))).await;
    world.converge().await;
    assert!(world.server.objects("v1", "Pod", NAMESPACE).is_empty(), "no crash loop");
    assert_eq!(world.state("m", "PlanFits"), "False/InsufficientMemory");
    let wiped = kube::api::Patch::Merge(json!({"status": null}));
    world.models().patch_status("m", &kube::api::PatchParams::default(), &wiped).await.expect("accepted");
    world.restart_operators();
    world.converge().await;
    assert!(world.server.objects("v1", "Pod", NAMESPACE).is_empty());
    assert_eq!(world.state("m", "PlanFits"), "False/InsufficientMemory");
    assert!(world.message("m", "PlanFits").contains("3.1 GiB"));
}

#[tokio::test]
async fn a_failing_new_revision_leaves_the_old_one_serving_and_says_so() {
    let mut world = World::new();
    world.apply(&model("m", &json!({"replicas": 2}))).await;
    world.converge().await;
    let old: Vec<Value> = world.server.objects("v1", "Pod", NAMESPACE);
    let template = world.child("Deployment", "m").expect("there")["spec"]["template"].clone();
    world.cluster.behave("m-", died(1, "Error"));
    // Those that run go on: they are named before the rule above.
    for pod in &old {
        world.cluster.behave(pod["metadata"]["name"].as_str().expect("a name"), Behaviour::Ready);
    }
    world.edit("m", &json!({"spec": {"engine": {"maxModelLen": 2048}}})).await;
    world.converge().await;
    assert_ne!(world.child("Deployment", "m").expect("there")["spec"]["template"], template);
    let ready = world
        .server
        .objects("v1", "Pod", NAMESPACE)
        .iter()
        .filter(|pod| old.iter().any(|o| o["metadata"]["uid"] == pod["metadata"]["uid"]))
        .count();
    assert_eq!(ready, 2, "no old worker is taken away");
    assert_eq!(world.state("m", "Available"), "True/Answering");
    assert_eq!(world.state("m", "Ready"), "False/CrashLoop");
    assert!(world.message("m", "Ready").contains("exit code 1"));
    world.wait(4000);
    world.cluster.settle();
    world.converge().await;
    assert_eq!(world.state("m", "Stalled"), "True/ProgressDeadlineExceeded");
    assert!(world.message("m", "Stalled").contains("exit code 1"), "{}", world.message("m", "Stalled"));
}

#[tokio::test]
async fn a_refusal_by_quota_is_told_and_passes() {
    let mut world = World::new();
    world.cluster.refuse_pods(Some("pods \"m-x\" is forbidden: exceeded quota: small, requested: limits.memory=2Gi"));
    world.apply(&model("m", &json!({}))).await;
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "False/QuotaExceeded");
    assert!(world.message("m", "Ready").contains("exceeded quota: small"));
    world.cluster.refuse_pods(None);
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "True/Answering");
}

#[tokio::test]
async fn an_evicted_pod_is_replaced_and_soon_forgotten() {
    let mut world = World::new();
    world.apply(&model("m", &json!({"replicas": 2}))).await;
    world.converge().await;
    let pod = world.server.objects("v1", "Pod", NAMESPACE)[0]["metadata"]["name"].as_str().expect("a name").to_owned();
    world.cluster.behave(&pod, Behaviour::Failed("Evicted".into(), "The node was low on resource: memory".into()));
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "True/Answering");
    assert_eq!(world.state("m", "WorkersHealthy"), "True/Healthy", "its replacement runs");
    assert_eq!(world.model("m").expect("stored")["status"]["readyReplicas"], 2);
}

#[tokio::test]
async fn a_failure_is_told_by_one_event_and_its_end_by_another() {
    let mut world = World::new();
    world.cluster.behave("m-", gave_up("ModelNotFound", 10, "config.json is absent"));
    world.apply(&model("m", &json!({}))).await;
    world.converge().await;
    let told = |world: &World, reason: &str| {
        let events = world.server.objects("v1", "Event", NAMESPACE);
        events.iter().filter(|e| e["involvedObject"]["kind"] == "ErnieModel" && e["reason"] == reason).count()
    };
    assert_eq!(told(&world, "ModelNotFound"), 1);
    for _ in 0..3 {
        world.restart_operators();
        world.converge().await;
    }
    assert_eq!(told(&world, "ModelNotFound"), 1, "a reconcile alone tells nothing");
    let ready = told(&world, "Ready");
    world.wait(5);
    world.cluster.behave("m-", Behaviour::Ready);
    world.converge().await;
    assert_eq!(told(&world, "Ready"), ready + 1);
    assert_eq!(told(&world, "Recovered"), 1);
}
