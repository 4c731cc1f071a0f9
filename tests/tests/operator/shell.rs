//! The reconcile against the in-memory API server: what it makes, heals, refuses and leaves alone.

use ernie_tests::apiserver::{Entry, Verb, transcript};
use ernie_tests::scenario::{NAMESPACE, WORKLOADS, World, children_touched, defaults, model, violations};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

const CHILDREN: [(&str, &str); 5] = [
    ("NetworkPolicy", "m"),
    ("Service", "m"),
    ("Service", "m-workers"),
    ("PodDisruptionBudget", "m"),
    ("Deployment", "m"),
];

async fn with_model(spec: &Value) -> World {
    let mut world = World::new();
    world.apply(&model("m", spec)).await;
    world.converge().await;
    world
}

fn pods(world: &World) -> Vec<(String, String)> {
    let pods = world.server.objects("v1", "Pod", NAMESPACE);
    pods.iter().map(|pod| (pod["metadata"]["name"].to_string(), pod["metadata"]["uid"].to_string())).collect()
}

fn spec_of(world: &World, kind: &str, name: &str) -> Value {
    world.child(kind, name).unwrap_or_else(|| panic!("{kind} {name} is there"))["spec"].clone()
}

#[tokio::test]
async fn a_model_gets_its_children_in_order_with_itself_as_owner_and_becomes_ready() {
    let world = with_model(&json!({"replicas": 2})).await;
    let uid = world.model("m").expect("stored")["metadata"]["uid"].clone();
    for (kind, name) in CHILDREN {
        let child = world.child(kind, name).unwrap_or_else(|| panic!("{kind} {name} is made"));
        let owner = &child["metadata"]["ownerReferences"][0];
        assert_eq!((&owner["uid"], &owner["controller"]), (&uid, &json!(true)), "{kind} {name}");
        assert_eq!(child["metadata"]["labels"]["serving.ernie.io/model"], "m", "{kind} {name}");
    }
    let log = world.operator_log();
    let created: Vec<&str> = log
        .iter()
        .filter(|entry| entry.call.verb == Verb::Create && entry.call.plural != "events")
        .map(|entry| entry.call.plural.as_str())
        .collect();
    assert_eq!(created.len(), CHILDREN.len(), "each child is created once: {created:?}");
    assert_eq!(created.last(), Some(&"deployments"), "workers start when everything else is there");
    assert_eq!(world.state("m", "Ready"), "True/Answering");
    let status = &world.model("m").expect("stored")["status"];
    assert_eq!((&status["readyReplicas"], &status["observedGeneration"]), (&json!(2), &json!(1)));
    assert_eq!(status["grpcUrl"], "m.chat.svc:8033");
}

#[tokio::test]
async fn the_first_write_follows_a_fresh_look_at_the_model() {
    let world = with_model(&json!({})).await;
    let log = world.operator_log();
    let first_write = log.iter().position(Entry::is_mutating).expect("something is written");
    let looked =
        log[..first_write].iter().any(|entry| entry.call.verb == Verb::Get && entry.call.plural == "erniemodels");
    assert!(looked, "{}", transcript(&log[..=first_write]));
}

#[tokio::test]
async fn no_workload_leaves_anything_to_write_or_breaks_a_rule_of_writing() {
    for workload in WORKLOADS {
        let mut world = World::new();
        (workload.run)(&mut world).await;
        let broken = violations(&world.operator_log());
        assert!(broken.is_empty(), "{}: {broken:#?}", workload.name);
        let writes = world.writes_at_rest().await;
        assert!(writes.is_empty(), "{}: at rest it writes\n{}", workload.name, transcript(&writes));
    }
}

#[tokio::test]
async fn conditions_keep_their_transition_times_and_follow_the_conventions() {
    let mut world = with_model(&json!({})).await;
    let before = world.condition("m", "Ready").expect("there");
    world.wait(100);
    world.edit("m", &json!({"spec": {"replicas": 2}})).await;
    world.converge().await;
    let after = world.condition("m", "Ready").expect("there");
    assert_eq!(after["status"], before["status"]);
    assert_eq!(after["lastTransitionTime"], before["lastTransitionTime"]);
    let model = world.model("m").expect("stored");
    for condition in model["status"]["conditions"].as_array().expect("a list") {
        for field in ["type", "status", "reason", "message", "lastTransitionTime"] {
            assert!(condition[field].is_string(), "{field} of {condition}");
        }
        assert_eq!(condition["observedGeneration"], model["metadata"]["generation"], "{condition}");
    }
}

#[tokio::test]
async fn a_transition_raises_one_event_and_a_reconcile_none() {
    let mut world = with_model(&json!({})).await;
    let events = |world: &World| world.server.objects("v1", "Event", NAMESPACE);
    let reasons = |world: &World| events(world).iter().map(|event| event["reason"].to_string()).collect::<Vec<_>>();
    let at_first = reasons(&world);
    assert!(!at_first.is_empty(), "becoming ready is told");
    for _ in 0..3 {
        world.restart_operators();
        world.converge().await;
    }
    assert_eq!(reasons(&world), at_first);
    for event in events(&world) {
        assert_eq!(event["involvedObject"]["kind"], "ErnieModel", "{event}");
        assert!(event["message"].as_str().is_some_and(|message| message.len() <= 1024), "{event}");
    }
}

#[tokio::test]
async fn a_field_taken_out_of_the_spec_leaves_the_children_too() {
    let mut world = with_model(&json!({})).await;
    let bare = spec_of(&world, "Deployment", "m");
    let full = json!({"nodeSelector": {"pool": "a"}, "priorityClassName": "high",
        "tolerations": [{"key": "gpu", "operator": "Exists"}], "imagePullSecrets": [{"name": "s"}],
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}]}},
        "resources": {"requests": {"cpu": "500m"}}});
    world.apply(&model("m", &full)).await;
    world.converge().await;
    let pod = &spec_of(&world, "Deployment", "m")["template"]["spec"];
    for field in ["nodeSelector", "priorityClassName", "tolerations", "imagePullSecrets", "affinity"] {
        assert!(!pod[field].is_null(), "{field}");
    }
    world.apply(&model("m", &json!({}))).await;
    world.converge().await;
    assert_eq!(spec_of(&world, "Deployment", "m"), bare);
}

#[tokio::test]
async fn scaling_touches_the_deployment_only_and_keeps_the_pods() {
    let mut world = with_model(&json!({"replicas": 1})).await;
    let before = pods(&world);
    world.server.clear_log();
    let patch = Patch::Merge(json!({"spec": {"replicas": 3}}));
    world.models().patch_scale("m", &PatchParams::default(), &patch).await.expect("scales");
    world.converge().await;
    assert!(before.iter().all(|pod| pods(&world).contains(pod)) && pods(&world).len() == 3);
    let log = world.operator_log();
    let written: Vec<&Entry> = log.iter().filter(|e| e.is_mutating() && e.call.plural != "events").collect();
    let only = |entry: &&Entry| entry.call.plural == "deployments" || entry.call.subresource == "status";
    assert!(written.iter().all(only), "{}", transcript(&log));
    let scale = world.models().get_scale("m").await.expect("served");
    let status = scale.status.expect("status");
    assert_eq!((status.replicas, status.selector.is_some_and(|s| s.contains("serving.ernie.io/rank=0"))), (3, true));
}

#[tokio::test]
async fn a_suspended_model_has_no_pods_and_comes_back_with_its_count() {
    let mut world = with_model(&json!({"replicas": 3})).await;
    world.edit("m", &json!({"spec": {"suspend": true}})).await;
    world.converge().await;
    assert!(pods(&world).is_empty());
    assert_eq!(world.state("m", "Available"), "False/Suspended");
    assert_eq!(world.state("m", "Ready"), "False/Suspended");
    world.edit("m", &json!({"spec": {"suspend": false}})).await;
    world.converge().await;
    assert_eq!((pods(&world).len(), world.state("m", "Ready").as_str()), (3, "True/Answering"));
}

#[tokio::test]
async fn a_paused_model_is_left_alone_and_still_reported() {
    let mut world = with_model(&json!({})).await;
    world.edit("m", &json!({"spec": {"paused": true, "replicas": 4}})).await;
    world.server.clear_log();
    world.converge().await;
    let touched = world.operator_log().into_iter().filter(|e| e.is_mutating() && e.call.plural != "events");
    let others: Vec<Entry> = touched.filter(|entry| entry.call.subresource != "status").collect();
    assert!(others.is_empty(), "{}", transcript(&others));
    assert_eq!(world.state("m", "Progressing"), "False/Paused");
    assert_eq!(spec_of(&world, "Deployment", "m")["replicas"], 1);
    world.edit("m", &json!({"spec": {"paused": false}})).await;
    world.converge().await;
    assert_eq!(spec_of(&world, "Deployment", "m")["replicas"], 4);
}

#[tokio::test]
async fn a_paused_model_does_not_take_a_foreign_deployment_for_its_own() {
    let mut world = World::new();
    let labels = json!({"app": "other"});
    let foreign = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "m", "namespace": NAMESPACE}, "spec": {"selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "other", "image": "other:1"}]}}}});
    world.server.create(&foreign).expect("accepted");
    world.apply(&model("m", &json!({"paused": true}))).await;
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "False/NameConflict");
    assert_eq!(world.state("m", "Progressing"), "False/Paused");
}

#[tokio::test]
async fn deletion_needs_no_operator() {
    let world = with_model(&json!({"replicas": 2})).await;
    assert!(world.model("m").expect("stored")["metadata"].get("finalizers").is_none());
    world.delete("m").await;
    // Nobody but the garbage collector has worked since.
    for (kind, name) in CHILDREN {
        assert!(world.child(kind, name).is_none(), "{kind} {name} is collected");
    }
    assert!(world.server.objects("apps/v1", "ReplicaSet", NAMESPACE).is_empty());
}

#[tokio::test]
async fn a_successor_of_the_same_name_waits_for_old_children_and_never_takes_them_over() {
    let mut world = with_model(&json!({})).await;
    let old = world.child("Deployment", "m").expect("there")["metadata"]["uid"].clone();
    world.server.set_garbage_collection(false);
    world.delete("m").await;
    world.apply(&model("m", &json!({"model": {"name": "second"}}))).await;
    world.converge().await;
    assert_eq!(world.child("Deployment", "m").expect("lingers")["metadata"]["uid"], old);
    assert_eq!(world.state("m", "WorkersHealthy"), "False/WaitingForDeletion");
    assert_eq!(world.state("m", "Stalled").split('/').next(), Some("False"), "it goes on by itself");
    world.server.set_garbage_collection(true);
    world.converge().await;
    let new = world.child("Deployment", "m").expect("made anew");
    assert_ne!(new["metadata"]["uid"], old);
    assert_eq!(world.state("m", "Ready"), "True/Answering");
}

#[tokio::test]
async fn a_foreign_child_is_named_in_the_condition_and_not_touched() {
    for (kind, name, body) in [
        ("Service", "m", json!({"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 80}]}})),
        ("Service", "m-workers", json!({"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 80}]}})),
        (
            "PodDisruptionBudget",
            "m",
            json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "other"}}}}),
        ),
        (
            "NetworkPolicy",
            "m",
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "spec": {"podSelector": {"matchLabels": {"app": "other"}}}}),
        ),
        (
            "Deployment",
            "m",
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {
            "selector": {"matchLabels": {"app": "other"}}, "template": {"metadata": {"labels": {"app": "other"}},
            "spec": {"containers": [{"name": "c", "image": "other:1"}]}}}}),
        ),
    ] {
        let mut world = World::new();
        let mut foreign = body;
        foreign["metadata"] = json!({"name": name, "namespace": NAMESPACE});
        let foreign = world.server.create(&foreign).expect("accepted");
        world.apply(&model("m", &json!({}))).await;
        world.apply(&model("other", &json!({}))).await;
        world.converge().await;
        assert_eq!(world.state("m", "WorkersHealthy"), "False/NameConflict", "{kind} {name}");
        assert_eq!(world.state("m", "Ready"), "False/NameConflict", "{kind} {name}");
        assert_eq!(world.state("m", "Stalled").split('/').next(), Some("True"), "{kind} {name}");
        let message = world.message("m", "Ready");
        assert!(message.contains(kind) && message.contains(name), "{message}");
        assert_eq!(world.state("other", "Ready"), "True/Answering", "others do not notice");
        let now = world.child(kind, name).expect("still there");
        assert_eq!(now["spec"], foreign["spec"], "{kind} {name}");
        assert!(now["metadata"].get("ownerReferences").is_none() && now["metadata"].get("labels").is_none());
        world.server.delete(&foreign);
        world.converge().await;
        assert_eq!(world.state("m", "Ready"), "True/Answering", "{kind} {name} gone");
    }
}

#[tokio::test]
async fn a_child_of_another_controller_is_foreign_too() {
    let mut world = World::new();
    let foreign = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "m", "namespace": NAMESPACE,
        "labels": {"serving.ernie.io/model": "m"}, "ownerReferences": [{"apiVersion": "v1", "kind": "Namespace",
        "name": NAMESPACE, "controller": true,
        "uid": world.server.object("v1", "Namespace", "", NAMESPACE).expect("there")["metadata"]["uid"]}]},
        "spec": {"ports": [{"port": 80}]}});
    world.server.create(&foreign).expect("accepted");
    world.apply(&model("m", &json!({}))).await;
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "False/NameConflict");
    assert!(world.message("m", "Ready").contains("Namespace"), "{}", world.message("m", "Ready"));
}

#[tokio::test]
async fn hand_edits_are_undone_and_foreign_additions_kept() {
    let mut world = with_model(&json!({"replicas": 2})).await;
    let before: Vec<Value> = CHILDREN.iter().map(|(kind, name)| spec_of(&world, kind, name)).collect();
    for (kind, name) in CHILDREN {
        let child = world.child(kind, name).expect("there");
        world.server.modify(&child, |child| match kind {
            "Deployment" => {
                child["spec"]["replicas"] = json!(7);
                child["spec"]["template"]["spec"]["containers"][0]["image"] = json!("mine:1");
            }
            "Service" => child["spec"]["selector"] = json!({"mine": "yes"}),
            "PodDisruptionBudget" => child["spec"]["maxUnavailable"] = json!(9),
            _ => child["spec"]["podSelector"] = json!({}),
        });
    }
    let service = world.child("Service", "m").expect("there");
    world.server.modify(&service, |service| service["metadata"]["annotations"]["mesh.example/inject"] = json!("no"));
    world.converge().await;
    let after: Vec<Value> = CHILDREN.iter().map(|(kind, name)| spec_of(&world, kind, name)).collect();
    assert_eq!(after, before);
    let service = world.child("Service", "m").expect("there");
    assert_eq!(service["metadata"]["annotations"]["mesh.example/inject"], "no");
}

#[tokio::test]
async fn a_deleted_child_comes_back() {
    for (kind, name) in CHILDREN {
        let mut world = with_model(&json!({})).await;
        let before = world.child(kind, name).expect("there");
        world.server.delete(&before);
        world.converge().await;
        let after = world.child(kind, name).unwrap_or_else(|| panic!("{kind} {name} is made again"));
        assert_ne!(after["metadata"]["uid"], before["metadata"]["uid"]);
        assert_eq!(world.state("m", "Ready"), "True/Answering", "{kind} {name}");
    }
}

#[tokio::test]
async fn losing_all_status_changes_no_pod_and_brings_the_status_back() {
    let mut world = with_model(&json!({"replicas": 2})).await;
    let (pods_before, status_before) = (pods(&world), world.model("m").expect("stored")["status"].clone());
    let wiped = Patch::Merge(json!({"status": null}));
    world.models().patch_status("m", &PatchParams::default(), &wiped).await.expect("accepted");
    world.server.clear_log();
    world.restart_operators();
    world.converge().await;
    assert_eq!(pods(&world), pods_before);
    assert_eq!(world.model("m").expect("stored")["status"], status_before);
    let children = children_touched(&world.operator_log());
    assert!(children.is_empty(), "{children:?}");
}

#[tokio::test]
async fn an_upgrade_of_the_operator_restarts_nothing_and_new_models_get_the_new_worker() {
    let mut world = with_model(&json!({})).await;
    let (before, pods_before) = (spec_of(&world, "Deployment", "m"), pods(&world));
    world.defaults = defaults("2.0.0");
    world.restart_operators();
    let wiped = Patch::Merge(json!({"status": null}));
    world.models().patch_status("m", &PatchParams::default(), &wiped).await.expect("accepted");
    world.converge().await;
    assert_eq!((spec_of(&world, "Deployment", "m"), pods(&world)), (before, pods_before));
    let engine = &world.model("m").expect("stored")["status"]["engine"];
    assert_eq!((&engine["version"], &engine["availableVersion"]), (&json!("1.0.0"), &json!("2.0.0")));
    world.apply(&model("n", &json!({}))).await;
    world.converge().await;
    let image = &spec_of(&world, "Deployment", "n")["template"]["spec"]["containers"][0]["image"];
    assert_eq!(image, "registry.test/worker:2.0.0");
}

#[tokio::test]
async fn a_gpu_without_an_image_for_it_starts_no_pod_and_says_what_to_do() {
    let mut world = World::new();
    world.apply(&model("m", &json!({"resources": {"limits": {"nvidia.com/gpu": 1}}}))).await;
    world.converge().await;
    assert_eq!(world.state("m", "WorkersHealthy"), "False/NoDeviceImage");
    assert!(world.message("m", "WorkersHealthy").contains("--worker-image-cuda"));
    assert!(pods(&world).is_empty());
    world.defaults.release.image_cuda = Some("registry.test/worker:1.0.0-cuda".to_owned());
    world.restart_operators();
    world.converge().await;
    assert_eq!(world.state("m", "Ready"), "True/Answering");
    let image = &spec_of(&world, "Deployment", "m")["template"]["spec"]["containers"][0]["image"];
    assert_eq!(image, "registry.test/worker:1.0.0-cuda");
}

#[tokio::test]
async fn a_malformed_model_is_skipped_with_one_event_and_others_go_on() {
    let mut world = World::new();
    let mut malformed = model("broken", &json!({"replicas": "many"}));
    malformed["metadata"]["namespace"] = json!(NAMESPACE);
    let malformed = world.server.insert(malformed);
    world.apply(&model("m", &json!({}))).await;
    for _ in 0..3 {
        world.converge().await;
        world.restart_operators();
    }
    assert_eq!(world.state("m", "Ready"), "True/Answering");
    assert!(world.child("Deployment", "broken").is_none());
    let events = world.server.objects("v1", "Event", NAMESPACE);
    let told: Vec<&Value> = events.iter().filter(|event| event["involvedObject"]["name"] == "broken").collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((&told[0]["type"], &told[0]["reason"]), (&json!("Warning"), &json!("Malformed")));
    world.server.modify(&malformed, |model| model["spec"]["replicas"] = json!(1));
    world.converge().await;
    assert_eq!(world.state("broken", "Ready"), "True/Answering", "corrected, it is served");
}

#[tokio::test]
async fn two_operators_at_once_come_to_the_same_end_and_then_rest() {
    for workload in WORKLOADS {
        let mut alone = World::new();
        (workload.run)(&mut alone).await;
        let mut both = World::with_operators(2);
        (workload.run)(&mut both).await;
        assert_eq!(both.outcome(), alone.outcome(), "{}", workload.name);
        let broken = violations(&both.operator_log());
        assert!(broken.is_empty(), "{}: {broken:#?}", workload.name);
        assert_eq!(
            children_touched(&both.operator_log()),
            children_touched(&alone.operator_log()),
            "{}: no child is made twice",
            workload.name
        );
        let writes = both.writes_at_rest().await;
        assert!(writes.is_empty(), "{}: at rest they write\n{}", workload.name, transcript(&writes));
    }
}

#[tokio::test]
async fn names_up_to_the_longest_make_valid_children() {
    let mut world = World::new();
    let longest = "m".repeat(40);
    world.apply(&model(&longest, &json!({}))).await;
    world.converge().await;
    assert_eq!(world.state(&longest, "Ready"), "True/Answering");
}

#[tokio::test]
async fn a_namespace_on_its_way_out_gets_no_new_children() {
    let mut world = World::new();
    world.server.set_garbage_collection(false);
    world.apply(&model("m", &json!({}))).await;
    let namespace = world.server.object("v1", "Namespace", "", NAMESPACE).expect("there");
    world.server.delete(&namespace);
    world.converge().await;
    let log = world.operator_log();
    let created = log.iter().filter(|entry| entry.call.verb == Verb::Create && entry.changed).count();
    assert_eq!(created, 0, "{}", transcript(&log));
    world.server.set_garbage_collection(true);
    world.converge().await;
    assert!(world.model("m").is_none());
}
