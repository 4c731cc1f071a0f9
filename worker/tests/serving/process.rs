//! The binary: signals, exit codes, last words, and `ask`.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use ernie_proto::failure::{Reason, TerminationMessage};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::running::{PATIENCE, Running, model};

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ernie-worker"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `serve` with a termination log in `folder`.
pub fn serve(model: &Path, folder: &TempDir, more: &[&str]) -> Child {
    let mut command = binary();
    command.args(["serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--kv-cache-memory", "64Mi"]);
    command.arg("--model").arg(model).arg("--termination-log").arg(folder.path().join("log")).args(more);
    command.spawn().expect("starts")
}

fn last_words(folder: &TempDir) -> Option<TerminationMessage> {
    TerminationMessage::parse(&fs::read_to_string(folder.path().join("log")).unwrap_or_default())
}

/// Waits for the end of a process.
pub fn end(mut child: Child) -> (i32, String) {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        assert!(begun.elapsed() < PATIENCE, "the process does not end");
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut text).expect("text");
    (status.code().expect("an exit code"), text)
}

/// Where a worker listens.
pub struct Ports {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
}

/// Reads the log until the worker is ready.
pub fn ready(child: &mut Child) -> Ports {
    let mut lines = BufReader::new(child.stderr.as_mut().expect("piped")).lines();
    let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready after"))).expect("it becomes ready");
    let port = |name: &str| {
        let port = line.split(name).nth(1).and_then(|rest| rest.split_whitespace().next()).expect("a port");
        SocketAddr::from(([127, 0, 0, 1], port.parse().expect("a number")))
    };
    Ports { grpc: port("gRPC port "), http: port("HTTP port ") }
}

pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    kill_process(pid, signal).expect("signalled");
}

fn ask(address: &str, more: &[&str]) -> Output {
    binary().args(["ask", "--server", address]).args(more).output().expect("runs")
}

#[test]
fn sigterm_and_sigint_end_a_worker_cleanly() {
    for (name, sent, flags) in
        [("SIGTERM", Signal::TERM, &["--lame-duck", "100ms"][..]), ("SIGINT", Signal::INT, &["--lame-duck", "1h"])]
    {
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = serve(&model(), &folder, flags);
        ready(&mut child);
        signal(&child, sent);
        let (code, log) = end(child);
        assert_eq!(code, 0, "{name}: {log}");
        assert_eq!(last_words(&folder), None);
    }
}

#[test]
fn a_second_sigterm_ends_a_worker_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut child = serve(&model(), &folder, &["--lame-duck", "1h"]);
    ready(&mut child);
    signal(&child, Signal::TERM);
    let mut lines = BufReader::new(child.stderr.as_mut().expect("piped")).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("told to stop"))));
    signal(&child, Signal::TERM);
    assert_eq!(end(child).0, 1);
    assert!(last_words(&folder).expect("a message").message.contains("told to stop twice"));
}

#[test]
fn a_missing_model_is_told_by_exit_code_and_last_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let (code, log) = end(serve(Path::new("/no/such/model"), &folder, &[]));
    assert_eq!(code, 10, "{log}");
    let words = last_words(&folder).expect("a message");
    assert_eq!(words.reason, Reason::ModelNotFound);
    assert!(words.message.contains("/no/such/model"), "{}", words.message);
}

/// A copy of the demo model with one file changed.
fn changed(name: &str, change: impl FnOnce(&Path)) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(model()).expect("the model") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copies");
    }
    change(&folder.path().join(name));
    folder
}

#[test]
fn each_kind_of_broken_model_has_its_exit_code() {
    let truncate = |path: &Path| {
        let bytes = fs::read(path).expect("reads");
        fs::write(path, &bytes[..bytes.len() / 2]).expect("writes");
    };
    let architecture = |path: &Path| {
        let text = fs::read_to_string(path).expect("reads").replace("Ernie4_5ForCausalLM", "LlamaForCausalLM");
        fs::write(path, text.replace("\"ernie4_5\"", "\"llama\"")).expect("writes");
    };
    let remove = |path: &Path| {
        fs::remove_file(path).expect("removes");
        let _ = fs::remove_file(path.with_file_name("tokenizer.model"));
    };
    let template = |path: &Path| fs::write(path, "{% if %}").expect("writes");
    let vocab = |path: &Path| {
        let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
        let text = fs::read_to_string(other).expect("reads").replace("\"hello\": 411", "\"hello\": 5000");
        assert!(text.contains("5000"));
        fs::write(path, text).expect("writes");
    };
    let cases: [(TempDir, Reason, &str); 6] = [
        (changed("model.safetensors", truncate), Reason::CorruptModel, "model.safetensors"),
        (changed("config.json", architecture), Reason::UnsupportedModel, "lama"),
        (changed("config.json", remove), Reason::ModelNotFound, "config.json"),
        (changed("tokenizer.json", remove), Reason::ModelNotFound, "tokenizer"),
        (changed("chat_template.jinja", template), Reason::CorruptModel, "chat_template.jinja"),
        (changed("tokenizer.json", vocab), Reason::CorruptModel, "5000"),
    ];
    for (model, reason, word) in cases {
        let folder = tempfile::tempdir().expect("a folder");
        let (code, log) = end(serve(model.path(), &folder, &[]));
        let words = last_words(&folder).unwrap_or_else(|| panic!("no message: {log}"));
        assert_eq!((words.reason, code), (reason, i32::from(reason.exit_code())), "{}", words.message);
        assert!(words.message.contains(word), "{word:?} in {:?}", words.message);
    }
}

#[test]
fn another_digest_than_that_of_the_folder_is_told_with_both_and_every_file() {
    let digest = |model: &Path, more: &[&str]| {
        let output = binary().args(["digest", "--model"]).arg(model).args(more).output().expect("runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let expected = digest(&model(), &[]);
    let model = changed("model.safetensors", |path| {
        let mut bytes = fs::read(path).expect("reads");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(path, bytes).expect("writes");
    });
    let folder = tempfile::tempdir().expect("a folder");
    let (code, log) = end(serve(model.path(), &folder, &["--model-digest", expected.trim()]));
    assert_eq!(code, 15, "{log}");
    let words = last_words(&folder).expect("a message");
    assert_eq!(words.reason, Reason::DigestMismatch);
    let found = digest(model.path(), &[]);
    for word in [expected.trim(), found.trim(), "--model-digest (spec.model.digest)"] {
        assert!(words.message.contains(word), "{word} in {}", words.message);
    }
    let files = digest(model.path(), &["--files"]);
    assert_eq!(files.lines().count(), words.detail["files"].as_object().expect("files").len());
    for line in files.lines() {
        let (sum, name) = line.split_once("  ").expect("a sum and a name");
        assert_eq!(words.detail["files"][name], sum);
    }
    let output = binary().args(["digest", "--model", "/no/such/model"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(10), "{output:?}");
}

#[test]
fn too_little_memory_is_told_with_the_plan() {
    let folder = tempfile::tempdir().expect("a folder");
    let (code, log) = end(serve(&model(), &folder, &["--kv-cache-memory", "1Mi", "--max-model-len", "2048"]));
    assert_eq!(code, 13, "{log}");
    let words = last_words(&folder).expect("a message");
    assert_eq!(words.reason, Reason::InsufficientMemory);
    assert!(words.message.contains("--kv-cache-memory"), "{}", words.message);
    assert!(words.detail["neededBytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{}", words.detail);
}

#[test]
fn wrong_flags_are_told_before_anything_is_opened() {
    for (flags, word) in [
        (&["--max-num-seqs", "0"][..], "--max-num-seqs (spec.engine.maxNumSeqs) <N>': must be at least 1"),
        (&["--dtype", "int8"], "--dtype (spec.engine.dtype)"),
        (&["--max-model-len", "8192"], "--max-model-len (spec.engine.maxModelLen) 8192 must be in 1..=2048"),
        (&["--max-model-len", "1"], "--max-model-len (spec.engine.maxModelLen) 1: choose from 2"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "raise the first"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let (code, log) = end(serve(&model(), &folder, flags));
        assert_eq!(code, 2, "{log}");
        let words = last_words(&folder).expect("a message");
        assert_eq!(words.reason, Reason::Usage);
        assert!(words.message.contains(word), "{}", words.message);
        assert!(!words.message.contains("--help"), "advice for a terminal: {}", words.message);
    }
}

#[test]
fn an_empty_environment_variable_counts_as_unset() {
    let names = ["ERNIE_TERMINATION_LOG", "ERNIE_MAX_MODEL_LEN", "ERNIE_DTYPE", "ERNIE_ADAPTER", "ERNIE_LOG"];
    let mut command = binary();
    command.envs(names.map(|name| (name, "")));
    command.args(["serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--kv-cache-memory", "64Mi"]);
    let mut child = command.arg("--model").arg(model()).spawn().expect("starts");
    ready(&mut child);
    signal(&child, Signal::TERM);
    assert_eq!(end(child).0, 0);

    let (code, log) = end(binary().arg("serve").env("ERNIE_MODEL", "").spawn().expect("starts"));
    assert!(code == 2 && log.contains("--model"), "{code}: {log}");
}

#[test]
fn a_port_in_use_is_told_with_the_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = taken.local_addr().expect("an address").port().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let (code, _) = end(serve(&model(), &folder, &["--http-port", &port]));
    assert_eq!(code, 1);
    let words = last_words(&folder).expect("a message").message;
    assert!(words.contains(&port) && words.contains("--http-port"), "{words}");
}

#[test]
fn help_and_version_are_no_failures() {
    for arguments in [&["--help"][..], &["serve", "--help"], &["ask", "--help"], &["version"], &["--version"]] {
        let output = binary().args(arguments).output().expect("runs");
        assert!(output.status.success(), "{arguments:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ask_streams_an_answer_and_tells_what_it_took() {
    let worker = Running::start(&["--dtype", "float32"]).await;
    let address = worker.grpc.to_string();
    let (raw, json, chat) = tokio::task::spawn_blocking(move || {
        let prompt = "It is a truth universally acknowledged, that";
        let flags = ["--raw", "--temperature", "0", "--max-tokens", "48"];
        let raw = ask(&address, &[&flags[..], &[prompt]].concat());
        let json = ask(&address, &[&flags[..], &["--json", prompt]].concat());
        let chat = ask(&address, &["--system", "Be brief.", "--seed", "5", "--max-tokens", "5", "- hello"]);
        (raw, json, chat)
    })
    .await
    .expect("runs");
    let golden = &super::running::golden()["prompts"][0];
    let text = golden["greedy_text"].as_str().expect("text");
    assert_eq!(String::from_utf8_lossy(&raw.stdout), format!("{text}\n"));
    let told = String::from_utf8_lossy(&raw.stderr).into_owned();
    assert!(told.contains("20 prompt and 48 answer tokens (length)") && told.contains("tokens/s"), "{told}");

    let answer: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!((&answer["text"], &answer["finish_reason"]), (&golden["greedy_text"], &"length".into()));
    assert_eq!((&answer["token_ids"], &answer["usage"]["prompt_tokens"]), (&golden["greedy_ids"], &20.into()));
    assert!(chat.status.success() && String::from_utf8_lossy(&chat.stderr).contains("seed 5"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ask_fails_with_the_status_and_its_sentence() {
    let worker = Running::start(&[]).await;
    let address = worker.grpc.to_string();
    let (unknown, hot) = tokio::task::spawn_blocking(move || {
        (ask(&address, &["--model", "gpt", "hi"]), ask(&address, &["--temperature", "9", "hi"]))
    })
    .await
    .expect("runs");
    assert_eq!((unknown.status.code(), hot.status.code()), (Some(1), Some(1)));
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(said.starts_with("error: NOT_FOUND: model: \"gpt\" is not served here"), "{said}");
    let said = String::from_utf8_lossy(&hot.stderr).into_owned();
    assert!(said.starts_with("error: INVALID_ARGUMENT: sampling.temperature: is 9"), "{said}");
}

#[test]
fn ask_says_when_no_server_is_there() {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let output = ask(&free.to_string(), &["hi"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&format!("cannot reach {free}")) && said.contains("refused"), "{said}");
    assert_eq!(ask("https://x", &["hi"]).status.code(), Some(2));
}
