//! A worker that runs in this process, and a client for it.

use std::{
    collections::BTreeSet,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use clap::Parser;
use ernie_proto::{
    ernie::v1::{
        ChatRequest, CompleteRequest, ContentPart, Delta, Done, GenerateResponse, Logprobs, Message, Role,
        SamplingParams, Started, TokenIds, complete_request::Prompt, content_part::Part, generate_response::Event,
        inference_client::InferenceClient,
    },
    failure::TerminationMessage,
};
use ernie_worker::{
    cli::{Cli, Command, ServeArgs},
    serve::{Ended, Worker},
    server::{
        connection::ConnectionLimits,
        lifecycle::{Lifecycle, Stage},
    },
    shutdown::Stop,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
};
use tonic::{
    Status, Streaming,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The demo model.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/austen-2.6m")
}

/// Its golden answers.
pub fn golden() -> serde_json::Value {
    let path = model().join("../golden.json");
    serde_json::from_slice(&std::fs::read(path).expect("models/golden.json")).expect("JSON")
}

/// Flags of `serve` as a user writes them, with free ports on loopback.
pub fn args(model: &Path, more: &[&str]) -> ServeArgs {
    let model = model.to_str().expect("a path");
    let mut line =
        vec!["ernie-worker", "serve", "--model", model, "--host", "127.0.0.1", "--port", "0", "--http-port", "0"];
    line.extend(["--kv-cache-memory", "64Mi", "--lame-duck", "0s"]);
    line.extend(more);
    match Cli::try_parse_from(line).expect("the flags parse").command {
        Command::Serve(args) => *args,
        other => panic!("{other:?}"),
    }
}

/// A running worker. It stops with the test's runtime.
pub struct Running {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    pub lifecycle: Lifecycle,
    pub stops: mpsc::Sender<Stop>,
    pub ended: JoinHandle<Result<Ended, TerminationMessage>>,
}

impl Running {
    /// Starts the demo model and waits until it is ready. Flags given again replace those of [`args`].
    pub async fn start(more: &[&str]) -> Self {
        Self::with(more, ConnectionLimits::default()).await
    }

    pub async fn with(more: &[&str], limits: ConnectionLimits) -> Self {
        let worker = Worker::bind(args(&model(), more), limits).await.expect("binds");
        let running = Self::run(worker);
        within(running.lifecycle.reached(Stage::Serving)).await;
        assert_eq!(running.lifecycle.stage(), Stage::Serving, "the worker failed to start");
        running
    }

    /// Runs a bound worker.
    pub fn run(worker: Worker) -> Self {
        let (stops, receiver) = mpsc::channel(4);
        let (grpc, http, lifecycle) = (worker.grpc_address(), worker.http_address(), worker.lifecycle());
        let ended = tokio::spawn(worker.run(receiver));
        Self { grpc, http, lifecycle, stops, ended }
    }

    pub async fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(channel(self.grpc).await)
    }

    /// Status and body of a page.
    pub async fn page(&self, path: &str) -> (u16, String) {
        page(self.http, path).await
    }

    /// A figure of `/metrics`: the first line that begins so.
    pub async fn figure(&self, begin: &str) -> f64 {
        figure(self.http, begin).await
    }

    /// Waits until a figure has a value.
    pub async fn figure_becomes(&self, begin: &str, value: f64) {
        until(&format!("{begin} is {value}"), async || self.figure(begin).await == value).await;
    }

    pub async fn stop(&self, stop: Stop) {
        self.stops.send(stop).await.expect("the worker listens");
    }

    pub async fn end(self) -> Result<Ended, TerminationMessage> {
        within(self.ended).await.expect("the worker does not panic")
    }
}

pub async fn channel(address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).expect("an address").connect().await.expect("connects")
}

pub async fn page(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let head = format!("GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("reads");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// A figure of `/metrics`: the first line that begins so.
pub async fn figure(address: SocketAddr, begin: &str) -> f64 {
    let page = page(address, "/metrics").await.1;
    let line = page.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{begin} in {page}"));
    line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a number")
}

/// Waits for work, within [`PATIENCE`].
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("takes too long")
}

/// Waits for a condition, within [`PATIENCE`].
pub async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, holds).await.is_ok(), "never: {what}");
}

pub fn message(role: Role, text: &str) -> Message {
    Message {
        role: role.into(),
        content: vec![ContentPart { part: Some(Part::Text(text.to_owned())) }],
        ..Default::default()
    }
}

pub fn chat(text: &str, sampling: SamplingParams) -> ChatRequest {
    ChatRequest { messages: vec![message(Role::User, text)], sampling: Some(sampling), ..Default::default() }
}

pub fn complete(text: &str, sampling: SamplingParams) -> CompleteRequest {
    CompleteRequest { prompt: Some(Prompt::Text(text.to_owned())), sampling: Some(sampling), ..Default::default() }
}

pub fn complete_ids(ids: &[u32], sampling: SamplingParams) -> CompleteRequest {
    let prompt = Some(Prompt::Tokens(TokenIds { ids: ids.to_vec() }));
    CompleteRequest { prompt, sampling: Some(sampling), ..Default::default() }
}

/// The most probable tokens.
pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: Some(0.0), max_tokens: Some(max_tokens), ..Default::default() }
}

/// An answer that takes as long as the context allows.
pub fn endless() -> SamplingParams {
    SamplingParams { temperature: Some(0.0), ignore_eos: true, ..Default::default() }
}

/// A whole answer. Of several choices, the deltas of all as they came.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub started: Started,
    pub prompt: Vec<Logprobs>,
    pub deltas: Vec<Delta>,
    pub done: Done,
}

impl Answer {
    pub fn text(&self) -> String {
        self.deltas.iter().map(|delta| delta.text.as_str()).collect()
    }

    pub fn ids(&self) -> Vec<u32> {
        self.deltas.iter().flat_map(|delta| &delta.token_ids).copied().collect()
    }
}

/// Reads a stream to its end, and checks that it has the promised form.
pub async fn read(stream: Streaming<GenerateResponse>) -> Result<Answer, Status> {
    within(read_on(stream)).await
}

async fn read_on(mut stream: Streaming<GenerateResponse>) -> Result<Answer, Status> {
    let mut answer = Answer::default();
    let (mut first, mut over) = (true, BTreeSet::new());
    while let Some(message) = stream.message().await? {
        match message.event.expect("an event") {
            Event::Started(started) => {
                assert!(first, "started is the first message");
                answer.started = started;
            }
            Event::PromptLogprobs(more) => {
                assert!(!first && answer.deltas.is_empty(), "the prompt is told before deltas");
                assert_eq!(more.first_index as usize, answer.prompt.len() + 1, "the prompt is told in order");
                assert!((1..=64).contains(&more.logprobs.len()), "messages are bounded");
                answer.prompt.extend(more.logprobs);
            }
            Event::Delta(delta) => {
                assert!(!first, "started comes before deltas");
                assert!(!over.contains(&delta.index), "a delta of choice {} after its done", delta.index);
                answer.deltas.push(delta);
            }
            Event::Done(done) => {
                assert!(!first && over.insert(done.index), "choice {} is done once", done.index);
                answer.done = done;
            }
        }
        first = false;
    }
    assert!(!over.is_empty(), "a stream that ends OK carries done");
    let open = answer.deltas.iter().find(|delta| !over.contains(&delta.index));
    assert_eq!(open, None, "each choice of a stream that ends OK is done");
    Ok(answer)
}

/// The status of a call whose `grpc-timeout` only the server sees: the usual client would end the call itself.
pub async fn status_in_time(address: SocketAddr, path: &str, timeout: &str, request: &impl prost::Message) -> Status {
    let stream = TcpStream::connect(address).await.expect("connects");
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.expect("speaks HTTP/2");
    tokio::spawn(connection);
    let message = request.encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).expect("a small message").to_be_bytes());
    body.extend(message);
    let request = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(http_body_util::Full::new(Bytes::from(body)))
        .expect("a request");
    let response = within(sender.send_request(request)).await.expect("a response");
    if let Some(status) = Status::from_header_map(response.headers()) {
        return status;
    }
    let body = within(http_body_util::BodyExt::collect(response.into_body())).await.expect("a body");
    Status::from_header_map(body.trailers().expect("trailers")).expect("a status")
}

/// Calls a method with bytes instead of a message, and returns the bytes of the first message.
pub async fn call_with_bytes(channel: Channel, path: &'static str, bytes: Bytes) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = tonic::Request::new(bytes);
    let path = http::uri::PathAndQuery::from_static(path);
    let mut stream = client.server_streaming(request, path, RawCodec).await?.into_inner();
    stream.message().await.map(Option::unwrap_or_default)
}

/// Bytes as they are.
#[derive(Clone, Copy, Debug, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put(buffer, item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = bytes::Buf::remaining(buffer);
        Ok(Some(bytes::Buf::copy_to_bytes(buffer, length)))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}
