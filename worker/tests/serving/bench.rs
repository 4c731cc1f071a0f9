//! `ernie-worker bench`, as those who read its figures know it.

use std::process::{Command, Output};

use serde_json::Value;

use super::running::{Running, model};

fn bench(flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ernie-worker")).arg("bench").args(flags).output().expect("started")
}

fn figures(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn the_figures_of_an_engine_have_their_names_and_sizes() {
    let folder = model();
    let folder = folder.to_str().expect("text");
    let sizes = ["--prompt", "40", "--generate", "9", "--concurrency", "3", "--repetitions", "3", "--threads", "2"];
    let flags = [&["--model", folder, "--json"], &sizes[..]].concat();
    let whole = figures(&bench(&flags));
    for rate in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
        let spread = &whole[format!("{rate}_spread")];
        let [least, median, most] = ["min", "median", "max"].map(|key| spread[key].as_f64().expect(rate));
        assert!(0.0 < least && least <= median && median <= most && whole[rate] == median, "{spread}");
    }
    for times in ["ttft_seconds", "itl_seconds"] {
        let [p50, p90, p99] = ["p50", "p90", "p99"].map(|key| whole[times][key].as_f64().expect(times));
        assert!(0.0 < p50 && p50 <= p90 && p90 <= p99, "{}", whole[times]);
    }
    let number = |name: &str| whole[name].as_f64().expect("a number");
    assert!(number("load_seconds") < number("start_to_first_token_seconds"));
    assert!(number("weights_bytes") < number("peak_rss_bytes"));
    assert_eq!((&whole["dtype"], &whole["quantization"]), (&"bfloat16".into(), &"none".into()));
    assert_eq!((&whole["threads"], &whole["repetitions"]), (&2.into(), &3.into()));

    // Behind a context that was read before, less is read; one answer has no spread.
    let deep = figures(&bench(&["--model", folder, "--json", "--depth", "320", "--prompt", "8", "--repetitions", "1"]));
    assert!(deep["prefill_tokens_per_second"].as_f64().expect("a rate") > 0.0);
    assert_eq!(deep.get("prefill_tokens_per_second_spread"), None);
}

#[test]
fn several_lengths_and_concurrencies_make_a_table() {
    let folder = model();
    let folder = folder.to_str().expect("text");
    let sizes = ["--prompt", "8,40", "--concurrency", "1,3", "--generate", "4", "--repetitions", "1"];
    let flags = [&["--model", folder, "--max-num-seqs", "2"], &sizes[..]].concat();
    let all = figures(&bench(&[&flags[..], &["--json"]].concat()));
    let keys = ["prompt", "concurrency", "max_num_seqs"];
    let points = all.as_array().expect("an array").iter().map(|point| keys.map(|key| point[key].as_u64().expect(key)));
    assert_eq!(points.collect::<Vec<_>>(), [[8, 1, 1], [40, 1, 1], [8, 3, 2], [40, 3, 2]]);
    let starts = all.as_array().expect("an array").iter().map(|point| point["start_to_first_token_seconds"].is_null());
    assert_eq!(starts.collect::<Vec<_>>(), [false, true, true, true]);

    let output = bench(&flags);
    let said = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 6, "{said}");
    assert!(lines[0].starts_with("| prompt | concurrency | prefill tok/s |"), "{said}");
    assert!(lines[5].starts_with("| 40 | 3 | "), "{said}");
}

#[test]
fn a_shape_is_measured_and_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().expect("a folder");
    let flags = ["--synthetic", "ernie-4.5-0.3b:layers=1", "--prompt", "8", "--generate", "2", "--repetitions", "1"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_ernie-worker"));
    let output = command.arg("bench").args(flags).env("TMPDIR", scratch.path()).output().expect("started");
    let said = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.lines().any(|line| line.starts_with("decode_tokens_per_second ")), "{said}");
    assert_eq!(std::fs::read_dir(scratch.path()).expect("read").count(), 0);
}

#[test]
fn flags_that_make_no_sense_together_are_refused() {
    let folder = model();
    let folder = folder.to_str().expect("text");
    for (flags, remedy) in [
        (vec![], "--model <DIR>"),
        (vec!["--model", folder, "--grpc", "localhost:1", "--rate", "1"], "cannot be used with"),
        (vec!["--grpc", "localhost:1"], "--rate"),
        (vec!["--grpc", "localhost:1", "--rate", "0"], "from 0.001"),
        (vec!["--model", folder, "--slo-ttft", "1s"], "cannot be used with"),
        (vec!["--model", folder, "--prompt", "5000"], "a context of 2048"),
        (vec!["--model", "/nowhere"], "does not exist"),
        (vec!["--grpc", "localhost:1", "--rate", "1"], "cannot reach"),
    ] {
        let output = bench(&flags);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(remedy), "{flags:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_to_a_server_is_in_the_figures() {
    let worker = Running::start(&["--max-num-seqs", "2", "--max-queued-requests", "1"]).await;
    let address = worker.grpc.to_string();
    let flags = ["--rate", "2000", "--duration", "500ms", "--prompt", "16", "--generate", "24", "--slo-ttft", "60s"];
    let whole = tokio::task::spawn_blocking(move || {
        figures(&bench(&[&["--grpc", address.as_str(), "--json"], &flags[..]].concat()))
    });
    let whole = whole.await.expect("ran");
    let number = |value: &Value| value.as_u64().expect("a number");
    let refused = whole["errors"]["RESOURCE_EXHAUSTED"].clone();
    let (requests, answers) = (number(&whole["requests"]), number(&whole["answers"]));
    assert!((850..1150).contains(&requests) && answers > 0, "{whole}");
    assert_eq!(requests, answers + number(&refused["count"]), "{whole}");
    assert!(refused["first"].as_str().expect("a sentence").contains("queue"), "{refused}");
    let attainment = whole["attainment"].as_f64().expect("a share");
    assert!((attainment - answers as f64 / requests as f64).abs() < 1e-9, "every answer kept the promise");
    let rate = |name: &str| whole[name].as_f64().expect("a rate");
    assert!((rate("generated_tokens_per_second") / rate("requests_per_second") - 24.0).abs() < 1e-6, "{whole}");
}
