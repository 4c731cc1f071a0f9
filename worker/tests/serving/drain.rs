//! Stopping.

use std::time::{Duration, Instant};

use ernie_proto::ernie::v1::{
    GenerateResponse, SamplingParams, generate_response::Event, inference_client::InferenceClient,
};
use ernie_worker::{serve::Ended, server::lifecycle::Stage, shutdown::Stop};
use tonic::{Code, Streaming, transport::Endpoint};

use super::running::{Running, chat, complete, endless, greedy, read, until, within};

async fn begun(worker: &Running, sampling: SamplingParams) -> Streaming<GenerateResponse> {
    let mut client = worker.client().await;
    let mut stream = client.complete(complete("It was", sampling)).await.expect("accepted").into_inner();
    loop {
        let message = within(stream.message()).await.expect("a message").expect("goes on");
        if matches!(message.event, Some(Event::Delta(_))) {
            return stream;
        }
    }
}

/// Reads what is left of a stream.
async fn rest(mut stream: Streaming<GenerateResponse>) -> Result<bool, Code> {
    let mut done = false;
    while let Some(message) = within(stream.message()).await.map_err(|status| status.code())? {
        done |= matches!(message.event, Some(Event::Done(_)));
    }
    Ok(done)
}

#[tokio::test(flavor = "multi_thread")]
async fn running_streams_finish_and_the_worker_ends_with_the_last_one() {
    let worker = Running::start(&[]).await;
    // With a window as small as this the answer waits for its reader, however fast the machine is.
    let endpoint = Endpoint::from_shared(format!("http://{}", worker.grpc)).expect("an address");
    let narrow = endpoint.initial_stream_window_size(1024).connect().await.expect("connects");
    let request = complete("It was", SamplingParams { ignore_eos: true, ..greedy(1200) });
    let mut stream = InferenceClient::new(narrow).complete(request).await.expect("accepted").into_inner();
    within(stream.message()).await.expect("a message");
    let mut other = worker.client().await;
    worker.stop(Stop::Interrupt).await;
    until("the worker drains", async || worker.lifecycle.stage() == Stage::Draining).await;
    assert_eq!(worker.page("/readyz").await.0, 503);
    assert_eq!(worker.figure("ernie:draining").await, 1.0);
    let refused = other.chat(chat("too late", greedy(1))).await;
    assert_eq!(refused.expect_err("refused").code(), Code::Unavailable);
    assert_eq!(rest(stream).await, Ok(true), "the stream is complete");
    let last = Instant::now();
    match worker.end().await.expect("a clean end") {
        Ended::Drained(drained) => assert_eq!((drained.completed, drained.cut), (1, 0)),
        other => panic!("{other:?}"),
    }
    assert!(last.elapsed() < Duration::from_secs(1), "{:?}", last.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lame_duck_is_unready_and_still_accepts() {
    let worker = Running::start(&["--lame-duck", "2s"]).await;
    worker.stop(Stop::Terminate).await;
    until("the worker is told", async || worker.lifecycle.stage() == Stage::LameDuck).await;
    let (status, body) = worker.page("/readyz").await;
    assert!(status == 503 && body.contains("stopping"), "{body}");
    assert_eq!(worker.figure("ernie:ready").await, 0.0);
    // A client that has not heard yet connects anew and is served.
    let mut late = worker.client().await;
    read(late.chat(chat("hi", greedy(2))).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!(worker.lifecycle.stage(), Stage::LameDuck);
    worker.end().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_outlive_the_drain_end_unavailable_and_are_counted_apart() {
    let worker = Running::start(&["--drain-timeout", "50ms", "--max-num-seqs", "1"]).await;
    let first = begun(&worker, endless()).await;
    let mut client = worker.client().await;
    let queued = client.complete(complete("It was", endless())).await.expect("accepted").into_inner();
    worker.figure_becomes("vllm:num_requests_waiting{", 1.0).await;
    worker.stop(Stop::Interrupt).await;
    assert_eq!(rest(first).await, Err(Code::Unavailable));
    assert_eq!(rest(queued).await, Err(Code::Unavailable));
    match worker.end().await.expect("a clean end") {
        Ended::Drained(drained) => assert_eq!((drained.completed, drained.cut), (0, 2)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_worker_at_once() {
    let worker = Running::start(&[]).await;
    let _stream = begun(&worker, endless()).await;
    worker.stop(Stop::Terminate).await;
    worker.stop(Stop::Terminate).await;
    let message = worker.end().await.expect_err("not clean");
    assert!(message.message.contains("told to stop twice: 1 running streams"), "{}", message.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_ends_at_once() {
    let worker = Running::start(&[]).await;
    let _idle = worker.client().await;
    let told = Instant::now();
    worker.stop(Stop::Interrupt).await;
    worker.end().await.expect("a clean end");
    assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
}
