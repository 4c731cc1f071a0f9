//! How requests end that do not simply finish.

use super::hash_executor::Accident;
use super::*;

#[tokio::test]
async fn a_dropped_stream_frees_its_blocks_within_one_step() {
    let fixture = start(config(), 100);
    let mut stream = fixture.engine.submit(request(0..50, 1000)).unwrap();
    while !matches!(stream.next().await, Some(Event::Token(_))) {}
    fixture.controls.hold();
    fixture.held().await;
    let before = fixture.controls.steps.load(std::sync::atomic::Ordering::SeqCst);
    drop(stream);
    fixture.controls.release();
    fixture.settled().await;
    let steps = fixture.controls.steps.load(std::sync::atomic::Ordering::SeqCst) - before;
    assert_eq!((fixture.recorder.outcomes().as_slice(), steps), ([Outcome::Cancelled].as_slice(), 1));
}

#[tokio::test]
async fn readers_that_vanish_at_every_stage_leave_nothing_behind() {
    let fixture = start(EngineConfig { max_queued_requests: 300, ..config() }, 40);
    let mut streams = vec![];
    for index in 0..200 {
        streams.push((index, fixture.engine.submit(request(index..index + 60, 50)).unwrap()));
    }
    for (index, mut stream) in streams {
        for _ in 0..index % 7 {
            stream.next().await;
        }
    }
    fixture.settled().await;
    assert_eq!(fixture.recorder.outcomes().len(), 200);
}

#[tokio::test]
async fn an_answer_stopped_by_its_reader_is_complete_and_counted_as_read() {
    let fixture = start(config(), 100);
    let mut stream = fixture.engine.submit(request(0..50, 1000)).unwrap();
    let mut read = 0;
    while read < 3 {
        read += u32::from(matches!(stream.next().await, Some(Event::Token(_))));
    }
    let done = stream.stop();
    assert_eq!((done.reason, done.usage.completion_tokens), (FinishReason::Stopped, 3));
    assert!(done.timings.decode > Duration::ZERO);
    fixture.settled().await;
    let ended = fixture.recorder.ended.lock().unwrap().clone();
    assert_eq!(ended, [("r".to_owned(), Outcome::Finished(FinishReason::Stopped), done.usage)]);
}

#[tokio::test]
async fn a_deadline_ends_a_request_that_runs_and_one_that_waits() {
    let one = EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, stream_capacity: 3000, ..config() };
    let fixture = start(one, 100);
    // Long enough for a first token on a busy machine, too short for the whole answer.
    *fixture.controls.delay.lock().unwrap() = Duration::from_millis(1);
    let deadline = Instant::now() + Duration::from_secs(1);
    let running = fixture.engine.submit(Request { deadline, ..request(0..10, 3000) }).unwrap();
    let waiting = fixture.engine.submit(Request { deadline, ..request(0..10, 10) }).unwrap();
    let (running, waiting) = (failed(running).await, failed(waiting).await);
    assert_eq!(running.kind, FailureKind::DeadlineExceeded);
    assert_eq!(running.message, "the deadline passed before the answer was complete");
    assert_eq!(waiting.message, "the deadline passed before the first token");
    fixture.settled().await;
}

#[tokio::test]
async fn a_slow_reader_pauses_its_own_request_only_and_loses_nothing_when_it_catches_up() {
    let fixture = start(EngineConfig { stream_capacity: 4, max_num_seqs: 2, ..config() }, 100);
    let slow_request = request(0..40, 50);
    let slow = fixture.engine.submit(slow_request.clone()).unwrap();
    eventually("the pause", || fixture.recorder.sum(|step| step.decode_tokens) >= 3).await;
    for index in 0..20 {
        let quick = request(index..index + 30, 40);
        let (tokens, _) = finished(fixture.engine.submit(quick.clone()).unwrap()).await;
        assert_eq!(tokens, reference::answer(&quick, 4096).0);
    }
    let produced = fixture.recorder.sum(|step| step.decode_tokens);
    assert!(produced <= 20 * 39 + 5, "the slow one generated at most what its stream holds: {produced}");
    assert_eq!(finished(slow).await.0, reference::answer(&slow_request, 4096).0);
}

#[tokio::test]
async fn a_reader_that_takes_nothing_for_too_long_is_given_up() {
    let stall_timeout = Duration::from_millis(30);
    let fixture = start(EngineConfig { stream_capacity: 4, stall_timeout, ..config() }, 100);
    let stream = fixture.engine.submit(request(0..40, 50)).unwrap();
    eventually("the end of the request", || !fixture.recorder.outcomes().is_empty()).await;
    let failure = failed(stream).await;
    assert_eq!(failure.kind, FailureKind::SlowReader);
    assert_eq!(failure.message, "the reader took no token for 30ms");
    fixture.settled().await;
}

#[tokio::test]
async fn a_failed_step_fails_its_sequences_with_a_sentence_and_nothing_else() {
    for accident in [Accident::Error, Accident::Shape] {
        let fixture = start(config(), 100);
        *fixture.controls.next.lock().unwrap() = Some(accident);
        let failure = failed(fixture.engine.submit(request(0..40, 5)).unwrap()).await;
        assert_eq!(failure.kind, FailureKind::Internal);
        assert_eq!(failure.message, "the forward pass failed; the server's log says more");
        let next = request(0..40, 5);
        let (tokens, done) = finished(fixture.engine.submit(next.clone()).unwrap()).await;
        assert_eq!(tokens, reference::answer(&next, 4096).0);
        assert_eq!(done.usage.cached_tokens, 0, "what the failed step wrote is not trusted");
        assert!(fixture.engine.healthy());
        fixture.settled().await;
    }
}

#[tokio::test]
async fn logits_that_are_not_numbers_end_one_request_and_spare_the_others() {
    let fixture = start(config(), 100);
    fixture.controls.hold();
    let blocker = fixture.engine.submit(request(0..3, 1)).unwrap();
    fixture.held().await;
    let healthy = request([5; 20], 30);
    let sick = fixture.engine.submit(request([7; 20], 30)).unwrap();
    let well = fixture.engine.submit(healthy.clone()).unwrap();
    *fixture.controls.next.lock().unwrap() = Some(Accident::NotANumber(7));
    fixture.controls.release();
    finished(blocker).await;
    let failure = failed(sick).await;
    assert_eq!(failure.kind, FailureKind::Internal);
    assert_eq!(failure.message, "the model computed a logit that is not finite (of token 0)");
    assert_eq!(finished(well).await.0, reference::answer(&healthy, 4096).0);
}

#[tokio::test]
async fn when_nothing_is_allowed_the_request_fails_with_a_sentence() {
    let fixture = start(config(), 100);
    let mut nothing = request(0..5, 5);
    nothing.sampling.logit_bias = (0..VOCAB as u32).map(|token| (token, -100.0)).collect();
    let failure = failed(fixture.engine.submit(nothing).unwrap()).await;
    assert_eq!(failure.kind, FailureKind::Unanswerable("sampling.logit_bias"));
    assert_eq!(failure.message, "logit_bias forbids the answer every token at its beginning; allow one of them");
}

#[tokio::test]
async fn a_panic_of_the_executor_fails_everything_and_readiness_without_taking_the_process_along() {
    let fixture = start(EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, ..config() }, 100);
    fixture.controls.hold();
    let running = fixture.engine.submit(request(0..40, 5)).unwrap();
    let waiting = fixture.engine.submit(request(0..40, 5)).unwrap();
    fixture.held().await;
    *fixture.controls.next.lock().unwrap() = Some(Accident::Panic);
    fixture.controls.release();
    for stream in [running, waiting] {
        let failure = failed(stream).await;
        assert_eq!(failure.kind, FailureKind::EngineFailed);
        assert_eq!(failure.message, "the engine has failed; use another replica");
    }
    assert!(!fixture.engine.healthy());
    let health = fixture.engine.health().borrow().clone();
    assert_eq!(health, Health::Failed("the executor panicked: a kernel met a ghost".to_owned()));
    let rejected = fixture.engine.submit(request(0..40, 5)).err().unwrap();
    assert_eq!((rejected.kind(), &rejected), (RejectionKind::Unavailable, &Rejected::EngineFailed));
    assert_eq!(fixture.engine.drain(Instant::now()).await, Drained::default());
}

#[tokio::test]
async fn an_executor_that_fails_from_the_start_is_never_ready() {
    for accident in [Accident::Error, Accident::Panic] {
        let controls = Arc::new(Controls::default());
        *controls.next.lock().unwrap() = Some(accident);
        let executor = HashExecutor::new(100, 4096, controls);
        let engine = Engine::start(executor, EngineConfig::default(), Arc::new(())).unwrap();
        let mut health = engine.health();
        let end = health.wait_for(|health| *health != Health::Starting).await.unwrap();
        assert!(matches!(&*end, Health::Failed(_)), "{end:?}");
    }
}

#[tokio::test]
async fn a_drain_finishes_what_was_accepted_and_accepts_nothing_more() {
    let fixture = start(EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, ..config() }, 100);
    fixture.controls.hold();
    let requests = [request(0..40, 20), request(1..41, 20)];
    let streams = requests.clone().map(|request| fixture.engine.submit(request).unwrap());
    fixture.held().await;
    let engine = fixture.engine.clone();
    let draining = tokio::spawn(async move { engine.drain(Instant::now() + Duration::from_secs(60)).await });
    eventually("the refusal", || {
        let rejected = fixture.engine.submit(request(0..40, 20)).err();
        rejected.is_some_and(|rejected| rejected == Rejected::Draining)
    })
    .await;
    fixture.controls.release();
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(finished(stream).await.0, reference::answer(request, 4096).0);
    }
    assert_eq!(draining.await.unwrap(), Drained { completed: 2, cut: 0 });
    let mut health = fixture.engine.health();
    health.wait_for(|health| *health == Health::Stopped).await.unwrap();
}

#[tokio::test]
async fn streams_that_outlive_the_drain_end_unavailable_and_are_counted_apart() {
    let fixture = start(config(), 100);
    // The endless one would take six seconds.
    *fixture.controls.delay.lock().unwrap() = Duration::from_millis(2);
    let quick = fixture.engine.submit(request(0..40, 5)).unwrap();
    let endless = fixture.engine.submit(request(0..40, 3000)).unwrap();
    let drained = fixture.engine.drain(Instant::now() + Duration::from_millis(1500));
    let (drained, (_, quick), endless) = tokio::join!(drained, finished(quick), failed(endless));
    assert_eq!(drained, Drained { completed: 1, cut: 1 });
    assert_eq!(quick.reason, FinishReason::Length);
    assert_eq!(endless.kind, FailureKind::Draining);
}

#[tokio::test]
async fn an_idle_engine_drains_at_once() {
    let fixture = start(config(), 100);
    let begun = Instant::now();
    assert_eq!(fixture.engine.drain(begun + Duration::from_secs(60)).await, Drained::default());
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn the_engine_stops_when_all_handles_and_streams_are_gone() {
    let Fixture { engine, recorder, .. } = start(config(), 100);
    let mut health = engine.health();
    let stream = engine.submit(request(0..40, 20)).unwrap();
    drop(engine);
    assert_eq!(finished(stream).await.0.len(), 20, "a stream keeps the engine alive");
    health.wait_for(|health| *health == Health::Stopped).await.unwrap();
    assert_eq!(recorder.latest().blocks_used, 0);
}
