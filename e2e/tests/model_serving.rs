//! The main job: apply an `ErnieModel`, talk to it, scale it, change it, remove it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ernie_e2e::product::{Claim, Load, Model, Product};
use ernie_e2e::{Cluster, wait};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

/// Spec of the demo model.
fn demo(product: &Product<'_>) -> Value {
    json!({
        "model": {"uri": format!("oci://{}", product.images.model)},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    })
}

#[tokio::test]
async fn an_applied_model_becomes_ready_and_answers_by_the_name_of_its_service() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("chat").await.unwrap();
    namespace.toolbox("client").await.unwrap();

    let start = Instant::now();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    println!("apply to Ready: {:.2} s", start.elapsed().as_secs_f64());
    let (text, finish) = model.chat("client", "My dear Miss", 16).await.unwrap();
    println!("apply to the end of a first chat: {:.2} s", start.elapsed().as_secs_f64());
    assert!(text.chars().any(char::is_alphabetic), "{text:?}");
    assert!(["FINISH_REASON_STOP", "FINISH_REASON_LENGTH"].contains(&finish.as_str()), "{finish}");
    assert_eq!(model.chat("client", "My dear Miss", 16).await.unwrap().0, text, "greedy answers differ");

    let status = model.get().await.unwrap()["status"].clone();
    let host = format!("austen.{}.svc", namespace.name());
    assert!(status["grpcUrl"].as_str().unwrap().starts_with(&host), "{status:#}");
    assert!(status["url"].as_str().unwrap().contains(&host), "{status:#}");
    let columns = namespace.kubectl(&["get", "em"]).await.unwrap();
    for word in ["MODEL", "READY", "REASON", "REPLICAS", "URL", "AGE", "True", "austen"] {
        assert!(columns.contains(word), "{word} is missing in\n{columns}");
    }
}

#[tokio::test]
async fn grpcurl_finds_the_services_by_reflection_and_streams_a_chat() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("grpcurl").await.unwrap();
    namespace.toolbox("client").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let address = model.address();
    let list = namespace.exec("client", &["grpcurl", "-plaintext", &address, "list"]).await.unwrap();
    let services: BTreeSet<_> = list.lines().collect();
    for service in ["ernie.v1.Inference", "grpc.health.v1.Health"] {
        assert!(services.contains(service), "{services:?}");
    }
    let described = namespace
        .exec("client", &["grpcurl", "-plaintext", &address, "describe", "ernie.v1.ChatRequest"])
        .await
        .unwrap();
    assert!(described.contains("repeated .ernie.v1.Message messages"), "{described}");
    let health =
        namespace.exec("client", &["grpcurl", "-plaintext", &address, "grpc.health.v1.Health/Check"]).await.unwrap();
    assert!(health.contains("SERVING"), "{health}");
    let (text, _) = model.chat("client", "It was a bright morning", 24).await.unwrap();
    assert!(!text.is_empty());
    let unknown = r#"{"model": "gpt", "messages": [{"role": "ROLE_USER", "content": [{"text": "x"}]}]}"#;
    let refused = namespace
        .exec("client", &["grpcurl", "-plaintext", "-d", unknown, &address, "ernie.v1.Inference/Chat"])
        .await
        .unwrap_err();
    assert!(format!("{refused:#}").contains("NotFound") && format!("{refused:#}").contains("gpt"), "{refused:#}");
}

#[tokio::test]
async fn the_client_in_the_workers_image_streams_an_answer_in_the_cluster() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("ask").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "ask"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "ask",
                "image": product.images.worker,
                "args": ["ask", "--server", model.address(), "--max-tokens", "24", "The Bennets were"],
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                    "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    namespace.apply(&pod.to_string()).await.unwrap();
    namespace.kubectl(&["wait", "pod/ask", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"]).await.unwrap();
    let log = namespace.kubectl(&["logs", "ask"]).await.unwrap();
    assert!(log.chars().filter(|letter| letter.is_alphabetic()).count() > 10, "{log}");
}

#[tokio::test]
async fn kubectl_scale_goes_from_one_to_three_and_back_and_all_replicas_answer() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("scale").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let first = model.ready_pods().await.unwrap();
    let load = Load::start(&cluster, &namespace, &model, 2, 32).await.unwrap();

    model.scale(3).await.unwrap();
    model.wait_ready(3, DEADLINE).await.unwrap();
    assert!(model.ready_pods().await.unwrap().is_superset(&first), "scaling up replaced a pod");
    let scale = namespace.kubectl(&["get", "erniemodel/austen", "--subresource=scale", "-o", "json"]).await.unwrap();
    let scale: Value = serde_json::from_str(&scale).unwrap();
    assert_eq!(scale["status"]["replicas"], 3, "{scale:#}");
    let selector = scale["status"]["selector"].as_str().unwrap();
    let selected = namespace.kubectl(&["get", "pods", "--selector", selector, "-o", "name"]).await.unwrap();
    assert_eq!(selected.lines().count(), 3, "{selected}");
    load.wait_for_more(10, DEADLINE).await.unwrap();

    model.scale(1).await.unwrap();
    model.wait_ready(1, Duration::from_secs(90)).await.unwrap();
    load.wait_for_more(10, DEADLINE).await.unwrap();
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");
    println!("scale 1 to 3 to 1: {} requests, none failed", report.completed);
}

#[tokio::test]
async fn an_edit_rolls_the_pods_and_no_request_fails() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("roll").await.unwrap();
    let mut spec = demo(&product);
    spec["replicas"] = json!(2);
    let model = Model::apply(&cluster, &namespace, "austen", spec.clone()).await.unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    let before = model.ready_pods().await.unwrap();
    let load = Load::start(&cluster, &namespace, &model, 4, 48).await.unwrap();

    spec["engine"] = json!({"maxNumSeqs": 7});
    model.edit(spec).await.unwrap();
    wait::until("the pods to be replaced", Duration::from_secs(120), async || {
        let pods = model.pods().await?;
        let names: BTreeSet<_> = pods.iter().filter_map(|pod| pod.metadata.name.clone()).collect();
        Ok((names.len() == 2 && names.is_disjoint(&before)).then_some(()))
    })
    .await
    .unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    load.wait_for_more(20, DEADLINE).await.unwrap();
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");
    println!("rolling edit: {} requests, none failed", report.completed);
}

#[tokio::test]
async fn a_killed_worker_comes_back_by_itself_and_the_model_says_so() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("kill").await.unwrap();
    namespace.toolbox("client").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let pod = model.ready_pods().await.unwrap().pop_first().unwrap();
    model.kill_worker(&pod).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    assert_eq!(model.ready_pods().await.unwrap(), BTreeSet::from([pod]), "the pod was replaced");
    wait::until("the model to answer again", DEADLINE, async || {
        Ok(model.chat("client", "My dear", 4).await.ok().map(drop))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_suspended_model_keeps_its_configuration_and_runs_no_pod() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("suspend").await.unwrap();
    let mut spec = demo(&product);
    let model = Model::apply(&cluster, &namespace, "austen", spec.clone()).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    spec["suspend"] = json!(true);
    model.edit(spec.clone()).await.unwrap();
    let ready = model.wait_for("Ready", "False", Some("Suspended"), DEADLINE).await.unwrap();
    assert!(ready.message.contains("suspend"), "{}", ready.message);
    wait::until("the pods to be gone", DEADLINE, async || Ok(model.pods().await?.is_empty().then_some(())))
        .await
        .unwrap();
    spec["suspend"] = json!(false);
    model.edit(spec).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_paused_model_keeps_its_pods_as_they_are_until_it_goes_on() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("pause").await.unwrap();
    let mut spec = demo(&product);
    let model = Model::apply(&cluster, &namespace, "austen", spec.clone()).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let before = model.children().await.unwrap();
    spec["paused"] = json!(true);
    spec["engine"] = json!({"maxNumSeqs": 5});
    model.edit(spec.clone()).await.unwrap();
    model.wait_for("Progressing", "False", Some("Paused"), DEADLINE).await.unwrap();
    assert_eq!(model.children().await.unwrap(), before);
    spec["paused"] = json!(false);
    model.edit(spec).await.unwrap();
    wait::until("the edit to be rolled out", DEADLINE, async || {
        let pods = model.pods().await?;
        let args = pods.iter().filter_map(|pod| serde_json::to_string(pod).ok());
        Ok((pods.len() == 1 && args.into_iter().all(|pod| pod.contains("--max-num-seqs=5"))).then_some(()))
    })
    .await
    .unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_model_on_a_volume_claim_is_served_from_its_folder() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("claim").await.unwrap();
    namespace.toolbox("client").await.unwrap();
    let claim = Claim::create(&cluster, &namespace, "models").await.unwrap();
    let fill = "mkdir -p /claim/hub/austen && cp /image/* /claim/hub/austen/ && chmod -R a+rX /claim";
    claim.write(&product.images, fill).await.unwrap();

    let mut spec = demo(&product);
    spec["model"] = json!({"uri": "pvc://models/hub/austen", "name": "austen-2.6m"});
    let model = Model::apply(&cluster, &namespace, "austen", spec).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let (text, _) = model.chat("client", "My dear Miss", 8).await.unwrap();
    assert!(!text.is_empty());
    claim.release().await.unwrap();
}

#[tokio::test]
async fn deleting_a_model_leaves_nothing_of_it() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("delete").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    assert!(model.children().await.unwrap().len() >= 6);
    model.delete().await.unwrap();
    model.wait_gone(DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_hand_edited_child_is_healed() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("heal").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    namespace.kubectl(&["delete", "service/austen", "poddisruptionbudget/austen"]).await.unwrap();
    namespace.kubectl(&["scale", "deployment/austen", "--replicas=3"]).await.unwrap();
    wait::until("the children to be as they were", DEADLINE, async || {
        let children = model.children().await?;
        let kinds = ["Service/austen ", "PodDisruptionBudget/austen "];
        let whole = kinds.iter().all(|kind| children.iter().any(|child| child.starts_with(kind)));
        Ok((whole && model.ready_pods().await?.len() == 1).then_some(()))
    })
    .await
    .unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
}
