//! A worker under everything that clients do, for as long as `ERNIE_SOAK_SECONDS` says.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use ernie_proto::client::never_sent;
use ernie_proto::ernie::v1::inference_client::InferenceClient;
use ernie_proto::ernie::v1::{CompleteRequest, SamplingParams};
use ernie_worker::bench::memory::memory;
use ernie_workload::Chance;
use rustix::process::Signal;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::adapters::{WIDTHS, flag, folder};
use super::process::{end, ready, serve, signal};
use super::running::{channel, complete_ids, figure, golden, greedy, model, read, until};

/// Clients at once; the worker has room for a quarter of them.
const CLIENTS: u64 = 32;

fn seconds() -> u64 {
    std::env::var("ERNIE_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// What became of requests.
#[derive(Debug, Default)]
struct Counts {
    answers: usize,
    abandoned: usize,
    statuses: BTreeMap<String, usize>,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.answers += other.answers;
        self.abandoned += other.abandoned;
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
    }
}

/// A request as somebody might send it.
fn request(chance: &mut Chance) -> CompleteRequest {
    let beginning = chance.below(3) as u32;
    let shared = 32 * chance.below(4) as u32;
    let own = 1 + chance.below(150);
    let mut prompt: Vec<u32> = (0..shared).map(|place| 300 + (7 * place + beginning) % 90).collect();
    prompt.extend((0..own).map(|_| 300 + chance.below(600) as u32));
    let sampling = SamplingParams {
        max_tokens: Some(1 + chance.below(200) as u32),
        seed: Some(chance.below(1000) as u64),
        temperature: Some(chance.uniform() as f32 * 2.0),
        n: (chance.below(8) == 0).then_some(3),
        logprobs: (chance.below(8) == 0).then_some(5),
        ignore_eos: chance.below(2) == 0,
        stop: if chance.below(4) == 0 { vec!["the".to_owned()] } else { Vec::new() },
        ..SamplingParams::default()
    };
    let model = ["", "loud", "soft"][chance.below(3)].to_owned();
    CompleteRequest { model, ..complete_ids(&prompt, sampling) }
}

/// Sends one request after another: reads answers, leaves in the middle, gives little time, asks for nonsense.
async fn client(mut inference: InferenceClient<Channel>, seed: u64, until: Instant) -> Counts {
    let mut chance = Chance::new(seed, 0);
    let mut counts = Counts::default();
    while Instant::now() < until {
        let mut request = tonic::Request::new(request(&mut chance));
        let behaviour = chance.below(6);
        match behaviour {
            0 => request.set_timeout(Duration::from_millis(1 + chance.below(80) as u64)),
            1 => request.get_mut().sampling.get_or_insert_default().top_p = Some(f32::NAN),
            _ => {}
        }
        let outcome = match inference.complete(request).await {
            Ok(answer) if behaviour == 2 => {
                let mut stream = answer.into_inner();
                let mut ended = Ok(());
                for _ in 0..chance.below(20) {
                    ended = stream.message().await.map(drop);
                }
                counts.abandoned += usize::from(ended.is_ok());
                ended
            }
            Ok(answer) => read(answer.into_inner()).await.map(|_| counts.answers += 1),
            Err(status) if never_sent(&status) => continue,
            Err(status) => Err(status),
        };
        if let Err(status) = outcome {
            assert_expected(behaviour, &status);
            *counts.statuses.entry(format!("{:?}", status.code())).or_default() += 1;
            // Clients wait before they try again; without, refusals would be all that the worker does.
            tokio::time::sleep(Duration::from_millis(1 + chance.below(100) as u64)).await;
        }
    }
    counts
}

fn assert_expected(behaviour: usize, status: &Status) {
    let expected = match status.code() {
        Code::ResourceExhausted => true,
        // The client's own clock may say it first, in one of two words.
        Code::DeadlineExceeded | Code::Cancelled => behaviour == 0,
        Code::InvalidArgument => behaviour == 1,
        _ => false,
    };
    assert!(expected, "behaviour {behaviour}: {status}");
}

/// Memory of a process that no file backs, in MiB.
fn anonymous(pid: u32) -> u64 {
    memory(pid, "RssAnon").expect("it lives") >> 20
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_cancels_deadlines_and_adapters_leaks_no_block_and_no_memory() {
    let (loud, soft, scratch) = (folder(0.7, WIDTHS.1), folder(1.3, WIDTHS.1), tempfile::tempdir().expect("a folder"));
    let (loud, soft) = (flag("loud", loud.path()), flag("soft", soft.path()));
    let flags = ["--adapter", &loud, "--adapter", &soft, "--max-num-seqs", "8", "--max-queued-requests", "4"];
    // Room for about 1,000 tokens, so that sequences are preempted.
    let mut worker =
        serve(&model(), &scratch, &[&flags[..], &["--kv-cache-memory", "2Mi", "--dtype", "float32"]].concat());
    let ports = ready(&mut worker);
    let inference = InferenceClient::new(channel(ports.grpc).await);

    let begun = Instant::now();
    let storm = |part: u64| {
        let until = begun + Duration::from_secs(seconds()).mul_f64(part as f64 / 2.0);
        let clients = (0..CLIENTS).map(|seed| client(inference.clone(), seed + part * CLIENTS, until));
        futures::future::join_all(clients.map(tokio::spawn))
    };
    let mut counts = Counts::default();
    let mut memory = Vec::new();
    for part in [1, 2] {
        for client in storm(part).await {
            counts.add(client.expect("every status was one that it should have been"));
        }
        for (figure_name, idle) in [
            ("vllm:num_requests_running{", 0.0),
            ("vllm:num_requests_waiting{", 0.0),
            ("vllm:kv_cache_usage_perc{", 0.0),
        ] {
            until(figure_name, async || figure(ports.http, figure_name).await == idle).await;
        }
        memory.push(anonymous(worker.id()));
    }
    let preemptions = figure(ports.http, "vllm:num_preemptions_total{").await;
    let told = format!("{} s: {counts:?}, {preemptions} preemptions, memory {memory:?} MiB", seconds());
    // straight to the terminal: what a passing test prints is not shown
    let _ = writeln!(std::io::stderr(), "{told}");
    assert!(counts.answers > 0 && counts.abandoned > 0 && preemptions > 0.0, "{told}");
    for status in ["ResourceExhausted", "InvalidArgument"] {
        assert!(counts.statuses.contains_key(status), "{told}");
    }
    assert!(memory[1] <= memory[0] + 8, "memory grows: {told}");

    // Nothing of it shows in an answer.
    let golden = &golden()["prompts"][0];
    let ids: Vec<u32> = serde_json::from_value(golden["greedy_ids"].clone()).expect("ids");
    let prompt: Vec<u32> = serde_json::from_value(golden["ids"].clone()).expect("ids");
    let mut inference = inference;
    let request = complete_ids(&prompt, greedy(u32::try_from(ids.len()).expect("few")));
    let answer = read(inference.complete(request).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!(answer.ids(), ids);
    signal(&worker, Signal::TERM);
    assert_eq!(end(worker).0, 0);
}
