//! Weights, packed into the layout that the kernels read.

use std::fmt;

use half::{bf16, f16};

use crate::Cpu;

/// How a number is stored.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Format {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

/// What the rows of a weight matrix are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// Row `i` produces output column `i`.
    Plain,
    /// The first half of the rows is a gate projection, the second half the up projection of the same width; kept
    /// side by side so that [`swiglu`](crate::swiglu) reads both in one pass. [`linear`](crate::linear) gives the gate
    /// columns, then the up columns.
    GateUp,
}

/// A value that the target format cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutOfRange {
    /// The value.
    pub value: f32,
    /// Its row.
    pub row: usize,
    /// Its column.
    pub column: usize,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OutOfRange { value, row, column } = self;
        write!(f, "the value {value} at row {row}, column {column} is beyond the range of float16 (±65504)")
    }
}

impl std::error::Error for OutOfRange {}

impl Format {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 | Format::F16 => 2,
        }
    }

    /// Reads little-endian numbers, at any alignment.
    fn read(self, bytes: &[u8], index: usize) -> f32 {
        let at = index * self.bytes();
        match self {
            Format::F32 => f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]),
            Format::Bf16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            Format::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        }
    }

    fn round(self, value: f32) -> f32 {
        match self {
            Format::F32 => value,
            Format::Bf16 => bf16::from_f32(value).to_f32(),
            Format::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// A weight matrix `[outputs, inputs]`, packed.
pub struct Matrix {
    format: Format,
    layout: Layout,
    outputs: usize,
    inputs: usize,
    values: Vec<f32>,
}

/// Fills a [`Matrix`] piece by piece, so that a checkpoint need not be in memory beside it.
pub struct MatrixBuilder {
    matrix: Matrix,
}

impl Matrix {
    /// A matrix `[outputs, inputs]` of zeros, to be filled by [`MatrixBuilder::write_rows`]. Several linears of one
    /// input (q, k and v) are fused by writing their rows below each other.
    ///
    /// # Panics
    /// When a size is 0, or `outputs` is odd with [`Layout::GateUp`].
    pub fn builder(format: Format, layout: Layout, outputs: usize, inputs: usize) -> MatrixBuilder {
        assert!(outputs > 0 && inputs > 0, "a matrix of {outputs} × {inputs}");
        assert!(layout == Layout::Plain || outputs.is_multiple_of(2), "gate and up of {outputs} rows together");
        let values = vec![0.0; outputs * inputs];
        MatrixBuilder { matrix: Matrix { format, layout, outputs, inputs, values } }
    }

    /// Packs `[outputs, inputs]` numbers at once; mostly for tests.
    ///
    /// # Panics
    /// When `values` is no multiple of `inputs`, or a value is out of the format's range.
    pub fn from_f32(cpu: &Cpu, format: Format, layout: Layout, inputs: usize, values: &[f32]) -> Matrix {
        assert!(values.len().is_multiple_of(inputs), "{} values in rows of {inputs}", values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut builder = Matrix::builder(format, layout, values.len() / inputs, inputs);
        match builder.write_rows(cpu, 0, Format::F32, &bytes) {
            Ok(()) => builder.finish(),
            Err(error) => panic!("{error}"),
        }
    }

    /// The number format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The order of the rows.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Output columns (rows of the matrix).
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Input columns.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.outputs * self.inputs * self.format.bytes()
    }

    /// Writes row `index` (an embedding vector) to `out`, widened.
    ///
    /// # Panics
    /// When the row does not exist or `out` is not `inputs` long.
    pub fn read_row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outputs, "row {index} of {}", self.outputs);
        out.copy_from_slice(&self.values[index * self.inputs..][..self.inputs]);
    }

    pub(crate) fn value(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.inputs + column]
    }
}

impl MatrixBuilder {
    /// Packs the rows `first_row..` from row-major little-endian numbers of `source` format, at any alignment.
    ///
    /// # Errors
    /// [`OutOfRange`] when the matrix is f16 and a finite value does not fit.
    ///
    /// # Panics
    /// When `bytes` is not a whole number of rows or goes past the last row.
    pub fn write_rows(&mut self, cpu: &Cpu, first_row: usize, source: Format, bytes: &[u8]) -> Result<(), OutOfRange> {
        let _ = cpu;
        let matrix = &mut self.matrix;
        let inputs = matrix.inputs;
        assert!(bytes.len().is_multiple_of(inputs * source.bytes()), "{} bytes in rows of {inputs}", bytes.len());
        let rows = bytes.len() / (inputs * source.bytes());
        assert!(first_row + rows <= matrix.outputs, "rows {first_row}+{rows} of {}", matrix.outputs);
        for index in 0..rows * inputs {
            let value = source.read(bytes, index);
            let stored = matrix.format.round(value);
            if stored.is_infinite() && value.is_finite() {
                return Err(OutOfRange { value, row: first_row + index / inputs, column: index % inputs });
            }
            matrix.values[first_row * inputs + index] = stored;
        }
        Ok(())
    }

    /// The finished matrix.
    pub fn finish(self) -> Matrix {
        self.matrix
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix[{}, {}] {:?} {:?}", self.outputs, self.inputs, self.format, self.layout)
    }
}
