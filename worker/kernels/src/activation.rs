//! Element-wise steps that are not fused into a linear.

use crate::{Cpu, Rows, RowsMut};

/// `out = silu(gate) · up`, silu(x) = x / (1 + e⁻ˣ); all `[rows, width]`.
///
/// # Panics
/// When the shapes differ.
pub fn silu_mul(cpu: &Cpu, gate: Rows<'_>, up: Rows<'_>, mut out: RowsMut<'_>) {
    let _ = cpu;
    let shape = (out.rows(), out.width());
    assert_eq!((gate.rows(), gate.width()), shape, "silu_mul: gate");
    assert_eq!((up.rows(), up.width()), shape, "silu_mul: up");
    for row in 0..out.rows() {
        for ((out, gate), up) in out.row_mut(row).iter_mut().zip(gate.row(row)).zip(up.row(row)) {
            *out = gate / (1.0 + (-gate).exp()) * up;
        }
    }
}

/// `out += x`, both `[rows, width]`.
///
/// # Panics
/// When the shapes differ.
pub fn add(cpu: &Cpu, x: Rows<'_>, mut out: RowsMut<'_>) {
    let _ = cpu;
    assert_eq!((x.rows(), x.width()), (out.rows(), out.width()), "add: shape");
    for row in 0..out.rows() {
        for (out, x) in out.row_mut(row).iter_mut().zip(x.row(row)) {
            *out += x;
        }
    }
}
