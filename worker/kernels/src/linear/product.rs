//! The engine behind every linear: a list of products, computed by one parallel loop for each way of computing them.

use super::target::Target;
use super::{lanes, tiles};
use crate::{Cpu, Format, Matrix, Rows, RowsMut, WeightFormat};

/// What happens to sums at the end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Epilogue {
    /// Plus bias, stored.
    Store,
    /// Plus bias, added to what is there.
    Add,
    /// Plus bias, then silu(gate) · up.
    SwiGlu,
}

/// One product of rows with a matrix.
pub(crate) struct Product<'a> {
    /// The activations.
    pub(crate) x: Rows<'a>,
    /// Which of the rows of `x` take part, in the order of `out`; all if `None`.
    pub(crate) rows: Option<&'a [u32]>,
    /// The weights.
    pub(crate) weight: &'a Matrix,
    /// One number for each output of `weight`.
    pub(crate) bias: Option<&'a [f32]>,
    /// What becomes of the sums.
    pub(crate) epilogue: Epilogue,
    /// One row for each row that takes part.
    pub(crate) out: RowsMut<'a>,
}

impl Product<'_> {
    /// The activations of a row that takes part.
    pub(super) fn input(&self, row: usize) -> &[f32] {
        self.x.row(self.rows.map_or(row, |rows| rows[row] as usize))
    }

    /// Where the sums go.
    pub(super) fn target(&mut self) -> Target<'_> {
        let out_stride = self.out.stride();
        let (weight, bias, epilogue) = (self.weight, self.bias, self.epilogue);
        Target { weight, bias, epilogue, out: self.out.disjoint(), out_stride }
    }

    fn check(&self) {
        let rows = self.rows.map_or(self.x.rows(), <[u32]>::len);
        assert_eq!(self.x.width(), self.weight.inputs(), "product: input width");
        assert_eq!(self.out.rows(), rows, "product: rows");
        let width = self.weight.outputs() / if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 };
        assert_eq!(self.out.width(), width, "product: output width");
        assert!(self.bias.is_none_or(|bias| bias.len() == self.weight.outputs()), "product: bias");
    }
}

/// Computes all products. How one is computed depends on its matrix and the level alone, not on the others or its rows.
///
/// # Panics
/// When sizes contradict each other.
pub(crate) fn run(cpu: &Cpu, products: &mut [Product<'_>]) {
    products.iter().for_each(Product::check);
    let on_tiles = |product: &Product<'_>| product.weight.format() == WeightFormat::Float(Format::Bf16);
    match cpu.tile_unit() {
        Some(unit) if products.iter().any(on_tiles) => {
            tiles::run(cpu, unit, products, on_tiles);
            if !products.iter().all(on_tiles) {
                lanes::run(cpu, products, |product| !on_tiles(product));
            }
        }
        _ => lanes::run(cpu, products, |_| true),
    }
}
