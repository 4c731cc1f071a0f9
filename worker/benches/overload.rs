//! What a thousand clients get of a worker with room for eight: answers per second against the most that fewer clients get,
//! how the others are refused, and how much memory it takes.
//!
//! `cargo bench --workspace --bench overload`. The worker is a process of its own with random weights in the shape of
//! ERNIE-4.5-0.3B with fewer layers and a smaller vocabulary; each client sends one request after another over gRPC and waits as long as a refusal
//! says.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ernie_proto::client::never_sent;
use ernie_proto::ernie::v1::inference_client::InferenceClient;
use ernie_proto::ernie::v1::{CompleteRequest, SamplingParams, TokenIds, complete_request::Prompt};
use ernie_worker::bench::figures::{Percentiles, Spread};
use ernie_worker::bench::memory::memory;
use ernie_worker::bench::synthetic::Shape;
use ernie_workload::Chance;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Layers of the model.
const LAYERS: usize = 4;
/// Whose tokenizer the model has.
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/austen-2.6m");
/// Tokens of it.
const VOCABULARY: usize = 1024;
/// Requests that run side by side, and as many may wait.
const ROOM: usize = 8;
/// Clients of the runs that are compared: the best of the first ones is the peak.
const FEW: [usize; 3] = [ROOM, ROOM + ROOM / 2, 2 * ROOM];
/// Clients of the overload.
const MANY: usize = 1000;
/// Connections that they share.
const CONNECTIONS: usize = 16;
/// Before answers are counted.
const WARM_UP: Duration = Duration::from_secs(3);
/// How long they are counted.
const WINDOW: Duration = Duration::from_secs(12);
/// Times that each number of clients is measured, in turn.
const ROUNDS: usize = 3;
/// A pause after a refusal that gives no hint.
const PAUSE: Duration = Duration::from_millis(200);

/// What one run gave.
#[derive(Default)]
struct Counts {
    /// When answers were complete, and how long each took from its acceptance.
    answers: Vec<(Instant, Duration)>,
    /// How requests ended otherwise.
    refused: BTreeMap<String, usize>,
}

fn request(chance: &mut Chance) -> CompleteRequest {
    let ids = (0..64).map(|_| chance.below(VOCABULARY) as u32).collect();
    let sampling = SamplingParams { max_tokens: Some(32), ignore_eos: true, ..SamplingParams::default() };
    let prompt = Some(Prompt::Tokens(TokenIds { ids }));
    CompleteRequest { prompt, sampling: Some(sampling), ..CompleteRequest::default() }
}

/// One request after another until the end.
async fn client(mut inference: InferenceClient<Channel>, seed: u64, end: Instant) -> Counts {
    let (mut chance, mut counts) = (Chance::new(seed, 0), Counts::default());
    while Instant::now() < end {
        let begun = Instant::now();
        let Ok(outcome) = timeout_at(end, answer(&mut inference, request(&mut chance))).await else { break };
        match outcome {
            Ok(()) => counts.answers.push((Instant::now(), begun.elapsed())),
            Err(status) if never_sent(&status) => {}
            Err(status) => {
                *counts.refused.entry(format!("{:?}", status.code())).or_default() += 1;
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                sleep(hint(&status)).await;
            }
        }
    }
    counts
}

async fn answer(inference: &mut InferenceClient<Channel>, request: CompleteRequest) -> Result<(), Status> {
    let mut stream = inference.complete(request).await?.into_inner();
    while stream.message().await?.is_some() {}
    Ok(())
}

/// How long a refused client is asked to wait.
fn hint(status: &Status) -> Duration {
    let pushback = status.metadata().get("grpc-retry-pushback-ms").and_then(|value| value.to_str().ok()?.parse().ok());
    pushback.map_or(PAUSE, Duration::from_millis)
}

async fn measure(address: &str, clients: usize) -> Counts {
    let end = Instant::now() + WARM_UP + WINDOW;
    let begin = Instant::now() + WARM_UP;
    let mut channels = Vec::new();
    for _ in 0..CONNECTIONS {
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        channels.push(InferenceClient::new(endpoint.connect().await.unwrap()));
    }
    let all = (0..clients).map(|seed| tokio::spawn(client(channels[seed % CONNECTIONS].clone(), seed as u64, end)));
    let mut counts = Counts::default();
    for one in futures::future::join_all(all).await {
        let one = one.unwrap();
        counts.answers.extend(one.answers.into_iter().filter(|&(at, _)| at >= begin));
        for (status, count) in one.refused {
            *counts.refused.entry(status).or_default() += count;
        }
    }
    counts
}

/// Starts a worker; gives its address when it is ready.
fn serve(folder: &Path) -> (Child, String) {
    let room = ROOM.to_string();
    let flags = ["--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--kv-cache-memory", "256Mi"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_ernie-worker"));
    command.arg("serve").arg("--model").arg(folder).args(flags);
    command.args(["--max-num-seqs", &room, "--max-queued-requests", &room]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.find_map(|line| line.ok().filter(|line| line.contains("ready after"))).unwrap();
    let port = line.split("gRPC port ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
    let address = format!("127.0.0.1:{port}");
    // Its pipe must not fill up.
    std::thread::spawn(move || lines.for_each(drop));
    (child, address)
}

/// Memory that no file backs, in MiB.
fn anonymous(child: &Child) -> u64 {
    memory(child.id(), "RssAnon").unwrap() >> 20
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        // `cargo test --benches` asks for no figures
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    Shape { layers: LAYERS, vocab: VOCABULARY, ..Shape::ERNIE_0_3B }.write(folder.path()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(Path::new(TOKENIZER).join(file), folder.path().join(file)).unwrap();
    }
    let (mut child, address) = serve(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let numbers: Vec<usize> = FEW.into_iter().chain([MANY]).collect();
    let mut rates = vec![Vec::new(); numbers.len()];
    let mut last = Vec::new();
    let mut memory = Vec::new();
    for _ in 0..ROUNDS {
        last.clear();
        memory.clear();
        for (&clients, rates) in numbers.iter().zip(&mut rates) {
            let counts = runtime.block_on(measure(&address, clients));
            rates.push(counts.answers.len() as f64 / WINDOW.as_secs_f64());
            memory.push(anonymous(&child));
            last.push(counts);
        }
    }
    println!(
        "room for {ROOM} requests and {ROOM} in the queue; medians of {ROUNDS} rounds, the rest of the last round"
    );
    println!("{:>8} {:>10} {:>8} {:>8} {:>8}  refused", "clients", "answers/s", "p50 s", "p99 s", "MiB");
    let mut medians = Vec::new();
    for (((clients, rates), counts), memory) in numbers.iter().zip(rates).zip(last).zip(memory) {
        let rate = Spread::of(rates).unwrap().median;
        let times = Percentiles::of(counts.answers.iter().map(|(_, took)| took.as_secs_f64()).collect()).unwrap();
        println!("{clients:8} {rate:10.2} {:8.2} {:8.2} {memory:8}  {:?}", times.p50, times.p99, counts.refused);
        medians.push(rate);
    }
    let overload = medians.pop().unwrap();
    let peak = medians.into_iter().fold(0.0, f64::max);
    println!("{MANY} clients get {:.3} of the peak", overload / peak);
    child.kill().unwrap();
    child.wait().unwrap();
}
