//! Products of activations with weights.

use crate::{Cpu, Layout, Matrix, Rows, RowsMut};

/// What happens to a result.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Write {
    /// It replaces what was in `out`.
    Store,
    /// It is added to what was in `out` (residual connections, adapters).
    Add,
}

/// `out = x · weightᵀ + bias`, or `out += …`: `x` `[rows, inputs]`, `bias` `[outputs]`, `out` `[rows, outputs]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn linear(cpu: &Cpu, x: Rows<'_>, weight: &Matrix, bias: Option<&[f32]>, write: Write, mut out: RowsMut<'_>) {
    let _ = cpu;
    assert_eq!(x.width(), weight.inputs(), "linear: input width");
    assert_eq!(out.width(), weight.outputs(), "linear: output width");
    assert_eq!(x.rows(), out.rows(), "linear: rows");
    assert!(bias.is_none_or(|bias| bias.len() == weight.outputs()), "linear: bias");
    for row in 0..x.rows() {
        for (column, out) in out.row_mut(row).iter_mut().enumerate() {
            let mut sum = 0.0;
            for (k, x) in x.row(row).iter().enumerate() {
                sum += x * weight.value(column, k);
            }
            sum += bias.map_or(0.0, |bias| bias[column]);
            *out = if write == Write::Add { *out + sum } else { sum };
        }
    }
}

/// `out = silu(x · gateᵀ + b) · (x · upᵀ + b)` in one pass over a [`Layout::GateUp`] matrix: `x` `[rows, inputs]`,
/// `bias` `[outputs]` (gate, then up), `out` `[rows, outputs / 2]`.
///
/// # Panics
/// When the sizes contradict each other or the matrix has another layout.
pub fn swiglu(cpu: &Cpu, x: Rows<'_>, weight: &Matrix, bias: Option<&[f32]>, out: RowsMut<'_>) {
    assert_eq!(weight.layout(), Layout::GateUp, "swiglu: layout");
    assert_eq!(out.width() * 2, weight.outputs(), "swiglu: output width");
    let mut both = vec![0.0; x.rows() * weight.outputs()];
    linear(cpu, x, weight, bias, Write::Store, RowsMut::new(&mut both, weight.outputs()));
    let both = Rows::new(&both, weight.outputs());
    let inner = out.width();
    crate::silu_mul(cpu, both.columns(0..inner), both.columns(inner..2 * inner), out);
}
