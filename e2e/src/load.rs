//! `load run` keeps chats under way against a server until `load stop`, run in the same container, ends it. Every
//! request that does not end well is counted with its status.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use ernie_e2e::product::{Failure, LoadReport};
use ernie_proto::client::never_sent;
use ernie_proto::ernie::v1::inference_client::InferenceClient;
use ernie_proto::ernie::v1::{
    ChatRequest, ContentPart, Message, Role, SamplingParams, content_part::Part, generate_response::Event,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

#[derive(Parser)]
#[command(about = "Keeps chats under way and counts how they end")]
enum Command {
    /// Sends requests until told to stop, then prints a report as JSON on the last line.
    Run(Run),
    /// Tells the first process of this container to stop.
    Stop,
}

#[derive(clap::Args)]
struct Run {
    /// Address of the inference port, HOST:PORT.
    #[arg(long)]
    server: String,
    /// Chats under way at any time, each on a connection of its own.
    #[arg(long, default_value_t = 4)]
    streams: u32,
    /// Tokens asked for in each chat.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Milliseconds between two chats of a stream.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Longest that one chat may take, in seconds.
    #[arg(long, default_value_t = 120)]
    timeout: u64,
}

/// The chats of one stream.
struct Chats {
    number: u32,
    max_tokens: u32,
    pause: Duration,
}

#[derive(Default)]
struct Tally {
    completed: u64,
    tokens: u64,
    failed: BTreeMap<(String, String), u64>,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Stop => rustix::process::kill_process(rustix::process::Pid::INIT, rustix::process::Signal::TERM)
            .context("signalling the first process"),
        Command::Run(run) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("making a runtime")?
            .block_on(run.run()),
    }
}

impl Run {
    async fn run(self) -> Result<()> {
        let mut signal = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .context("listening for the signal to stop")?;
        let stop = CancellationToken::new();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let start = Instant::now();
        let mut streams = tokio::task::JoinSet::new();
        for number in 0..self.streams {
            let endpoint = Endpoint::from_shared(format!("http://{}", self.server))
                .context("an address that is none")?
                .connect_timeout(Duration::from_secs(10))
                .timeout(Duration::from_secs(self.timeout));
            let client = InferenceClient::new(endpoint.connect_lazy());
            let chats = Chats { number, max_tokens: self.max_tokens, pause: Duration::from_millis(self.pause) };
            streams.spawn(stream(client, chats, stop.clone(), tally.clone()));
        }
        signal.recv().await;
        stop.cancel();
        streams.join_all().await;
        let tally = lock(&tally);
        let failed = tally.failed.iter().map(|((code, message), count)| Failure {
            code: code.clone(),
            message: message.clone(),
            count: *count,
        });
        let report = LoadReport {
            completed: tally.completed,
            failed: failed.collect(),
            tokens: tally.tokens,
            seconds: start.elapsed().as_secs_f64(),
        };
        println!("{}", serde_json::to_string(&report).context("a report that is no JSON")?);
        Ok(())
    }
}

fn lock(tally: &Mutex<Tally>) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How long a new address may be unknown to the node's proxy, which learns of it about a second after the pod is ready.
const UNKNOWN: Duration = Duration::from_secs(10);

/// One chat after another. A failure is counted, never tried again, once a first chat came through; a call that left with
/// its old connection before it was sent is none.
async fn stream(
    mut client: InferenceClient<Channel>,
    Chats { number, max_tokens, pause }: Chats,
    stop: CancellationToken,
    tally: Arc<Mutex<Tally>>,
) {
    let (begun, mut came_through) = (Instant::now(), false);
    while !stop.is_cancelled() {
        let outcome = chat(&mut client, number, max_tokens).await;
        let failed = outcome.is_err();
        came_through |= !failed;
        if came_through || begun.elapsed() >= UNKNOWN {
            let mut tally = lock(&tally);
            match outcome {
                Ok(tokens) => {
                    tally.completed += 1;
                    tally.tokens += tokens;
                    println!("{{\"completed\":{}}}", tally.completed);
                }
                Err(status) => {
                    let code = format!("{:?}", status.code());
                    eprintln!("{code}: {}", status.message());
                    *tally.failed.entry((code, status.message().to_owned())).or_default() += 1;
                }
            }
        }
        // A server that is down is not asked a thousand times a second.
        let pause = if failed { pause.max(Duration::from_millis(100)) } else { pause };
        if !pause.is_zero() {
            let _ = tokio::time::timeout(pause, stop.cancelled()).await;
        }
    }
}

async fn chat(client: &mut InferenceClient<Channel>, number: u32, max_tokens: u32) -> Result<u64, Status> {
    let request = ChatRequest {
        messages: vec![Message {
            role: Role::User.into(),
            content: vec![ContentPart { part: Some(Part::Text(format!("Letter {number}: My dear Miss"))) }],
            ..Default::default()
        }],
        sampling: Some(SamplingParams { max_tokens: Some(max_tokens), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    };
    let mut answer = loop {
        match client.chat(request.clone()).await {
            Ok(accepted) => break accepted.into_inner(),
            Err(status) if never_sent(&status) => {}
            Err(status) => return Err(status),
        }
    };
    let mut tokens = 0;
    let mut done = false;
    while let Some(message) = answer.message().await? {
        match message.event {
            Some(Event::Delta(delta)) => tokens += delta.token_ids.len() as u64,
            Some(Event::Done(_)) => done = true,
            Some(Event::Started(_) | Event::PromptLogprobs(_)) | None => {}
        }
    }
    if done { Ok(tokens) } else { Err(Status::new(Code::DataLoss, "the stream ended without `done`")) }
}
