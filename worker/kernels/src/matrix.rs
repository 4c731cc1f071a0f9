//! Weights, packed into panels.

use std::fmt;
use std::io;
use std::sync::Mutex;

use crate::Cpu;
use crate::memory::{Disjoint, Pages};
use crate::pack::Pack;
use crate::panel::COLUMNS;
use crate::simd::{FUSED, Kernel, Portable};
use crate::weight::Weight;

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

/// How weights are kept.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum WeightFormat {
    /// Numbers, rounded to a format.
    Float(Format),
    /// Whole numbers of 8 bits, and a bf16 scale for each 128 inputs of an output.
    Int8,
    /// Whole numbers of 4 bits, and a bf16 scale for each 32 inputs of an output.
    Int4,
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

/// A value that the target format cannot hold: a finite one in f16, one that is not finite in a quantised format.
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
        let why = if value.is_finite() { "is beyond the range of float16 (±65504)" } else { "cannot be quantised" };
        write!(f, "the value {value} at row {row}, column {column} {why}")
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
}

impl From<Format> for WeightFormat {
    fn from(format: Format) -> Self {
        WeightFormat::Float(format)
    }
}

impl WeightFormat {
    /// Bytes of a matrix `[outputs, inputs]` in memory, filled up to whole panels.
    pub fn bytes(self, layout: Layout, outputs: usize, inputs: usize) -> usize {
        layout.panels(outputs).saturating_mul(with_weight!(self, W => <W as Weight>::panel_bytes(inputs)))
    }

    /// Replaces the numbers of a matrix's row by those that this format keeps of it.
    ///
    /// # Errors
    /// [`OutOfRange`], with row 0, when there is one that the format cannot hold.
    pub fn round(self, row: &mut [f32]) -> Result<(), OutOfRange> {
        let (inputs, bytes) = (row.len(), row.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        with_weight!(self, W => {
            let mut panel = vec![0; <W as Weight>::panel_bytes(inputs)];
            let (bytes, panel) = (&bytes[..], &mut panel[..]);
            Pack { format: self, panel, column: 0, source: Format::F32, bytes, row_bytes: bytes.len() }.run(Portable::<FUSED>)?;
            row.iter_mut().enumerate().for_each(|(k, value)| *value = <W as Weight>::read(panel, inputs, k, 0));
        });
        Ok(())
    }
}

impl Layout {
    /// Panels of a matrix with so many rows.
    fn panels(self, outputs: usize) -> usize {
        match self {
            Layout::Plain => outputs.div_ceil(COLUMNS),
            Layout::GateUp => 2 * (outputs / 2).div_ceil(COLUMNS),
        }
    }
}

/// Runs `$body` with `$E` standing for the element type of `$format`.
macro_rules! with_element {
    ($format:expr, $E:ident => $body:expr) => {
        match $format {
            $crate::Format::F32 => {
                type $E = $crate::panel::F32;
                $body
            }
            $crate::Format::Bf16 => {
                type $E = $crate::panel::Bf16;
                $body
            }
            $crate::Format::F16 => {
                type $E = $crate::panel::F16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// Runs `$body` with `$W` standing for the [`Weight`] of a [`WeightFormat`].
macro_rules! with_weight {
    ($format:expr, $W:ident => $body:expr) => {
        match $format {
            $crate::WeightFormat::Float(format) => $crate::matrix::with_element!(format, $W => $body),
            $crate::WeightFormat::Int8 => {
                type $W = $crate::quantized::Grouped<$crate::quantized::Int8>;
                $body
            }
            $crate::WeightFormat::Int4 => {
                type $W = $crate::quantized::Grouped<$crate::quantized::Int4>;
                $body
            }
        }
    };
}
pub(crate) use with_weight;

/// A weight matrix `[outputs, inputs]`, packed.
pub struct Matrix {
    format: WeightFormat,
    layout: Layout,
    outputs: usize,
    inputs: usize,
    panel_bytes: usize,
    pages: Pages,
}

/// Fills a [`Matrix`] piece by piece, so that a checkpoint need not be in memory beside it.
pub struct MatrixBuilder {
    matrix: Matrix,
}

impl Matrix {
    /// A matrix `[outputs, inputs]` of zeros, to be filled by [`MatrixBuilder::write_rows`]. Several linears of one
    /// input (q, k and v) are fused by writing their rows below each other.
    ///
    /// # Errors
    /// When the memory cannot be had.
    ///
    /// # Panics
    /// When a size is 0, or `outputs` is odd with [`Layout::GateUp`].
    pub fn builder(
        format: impl Into<WeightFormat>,
        layout: Layout,
        outputs: usize,
        inputs: usize,
    ) -> io::Result<MatrixBuilder> {
        let format = format.into();
        assert!(outputs > 0 && inputs > 0, "a matrix of {outputs} × {inputs}");
        assert!(layout == Layout::Plain || outputs.is_multiple_of(2), "gate and up of {outputs} rows together");
        let panel_bytes = with_weight!(format, W => <W as Weight>::panel_bytes(inputs));
        let pages = Pages::zeroed(layout.panels(outputs).saturating_mul(panel_bytes))?;
        Ok(MatrixBuilder { matrix: Matrix { format, layout, outputs, inputs, panel_bytes, pages } })
    }

    /// Packs `[outputs, inputs]` numbers at once; mostly for tests.
    ///
    /// # Errors
    /// When the memory cannot be had, or a value does not fit the format.
    ///
    /// # Panics
    /// When `values` is no multiple of `inputs`.
    pub fn from_f32(
        cpu: &Cpu,
        format: impl Into<WeightFormat>,
        layout: Layout,
        inputs: usize,
        values: &[f32],
    ) -> io::Result<Matrix> {
        assert!(values.len().is_multiple_of(inputs), "{} values in rows of {inputs}", values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut builder = Matrix::builder(format, layout, values.len() / inputs, inputs)?;
        builder
            .write_rows(cpu, 0, Format::F32, &bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(builder.finish())
    }

    /// The number format.
    pub fn format(&self) -> WeightFormat {
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
        self.pages.as_slice().len()
    }

    /// Writes row `index` (an embedding vector) to `out`, widened.
    ///
    /// # Panics
    /// When the row does not exist or `out` is not `inputs` long.
    pub fn read_row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outputs, "row {index} of {}", self.outputs);
        assert_eq!(out.len(), self.inputs, "read_row: width");
        let (panel, column) = self.place(index);
        let panel = self.panel(panel);
        with_weight!(self.format, W => for (k, out) in out.iter_mut().enumerate() {
            *out = <W as Weight>::read(panel, self.inputs, k, column);
        });
    }

    pub(crate) fn panels(&self) -> usize {
        self.pages.as_slice().len() / self.panel_bytes
    }

    pub(crate) fn panel(&self, index: usize) -> &[u8] {
        &self.pages.as_slice()[index * self.panel_bytes..][..self.panel_bytes]
    }

    /// The output columns that a panel produces: the first, and how many of its sixteen exist.
    pub(crate) fn columns_of(&self, panel: usize) -> (usize, usize) {
        let (first, end) = match self.layout {
            Layout::Plain => (panel * COLUMNS, self.outputs),
            Layout::GateUp => {
                let inner = self.outputs / 2;
                (panel % 2 * inner + panel / 2 * COLUMNS, (panel % 2 + 1) * inner)
            }
        };
        (first, (end - first).min(COLUMNS))
    }

    /// Panel and column of a row.
    fn place(&self, row: usize) -> (usize, usize) {
        match self.layout {
            Layout::Plain => (row / COLUMNS, row % COLUMNS),
            Layout::GateUp => {
                let inner = self.outputs / 2;
                let (part, row) = (row / inner, row % inner);
                (2 * (row / COLUMNS) + part, row % COLUMNS)
            }
        }
    }

    /// `rows` cut where the panel changes.
    fn cut_at_panels(&self, rows: std::ops::Range<usize>) -> Vec<std::ops::Range<usize>> {
        let mut pieces: Vec<std::ops::Range<usize>> = Vec::new();
        for row in rows {
            match pieces.last_mut() {
                Some(piece) if self.place(piece.start).0 == self.place(row).0 => piece.end = row + 1,
                _ => pieces.push(row..row + 1),
            }
        }
        pieces
    }
}

impl MatrixBuilder {
    /// Packs the rows `first_row..` from row-major little-endian numbers of `source` format, at any alignment.
    ///
    /// # Errors
    /// [`OutOfRange`] when the matrix is f16 and a finite value does not fit, or quantised and a value is not finite.
    ///
    /// # Panics
    /// When `bytes` is not a whole number of rows or goes past the last row.
    pub fn write_rows(&mut self, cpu: &Cpu, first_row: usize, source: Format, bytes: &[u8]) -> Result<(), OutOfRange> {
        let matrix = &mut self.matrix;
        let row_bytes = matrix.inputs * source.bytes();
        assert!(bytes.len().is_multiple_of(row_bytes), "{} bytes in rows of {}", bytes.len(), matrix.inputs);
        let rows = bytes.len() / row_bytes;
        assert!(first_row + rows <= matrix.outputs, "rows {first_row}+{rows} of {}", matrix.outputs);
        let pieces = matrix.cut_at_panels(first_row..first_row + rows);
        let places: Vec<(usize, usize)> = pieces.iter().map(|piece| matrix.place(piece.start)).collect();
        let (format, panel_bytes) = (matrix.format, matrix.panel_bytes);
        let panels = Disjoint::new(matrix.pages.as_mut_slice());
        let refused: Mutex<Option<OutOfRange>> = Mutex::new(None);
        cpu.pool().run(pieces.len(), |piece| {
            let (rows, (panel, column)) = (&pieces[piece], places[piece]);
            // SAFETY: pieces of one call lie in different panels, and each is packed by one task.
            let panel = unsafe { panels.slice(panel * panel_bytes, panel_bytes) };
            let bytes = &bytes[(rows.start - first_row) * row_bytes..(rows.end - first_row) * row_bytes];
            if let Err(error) = cpu.dispatch(Pack { format, panel, column, source, bytes, row_bytes }) {
                let error = OutOfRange { row: rows.start + error.row, ..error };
                let mut first = refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if first.is_none_or(|first| (error.row, error.column) < (first.row, first.column)) {
                    *first = Some(error);
                }
            }
        });
        match refused.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
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
