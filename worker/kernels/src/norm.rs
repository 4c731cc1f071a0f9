//! RMSNorm.

use std::ops::Range;

use crate::elementwise::{for_row_ranges, load, store, vectors};
use crate::memory::Disjoint;
use crate::simd::{Kernel, LANES, Simd};
use crate::{Cpu, Rows, RowsMut};

/// `out = x · rsqrt(mean(x²) + eps) · weight` for each row; `x` and `out` `[rows, width]`, `weight` `[width]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn rms_norm(cpu: &Cpu, x: Rows<'_>, weight: &[f32], eps: f32, mut out: RowsMut<'_>) {
    assert_eq!((x.rows(), x.width()), (out.rows(), out.width()), "rms_norm: shape");
    assert_eq!(weight.len(), x.width(), "rms_norm: weight");
    let stride = out.stride();
    let out = out.disjoint();
    for_row_ranges(cpu, x.rows(), x.width(), |rows| cpu.dispatch(RmsNorm { rows, x, weight, eps, out, stride }));
}

/// `residual += delta`, then `out = rms_norm(residual)`, in one pass; all `[rows, width]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn add_rms_norm(
    cpu: &Cpu,
    mut residual: RowsMut<'_>,
    delta: Rows<'_>,
    weight: &[f32],
    eps: f32,
    mut out: RowsMut<'_>,
) {
    let (rows, width) = (residual.rows(), residual.width());
    assert_eq!((delta.rows(), delta.width()), (rows, width), "add_rms_norm: delta");
    assert_eq!((out.rows(), out.width()), (rows, width), "add_rms_norm: out");
    assert_eq!(weight.len(), width, "add_rms_norm: weight");
    let (residual_stride, out_stride) = (residual.stride(), out.stride());
    let (residual, out) = (residual.disjoint(), out.disjoint());
    for_row_ranges(cpu, rows, width, |rows| {
        cpu.dispatch(AddRmsNorm { rows, residual, residual_stride, delta, weight, eps, out, out_stride });
    });
}

struct RmsNorm<'a> {
    rows: Range<usize>,
    x: Rows<'a>,
    weight: &'a [f32],
    eps: f32,
    out: Disjoint<'a, f32>,
    stride: usize,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let x = self.x.row(row);
            // SAFETY: each row belongs to one task.
            let out = unsafe { self.out.slice(row * self.stride, x.len()) };
            normalise(s, x, self.weight, self.eps, out);
        }
    }
}

struct AddRmsNorm<'a> {
    rows: Range<usize>,
    residual: Disjoint<'a, f32>,
    residual_stride: usize,
    delta: Rows<'a>,
    weight: &'a [f32],
    eps: f32,
    out: Disjoint<'a, f32>,
    out_stride: usize,
}

impl Kernel for AddRmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let delta = self.delta.row(row);
            // SAFETY: each row belongs to one task.
            let residual = unsafe { self.residual.slice(row * self.residual_stride, delta.len()) };
            // SAFETY: as above.
            let out = unsafe { self.out.slice(row * self.out_stride, delta.len()) };
            for at in vectors(delta.len()) {
                store(s, residual, at, s.add(load(s, residual, at), load(s, delta, at)));
            }
            normalise(s, residual, self.weight, self.eps, out);
        }
    }
}

#[inline(always)]
fn normalise<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_of_squares(s, x) / x.len() as f32;
    let scale = s.splat(1.0 / (mean + eps).sqrt());
    for at in vectors(x.len()) {
        store(s, out, at, s.mul(s.mul(load(s, x, at), scale), load(s, weight, at)));
    }
}

/// Σ x² in four interleaved sums.
#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    for at in vectors(x.len()) {
        let v = load(s, x, at);
        let sum = &mut sums[at / LANES % 4];
        *sum = s.fma(v, v, *sum);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
