//! Refusals, and more work than there is room for.

use super::*;

fn refused(fixture: &Fixture, request: Request) -> Rejected {
    fixture.engine.submit(request).err().expect("the request is refused")
}

#[tokio::test]
async fn a_request_that_can_never_be_served_is_refused_with_what_would_be_accepted() {
    let fixture = start(config(), 4);
    let cases = [
        (request([], 1), "the prompt is empty; give at least one token"),
        (
            request(0..128, 1),
            "the prompt has 128 tokens; this server takes at most 127, since prompt and answer together may have 128",
        ),
        (request(0..5, 0), "max_tokens is 0; ask for at least 1"),
        (request(0..100, 29), "max_tokens 29 and a prompt of 100 tokens exceed the context of 128; ask for at most 28"),
        (Request { min_tokens: 11, ..request(0..5, 10) }, "min_tokens 11 exceeds the 10 tokens that may be generated"),
        (
            Request { emitted: vec![1; 10], ..request(0..5, 10) },
            "10 tokens were emitted already, and max_tokens is 10; there is nothing to resume",
        ),
        (
            Request { prompt: vec![1, 50], ..request(0..5, 10) },
            "token id 50 in the prompt is not in the vocabulary of 50 tokens",
        ),
        (
            Request { emitted: vec![51], ..request(0..5, 10) },
            "token id 51 in the emitted tokens is not in the vocabulary of 50 tokens",
        ),
        (
            Request { stop_token_ids: vec![u32::MAX], ..request(0..5, 10) },
            "token id 4294967295 in stop_token_ids is not in the vocabulary of 50 tokens",
        ),
        (Request { position_ids: Some(vec![0; 4]), ..request(0..5, 10) }, "4 positions were given for 5 prompt tokens"),
        (Request { priority: 101, ..request(0..5, 10) }, "priority 101 is not between -100 and 100"),
        (
            Request {
                sampling: SamplingParams { temperature: f32::NAN, ..SamplingParams::default() },
                ..request(0..5, 10)
            },
            "temperature is NaN; choose from 0 to 2",
        ),
    ];
    let count = cases.len();
    for (request, sentence) in cases {
        let rejected = refused(&fixture, request);
        assert_eq!((rejected.to_string().as_str(), rejected.kind()), (sentence, RejectionKind::Invalid));
        assert_eq!(rejected.retry_after(), None);
    }
    assert_eq!(*fixture.recorder.rejected.lock().unwrap(), vec![RejectionKind::Invalid; count]);
}

#[tokio::test]
async fn a_full_queue_and_a_used_up_quota_refuse_with_a_hint_when_to_retry() {
    let config = EngineConfig { max_num_seqs: 2, max_queued_requests: 3, max_requests_per_tenant: Some(4), ..config() };
    let fixture = start(config, 100);
    fixture.controls.hold();
    let mine = |_| fixture.engine.submit(request(0..5, 5)).unwrap();
    let mut streams: Vec<_> = (0..4).map(mine).collect();
    let quota = refused(&fixture, request(0..5, 5));
    assert!(matches!(quota, Rejected::TenantQuota { limit: 4, .. }), "{quota:?}");
    let other = Request { tenant: "other".into(), ..request(0..5, 5) };
    streams.push(fixture.engine.submit(other.clone()).unwrap());
    let full = refused(&fixture, other.clone());
    assert!(matches!(full, Rejected::QueueFull { limit: 5, .. }), "{full:?}");
    assert_eq!(full.kind(), RejectionKind::Exhausted);
    assert!(full.retry_after().is_some());
    fixture.controls.release();
    for stream in streams {
        finished(stream).await;
        // Whoever has heard of its end finds its place free.
        finished(fixture.engine.submit(other.clone()).unwrap()).await;
    }
}

#[tokio::test]
async fn a_deadline_that_has_passed_or_cannot_be_met_is_refused_at_once() {
    let config = EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, enable_prefix_caching: false, ..config() };
    let fixture = start(config, 200);
    let passed = refused(&fixture, Request { deadline: Instant::now(), ..request(0..5, 5) });
    assert_eq!(passed.kind(), RejectionKind::Late);

    // The engine learns that a request takes 20 ms and more from one start to the next.
    *fixture.controls.delay.lock().unwrap() = Duration::from_millis(5);
    let streams: Vec<_> = (0..6).map(|_| fixture.engine.submit(request(0..60, 4)).unwrap()).collect();
    for stream in streams {
        finished(stream).await;
    }
    let _queue: Vec<_> = (0..40).map(|_| fixture.engine.submit(request(0..60, 4)).unwrap()).collect();
    let soon = Instant::now() + Duration::from_millis(100);
    let late = refused(&fixture, Request { deadline: soon, ..request(0..60, 4) });
    assert!(matches!(late, Rejected::DeadlineUnmeetable { expected, .. } if expected > Duration::from_millis(100)));
    assert_eq!(late.kind(), RejectionKind::Late);
    let patient = Instant::now() + Duration::from_secs(60);
    fixture.engine.submit(Request { deadline: patient, ..request(0..60, 4) }).unwrap();
}

#[tokio::test]
async fn a_thousand_requests_against_room_for_eight_each_end_with_tokens_or_a_definite_refusal() {
    let fixture = start(EngineConfig { max_queued_requests: 56, ..config() }, 64);
    let mut clients = vec![];
    for index in 0..1000u32 {
        let engine = fixture.engine.clone();
        clients.push(tokio::spawn(async move {
            let request = request(index % 7..index % 7 + 20 + index % 90, 5 + index % 40);
            match engine.submit(request.clone()) {
                Ok(stream) => {
                    assert_eq!(finished(stream).await.0, reference::answer(&request, 2048).0);
                    true
                }
                Err(rejected) => {
                    assert_eq!(rejected.kind(), RejectionKind::Exhausted, "{rejected}");
                    false
                }
            }
        }));
    }
    let mut served = 0;
    for client in clients {
        served += usize::from(client.await.unwrap());
    }
    assert!((64..1000).contains(&served), "{served} were served");
    fixture.settled().await;
    assert_eq!(fixture.recorder.rejected.lock().unwrap().len(), 1000 - served);
    let steps = fixture.recorder.steps.lock().unwrap();
    assert!(steps.iter().all(|step| step.running <= 8 && step.waiting <= 64 && step.blocks_used <= 64));
}

#[tokio::test]
async fn urgent_requests_overtake_those_that_wait() {
    let fixture = start(EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 64, ..config() }, 100);
    fixture.controls.hold();
    let blocker = fixture.engine.submit(request(0..5, 1)).unwrap();
    fixture.held().await;
    let submit = |id: &str, priority| {
        let request = Request { id: id.to_owned(), priority, ..request(0..5, 1) };
        fixture.engine.submit(request).unwrap()
    };
    let streams = [submit("usual", 0), submit("background", 5), submit("urgent", -1), submit("usual too", 0), blocker];
    fixture.controls.release();
    for stream in streams {
        finished(stream).await;
    }
    fixture.settled().await;
    let order: Vec<_> = fixture.recorder.ended.lock().unwrap().iter().map(|(id, ..)| id.clone()).collect();
    assert_eq!(order, ["r", "urgent", "usual", "usual too", "background"]);
}

#[tokio::test]
async fn settings_that_no_engine_can_run_with_are_refused() {
    let engine = |config, blocks| {
        let executor = HashExecutor::new(blocks, 4096, Arc::default());
        Engine::start(executor, config, Arc::new(())).err().map(|error| error.to_string())
    };
    let zero = EngineConfig { max_num_seqs: 0, ..config() };
    assert_eq!(engine(zero, 10).unwrap(), "max_num_seqs 0: choose from 1 to 4096");
    let empty = engine(config(), 0).unwrap();
    assert!(empty.contains("0 blocks of 32 tokens") && empty.contains("more memory"), "{empty}");
}

#[tokio::test]
async fn the_engine_measures_its_executor_before_it_is_ready() {
    let controls = Arc::new(Controls::default());
    *controls.delay.lock().unwrap() = Duration::from_millis(1);
    let executor = HashExecutor::new(10, 4096, Arc::clone(&controls));
    let config = EngineConfig { warm_up: Duration::from_millis(100), ..EngineConfig::default() };
    let engine = Engine::start(executor, config, Arc::new(())).unwrap();
    // Accepted before the engine is ready, and served afterwards.
    let early = request(0..40, 5);
    let stream = engine.submit(early.clone()).unwrap();
    engine.health().wait_for(|health| *health == Health::Ready).await.unwrap();
    let cost = engine.load().cost;
    let step = cost.base + cost.per_token + cost.per_sequence;
    assert!((0.5e-3..50e-3).contains(&step), "{cost:?}");
    let (tokens, done) = finished(stream).await;
    assert_eq!((tokens, done.usage.cached_tokens), (reference::answer(&early, 320).0, 0));
}
