//! What is generated: always the same, whatever else runs.

use super::*;

/// A generator of numbers; SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % u64::from(bound)) as u32
    }
}

/// Requests of every kind, many of them with a common beginning.
fn mixture(count: u32, seed: u64) -> Vec<Request> {
    let mut random = Random(seed);
    (0..count)
        .map(|index| {
            let (beginning, common, own) = (random.below(3), random.below(150), 1 + random.below(120));
            let mut prompt: Vec<u32> = (beginning..).step_by(3).take(common as usize).collect();
            prompt.extend((0..own).map(|_| random.below(VOCAB as u32)));
            let sampling = SamplingParams {
                temperature: random.below(3) as f32 * 0.6,
                top_k: random.below(2) as i32 * 20,
                top_p: [1.0, 0.9][random.below(2) as usize],
                repetition_penalty: [1.0, 1.3][random.below(2) as usize],
                frequency_penalty: [0.0, 0.4][random.below(2) as usize],
                seed: index.into(),
                logprobs: [None, Some(3)][random.below(2) as usize],
                ..SamplingParams::default()
            };
            let adapter = match random.below(4) {
                0 => Some(Adapter { index: 1, digest: [1; 32] }),
                _ => None,
            };
            Request {
                id: index.to_string(),
                sampling,
                choice: random.below(2),
                min_tokens: random.below(10),
                stop_token_ids: vec![3; random.below(2) as usize],
                eos_token_ids: [1, 2].into(),
                ignore_eos: random.below(2) == 0,
                tenant: ["a", "b"][random.below(2) as usize].into(),
                priority: random.below(3) as i32,
                adapter,
                position_ids: (random.below(8) == 0).then(|| (0..common + own).map(|place| place / 2).collect()),
                ..request(prompt, 10 + random.below(150))
            }
        })
        .collect()
}

async fn assert_all_equal_the_reference(fixture: &Fixture, requests: Vec<Request>) {
    let context = fixture.engine.limits().context;
    let streams: Vec<_> = requests.iter().map(|request| fixture.engine.submit(request.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(streams) {
        let (tokens, finished) = finished(stream).await;
        assert_eq!((tokens, finished.reason), reference::answer(request, context), "request {}", request.id);
    }
}

#[tokio::test]
async fn a_request_gives_its_tokens_then_how_and_why_it_ended() {
    let fixture = start(config(), 100);
    let request = request(0..70, 20);
    let (tokens, finished) = finished(fixture.engine.submit(request.clone()).unwrap()).await;
    assert_eq!(tokens, reference::answer(&request, 4096).0);
    assert_eq!(finished.reason, FinishReason::Length);
    assert_eq!(finished.usage, Usage { prompt_tokens: 70, completion_tokens: 20, cached_tokens: 0 });
    let Timings { queue, prefill, decode, time_to_first_token } = finished.timings;
    assert_eq!(time_to_first_token, queue + prefill);
    assert!(decode > Duration::ZERO && prefill > Duration::ZERO);
    fixture.settled().await;
    assert_eq!(fixture.recorder.outcomes(), [Outcome::Finished(FinishReason::Length)]);
    assert_eq!((*fixture.recorder.first_tokens.lock().unwrap(), *fixture.recorder.tokens.lock().unwrap()), (1, 19));
}

#[tokio::test]
async fn answers_in_a_crowd_equal_answers_alone() {
    let fixture = start(EngineConfig { max_queued_requests: 100, ..config() }, 1000);
    assert_all_equal_the_reference(&fixture, mixture(60, 1)).await;
    fixture.settled().await;
    assert!(
        fixture.recorder.steps.lock().unwrap().iter().any(|step| step.decode_tokens > 4 && step.prefill_tokens > 0)
    );
}

#[tokio::test]
async fn answers_equal_when_prompts_are_read_in_small_pieces() {
    let config = EngineConfig { max_num_batched_tokens: 8, max_queued_requests: 100, ..config() };
    let fixture = start(config, 1000);
    assert_all_equal_the_reference(&fixture, mixture(30, 2)).await;
    fixture.settled().await;
    assert!(fixture.recorder.steps.lock().unwrap().iter().all(|step| step.decode_tokens + step.prefill_tokens <= 8));
}

#[tokio::test]
async fn answers_equal_when_sequences_are_preempted_again_and_again() {
    // Room for little more than one of the largest requests.
    let fixture = start(EngineConfig { max_queued_requests: 100, ..config() }, 20);
    assert_all_equal_the_reference(&fixture, mixture(60, 3)).await;
    fixture.settled().await;
    let preemptions = fixture.recorder.sum(|step| step.preemptions);
    assert!(preemptions > 10, "{preemptions}");
}

#[tokio::test]
async fn answers_equal_when_prompts_are_found_in_the_cache_and_without_a_cache() {
    let mut cached = vec![];
    for enable_prefix_caching in [true, false] {
        let fixture = start(EngineConfig { enable_prefix_caching, max_queued_requests: 100, ..config() }, 1000);
        assert_all_equal_the_reference(&fixture, mixture(40, 4)).await;
        assert_all_equal_the_reference(&fixture, mixture(40, 4)).await;
        fixture.settled().await;
        cached.push(fixture.recorder.sum(|step| step.prefix_hits));
        assert!(fixture.recorder.sum(|step| step.prefix_queries) >= cached[cached.len() - 1]);
    }
    assert!(cached[0] > 2000 && cached[1] == 0, "{cached:?}");
}

#[tokio::test]
async fn an_answer_resumed_at_any_token_goes_on_as_if_it_had_never_been_cut() {
    let fixture = start(config(), 200);
    for whole in mixture(6, 5) {
        let whole = Request { ignore_eos: true, stop_token_ids: vec![], ..whole };
        let (tokens, _) = reference::answer(&whole, 4096);
        for cut in 0..tokens.len() {
            let resumed = Request { emitted: tokens[..cut].to_vec(), ..whole.clone() };
            let (rest, finished) = finished(fixture.engine.submit(resumed).unwrap()).await;
            assert_eq!(rest, tokens[cut..], "cut at {cut}");
            assert_eq!(finished.usage.completion_tokens as usize, tokens.len());
        }
    }
}

#[tokio::test]
async fn cached_tokens_are_counted_and_never_exceed_the_prompt() {
    let fixture = start(config(), 100);
    let first = request(0..100, 40);
    let (tokens, _) = finished(fixture.engine.submit(first.clone()).unwrap()).await;
    let (_, again) = finished(fixture.engine.submit(first.clone()).unwrap()).await;
    assert_eq!(again.usage.cached_tokens, 96);
    let resumed = Request { emitted: tokens[..39].to_vec(), ..first };
    let (_, resumed) = finished(fixture.engine.submit(resumed).unwrap()).await;
    assert_eq!(resumed.usage.cached_tokens, 100, "128 were found");
}

#[tokio::test]
async fn tenants_salts_and_adapters_never_share_cached_prompts() {
    let fixture = start(config(), 100);
    let adapter = |digest| Some(Adapter { index: 0, digest: [digest; 32] });
    let tenant = |name: &str| Arc::<str>::from(name);
    let different = [
        request(0..100, 1),
        Request { tenant: tenant("other"), ..request(0..100, 1) },
        Request { cache_salt: "other".into(), ..request(0..100, 1) },
        Request { cache_salt: "other".into(), tenant: tenant("other"), ..request(0..100, 1) },
        Request { adapter: adapter(1), ..request(0..100, 1) },
        Request { adapter: adapter(2), ..request(0..100, 1) },
        Request { adapter: adapter(1), tenant: tenant("other"), ..request(0..100, 1) },
    ];
    for expected in [0, 96] {
        for request in &different {
            let (_, finished) = finished(fixture.engine.submit(request.clone()).unwrap()).await;
            assert_eq!(finished.usage.cached_tokens, expected, "{request:?}");
        }
    }
}

#[tokio::test]
async fn logprobs_come_with_each_token_when_asked_for() {
    let fixture = start(config(), 100);
    let mut with = request(0..10, 5);
    with.sampling.logprobs = Some(4);
    let mut stream = fixture.engine.submit(with).unwrap();
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        if let Event::Token(Token { id, logprobs, .. }) = event {
            let logprobs = logprobs.unwrap();
            assert_eq!(logprobs.top.len(), 4);
            assert_eq!(logprobs.top[0], (id, logprobs.chosen), "the greedy token is the best");
            assert!(logprobs.chosen < 0.0);
            tokens += 1;
        }
    }
    assert_eq!(tokens, 5);
}

#[tokio::test]
async fn end_of_sequence_and_stop_tokens_end_an_answer_and_are_its_last_token() {
    let fixture = start(config(), 100);
    let plain = request(0..10, 60);
    let (tokens, _) = reference::answer(&plain, 4096);
    let end = tokens[20];
    let place = tokens.iter().position(|&token| token == end).unwrap();

    let eos = Request { eos_token_ids: [end].into(), ..plain.clone() };
    let (output, done) = finished(fixture.engine.submit(eos.clone()).unwrap()).await;
    assert_eq!((output.as_slice(), done.reason), (&tokens[..=place], FinishReason::EndOfSequence(end)));

    let ignored = Request { ignore_eos: true, ..eos.clone() };
    assert_eq!(finished(fixture.engine.submit(ignored).unwrap()).await.0, tokens);

    let stop = Request { stop_token_ids: vec![end], ..plain };
    let (output, done) = finished(fixture.engine.submit(stop).unwrap()).await;
    assert_eq!((output.as_slice(), done.reason), (&tokens[..=place], FinishReason::StopToken(end)));

    let later = Request { min_tokens: 60, ..eos };
    let (output, done) = finished(fixture.engine.submit(later).unwrap()).await;
    assert_eq!((output.len(), done.reason), (60, FinishReason::Length));
    assert!(!output.contains(&end));
}

#[tokio::test]
async fn a_prompt_may_fill_the_context_but_for_one_token() {
    // The pool of 4 blocks is the tightest bound.
    let fixture = start(config(), 4);
    assert_eq!(fixture.engine.limits().context, 128);
    let longest = Request { max_tokens: None, ..request(0..127, 1) };
    assert_eq!(finished(fixture.engine.submit(longest).unwrap()).await.0.len(), 1);
    let to_the_end = Request { max_tokens: None, ..request(0..5, 1) };
    let (tokens, done) = finished(fixture.engine.submit(to_the_end).unwrap()).await;
    assert_eq!((tokens.len(), done.reason), (123, FinishReason::Length));
}
