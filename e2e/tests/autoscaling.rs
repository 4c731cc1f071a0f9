//! The autoscaler on real workers: load adds some, its end takes them away, and nobody else may.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::{Duration, Instant};

use ernie_e2e::product::{Load, Model, Product};
use ernie_e2e::{Cluster, wait};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// The down window, half of the workers a minute, and time to spare.
const DOWN: Duration = Duration::from_secs(480);

/// The demo model, each worker held to a few requests at a time.
fn autoscaled(product: &Product<'_>) -> Value {
    json!({
        "model": {"uri": format!("oci://{}", product.images.model)},
        "engine": {"maxNumSeqs": 4},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "autoscaling": {"maxReplicas": 3},
    })
}

#[tokio::test]
async fn load_adds_workers_and_its_end_takes_them_away_without_losing_a_request() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("autoscale").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", autoscaled(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    model.wait_for("ScalingActive", "True", Some("FreshData"), DEADLINE).await.unwrap();

    let start = Instant::now();
    let load = Load::start(&cluster, &namespace, &model, 24, 64).await.unwrap();
    let up = wait::until("more workers that answer", 2 * DEADLINE, async || {
        let status = model.get().await?["status"].clone();
        Ok(status["readyReplicas"].as_u64().filter(|ready| *ready > 1))
    });
    let up = up.await.unwrap();
    println!("1 to {up} workers that answer: {:.1} s after the load began", start.elapsed().as_secs_f64());
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");
    assert!(report.completed > 0);

    // Requests still come while workers go, a few a second.
    let pause = Duration::from_millis(500);
    let load = Load::start_paused(&cluster, &namespace, &model, 2, 8, pause).await.unwrap();
    model.wait_ready(1, DOWN).await.unwrap();
    let report = load.stop().await.unwrap();
    assert_eq!(report.failed, [], "{report:?}");

    let status = model.get().await.unwrap()["status"]["autoscaling"].clone();
    let decisions = status["decisions"].as_array().unwrap();
    assert_eq!(decisions.last().unwrap()["to"], status["desiredReplicas"]);
    for decision in decisions {
        println!("{decision}");
        assert!(decision["message"].as_str().unwrap().contains("work arrives"), "{decision}");
    }
    let events = namespace.kubectl(&["get", "events", "--field-selector=reason=SuccessfulRescale", "-o", "name"]);
    assert!(events.await.unwrap().lines().count() >= 2);
}

#[tokio::test]
async fn a_number_that_the_autoscaler_decides_on_cannot_be_set_by_hand() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("byhand").await.unwrap();
    let model = Model::apply(&cluster, &namespace, "austen", autoscaled(&product)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let refused = format!("{:#}", model.scale(2).await.unwrap_err());
    assert!(refused.contains("spec.autoscaling decides") && refused.contains("or remove autoscaling"), "{refused}");

    let mut spec = autoscaled(&product);
    spec["autoscaling"]["minReplicas"] = json!(2);
    model.edit(spec.clone()).await.unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    // Removed, the number stays until somebody sets another.
    namespace
        .kubectl(&[
            "patch",
            "erniemodel/austen",
            "--type=json",
            "-p",
            r#"[{"op":"remove","path":"/spec/autoscaling"}]"#,
        ])
        .await
        .unwrap();
    model.wait_ready(2, DEADLINE).await.unwrap();
    assert!(model.get().await.unwrap()["status"]["autoscaling"].is_null());
    model.scale(3).await.unwrap();
    model.wait_ready(3, DEADLINE).await.unwrap();
}
