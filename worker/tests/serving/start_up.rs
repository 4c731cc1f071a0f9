//! The order of start-up: what is small and often wrong is refused before weights are read, and so is another digest.

use std::{fs, path::Path};

use ernie_proto::failure::{Reason, TerminationMessage};
use ernie_worker::{
    model::digest::{Manifest, ModelDigest, Reading},
    serve::{Ended, Worker},
    server::{connection::ConnectionLimits, lifecycle::Stage},
    shutdown::Stop,
};
use tempfile::TempDir;

use super::running::{Running, args, model, page, within};

/// A copy of the demo model.
fn copy() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(model()).expect("the model") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copies");
    }
    folder
}

fn digest(folder: &Path) -> ModelDigest {
    let how = Reading { threads: 1, drop_pages: false, report: &|_| {} };
    Manifest::of(folder, &how).expect("a manifest").digest()
}

/// Starts a worker that fails; what it says, and the start-up phases that `/metrics` shows then.
async fn failing(folder: &Path, more: &[&str]) -> (TerminationMessage, Vec<String>) {
    let worker = Worker::bind(args(folder, more), ConnectionLimits::default()).await.expect("binds");
    let http = worker.http_address();
    let failure = Running::run(worker).end().await.expect_err("it fails");
    let (_, metrics) = page(http, "/metrics").await;
    let phases = metrics.lines().filter(|line| line.starts_with("ernie:startup_phase_seconds{"));
    let phases = phases.filter_map(|line| Some(line.split_once("phase=\"")?.1.split_once('"')?.0.to_owned()));
    (failure, phases.collect())
}

/// Makes the first number of the weights one that half precision cannot hold, which is found when it is read.
fn spoil_weights(folder: &Path) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).expect("reads");
    let (length, _) = bytes.split_first_chunk::<8>().expect("a length");
    let data = 8 + u64::from_le_bytes(*length) as usize;
    let huge = 1e30f32.to_le_bytes();
    bytes[data..data + 2].copy_from_slice(&huge[2..]);
    fs::write(path, bytes).expect("writes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_tokenizer_or_template_is_refused_before_a_weight_is_read() {
    let half = ["--dtype", "float16"];
    let folder = copy();
    spoil_weights(folder.path());
    let (failure, phases) = failing(folder.path(), &half).await;
    assert!(failure.message.contains("does not fit float16"), "{}", failure.message);
    assert_eq!(phases, ["metadata", "tokenizer", "weights"]);

    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
    let misfit = fs::read_to_string(other).expect("reads").replace("\"hello\": 411", "\"hello\": 5000");
    for (file, text, word) in [
        ("tokenizer.json", misfit.as_str(), "5000"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja"),
    ] {
        let folder = copy();
        spoil_weights(folder.path());
        fs::write(folder.path().join(file), text).expect("writes");
        let (failure, phases) = failing(folder.path(), &half).await;
        assert_eq!(failure.reason, Reason::CorruptModel);
        assert!(failure.message.contains(word), "{}", failure.message);
        assert_eq!(phases, ["metadata", "tokenizer"], "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_digest_is_refused_before_a_weight_is_read() {
    let folder = copy();
    let expected = digest(folder.path()).to_string();
    spoil_weights(folder.path());
    let (failure, phases) = failing(folder.path(), &["--dtype", "float16", "--model-digest", &expected]).await;
    assert_eq!(failure.reason, Reason::DigestMismatch);
    for word in [&expected, &digest(folder.path()).to_string(), "--model-digest"] {
        assert!(failure.message.contains(word), "{word}: {}", failure.message);
    }
    assert_eq!(phases, ["digest", "metadata", "tokenizer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_digest_is_compared_and_served() {
    let expected = digest(&model()).to_string();
    let worker = Running::start(&["--model-digest", &expected]).await;
    let name = "ernie:startup_phase_seconds{engine=\"0\",model_name=\"austen-2.6m\",phase=\"digest\"}";
    assert!(worker.figure(name).await > 0.0);
    worker.stop(Stop::Interrupt).await;
    within(worker.lifecycle.reached(Stage::Draining)).await;
    assert!(matches!(worker.end().await, Ok(Ended::Drained(_))));
}
