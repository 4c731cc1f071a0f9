//! Products of activations with weights, for one row or thousands.
//!
//! Activations are packed by rows, weights are panels of sixteen outputs ([`crate::panel`]), and [`product`] hands both to
//! one of two engines: `lanes` multiplies vectors of sixteen outputs, at every level and in every format; `tiles` has AMX
//! multiply bf16 matrices. Both finish in the same way: bias, SwiGLU or addition ([`target`]).

mod lanes;
mod product;
mod target;
mod tiles;

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
