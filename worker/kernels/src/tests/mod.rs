//! Every kernel at every level that this CPU has, and in the shape of AVX-512, against plain sums in f64; with odd
//! sizes, unaligned starts and every operand flush against inaccessible pages.

mod attention;
mod elementwise;
pub(crate) mod emulated;
pub(crate) mod guard;
mod linear;
mod moe;
mod quantized;
mod reference;
mod select;

use std::sync::OnceLock;

use half::{bf16, f16};
use proptest::prelude::*;

use crate::{Cpu, Format, Level, WeightFormat};

/// All levels at one and at three threads, and the emulations of AVX-512 and AMX.
fn cpus() -> &'static [Cpu] {
    static CPUS: OnceLock<Vec<Cpu>> = OnceLock::new();
    CPUS.get_or_init(|| {
        let mut cpus: Vec<Cpu> = Level::available()
            .flat_map(|level| [1, 3].map(|threads| Cpu::new(level, threads).expect("an available level")))
            .collect();
        cpus.push(Cpu::emulated(2).expect("plain Rust"));
        cpus.push(Cpu::emulated_tiles(2).expect("plain Rust"));
        cpus
    })
}

/// The `Cpu`s that fuse multiply and add: their results are equal to the last bit.
fn fused() -> impl Iterator<Item = &'static Cpu> {
    cpus().iter().filter(|cpu| cpu.is_fused())
}

/// Cases for a kernel; the sizes are small, so that many shapes are tried.
fn config() -> ProptestConfig {
    ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() }
}

/// Numbers that f16 and bf16 hold with a small error, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// What a matrix of that format holds when it is given `value`.
fn stored(format: Format, value: f32) -> f32 {
    match format {
        Format::F32 => value,
        Format::Bf16 => bf16::from_f32(value).to_f32(),
        Format::F16 => f16::from_f32(value).to_f32(),
    }
}

/// Whether activations are rounded to bf16 before they are multiplied.
fn rounds(cpu: &Cpu, format: WeightFormat) -> bool {
    cpu.tile_unit().is_some() && format == WeightFormat::Float(Format::Bf16)
}

/// Activations as they enter a product.
fn seen(cpu: &Cpu, format: WeightFormat, x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| if rounds(cpu, format) { stored(Format::Bf16, x) } else { x }).collect()
}

/// Fails unless each number is within `tolerance` of its own magnitude scale.
fn assert_close(cpu: &Cpu, what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let difference = (f64::from(got) - expected).abs();
        assert!(
            difference <= tolerance * (1.0 + expected.abs()),
            "{what}[{i}] is {got} instead of {expected} at {cpu:?}"
        );
    }
}

/// Fails unless all numbers have the same bits.
fn assert_same(cpu: &Cpu, what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.to_bits(), expected.to_bits(), "{what}[{i}]: {got} and {expected} at {cpu:?}");
    }
}
