//! Single kernels on the shapes of ERNIE 4.5 0.3B, beside what the machine allows.
//!
//! `cargo bench -p ernie-kernels`; `ERNIE_KERNELS_LEVEL` forces a level, `ERNIE_KERNELS_THREADS` a thread count. Rates in
//! GB/s are bytes of weights or cache; rates in Gelem/s are GFLOP/s (a multiplication and an addition count as two).

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ernie_kernels::{
    Attention, BLOCK_TOKENS, Cpu, Cpus, Format, KvCache, KvFormat, KvShape, LEVEL_VARIABLE, Layout, Level, Matrix,
    Rows, RowsMut, Span, Write, limits, linear, rms_norm, softmax, swiglu,
};

/// Weights of a bench: more than the caches hold.
const LARGE: usize = 256 << 20;

fn cpu() -> Cpu {
    let level = Level::choose(std::env::var(LEVEL_VARIABLE).ok().as_deref()).expect("a level of this CPU");
    let threads = std::env::var("ERNIE_KERNELS_THREADS").ok().and_then(|text| text.parse().ok());
    let cpu = Cpu::new(level, threads.unwrap_or_else(|| Cpus::detect().threads())).expect("threads");
    println!("level {level}, {} threads, {}", cpu.threads(), Cpus::detect());
    cpu
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect()
}

fn matrix(cpu: &Cpu, format: Format, layout: Layout, outputs: usize, inputs: usize) -> Matrix {
    let mut builder = Matrix::builder(format, layout, outputs, inputs).expect("memory");
    let row: Vec<u8> = numbers(inputs).iter().flat_map(|x| x.to_le_bytes()).collect();
    for first in (0..outputs).step_by(256) {
        let rows = (outputs - first).min(256);
        builder.write_rows(cpu, first, Format::F32, &row.repeat(rows)).expect("in range");
    }
    builder.finish()
}

fn machine(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("machine");
    let bytes = vec![1u8; LARGE];
    group.throughput(Throughput::BytesDecimal(bytes.len() as u64));
    group.bench_function("read", |b| b.iter(|| limits::read(&cpu, black_box(&bytes))));
    let rounds = 100_000;
    group.throughput(Throughput::Elements((2 * 16 * limits::chains(&cpu) * rounds * cpu.threads()) as u64));
    group.bench_function("multiply", |b| b.iter(|| limits::multiply(&cpu, rounds)));
    group.finish();
}

fn few_rows(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("linear, few rows");
    let inputs = 1024;
    for format in [Format::Bf16, Format::F16, Format::F32] {
        let outputs = LARGE / format.bytes() / inputs;
        let weight = matrix(&cpu, format, Layout::Plain, outputs, inputs);
        for rows in [1, 2, 4, 8] {
            let (x, mut out) = (numbers(rows * inputs), vec![0.0; rows * outputs]);
            group.throughput(Throughput::BytesDecimal(weight.bytes() as u64));
            group.bench_function(BenchmarkId::new(format!("{format:?}"), rows), |b| {
                b.iter(|| {
                    let out = RowsMut::new(&mut out, outputs);
                    linear(&cpu, Rows::new(black_box(&x), inputs), &weight, None, Write::Store, out);
                });
            });
        }
    }
    group.finish();
}

fn many_rows(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("linear, many rows");
    for format in [Format::Bf16, Format::F32] {
        for (outputs, inputs) in [(2560, 1024), (1024, 3072)] {
            let weight = matrix(&cpu, format, Layout::Plain, outputs, inputs);
            for rows in [16, 64, 512] {
                let (x, mut out) = (numbers(rows * inputs), vec![0.0; rows * outputs]);
                group.throughput(Throughput::Elements((2 * rows * outputs * inputs) as u64));
                group.bench_function(BenchmarkId::new(format!("{format:?} {outputs}x{inputs}"), rows), |b| {
                    b.iter(|| {
                        let out = RowsMut::new(&mut out, outputs);
                        linear(&cpu, Rows::new(black_box(&x), inputs), &weight, None, Write::Store, out);
                    });
                });
            }
        }
    }
    let (inner, inputs, rows) = (3072, 1024, 512);
    let weight = matrix(&cpu, Format::Bf16, Layout::GateUp, 2 * inner, inputs);
    let (x, mut out) = (numbers(rows * inputs), vec![0.0; rows * inner]);
    group.throughput(Throughput::Elements((4 * rows * inner * inputs) as u64));
    group.bench_function(BenchmarkId::new("Bf16 swiglu 6144x1024", rows), |b| {
        b.iter(|| swiglu(&cpu, Rows::new(black_box(&x), inputs), &weight, None, RowsMut::new(&mut out, inner)));
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    let cpu = cpu();
    let (heads, kv_heads, head_dim, layers) = (16, 2, 128, 18);
    let attention = Attention { heads, scale: 1.0 / (head_dim as f32).sqrt(), window: None };
    for format in [KvFormat::Bf16, KvFormat::F32] {
        let mut group = c.benchmark_group(format!("attention, {format:?}"));
        for context in [512usize, 2048, 8192] {
            let blocks = context / BLOCK_TOKENS;
            let mut cache = KvCache::new(KvShape { layers, blocks, kv_heads, head_dim, format }).expect("memory");
            let slots: Vec<u32> = (0..context as u32).collect();
            let width = kv_heads * head_dim;
            let kv = numbers(context * width);
            for layer in 0..layers {
                cache.write(&cpu, layer, &slots, Rows::new(&kv, width), Rows::new(&kv, width));
            }
            let table: Vec<u32> = (0..blocks as u32).collect();
            let width = heads * head_dim;
            let (q, mut out) = (numbers(context.min(512) * width), vec![0.0; context.min(512) * width]);
            let mut span = Span { row: 0, rows: 1, start: context - 1, blocks: &table };
            group.throughput(Throughput::BytesDecimal(cache.shape().bytes() as u64));
            group.bench_function(BenchmarkId::new("one token, all layers, at", context), |b| {
                b.iter(|| {
                    for layer in 0..layers {
                        let out = RowsMut::new(&mut out[..width], width);
                        cache.attend(&cpu, layer, &attention, Rows::new(black_box(&q[..width]), width), &[span], out);
                    }
                });
            });
            // The last 512 tokens of a prompt, in one layer.
            span = Span { rows: 512, start: context - 512, ..span };
            let pairs: usize = (context - 511..=context).sum();
            group.throughput(Throughput::Elements((4 * heads * head_dim * pairs) as u64));
            group.bench_function(BenchmarkId::new("512 tokens, one layer, up to", context), |b| {
                b.iter(|| {
                    let out = RowsMut::new(&mut out, width);
                    cache.attend(&cpu, 0, &attention, Rows::new(black_box(&q), width), &[span], out);
                });
            });
        }
        group.finish();
    }
}

fn small_steps(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("small steps");
    for rows in [1, 512] {
        let (x, weight, mut out) = (numbers(rows * 1024), numbers(1024), vec![0.0; rows * 1024]);
        group.throughput(Throughput::Elements((rows * 1024) as u64));
        group.bench_function(BenchmarkId::new("rms_norm, width 1024", rows), |b| {
            b.iter(|| rms_norm(&cpu, Rows::new(black_box(&x), 1024), &weight, 1e-5, RowsMut::new(&mut out, 1024)));
        });
    }
    let mut row = numbers(103_424);
    group.throughput(Throughput::Elements(row.len() as u64));
    group.bench_function("softmax of a vocabulary", |b| b.iter(|| softmax(&cpu, black_box(&mut row))));
    group.bench_function("argmax of a vocabulary", |b| b.iter(|| ernie_kernels::argmax(&cpu, black_box(&row))));
    group.bench_function("top 50 of a vocabulary", |b| b.iter(|| ernie_kernels::top_k(&cpu, black_box(&row), 50)));
    group.bench_function("an empty parallel loop", |b| b.iter(|| cpu.pool().run(cpu.threads(), |_| {})));
    group.finish();
}

criterion_group! {
    name = kernels;
    config = Criterion::default().sample_size(20).without_plots();
    targets = machine, few_rows, many_rows, attention, small_steps
}
criterion_main!(kernels);
