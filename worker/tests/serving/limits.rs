//! What connections may do, and how they end.

use std::time::Duration;

use ernie_proto::{client::never_sent, ernie::v1::SamplingParams};
use ernie_worker::server::connection::ConnectionLimits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::running::{Running, channel, chat, complete, endless, greedy, page, read, within};

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_those_of_a_peer_are_refused_at_accept() {
    let limits = ConnectionLimits { per_peer: 2, ..ConnectionLimits::default() };
    let worker = Running::with(&[], limits).await;
    worker.figure_becomes("ernie:grpc_connections ", 0.0).await;
    let mut first = worker.client().await;
    let second = worker.client().await;
    worker.figure_becomes("ernie:grpc_connections ", 2.0).await;
    let mut third = TcpStream::connect(worker.grpc).await.expect("the kernel accepts");
    let closed = within(third.read(&mut [0; 16])).await;
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    worker.figure_becomes("ernie:grpc_connections_refused_total{reason=\"peer\"}", 1.0).await;
    read(first.chat(chat("hi", greedy(1))).await.expect("accepted").into_inner()).await.expect("an answer");
    drop(second);
    worker.figure_becomes("ernie:grpc_connections ", 1.0).await;
    let mut next = worker.client().await;
    read(next.chat(chat("hi", greedy(1))).await.expect("accepted").into_inner()).await.expect("an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_connections_go_away_without_a_failed_request() {
    let limits = ConnectionLimits { age: Duration::from_millis(200), ..ConnectionLimits::default() };
    let worker = Running::with(&[], limits).await;
    let client = worker.client().await;
    // This stream outlives the connection's age and must finish on it.
    let long = SamplingParams { ignore_eos: true, ..greedy(1500) };
    let mut first = client.clone();
    let long = tokio::spawn(async move {
        let stream = first.complete(complete("It was", long)).await.expect("accepted").into_inner();
        read(stream).await.expect("an answer").ids().len()
    });
    let mut answered = 0.0;
    while worker.figure("ernie:grpc_connections_aged_total").await < 4.0 {
        let stream = match client.clone().chat(chat("Emma", greedy(4))).await {
            Ok(stream) => stream.into_inner(),
            Err(status) if never_sent(&status) => continue,
            Err(status) => panic!("{status}"),
        };
        read(stream).await.expect("an answer");
        answered += 1.0;
    }
    assert_eq!(within(long).await.expect("no panic"), 1500);
    let chats = |page: &str| page.lines().filter(|line| line.contains("grpc_method=\"Chat\"")).count();
    let ok = "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Chat\"";
    worker.figure_becomes(ok, answered).await;
    assert_eq!(chats(&worker.page("/metrics").await.1), 2, "no chat has another status");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_request_is_closed() {
    let limits = ConnectionLimits { first_request: Duration::from_millis(100), ..ConnectionLimits::default() };
    let worker = Running::with(&[], limits).await;
    let mut silent = TcpStream::connect(worker.grpc).await.expect("connects");
    let mut bytes = Vec::new();
    // An error here is a reset, which is as closed as the end of the stream.
    let _ = within(silent.read_to_end(&mut bytes)).await;
    worker.figure_becomes("ernie:grpc_connections ", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_no_inference_does_not_keep_an_old_connection() {
    let limits = ConnectionLimits {
        age: Duration::from_millis(100),
        linger: Duration::from_millis(100),
        ..ConnectionLimits::default()
    };
    let worker = Running::with(&[], limits).await;
    let mut health = HealthClient::new(channel(worker.grpc).await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.expect("watches").into_inner();
    assert!(within(watch.message()).await.expect("a status").is_some());
    // The readiness of a moment ago may still be on its way.
    let status = loop {
        match within(watch.message()).await {
            Ok(message) => assert!(message.is_some(), "the stream looks complete"),
            Err(status) => break status,
        }
    };
    assert!(matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal), "{status}");
    worker.figure_becomes("ernie:grpc_connections ", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_beyond_the_limit_are_refused_and_the_worker_lives() {
    let worker = Running::start(&[]).await;
    let mut request = Request::new(chat("hi", greedy(1)));
    for number in 0..20 {
        let key = tonic::metadata::MetadataKey::from_bytes(format!("x-long-{number}").as_bytes()).expect("a key");
        request.metadata_mut().insert(key, "v".repeat(1000).parse().expect("a value"));
    }
    let refused = match worker.client().await.chat(request).await {
        Ok(stream) => read(stream.into_inner()).await.map(|_| ()),
        Err(status) => Err(status),
    };
    assert!(refused.is_err());
    let mut client = worker.client().await;
    read(client.chat(chat("hi", greedy(1))).await.expect("accepted").into_inner()).await.expect("an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_at_most_as_many_streams_as_it_may() {
    let limits = ConnectionLimits { streams: 2, ..ConnectionLimits::default() };
    let worker = Running::with(&[], limits).await;
    let client = worker.client().await;
    let open = async |client: &ernie_proto::ernie::v1::inference_client::InferenceClient<_>| {
        client.clone().complete(complete("It was", endless())).await.expect("accepted").into_inner()
    };
    let (first, _second) = (open(&client).await, open(&client).await);
    // The third call waits in the client until a stream is free, and reaches the server then.
    let mut third = client.clone();
    let third = tokio::spawn(async move {
        let stream = third.complete(complete("It was", greedy(2))).await.expect("accepted").into_inner();
        read(stream).await.expect("an answer");
    });
    worker.figure_becomes("vllm:num_requests_running{", 2.0).await;
    assert!(!third.is_finished());
    drop(first);
    within(third).await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_go_on_beside_hundreds_of_idle_connections() {
    let worker = Running::start(&[]).await;
    let mut idle = Vec::new();
    for number in 0..400 {
        let socket = TcpSocket::new_v4().expect("a socket");
        // Half of them come from the probe's own address.
        if number % 2 == 0 {
            socket.bind("127.0.0.2:0".parse().expect("an address")).expect("binds");
        }
        let mut stream = socket.connect(worker.http).await.expect("connects");
        // Some have asked for nothing yet, some are in the middle of asking. One that was ended already may fail.
        if number % 3 == 0 {
            let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nhost: w").await;
        }
        idle.push(stream);
    }
    for _ in 0..20 {
        assert_eq!(within(page(worker.http, "/livez")).await, (200, "ok\n".to_owned()));
        assert_eq!(within(page(worker.http, "/readyz")).await.0, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_connection_ends_with_its_answer() {
    let worker = Running::start(&[]).await;
    let mut stream = TcpStream::connect(worker.http).await.expect("connects");
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: worker\r\n\r\n").await.expect("writes");
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.expect("ends");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
}
