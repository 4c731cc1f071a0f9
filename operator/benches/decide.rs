//! How long `decide` takes: one model of 100 replicas (mean by criterion, and the 99th percentile of single calls), and one
//! tick of 1,000 such models.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use ernie_operator::scale::policy::Policy;
use ernie_operator::scale::{History, Moment, Observation, Replica, Sample, State, decide};

const REPLICAS: u32 = 100;
const MODELS: usize = 1000;

fn observation(at: f64) -> Observation {
    let now = Moment::from_seconds(at);
    let created = Moment::from_seconds(-120.0);
    let replicas = (0..REPLICAS).map(|id| {
        let done = (at * 0.8).floor();
        let sample = Sample {
            at: now,
            accepted: done,
            finished: done,
            prompt_tokens: done * 1000.0,
            output_tokens: done * 200.0,
            steps: at * 30.0,
            step_seconds: at * 0.9,
            prefill_tokens: done * 1000.0,
            decode_tokens: done * 200.0,
            kv_token_steps: done * 200.0 * 1100.0,
            judged: done,
            good: done,
            running: 8.0 + f64::from(id % 5),
            kv_used: 9000.0,
            kv_capacity: 350_000.0,
            max_num_seqs: 256.0,
            ..Sample::default()
        };
        let ready = Some(Moment::from_seconds(-60.0));
        Replica { id: u128::from(id) << 64 | 7, state: State::Ready, created, ready, sample: Some(sample) }
    });
    Observation { current: REPLICAS, replicas: replicas.collect(), front_door: None, quota: None }
}

/// A model that has been watched for ten minutes, and when that is.
fn watched(policy: &Policy) -> (History, f64) {
    (1..=120).fold((History::default(), 0.0), |(history, _), tick| {
        let at = 5.0 * f64::from(tick);
        (decide(&observation(at), policy, &history, Moment::from_seconds(at)).history, at)
    })
}

fn benchmark(criterion: &mut Criterion) {
    let policy = Policy { max_replicas: 200, ..Policy::default() };
    let (history, at) = watched(&policy);
    let (next, now) = (observation(at + 5.0), Moment::from_seconds(at + 5.0));
    criterion.bench_function("decide, 100 replicas", |bencher| {
        bencher.iter(|| black_box(decide(black_box(&next), &policy, &history, now)));
    });
    let mut group = criterion.benchmark_group("tick");
    group.sample_size(20);
    let models: Vec<(Observation, History)> = (0..MODELS).map(|_| (next.clone(), history.clone())).collect();
    group.bench_function("1,000 models of 100 replicas", |bencher| {
        bencher.iter(|| {
            let answers = models.iter().map(|(next, history)| decide(next, &policy, history, now).desired);
            black_box(answers.sum::<u32>())
        });
    });
    group.finish();
    let mut times: Vec<Duration> = (0..20_000)
        .map(|_| {
            let start = Instant::now();
            black_box(decide(black_box(&next), &policy, &history, now));
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    println!("decide, 100 replicas: median {:?}, 99th percentile {:?}", times[10_000], times[19_800]);
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
