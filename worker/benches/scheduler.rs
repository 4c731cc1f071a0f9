//! What the engine itself costs in a step: planning, and the bookkeeping after it.
//!
//! `cargo bench -p ernie-worker --bench scheduler`. The aim is 50 µs for 256 running sequences.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use ernie_worker::engine::blocks::Blocks;
use ernie_worker::engine::cost::StepCost;
use ernie_worker::engine::scheduler::{Bounds, NewSequence, Pace, Scheduler, Step};

const PACE: Pace =
    Pace { cost: StepCost { base: 1e-3, per_token: 1e-4, per_sequence: 1e-4, per_context: 1e-8 }, target: 0.1 };

fn sequence(index: u32, tokens: u32) -> NewSequence {
    NewSequence {
        tokens: (0..tokens).map(|token| token * 7 + index * 100_003).collect(),
        position_ids: None,
        adapter: None,
        scope: vec![b"tenant".to_vec(), vec![0; 32], vec![]],
        rank_micros: i64::from(index),
        tenant: "tenant".into(),
        reading: None,
        generates: true,
    }
}

/// A scheduler with room for one sequence more than the `running` ones that decode, each with `context` tokens.
fn decoding(running: usize, context: u32) -> Scheduler {
    let bounds = Bounds {
        max_num_seqs: running + 1,
        max_num_batched_tokens: 1 << 20,
        long_prefill_token_threshold: usize::MAX,
        prefix_caching: true,
    };
    let blocks = 256 + running * (context as usize / 32 + 64);
    let mut scheduler = Scheduler::new(bounds, Blocks::new(blocks, [7; 32]));
    for index in 0..running as u32 {
        // Of different lengths, so that blocks do not become full all at once.
        scheduler.add(sequence(index, context + index % 32));
    }
    let mut step = Step::default();
    loop {
        scheduler.plan(&Pace { target: 1e9, ..PACE }, &mut step);
        scheduler.commit(&step);
        for part in step.parts.iter().filter(|part| part.samples) {
            scheduler.append(part.id, 5);
        }
        if step.decode_rows == running {
            return scheduler;
        }
    }
}

/// One turn without an executor.
fn turn(scheduler: &mut Scheduler, step: &mut Step) {
    scheduler.plan(&PACE, step);
    scheduler.commit(black_box(step));
    for part in step.parts.iter().filter(|part| part.samples) {
        scheduler.append(part.id, 5);
    }
}

/// Times `turns` turns of `running` sequences. Every thousand turns it starts again, so that contexts grow and blocks
/// become full as in service, and memory stays bounded.
fn time(running: usize, context: u32, turns: u64) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = turns;
    while left > 0 {
        let mut scheduler = decoding(running, context);
        let mut step = Step::default();
        let now = left.min(1000);
        let begun = Instant::now();
        for _ in 0..now {
            turn(&mut scheduler, &mut step);
        }
        total += begun.elapsed();
        left -= now;
    }
    total
}

/// Times turns in which, beside 255 sequences that decode, a prompt of 4,096 tokens starts that was read before.
fn time_prefix_hit(turns: u64) -> Duration {
    let mut scheduler = decoding(255, 512);
    let mut step = Step::default();
    let prompt = sequence(9999, 4096);
    let first = scheduler.add(prompt.clone());
    while !step.parts.iter().any(|part| part.id == first && part.samples) {
        turn(&mut scheduler, &mut step);
    }
    scheduler.remove(first);
    let mut total = Duration::ZERO;
    for _ in 0..turns {
        let prompt = prompt.clone();
        let begun = Instant::now();
        let id = scheduler.add(prompt);
        scheduler.plan(&PACE, black_box(&mut step));
        total += begun.elapsed();
        assert_eq!(step.started.first().map(|started| started.cached), Some(4064));
        scheduler.remove(id);
    }
    total
}

fn plan_and_bookkeeping(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan and bookkeeping");
    for (running, context) in [(1, 512), (16, 512), (64, 512), (256, 512), (256, 4096)] {
        let name = format!("{running} sequences of {context} tokens decode");
        group.bench_function(name, |bencher| bencher.iter_custom(|turns| time(running, context, turns)));
    }
    let name = "255 sequences decode and a cached prompt of 4096 tokens starts";
    group.bench_function(name, |bencher| bencher.iter_custom(time_prefix_hit));
    group.finish();
}

criterion_group!(benches, plan_and_bookkeeping);
criterion_main!(benches);
