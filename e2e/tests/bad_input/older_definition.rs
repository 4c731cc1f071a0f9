//! A model that an older resource definition let in, and that today's operator cannot read.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ernie_e2e::product::{Model, Product};
use ernie_e2e::{Cluster, Namespace, wait};
use serde_json::{Value, json};

use super::{DEADLINE, PROMPTLY, spec, with};

const DEFINITION: &str = "customresourcedefinition/erniemodels.serving.ernie.io";
const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec";

/// Replaces a part of the definition.
async fn replace(cluster: &Cluster, path: &str, value: &Value) -> Result<()> {
    let patch = json!([{"op": "replace", "path": path, "value": value}]).to_string();
    cluster.kubectl(&["patch", DEFINITION, "--type=json", "--patch", &patch]).await.map(drop)
}

/// Applies a model that the definition of the chart refuses, under a definition that takes anything.
async fn slip_past<'a>(
    cluster: &'a Cluster,
    namespace: &'a Namespace<'a>,
    name: &str,
    malformed: &Value,
) -> Result<(Model<'a>, Instant)> {
    let shown = cluster.kubectl(&["get", DEFINITION, "--output=json", "--show-managed-fields"]).await?;
    let before: Value = serde_json::from_str(&shown).context("the definition is no JSON")?;
    let schema = before.pointer(SCHEMA).context("the definition has no schema of the spec")?;
    let anything = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let applied = async {
        replace(cluster, SCHEMA, &anything).await?;
        // The API server takes a moment to put it in force.
        let mut refusal = String::new();
        let accepted = wait::until("the malformed model to be accepted", Duration::from_secs(20), async || {
            let start = Instant::now();
            match Model::apply(cluster, namespace, name, malformed.clone()).await {
                Ok(model) => Ok(Some((model, start))),
                Err(error) => {
                    refusal = format!("{error:#}");
                    Ok(None)
                }
            }
        })
        .await;
        accepted.with_context(|| format!("refused at last: {refusal}"))
    }
    .await;
    replace(cluster, SCHEMA, schema).await.context("restoring the definition")?;
    // Or the next `helm upgrade` would find that somebody else has the say.
    replace(cluster, "/metadata/managedFields", &before["metadata"]["managedFields"]).await?;
    applied
}

/// What the operator has said of a model that it cannot read.
async fn told(namespace: &Namespace<'_>, name: &str) -> Result<Vec<String>> {
    let events = namespace.kubectl(&["get", "events.events.k8s.io", "--output=json"]).await?;
    let events: Value = serde_json::from_str(&events).context("events are no JSON")?;
    let about = events["items"].as_array().into_iter().flatten().filter(|event| {
        event["reason"] == "Malformed"
            && event["type"] == "Warning"
            && event["regarding"]["kind"] == "ErnieModel"
            && event["regarding"]["name"] == name
    });
    Ok(about.map(|event| event["note"].as_str().unwrap_or_default().to_owned()).collect())
}

#[tokio::test]
async fn a_malformed_model_that_slipped_past_an_older_definition_is_told_once_and_holds_nobody_up() {
    let cluster = Cluster::connect_alone().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("malformed").await.unwrap();
    let good = format!("oci://{}", product.images.model);
    // Whatever the schema says, the API server itself wants a number in the fields that /scale reads.
    let malformed = with(&good, |spec| spec["engine"] = json!({"maxNumSeqs": "many"}));
    let (model, start) = slip_past(&cluster, &namespace, "malformed", &malformed).await.unwrap();

    let notes = wait::until("the event about the malformed model", DEADLINE, async || {
        Ok(Some(told(&namespace, "malformed").await?).filter(|notes| !notes.is_empty()))
    })
    .await
    .unwrap();
    let took = start.elapsed();
    println!("told after {:.1} s: {}", took.as_secs_f64(), notes[0]);
    assert!(took <= PROMPTLY, "told after {:.1} s only", took.as_secs_f64());
    for word in ["many", "correct it"] {
        assert!(notes[0].contains(word), "{word:?} is missing in: {}", notes[0]);
    }

    let held_up = async {
        let sound = Model::apply(&cluster, &namespace, "sound", spec(&good)).await?;
        sound.wait_ready(1, DEADLINE).await?;
        // An operator that starts with it there lists it among the rest.
        product.kill_operators().await?;
        product.wait_for_operators(1).await?;
        sound.scale(2).await?;
        sound.wait_ready(2, DEADLINE).await?;
        let notes = told(&namespace, "malformed").await?;
        ensure!(notes.len() == 1, "told more than once: {notes:#?}");
        ensure!(model.children().await?.is_empty(), "a model that cannot be read got children");
        anyhow::Ok(())
    };
    held_up.await.unwrap();

    model.edit(spec(&good)).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
}
