//! Models on a volume claim that is there, but not as it should be.

use std::time::{Duration, Instant};

use ernie_e2e::Cluster;
use ernie_e2e::product::{Claim, Model, Product};
use futures::future::join_all;
use serde_json::json;

use super::{Broken, DEADLINE, spec};

/// The kubelet starts a worker that failed again after a pause that grows: 10 s, 20 s, 40 s, 80 s.
const RESTARTED: Duration = Duration::from_secs(150);

#[tokio::test]
async fn what_is_wrong_on_a_claim_is_said_and_clears_once_the_claim_is_repaired_without_an_edit_of_the_model() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("repair").await.unwrap();
    let claim = Claim::create(&cluster, &namespace, "models").await.unwrap();
    let write = "mkdir -p /claim/hub/garbled && cp /image/* /claim/hub/garbled/ && chmod -R a+rX /claim && \
                 printf garbled | dd of=/claim/hub/garbled/model.safetensors bs=1 seek=9 conv=notrunc";
    claim.write(&product.images, write).await.unwrap();

    let cases = [
        Broken {
            name: "absent",
            spec: spec("pvc://models/hub/absent"),
            condition: "WorkersHealthy",
            reason: "ModelNotFound",
            words: &["config.json"],
            stalled: false,
        },
        Broken {
            name: "garbled",
            spec: spec("pvc://models/hub/garbled"),
            condition: "WorkersHealthy",
            reason: "CorruptModel",
            words: &["model.safetensors", "header"],
            stalled: false,
        },
    ];
    let checks = cases.iter().map(|case| async {
        let start = Instant::now();
        let model = Model::apply(&cluster, &namespace, case.name, case.spec.clone()).await.unwrap();
        case.check(&model, start).await.unwrap_or_else(|error| panic!("{}: {error:#}", case.name));
        model
    });
    let models = join_all(checks).await;

    // Whole at any time: a worker may start in between.
    let repair = "for model in absent garbled; do mkdir -p /claim/hub/$model; for file in /image/*; do \
                  name=/claim/hub/$model/$(basename $file); cp $file $name.part; chmod a+r $name.part; \
                  mv $name.part $name; done; done; chmod -R a+rX /claim";
    claim.write(&product.images, repair).await.unwrap();
    let start = Instant::now();
    for model in &models {
        model.wait_ready(1, RESTARTED).await.unwrap();
        println!("{}: ready {:.1} s after the repair", model.name(), start.elapsed().as_secs_f64());
        model.wait_for("WorkersHealthy", "True", None, DEADLINE).await.unwrap();
        let object = model.get().await.unwrap();
        assert_eq!(object["metadata"]["generation"], json!(1), "the model was edited");
        assert!(object["status"]["modelStatus"]["lastFailureInfo"].is_null(), "{:#}", object["status"]);
    }
    claim.release().await.unwrap();
}
