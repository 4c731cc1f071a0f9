//! Work that nobody waits for any more, and work that cannot be taken.

use std::time::Duration;

use ernie_proto::ernie::v1::{GenerateResponse, generate_response::Event};
use tonic::{Code, Streaming, transport::Endpoint};
use tonic_types::StatusExt;

use super::running::{Running, chat, complete, endless, greedy, read, status_in_time, until, within};

const COMPLETE: &str = "/ernie.v1.Inference/Complete";
const RUNNING: &str = "vllm:num_requests_running{";
const WAITING: &str = "vllm:num_requests_waiting{";
const ABORTED: &str = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"";

/// Reads until the first token.
async fn first_token(stream: &mut Streaming<GenerateResponse>) {
    within(async {
        while let Some(message) = stream.message().await.expect("a message") {
            if matches!(message.event, Some(Event::Delta(_))) {
                return;
            }
        }
        panic!("no token");
    })
    .await;
}

/// A stream of an answer that is far from its end.
async fn long_stream(worker: &Running) -> Streaming<GenerateResponse> {
    let request = complete("It was", endless());
    let mut stream = worker.client().await.complete(request).await.expect("accepted").into_inner();
    first_token(&mut stream).await;
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_work_at_once() {
    let worker = Running::start(&[]).await;
    let stream = long_stream(&worker).await;
    worker.figure_becomes(RUNNING, 1.0).await;
    drop(stream);
    worker.figure_becomes(RUNNING, 0.0).await;
    worker.figure_becomes(ABORTED, 1.0).await;
    worker.figure_becomes("vllm:kv_cache_usage_perc{", 0.0).await;
    let canceled = "grpc_server_handled_total{grpc_code=\"Canceled\",grpc_method=\"Complete\"";
    worker.figure_becomes(canceled, 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_its_connection_frees_all_its_work() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(client.complete(complete("It was", endless())).await.expect("accepted").into_inner());
    }
    for stream in &mut streams {
        first_token(stream).await;
    }
    drop((client, streams));
    worker.figure_becomes(RUNNING, 0.0).await;
    worker.figure_becomes(ABORTED, 4.0).await;
    worker.figure_becomes("ernie:grpc_connections ", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_can_go_away_too() {
    let worker = Running::start(&["--max-num-seqs", "1"]).await;
    let _running = long_stream(&worker).await;
    let waiting = worker.client().await.complete(complete("It was", endless())).await.expect("accepted");
    worker.figure_becomes(WAITING, 1.0).await;
    drop(waiting);
    worker.figure_becomes(WAITING, 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_a_hint_and_recovers() {
    let worker = Running::start(&["--max-num-seqs", "1", "--max-queued-requests", "1"]).await;
    let running = long_stream(&worker).await;
    let mut client = worker.client().await;
    let queued = client.complete(complete("It was", greedy(1))).await.expect("accepted").into_inner();
    worker.figure_becomes(WAITING, 1.0).await;

    let status = client.complete(complete("It was", greedy(1))).await.expect_err("refused");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().starts_with("the server is full: 2 requests"), "{status}");
    let hint = status.get_details_retry_info().expect("a hint").retry_delay.expect("a delay");
    assert!(hint > Duration::ZERO && hint < Duration::from_secs(60), "{hint:?}");
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
    assert_eq!(worker.figure("vllm:admission_rejections_total{").await, 1.0);

    drop(running);
    read(queued).await.expect("an answer");
    until("a new request is accepted", async || client.clone().complete(complete("It was", greedy(1))).await.is_ok())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_requests_against_room_for_eight_all_end_definitely() {
    let worker = Running::start(&["--max-num-seqs", "4", "--max-queued-requests", "4"]).await;
    // A connection has room for 128 streams.
    let clients = futures::future::join_all((0..10).map(|_| worker.client())).await;
    let calls = (0..1000).map(|number| {
        let mut client = clients[number % clients.len()].clone();
        tokio::spawn(async move {
            let request = chat("Emma", ernie_proto::ernie::v1::SamplingParams { ignore_eos: true, ..greedy(200) });
            match client.chat(request).await {
                Ok(stream) => read(stream.into_inner()).await.map(|answer| answer.ids().len()),
                Err(status) => Err(status),
            }
        })
    });
    let (mut answered, mut refused) = (0, 0);
    for call in calls.collect::<Vec<_>>() {
        match within(call).await.expect("no panic") {
            Ok(tokens) => {
                assert_eq!(tokens, 200);
                answered += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                refused += 1;
            }
        }
    }
    assert!(answered >= 8 && refused > 0, "{answered} answered, {refused} refused");
    worker.figure_becomes(RUNNING, 0.0).await;
    worker.figure_becomes(WAITING, 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_an_answer_and_frees_its_work() {
    let worker = Running::start(&[]).await;
    let status = status_in_time(worker.grpc, COMPLETE, "150m", &complete("It was", endless())).await;
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    worker.figure_becomes(RUNNING, 0.0).await;
    worker
        .figure_becomes("grpc_server_handled_total{grpc_code=\"DeadlineExceeded\",grpc_method=\"Complete\"", 1.0)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_has_passed_is_refused_at_once() {
    let worker = Running::start(&[]).await;
    let status = status_in_time(worker.grpc, COMPLETE, "0n", &complete("It was", greedy(1))).await;
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert_eq!(worker.figure("vllm:prompt_tokens_total{").await, 0.0, "nothing was computed for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_given_up() {
    let worker = Running::start(&[]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", worker.grpc)).expect("an address");
    let channel = endpoint.initial_stream_window_size(1024).connect().await.expect("connects");
    let mut client = ernie_proto::ernie::v1::inference_client::InferenceClient::new(channel);
    let mut unread = client.complete(complete("It was", endless())).await.expect("accepted").into_inner();
    first_token(&mut unread).await;
    // The engine waits 30 s for a reader.
    worker.figure_becomes(ABORTED, 1.0).await;
    worker.figure_becomes(RUNNING, 0.0).await;
    // Another stream of the same connection is served meanwhile.
    read(client.complete(complete("It was", greedy(4))).await.expect("accepted").into_inner())
        .await
        .expect("an answer");
    // What was sent is still there; then the stream ends with a status, not as if it were complete.
    let status = loop {
        match within(unread.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the answer looks complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Cancelled, "{status}");
}
