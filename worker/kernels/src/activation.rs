//! Element-wise steps that are not fused into a linear.

use std::ops::Range;

use crate::elementwise::{for_row_ranges, load, store, vectors};
use crate::memory::Disjoint;
use crate::simd::{Kernel, Simd, math};
use crate::{Cpu, Rows, RowsMut};

/// `out = silu(gate) · up`, silu(x) = x / (1 + e⁻ˣ); all `[rows, width]`.
///
/// # Panics
/// When the shapes differ.
pub fn silu_mul(cpu: &Cpu, gate: Rows<'_>, up: Rows<'_>, mut out: RowsMut<'_>) {
    let shape = (out.rows(), out.width());
    assert_eq!((gate.rows(), gate.width()), shape, "silu_mul: gate");
    assert_eq!((up.rows(), up.width()), shape, "silu_mul: up");
    let stride = out.stride();
    let out = out.disjoint();
    for_row_ranges(cpu, shape.0, shape.1, |rows| cpu.dispatch(SiluMul { rows, gate, up, out, stride }));
}

struct SiluMul<'a> {
    rows: Range<usize>,
    gate: Rows<'a>,
    up: Rows<'a>,
    out: Disjoint<'a, f32>,
    stride: usize,
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let (gate, up) = (self.gate.row(row), self.up.row(row));
            // SAFETY: each row belongs to one task.
            let out = unsafe { self.out.slice(row * self.stride, gate.len()) };
            for at in vectors(gate.len()) {
                store(s, out, at, s.mul(math::silu(s, load(s, gate, at)), load(s, up, at)));
            }
        }
    }
}

/// `out += x`, both `[rows, width]`.
///
/// # Panics
/// When the shapes differ.
pub fn add(cpu: &Cpu, x: Rows<'_>, mut out: RowsMut<'_>) {
    assert_eq!((x.rows(), x.width()), (out.rows(), out.width()), "add: shape");
    let stride = out.stride();
    let out = out.disjoint();
    for_row_ranges(cpu, x.rows(), x.width(), |rows| cpu.dispatch(Add { rows, x, out, stride }));
}

struct Add<'a> {
    rows: Range<usize>,
    x: Rows<'a>,
    out: Disjoint<'a, f32>,
    stride: usize,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let x = self.x.row(row);
            // SAFETY: each row belongs to one task.
            let out = unsafe { self.out.slice(row * self.stride, x.len()) };
            for at in vectors(x.len()) {
                store(s, out, at, s.add(load(s, out, at), load(s, x, at)));
            }
        }
    }
}
