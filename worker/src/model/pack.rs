//! From a checkpoint's tensors to what a backend computes with.
//!
//! The decoder is assembled once with a packer that only looks ([`inventory`](super::inventory): completeness, shapes
//! and bytes) and once with a backend that reads. So what is checked is what is loaded.

use super::error::LoadResult;
use super::weights::Part;

pub use ernie_kernels::Layout;

/// Makes matrices and vectors out of parts of a checkpoint.
pub trait Pack {
    /// A weight matrix `[outputs, inputs]`.
    type Matrix;
    /// A norm's weight or a bias.
    type Vector;

    /// Packs a matrix.
    ///
    /// # Errors
    /// [`LoadError`](crate::model::LoadError) when its bytes cannot be read or do not fit the working format.
    fn matrix(&self, source: &MatrixSource<'_>) -> LoadResult<Self::Matrix>;

    /// Packs the numbers of several tensors, one after the other.
    ///
    /// # Errors
    /// As [`Pack::matrix`].
    fn vector(&self, parts: &[Part<'_>]) -> LoadResult<Self::Vector>;

    /// Packs numbers `[outputs, inputs]` in single precision: adapters.
    ///
    /// # Errors
    /// As [`Pack::matrix`].
    fn matrix_of(&self, numbers: Vec<f32>, inputs: usize) -> LoadResult<Self::Matrix>;

    /// Reads a few numbers, widened.
    ///
    /// # Errors
    /// As [`Pack::matrix`].
    fn numbers(&self, part: &Part<'_>) -> LoadResult<Vec<f32>>;
}

/// In which format a weight is kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Precision {
    /// The format that the model is loaded in, never quantised: embeddings.
    Working,
    /// That, or what quantisation makes of it: linear maps.
    Linear,
    /// The same for the output head, also where the embedding is the head.
    Head,
    /// Single precision whatever the rest has: routers.
    Single,
}

/// A weight matrix as the checkpoint has it.
#[derive(Clone, Debug)]
pub struct MatrixSource<'a> {
    /// Whose rows lie below each other; equal `inputs`.
    pub parts: Vec<Part<'a>>,
    /// What the rows are.
    pub layout: Layout,
    /// In which format it is kept.
    pub precision: Precision,
}

impl MatrixSource<'_> {
    /// Rows of all parts.
    pub fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.rows.len()).sum()
    }

    /// Numbers in a row.
    pub fn inputs(&self) -> usize {
        self.parts.first().map_or(0, |part| part.inputs)
    }
}
