//! The chart on a real cluster: install, test, upgrade, remove, install again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use ernie_e2e::product::{Model, Product};
use ernie_e2e::{Cluster, wait};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

fn demo(product: &Product<'_>) -> Value {
    json!({
        "model": {"uri": format!("oci://{}", product.images.model)},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    })
}

#[tokio::test]
async fn upgrading_and_removing_the_chart_leaves_models_as_they_are() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("chart").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let children = model.children().await.unwrap();

    product.upgrade(&["operator.logLevel=debug", "operator.replicas=2"]).await.unwrap();
    product.wait_for_operators(2).await.unwrap();
    assert_eq!(model.children().await.unwrap(), children, "an upgrade touched the model");

    product.uninstall().await.unwrap();
    assert_eq!(model.children().await.unwrap(), children, "removing the chart touched the model");
    model.wait_for("Ready", "True", None, DEADLINE).await.unwrap();

    let took = product.upgrade(&[]).await.unwrap();
    println!("helm install to a ready operator: {:.2} s", took.as_secs_f64());
    product.wait_for_operators(1).await.unwrap();
    model.scale(2).await.unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    let after = model.children().await.unwrap();
    assert!(children.iter().all(|child| after.contains(child)), "installing again replaced {children:?} by {after:?}");
}

#[tokio::test]
async fn helm_test_makes_a_model_asks_it_and_removes_it() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let log = product.helm_test().await.unwrap();
    assert!(log.contains("Phase:") && log.contains("Succeeded"), "{log}");
    wait::until("the test's model to be gone", DEADLINE, async || {
        let left = cluster.kubectl(&["--namespace", product.namespace(), "get", "erniemodels", "-o", "name"]).await?;
        Ok(left.trim().is_empty().then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_gpu_in_limits_runs_the_gpu_image_on_a_node_that_has_one() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    // No GPU image can run here; the CPU's under another name shows where the pod goes.
    let (repository, tag) = product.images.worker.rsplit_once('/').unwrap().1.split_once(':').unwrap();
    let values = [format!("worker.cudaImage.repository={repository}"), format!("worker.cudaImage.tag={tag}")];
    product.upgrade(&[&values[0], &values[1]]).await.unwrap();
    let namespace = cluster.namespace("gpu").await.unwrap();
    let mut spec = demo(&product);
    spec["resources"]["limits"]["nvidia.com/gpu"] = json!(1);
    let model = Model::apply(&cluster, &namespace, "austen", spec).await.unwrap();
    let condition = model.wait_for("WorkersHealthy", "False", Some("InsufficientGPU"), DEADLINE).await.unwrap();
    assert!(condition.message.contains("nvidia.com/gpu"), "{}", condition.message);
    cluster.set_extended_resource("nvidia.com/gpu", Some(1)).await.unwrap();
    let scheduled = wait::until("the pod to land on the node with a GPU", DEADLINE, async || {
        let pods = model.pods().await?;
        Ok(pods.into_iter().find(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())))
    })
    .await;
    cluster.set_extended_resource("nvidia.com/gpu", None).await.unwrap();
    let pod = scheduled.unwrap();
    let container = &pod.spec.as_ref().unwrap().containers[0];
    let limits = container.resources.as_ref().unwrap().limits.as_ref().unwrap();
    assert_eq!(limits["nvidia.com/gpu"].0, "1");
    product.upgrade(&[]).await.unwrap();
}

#[tokio::test]
async fn an_operator_without_its_crd_says_so_and_goes_on_once_it_is_there() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    product.scale_operator(0).await.unwrap();
    let crd = "customresourcedefinition/erniemodels.serving.ernie.io";
    cluster.kubectl(&["delete", crd, "--wait=true"]).await.unwrap();
    cluster
        .kubectl(&["--namespace", product.namespace(), "scale", "deployment/ernie-operator", "--replicas=1"])
        .await
        .unwrap();
    let said = wait::until("the operator to say that its CRD is missing", DEADLINE, async || {
        let log = product.logs().await.unwrap_or_default();
        Ok((log.contains("erniemodels.serving.ernie.io") && log.contains("crds.install")).then_some(()))
    })
    .await;
    let restored = product.upgrade(&[]).await;
    said.unwrap();
    restored.unwrap();
    let pods = product.wait_for_operators(1).await.unwrap();
    let restarts = pods[0].status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].restart_count;
    assert_eq!(restarts, 0, "the operator crashed without its CRD");
    let namespace = cluster.namespace("crd").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    // The deletion of a namespace may still miss a kind that was defined a moment ago, and leave the model behind for the
    // operator to retry for ever.
    model.delete().await.unwrap();
    model.wait_gone(DEADLINE).await.unwrap();
}
