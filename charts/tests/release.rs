//! What becomes of the resource definition and of models when the chart is removed, installed under another name, and
//! rolled back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;

use anyhow::Result;
use ernie_e2e::Cluster;
use ernie_e2e::product::{Model, Product};
use serde_json::json;

const CRD: &str = "customresourcedefinition/erniemodels.serving.ernie.io";
const OTHER: &str = "other";

/// `helm upgrade --install` of the images under test as `release`.
async fn install(product: &Product<'_>, release: &str, more: &[&str]) -> Result<String> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/ernie-operator");
    let chart = chart.to_str().unwrap();
    let (registry, operator) = product.images.operator.rsplit_once('/').unwrap();
    let sets = [
        format!("image.registry={registry}"),
        format!("operator.image.tag={}", operator.split_once(':').unwrap().1),
        format!("worker.image.tag={}", product.images.worker.rsplit_once(':').unwrap().1),
    ];
    let mut args =
        vec!["upgrade", "--install", release, chart, "--namespace", product.namespace(), "--wait", "--timeout=60s"];
    for set in &sets {
        args.extend(["--set", set]);
    }
    product.cluster.helm(&[&args, more].concat()).await
}

async fn owner_of_the_crd(cluster: &Cluster) -> String {
    let path = r"jsonpath={.metadata.annotations.meta\.helm\.sh/release-name}";
    cluster.kubectl(&["get", CRD, "--output", path]).await.unwrap()
}

#[tokio::test]
async fn another_release_takes_the_definition_over_and_a_rollback_keeps_models() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("release").await.unwrap();
    let uri = format!("oci://{}", product.images.model);
    let model =
        Model::apply(&cluster, &namespace, "austen", json!({"model": {"uri": uri}, "replicas": 0})).await.unwrap();
    model.wait_for("Ready", "False", Some("NoReplicas"), std::time::Duration::from_secs(30)).await.unwrap();
    let children = model.children().await.unwrap();

    product.uninstall().await.unwrap();
    let refusal = format!("{:#}", install(&product, OTHER, &[]).await.unwrap_err());
    assert!(refusal.contains("invalid ownership metadata"), "{refusal}");
    install(&product, OTHER, &["--take-ownership"]).await.unwrap();
    assert_eq!(owner_of_the_crd(&cluster).await, OTHER);

    install(&product, OTHER, &["--set", "operator.logLevel=debug"]).await.unwrap();
    cluster.helm(&["rollback", OTHER, "1", "--namespace", product.namespace(), "--wait"]).await.unwrap();
    assert_eq!(owner_of_the_crd(&cluster).await, OTHER);
    assert_eq!(model.children().await.unwrap(), children);

    cluster.helm(&["uninstall", OTHER, "--namespace", product.namespace(), "--wait"]).await.unwrap();
    assert_eq!(model.children().await.unwrap(), children);
    // As the other tests expect to find it.
    install(&product, "ernie-operator", &["--take-ownership"]).await.unwrap();
    assert_eq!(owner_of_the_crd(&cluster).await, "ernie-operator");
    assert_eq!(model.children().await.unwrap(), children);
}
