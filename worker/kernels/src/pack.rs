//! Numbers of a checkpoint, written to their places in panels.

use half::{bf16, f16};

use crate::panel::{Bf16, Element, F16, F32};
use crate::quantized::{Int4, Int8, Quantized, pack_row};
use crate::simd::{Kernel, Simd};
use crate::{Format, OutOfRange, WeightFormat};

/// Packs rows of one panel, from `column` on; `row` in the error counts from the first of them.
pub(crate) struct Pack<'a> {
    pub(crate) format: WeightFormat,
    pub(crate) panel: &'a mut [u8],
    pub(crate) column: usize,
    /// The format of `bytes`, little-endian.
    pub(crate) source: Format,
    /// Whole rows.
    pub(crate) bytes: &'a [u8],
    pub(crate) row_bytes: usize,
}

impl Kernel for Pack<'_> {
    type Output = Result<(), OutOfRange>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Result<(), OutOfRange> {
        let Pack { format, panel, column, source, bytes, row_bytes } = self;
        match format {
            WeightFormat::Float(format) => pack(format, panel, column, source, bytes, row_bytes),
            WeightFormat::Int8 => pack_quantized::<S, Int8>(s, panel, column, source, bytes, row_bytes),
            WeightFormat::Int4 => pack_quantized::<S, Int4>(s, panel, column, source, bytes, row_bytes),
        }
    }
}

/// Quantises rows of numbers.
#[inline(always)]
fn pack_quantized<S: Simd, Q: Quantized>(
    s: S,
    panel: &mut [u8],
    column: usize,
    source: Format,
    bytes: &[u8],
    row_bytes: usize,
) -> Result<(), OutOfRange> {
    let mut numbers = vec![0.0; row_bytes / source.bytes()];
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        match source {
            Format::F32 => widen(bytes, &mut numbers, read_f32),
            Format::Bf16 => widen(bytes, &mut numbers, read_bf16),
            Format::F16 => widen(bytes, &mut numbers, read_f16),
        }
        let packed = pack_row::<S, Q>(s, panel, column + row, &numbers);
        packed.map_err(|(value, column)| OutOfRange { value, row, column })?;
    }
    Ok(())
}

#[inline(always)]
fn widen<const N: usize>(bytes: &[u8], to: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    bytes.as_chunks::<N>().0.iter().zip(to).for_each(|(bytes, to)| *to = read(*bytes));
}

/// Packs rows as numbers.
fn pack(
    format: Format,
    panel: &mut [u8],
    column: usize,
    source: Format,
    bytes: &[u8],
    row_bytes: usize,
) -> Result<(), OutOfRange> {
    match (format, source) {
        (Format::F32, Format::F32) => pack_rows::<F32, _>(panel, column, bytes, row_bytes, read_f32),
        (Format::F32, Format::Bf16) => pack_rows::<F32, _>(panel, column, bytes, row_bytes, read_bf16),
        (Format::F32, Format::F16) => pack_rows::<F32, _>(panel, column, bytes, row_bytes, read_f16),
        (Format::Bf16, Format::F32) => pack_rows::<Bf16, _>(panel, column, bytes, row_bytes, read_f32),
        (Format::Bf16, Format::Bf16) => pack_bf16(panel, column, bytes, row_bytes),
        (Format::Bf16, Format::F16) => pack_rows::<Bf16, _>(panel, column, bytes, row_bytes, read_f16),
        (Format::F16, Format::F32) => pack_f16(panel, column, bytes, row_bytes, read_f32)?,
        (Format::F16, Format::Bf16) => pack_f16(panel, column, bytes, row_bytes, read_bf16)?,
        (Format::F16, Format::F16) => pack_rows::<F16, _>(panel, column, bytes, row_bytes, read_f16),
    }
    Ok(())
}

#[inline(always)]
fn read_f32([a, b, c, d]: [u8; 4]) -> f32 {
    f32::from_le_bytes([a, b, c, d])
}

#[inline(always)]
fn read_bf16([a, b]: [u8; 2]) -> f32 {
    bf16::from_le_bytes([a, b]).to_f32()
}

#[inline(always)]
fn read_f16([a, b]: [u8; 2]) -> f32 {
    f16::from_le_bytes([a, b]).to_f32()
}

/// Packs numbers of `N` bytes, each read by `read` and rounded by the element.
#[inline(always)]
fn pack_rows<E: Element, const N: usize>(
    panel: &mut [u8],
    column: usize,
    bytes: &[u8],
    row_bytes: usize,
    read: impl Fn([u8; N]) -> f32,
) {
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        for (k, bytes) in bytes.as_chunks::<N>().0.iter().enumerate() {
            E::put(panel, k, column + row, E::round(read(*bytes)));
        }
    }
}

/// bf16 to bf16: pairs move as they are.
fn pack_bf16(panel: &mut [u8], column: usize, bytes: &[u8], row_bytes: usize) {
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        let (pairs, last) = bytes.as_chunks::<4>();
        for (line, [a, b, c, d]) in panel.as_chunks_mut::<{ Bf16::PAIR_BYTES }>().0.iter_mut().zip(pairs) {
            let pair = u32::from(u16::from_le_bytes([*a, *b])) | u32::from(u16::from_le_bytes([*c, *d])) << 16;
            line.as_chunks_mut::<4>().0[column + row] = pair.to_ne_bytes();
        }
        if let [a, b] = *last {
            Bf16::put(panel, 2 * pairs.len(), column + row, u16::from_le_bytes([a, b]));
        }
    }
}

/// To f16, refusing finite values that would become infinite.
fn pack_f16<const N: usize>(
    panel: &mut [u8],
    column: usize,
    bytes: &[u8],
    row_bytes: usize,
    read: impl Fn([u8; N]) -> f32,
) -> Result<(), OutOfRange> {
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        for (k, bytes) in bytes.as_chunks::<N>().0.iter().enumerate() {
            let value = read(*bytes);
            if value.is_finite() && f16::from_f32(value).is_infinite() {
                return Err(OutOfRange { value, row, column: k });
            }
            F16::put(panel, k, column + row, F16::round(value));
        }
    }
    Ok(())
}
