//! What happens to models when parts of the system are killed, frozen or removed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use ernie_e2e::product::{Load, Model, Product};
use ernie_e2e::{Cluster, Component, wait};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

fn demo(product: &Product<'_>) -> Value {
    json!({
        "model": {"uri": format!("oci://{}", product.images.model)},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    })
}

/// Waits until the operator's Lease has been renewed so many times.
async fn wait_for_renewals(product: &Product<'_>, renewals: usize) {
    let leases = Api::<Lease>::namespaced(product.cluster.client(), product.namespace());
    let mut last = None;
    let mut seen = 0;
    wait::until("the operator's Lease to be renewed", Duration::from_secs(120), async || {
        let leases = leases.list(&kube::api::ListParams::default()).await?;
        let renewed: Vec<_> = leases.items.iter().filter_map(|lease| lease.spec.as_ref()?.renew_time.clone()).collect();
        if last.as_ref() != Some(&renewed) {
            seen += 1;
            last = Some(renewed);
        }
        Ok((seen > renewals).then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn an_operator_killed_again_and_again_changes_nothing_and_finishes_what_was_begun() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("operator").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "steady", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let children = model.children().await.unwrap();
    let load = Load::start(&cluster, &namespace, &model, 2, 32).await.unwrap();
    for round in 0..3 {
        // In the middle of work: a model has just been applied.
        let fresh = Model::apply(&cluster, &namespace, &format!("fresh-{round}"), demo(&product)).await.unwrap();
        product.kill_operators().await.unwrap();
        fresh.wait_ready(1, DEADLINE).await.unwrap();
    }
    product.wait_for_operators(1).await.unwrap();
    assert_eq!(model.children().await.unwrap(), children);
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");
}

#[tokio::test]
async fn a_model_deleted_while_no_operator_runs_leaves_nothing() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("orphan").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    product.scale_operator(0).await.unwrap();
    model.delete().await.unwrap();
    let gone = model.wait_gone(DEADLINE).await;
    product.scale_operator(1).await.unwrap();
    gone.unwrap();
}

#[tokio::test]
async fn a_restarted_api_server_costs_no_request_and_the_operator_goes_on() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("apiserver").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let children = model.children().await.unwrap();
    let load = Load::start(&cluster, &namespace, &model, 2, 32).await.unwrap();
    let faults = cluster.faults().unwrap();
    faults.kill(Component::KubeApiserver).unwrap();
    faults.start(Component::KubeApiserver, &[]).unwrap();
    faults.wait_until_healthy(DEADLINE).await.unwrap();
    assert_eq!(model.children().await.unwrap(), children);
    model.scale(2).await.unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");
}

#[tokio::test]
async fn at_the_fixed_point_the_operator_sends_nothing_that_changes_anything_but_its_lease() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("quiet").await.unwrap();
    let mut models = Vec::new();
    for name in ["one", "two", "three"] {
        models.push(Model::apply(&cluster, &namespace, name, demo(&product)).await.unwrap());
    }
    for model in &models {
        model.wait_ready(1, DEADLINE).await.unwrap();
    }
    // What was ready a moment ago may still be told of.
    wait_for_renewals(&product, 1).await;
    let audit = cluster.audit().unwrap();
    let mark = audit.mark().await.unwrap();
    wait_for_renewals(&product, 4).await;
    let user = product.user();
    let requests = audit.since(mark).await.unwrap();
    // A namespace of another test may still be on its way out, and the operator at work for what is left in it.
    let here = [namespace.name(), product.namespace()];
    let ours: Vec<_> = requests
        .into_iter()
        .filter(|event| event.user == user && event.is_mutating() && here.contains(&event.namespace.as_str()))
        .collect();
    assert!(ours.iter().any(|event| event.resource == "leases"), "the log shows no Lease renewal of {user}");
    let others: Vec<_> = ours.into_iter().filter(|event| event.resource != "leases").collect();
    assert!(others.is_empty(), "{others:#?}");
}

#[tokio::test]
async fn the_operator_uses_no_right_that_it_was_not_given() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("rights").await.unwrap();
    let audit = cluster.audit().unwrap();
    let mark = audit.mark().await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", demo(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    model.scale(2).await.unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    product.kill_operators().await.unwrap();
    product.wait_for_operators(1).await.unwrap();
    model.delete().await.unwrap();
    model.wait_gone(DEADLINE).await.unwrap();
    let user = product.user();
    let requests = audit.since(mark).await.unwrap();
    let ours: Vec<_> = requests.iter().filter(|event| event.user == user).collect();
    assert!(!ours.is_empty(), "the log shows no request of {user}");
    let forbidden: Vec<_> = ours.iter().filter(|event| event.code == 403).collect();
    assert!(forbidden.is_empty(), "{forbidden:#?}");
    assert!(ours.iter().all(|event| event.resource != "secrets"), "the operator reads secrets");
}
