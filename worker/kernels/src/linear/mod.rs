//! Products of activations with weights, for one row or thousands.
//!
//! The rows of activations are cut into tiles of a few rows and packed so that a tile's values for one `k` lie beside
//! each other; the weights are panels of sixteen outputs ([`crate::panel`]). A task owns some panels and some rows,
//! keeps their sums in its own scratch memory, goes through `k` in blocks of [`K_BLOCK`](crate::weight::K_BLOCK), and finishes with the
//! epilogue (bias, SwiGLU, addition). With few rows it walks along each panel, so that every weight is read from memory
//! once, in order; with many it takes a block of all its panels at a time, so that the activations stay in the cache.
//!
//! The sum of one output is the same in either order: blocks of `k` from zero, added in ascending order.

mod product;

use crate::{Cpu, Layout, Matrix, Rows, RowsMut};

pub(crate) use product::{Epilogue, Product, run};

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
pub fn linear(cpu: &Cpu, x: Rows<'_>, weight: &Matrix, bias: Option<&[f32]>, write: Write, out: RowsMut<'_>) {
    assert_eq!(out.width(), weight.outputs(), "linear: output width");
    let epilogue = match write {
        Write::Store => Epilogue::Store,
        Write::Add => Epilogue::Add,
    };
    run(cpu, &mut [Product { x, rows: None, weight, bias, epilogue, out }]);
}

/// `out = silu(x · gateᵀ + b) · (x · upᵀ + b)` in one pass over a [`Layout::GateUp`] matrix: `x` `[rows, inputs]`,
/// `bias` `[outputs]` (gate, then up), `out` `[rows, outputs / 2]`.
///
/// # Panics
/// When the sizes contradict each other or the matrix has another layout.
pub fn swiglu(cpu: &Cpu, x: Rows<'_>, weight: &Matrix, bias: Option<&[f32]>, out: RowsMut<'_>) {
    assert_eq!(weight.layout(), Layout::GateUp, "swiglu: layout");
    assert_eq!(out.width() * 2, weight.outputs(), "swiglu: output width");
    run(cpu, &mut [Product { x, rows: None, weight, bias, epilogue: Epilogue::SwiGlu, out }]);
}
