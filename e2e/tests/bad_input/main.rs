//! What each kind of bad input gets: a refusal, or a condition that says which, where and what to do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod claim;
mod older_definition;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use ernie_e2e::product::{Model, ModelImage, Product, edit_config, enlarge};
use ernie_e2e::{Cluster, Namespace, wait};
use futures::future::join_all;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
/// What is wrong is said within this time after the apply.
const PROMPTLY: Duration = Duration::from_secs(10);
/// Models that are applied at once: together they start as many workers, on a machine that may have two processors.
const AT_ONCE: usize = 6;

fn spec(uri: &str) -> Value {
    json!({
        "model": {"uri": uri},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
    })
}

fn with(uri: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = spec(uri);
    change(&mut spec);
    spec
}

#[tokio::test]
async fn the_api_server_refuses_nonsense_with_a_sentence_that_says_what_to_do() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("refused").await.unwrap();
    let good = format!("oci://{}", product.images.model);
    let cases = [
        ("austen", spec("ftp://host/model"), "must begin with oci://"),
        ("austen", spec("/models/austen"), "must begin with oci://"),
        ("austen", spec("oci://Not A Reference"), "not an image reference"),
        ("austen", spec("pvc://claim/../secrets"), "pvc://CLAIM/PATH"),
        ("ernie-4.5-0.3b", spec(&good), "use ernie-4-5-0-3b"),
        ("austen-workers", spec(&good), "not end in -workers"),
        ("austen", with(&good, |spec| spec["replicas"] = json!(-1)), "spec.replicas"),
        ("austen", with(&good, |spec| spec["replicas"] = json!(100_000)), "spec.replicas"),
        ("austen", with(&good, |spec| spec["disruption"] = json!({"maxUnavailable": 0})), "must be at least 1"),
        ("austen", with(&good, |spec| spec["engine"] = json!({"maxModelLen": -4})), "spec.engine.maxModelLen"),
        ("austen", with(&good, |spec| spec["engine"] = json!({"dtype": "float8"})), "spec.engine.dtype"),
        (
            "austen",
            with(&good, |spec| spec["drain"] = json!({"timeoutSeconds": 1_000_000})),
            "spec.drain.timeoutSeconds",
        ),
        ("austen", with(&good, |spec| spec["resources"]["limits"]["memory"] = json!("much")), "resources.limits"),
        ("austen", with(&good, |spec| spec["rollout"] = json!({"canary": 3})), "unknown field"),
        ("austen", with(&good, |spec| spec["autoscaling"] = json!({"minReplicas": 1})), "maxReplicas"),
        (
            "austen",
            with(&good, |spec| spec["autoscaling"] = json!({"minReplicas": 0, "maxReplicas": 3})),
            "spec.suspend",
        ),
        (
            "austen",
            with(&good, |spec| spec["autoscaling"] = json!({"minReplicas": 4, "maxReplicas": 3})),
            "raise the other",
        ),
        (
            "austen",
            with(&good, |spec| spec["autoscaling"] = json!({"maxReplicas": 3, "slo": {"itl": "fast"}})),
            "such as 100ms",
        ),
        (
            "austen",
            with(&good, |spec| {
                let never = json!({"selectPolicy": "Disabled"});
                spec["autoscaling"] = json!({"maxReplicas": 3, "behavior": {"scaleUp": never, "scaleDown": never}});
            }),
            "remove one selectPolicy: Disabled",
        ),
        ("austen", json!({"replicas": 1}), "spec.model"),
    ];
    for (name, spec, sentence) in cases {
        let error = match Model::apply(&cluster, &namespace, name, spec.clone()).await {
            Ok(_) => panic!("accepted as {name}: {spec}"),
            Err(error) => format!("{error:#}"),
        };
        assert!(error.contains(sentence), "{spec} got {error}");
    }
}

/// A model that cannot run, and what its condition must say.
struct Broken<'a> {
    name: &'static str,
    spec: Value,
    /// Condition that turns False.
    condition: &'static str,
    reason: &'static str,
    /// Words that the message must hold: which, where, what to do.
    words: &'a [&'a str],
    /// Whether nothing will move without a person.
    stalled: bool,
}

impl Broken<'_> {
    async fn check(&self, model: &Model<'_>, start: Instant) -> Result<()> {
        let condition = model.wait_for(self.condition, "False", Some(self.reason), DEADLINE).await?;
        let took = start.elapsed();
        println!(
            "{}: {}/{} after {:.1} s: {}",
            self.name,
            self.condition,
            self.reason,
            took.as_secs_f64(),
            condition.message
        );
        anyhow::ensure!(took <= PROMPTLY, "it was said after {:.1} s only", took.as_secs_f64());
        for word in self.words {
            anyhow::ensure!(
                condition.message.contains(word),
                "{}: {word:?} is missing in: {}",
                self.name,
                condition.message
            );
        }
        model.wait_for("Ready", "False", Some(self.reason), DEADLINE).await?;
        if self.stalled {
            model.wait_for("Stalled", "True", Some(self.reason), DEADLINE).await?;
        }
        Ok(())
    }
}

async fn image(cluster: &Cluster, change: impl FnOnce(&Path) -> Result<()>) -> String {
    ModelImage::of_demo(cluster, change).await.unwrap().uri
}

/// Writes over a part of a file.
fn overwrite(root: &Path, file: &str, offset: usize, bytes: &[u8]) -> Result<()> {
    let path = root.join(file);
    let mut content = fs::read(&path)?;
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
    Ok(fs::write(&path, content)?)
}

fn shorten(root: &Path, file: &str) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(root.join(file))?;
    let length = file.metadata()?.len();
    Ok(file.set_len(length / 2)?)
}

/// The digest of a model folder, by the shell line that the documentation gives.
fn digest(root: &Path) -> Result<String> {
    let line = r"LC_ALL=C ls | grep -E '\.(jinja|json|model|safetensors)$' | xargs -d '\n' sha256sum | sha256sum";
    let output = Command::new("sh").args(["-c", line]).current_dir(root).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(format!("sha256:{}", text.split_whitespace().next().unwrap_or_default()))
}

/// Flips a bit of the last weight.
fn flip(root: &Path) -> Result<()> {
    let content = fs::read(root.join("model.safetensors"))?;
    let last = content.len() - 1;
    overwrite(root, "model.safetensors", last, &[content[last] ^ 1])
}

#[tokio::test]
async fn each_broken_model_says_what_is_wrong_and_where_and_others_do_not_notice() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("broken").await.unwrap();
    namespace.toolbox("client").await.unwrap();
    let good = format!("oci://{}", product.images.model);
    let mut whole = String::new();
    let flipped = image(&cluster, |root| {
        whole = digest(root)?;
        flip(root)
    })
    .await;
    let pinned = |uri: &str| with(uri, |spec| spec["model"]["digest"] = json!(whole));
    let sound = Model::apply(&cluster, &namespace, "sound", pinned(&good)).await.unwrap();
    sound.wait_ready(1, DEADLINE).await.unwrap();
    let untouched = sound.children().await.unwrap();

    let no_config = image(&cluster, |root| Ok(fs::remove_file(root.join("config.json"))?)).await;
    let llama = image(&cluster, |root| {
        edit_config(root, |config| {
            config.insert("model_type".into(), "llama".into());
            config.insert("architectures".into(), json!(["LlamaForCausalLM"]));
        })
    })
    .await;
    let truncated = image(&cluster, |root| shorten(root, "model.safetensors")).await;
    // The file begins with the length of its header, which is JSON.
    let garbled = image(&cluster, |root| overwrite(root, "model.safetensors", 8, b"\xf0garbled")).await;
    let lying = image(&cluster, |root| overwrite(root, "model.safetensors", 0, &[0xff; 8])).await;
    let wrong_shape =
        image(&cluster, |root| edit_config(root, |config| drop(config.insert("intermediate_size".into(), 640.into()))))
            .await;
    let no_tokenizer = image(&cluster, |root| {
        for file in ["tokenizer.json", "tokenizer.model"] {
            fs::remove_file(root.join(file))?;
        }
        Ok(())
    })
    .await;
    let large = image(&cluster, |root| enlarge(root, 128 << 20)).await;

    let cases = [
        Broken {
            name: "no-config",
            spec: spec(&no_config),
            condition: "WorkersHealthy",
            reason: "ModelNotFound",
            words: &["config.json"],
            stalled: true,
        },
        Broken {
            name: "llama",
            spec: spec(&llama),
            condition: "PlanFits",
            reason: "UnsupportedModel",
            words: &["llama", "ernie4_5"],
            stalled: true,
        },
        Broken {
            name: "truncated",
            spec: spec(&truncated),
            condition: "WorkersHealthy",
            reason: "CorruptModel",
            words: &["model.safetensors"],
            stalled: true,
        },
        Broken {
            name: "garbled-header",
            spec: spec(&garbled),
            condition: "WorkersHealthy",
            reason: "CorruptModel",
            words: &["model.safetensors", "header"],
            stalled: true,
        },
        Broken {
            name: "lying-header",
            spec: spec(&lying),
            condition: "WorkersHealthy",
            reason: "CorruptModel",
            words: &["model.safetensors", "header"],
            stalled: true,
        },
        Broken {
            name: "flipped-bit",
            spec: pinned(&flipped),
            condition: "WorkersHealthy",
            reason: "DigestMismatch",
            words: &["sha256:", &whole],
            stalled: true,
        },
        Broken {
            name: "wrong-shape",
            spec: spec(&wrong_shape),
            condition: "WorkersHealthy",
            reason: "CorruptModel",
            words: &["mlp", "640"],
            stalled: true,
        },
        Broken {
            name: "no-tokenizer",
            spec: spec(&no_tokenizer),
            condition: "WorkersHealthy",
            reason: "ModelNotFound",
            words: &["tokenizer.json"],
            stalled: true,
        },
        Broken {
            name: "large",
            spec: with(&large, |spec| spec["resources"]["limits"]["memory"] = json!("64Mi")),
            condition: "PlanFits",
            reason: "InsufficientMemory",
            words: &["64", "MiB", "resources.limits.memory"],
            stalled: true,
        },
        Broken {
            name: "no-claim",
            spec: spec("pvc://absent/austen"),
            condition: "WorkersHealthy",
            reason: "VolumeNotFound",
            words: &["absent"],
            stalled: false,
        },
        Broken {
            name: "no-image",
            spec: spec("oci://docker.io/local/absent:1"),
            condition: "WorkersHealthy",
            reason: "ImagePullFailed",
            words: &["docker.io/local/absent:1"],
            stalled: false,
        },
        Broken {
            name: "hungry",
            spec: with(&good, |spec| spec["resources"]["requests"] = json!({"cpu": "1000", "memory": "64Mi"})),
            condition: "WorkersHealthy",
            reason: "InsufficientCPU",
            words: &["cpu"],
            stalled: false,
        },
        Broken {
            name: "gpu",
            spec: with(&good, |spec| spec["resources"]["limits"] = json!({"memory": "256Mi", "nvidia.com/gpu": 1})),
            condition: "WorkersHealthy",
            reason: "NoDeviceImage",
            words: &["nvidia.com/gpu"],
            stalled: true,
        },
    ];
    let (mut models, mut failures) = (Vec::new(), Vec::new());
    for wave in cases.chunks(AT_ONCE) {
        let checks = wave.iter().map(|case| async {
            let start = Instant::now();
            let model = Model::apply(&cluster, &namespace, case.name, case.spec.clone()).await.unwrap();
            let checked = case.check(&model, start).await;
            (model, checked.err().map(|error| format!("{}: {error:#}", case.name)))
        });
        for (model, failure) in join_all(checks).await {
            models.push(model);
            failures.extend(failure);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(models.last().unwrap().pods().await.unwrap().is_empty(), "a model without a device image runs a pod");
    assert_eq!(sound.children().await.unwrap(), untouched);
    sound.chat("client", "My dear", 4).await.unwrap();

    // Repaired, each clears.
    for (case, model) in cases.iter().zip(&models) {
        model.edit(spec(&good)).await.unwrap();
        model.wait_ready(1, DEADLINE).await.unwrap_or_else(|error| panic!("{} repaired: {error:#}", case.name));
        model.wait_for("WorkersHealthy", "True", None, DEADLINE).await.unwrap();
        model.wait_for("Stalled", "False", None, DEADLINE).await.unwrap();
        assert_eq!(
            model.get().await.unwrap()["status"]["modelStatus"]["lastFailureInfo"],
            Value::Null,
            "{}",
            case.name
        );
    }
}

async fn conflict(cluster: &Cluster, namespace: &Namespace<'_>, good: &str) -> Result<()> {
    let foreign = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: taken, labels: {owner: somebody}}
spec:
  replicas: 0
  selector: {matchLabels: {app: taken}}
  template:
    metadata: {labels: {app: taken}}
    spec: {containers: [{name: a, image: "docker.io/local/toolbox:1"}]}
"#;
    namespace.apply(foreign).await?;
    let model = Model::apply(cluster, namespace, "taken", spec(good)).await?;
    let condition = model.wait_for("WorkersHealthy", "False", Some("NameConflict"), DEADLINE).await?;
    anyhow::ensure!(condition.message.contains("Deployment") && condition.message.contains("taken"), "{condition:?}");
    let labels = namespace.kubectl(&["get", "deployment/taken", "-o", "jsonpath={.metadata.labels.owner}"]).await?;
    anyhow::ensure!(labels == "somebody", "the foreign Deployment was changed");
    namespace.kubectl(&["delete", "deployment/taken"]).await?;
    model.wait_ready(1, DEADLINE).await
}

#[tokio::test]
async fn a_foreign_deployment_of_the_same_name_is_not_touched_and_once_gone_the_model_runs() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("conflict").await.unwrap();
    conflict(&cluster, &namespace, &format!("oci://{}", product.images.model)).await.unwrap();
}

#[tokio::test]
async fn a_full_quota_is_told_and_clears_when_it_is_raised() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("quota").await.unwrap();
    let quota = "{apiVersion: v1, kind: ResourceQuota, metadata: {name: small}, spec: {hard: {pods: \"0\"}}}";
    namespace.apply(quota).await.unwrap();
    wait::until("the quota to count", DEADLINE, async || {
        let hard = namespace.kubectl(&["get", "resourcequota/small", "-o", "jsonpath={.status.hard.pods}"]).await?;
        Ok((hard == "0").then_some(()))
    })
    .await
    .unwrap();
    let good = format!("oci://{}", product.images.model);
    let model = Model::apply(&cluster, &namespace, "austen", spec(&good)).await.unwrap();
    let condition = model.wait_for("WorkersHealthy", "False", Some("QuotaExceeded"), DEADLINE).await.unwrap();
    assert!(condition.message.contains("small"), "{}", condition.message);
    namespace.kubectl(&["delete", "resourcequota/small"]).await.unwrap();
    // The Deployment controller tries again with growing pauses.
    model.wait_ready(1, Duration::from_secs(120)).await.unwrap();
}

#[tokio::test]
async fn a_failure_is_an_event_once_and_not_with_every_look() {
    let cluster = Cluster::connect().await.unwrap();
    let product = Product::install(&cluster).await.unwrap();
    let namespace = cluster.namespace("events").await.unwrap();
    let no_config = image(&cluster, |root| Ok(fs::remove_file(root.join("config.json"))?)).await;
    let model = Model::apply(&cluster, &namespace, "broken", spec(&no_config)).await.unwrap();
    model.wait_for("Ready", "False", Some("ModelNotFound"), DEADLINE).await.unwrap();
    model.edit(spec(&format!("oci://{}", product.images.model))).await.unwrap();
    model.wait_ready(1, DEADLINE).await.unwrap();
    let events = wait::until("the events of the transitions", DEADLINE, async || {
        let events = namespace.kubectl(&["get", "events.events.k8s.io", "-o", "json"]).await?;
        let events: Value = serde_json::from_str(&events)?;
        let ours: Vec<Value> = events["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|event| event["regarding"]["kind"] == "ErnieModel")
            .cloned()
            .collect();
        Ok(ours.iter().any(|event| event["reason"] == "Ready").then_some(ours))
    })
    .await
    .unwrap();
    let failures: Vec<_> = events.iter().filter(|event| event["reason"] == "ModelNotFound").collect();
    assert_eq!(failures.len(), 1, "{failures:#?}");
    assert_eq!(failures[0]["type"], "Warning");
}
