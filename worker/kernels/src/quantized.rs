//! Weights of 8 and 4 bits: whole numbers in groups along `k`, times one bf16 scale for each group of a column.
//!
//! A block of [`K_BLOCK`] rows (the last one of a panel may be shorter) holds the scales of its groups, as a bf16 panel
//! whose rows are groups, and behind them the numbers in octets of `k`:
//!
//! | format | group | an octet of `k` | bytes |
//! |---|---|---|---|
//! | int8, −127 to 127 | 128 | for each column four numbers beside each other, then the next four of each column | 128 |
//! | int4, −8 to 7 | 32 | for each column four bytes: its first four numbers in the low halves, its next four in the high | 64 |
//!
//! Four numbers of a column in one 32-bit word are what VNNI and AMX tiles multiply. A number times its scale has at most
//! 15 significant bits, so it is exact in f32: a product is that of the f32 matrix with the same numbers, to the last bit.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use crate::panel::{AHEAD, Bf16, COLUMNS, Element, Prefetch, panel_bytes};
use crate::scratch::Vector;
use crate::simd::Simd;
use crate::weight::{K_BLOCK, Weight};

/// Rows of `k` that are unpacked together.
const OCTET: usize = 8;
/// Scales below this count as 0, so that a scale times 2⁻²⁴ is exact.
const SMALLEST_SCALE: f32 = 1.0 / (1u128 << 100) as f32;
/// Added and subtracted, it rounds a number of magnitude below 2²² to a whole one, halves to even.
const ROUNDING: f32 = 1.5 * (1 << 23) as f32;

/// A format of whole numbers with scales.
pub(crate) trait Quantized: Copy + Send + Sync + 'static {
    /// Rows of `k` that share a scale; a divisor of `K_BLOCK`, a multiple of 16.
    const GROUP: usize;
    /// Bytes of eight rows of `k`.
    const OCTET_BYTES: usize;
    /// The smallest and the largest number.
    const RANGE: (f32, f32);

    /// Eight rows, each times `scale`.
    ///
    /// # Safety
    /// `OCTET_BYTES` at `from` must be readable.
    unsafe fn load<S: Simd>(s: S, from: *const u8, scale: S::V) -> [S::V; OCTET];

    /// Writes the rows of an octet, numbers within `RANGE`.
    fn put(octet: &mut [u8], column: usize, numbers: [i8; OCTET]);

    /// Reads row `k` of an octet.
    fn get(octet: &[u8], k: usize, column: usize) -> i8;

    /// A scale for a group of finite numbers, of which the one of largest magnitude is given. The same at every level.
    fn scale<S: Simd>(s: S, group: &[f32], largest: f32) -> bf16;
}

/// Weights of such a format.
#[derive(Clone, Copy)]
pub(crate) struct Grouped<Q>(PhantomData<Q>);

/// Numbers of 8 bits.
#[derive(Clone, Copy)]
pub(crate) struct Int8;
/// Numbers of 4 bits.
#[derive(Clone, Copy)]
pub(crate) struct Int4;

impl Quantized for Int8 {
    const GROUP: usize = 128;
    const OCTET_BYTES: usize = OCTET * COLUMNS;
    const RANGE: (f32, f32) = (-127.0, 127.0);

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8, scale: S::V) -> [S::V; OCTET] {
        // SAFETY: the caller vouches for 128 readable bytes.
        let ([a, b, c, d], [e, f, g, h]) = unsafe { (s.load_i8(from, scale), s.load_i8(from.add(64), scale)) };
        [a, b, c, d, e, f, g, h]
    }

    #[inline(always)]
    fn put(octet: &mut [u8], column: usize, numbers: [i8; OCTET]) {
        let [a, b, c, d, e, f, g, h] = numbers.map(i8::cast_unsigned);
        octet[column * 4..][..4].copy_from_slice(&[a, b, c, d]);
        octet[64 + column * 4..][..4].copy_from_slice(&[e, f, g, h]);
    }

    #[inline(always)]
    fn get(octet: &[u8], k: usize, column: usize) -> i8 {
        octet[k / 4 * 64 + column * 4 + k % 4].cast_signed()
    }

    #[inline(always)]
    fn scale<S: Simd>(_: S, _: &[f32], largest: f32) -> bf16 {
        bf16::from_f32(largest.abs() / 127.0)
    }
}

impl Quantized for Int4 {
    const GROUP: usize = 32;
    const OCTET_BYTES: usize = OCTET * COLUMNS / 2;
    const RANGE: (f32, f32) = (-8.0, 7.0);

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8, scale: S::V) -> [S::V; OCTET] {
        // SAFETY: the caller vouches for 64 readable bytes.
        unsafe { s.load_i4(from, scale) }
    }

    #[inline(always)]
    fn put(octet: &mut [u8], column: usize, numbers: [i8; OCTET]) {
        let [a, b, c, d, e, f, g, h] = numbers.map(|number| (number + 8).cast_unsigned());
        octet[column * 4..][..4].copy_from_slice(&[a | e << 4, b | f << 4, c | g << 4, d | h << 4]);
    }

    #[inline(always)]
    fn get(octet: &[u8], k: usize, column: usize) -> i8 {
        (octet[column * 4 + k % 4] >> (k / 4 * 4) & 15).cast_signed() - 8
    }

    /// The scale of a few that leaves the smallest sum of squared differences. The number of largest magnitude comes to
    /// lie at or near −8, the longer end of the range, by the sign of the scale.
    #[inline(always)]
    fn scale<S: Simd>(s: S, group: &[f32], largest: f32) -> bf16 {
        // Squares of huge differences are all infinite; the smallest scale times −8 is not.
        let mut best = (f32::INFINITY, bf16::from_f32(largest / INT4_ENDS[3]));
        for end in INT4_ENDS {
            let scale = bf16::from_f32(largest / end);
            let difference = squared_difference::<S, Int4>(s, group, scale.to_f32());
            if difference < best.0 {
                best = (difference, scale);
            }
        }
        best.1
    }
}

/// Where the number of largest magnitude may come to lie, before it is cut to the range.
const INT4_ENDS: [f32; 4] = [-8.0, -7.4, -8.6, -9.2];

/// Values over a scale as whole numbers of the format's range, by the reciprocal of the scale.
#[inline(always)]
fn numbers<S: Simd, Q: Quantized>(s: S, values: S::V, reciprocal: S::V) -> S::V {
    // Products and sums are rounded one by one, so that all levels give the same.
    let rounding = s.splat(ROUNDING);
    let rounded = s.sub(s.add(s.mul(values, reciprocal), rounding), rounding);
    s.min(s.max(rounded, s.splat(Q::RANGE.0)), s.splat(Q::RANGE.1))
}

/// Σ (value − scale · number)² over a group.
#[inline(always)]
fn squared_difference<S: Simd, Q: Quantized>(s: S, group: &[f32], scale: f32) -> f32 {
    let (reciprocal, scale, mut sums) = (s.splat(1.0 / scale), s.splat(scale), s.splat(0.0));
    for values in group.as_chunks::<COLUMNS>().0 {
        let values = s.load(values);
        let difference = s.sub(values, s.mul(scale, numbers::<S, Q>(s, values, reciprocal)));
        sums = s.add(sums, s.mul(difference, difference));
    }
    s.sum(sums)
}

/// Bytes of the scales of a block of `k` rows.
#[inline(always)]
fn scale_bytes<Q: Quantized>(k: usize) -> usize {
    panel_bytes::<Bf16>(k.div_ceil(Q::GROUP))
}

/// Bytes of a block of `k` rows.
#[inline(always)]
fn block_bytes<Q: Quantized>(k: usize) -> usize {
    scale_bytes::<Q>(k) + k.div_ceil(OCTET) * Q::OCTET_BYTES
}

/// The numbers of a column, `row` of a row-major matrix, quantised and written to their places. The first number that is
/// not finite is given back with its place.
#[inline(always)]
pub(crate) fn pack_row<S: Simd, Q: Quantized>(
    s: S,
    panel: &mut [u8],
    column: usize,
    row: &[f32],
) -> Result<(), (f32, usize)> {
    let mut padded = [0.0; K_BLOCK];
    for start in (0..row.len()).step_by(K_BLOCK) {
        let values = &row[start..row.len().min(start + K_BLOCK)];
        let block = &mut panel[Grouped::<Q>::block(row.len(), start)];
        let (scales, octets) = block.split_at_mut(scale_bytes::<Q>(values.len()));
        let mut octets = octets.chunks_exact_mut(Q::OCTET_BYTES);
        padded.fill(0.0);
        padded[..values.len()].copy_from_slice(values);
        for (group, values) in padded.chunks(Q::GROUP).take(values.len().div_ceil(Q::GROUP)).enumerate() {
            let scale = choose_scale::<S, Q>(s, values).map_err(|(value, k)| (value, start + group * Q::GROUP + k))?;
            Bf16::put(scales, group, column, scale.to_bits());
            let reciprocal = s.splat(if scale == bf16::ZERO { 0.0 } else { 1.0 / scale.to_f32() });
            for values in values.as_chunks::<COLUMNS>().0 {
                let mut whole = [0.0; COLUMNS];
                s.store(&mut whole, numbers::<S, Q>(s, s.load(values), reciprocal));
                // A last block has no octets behind its last row.
                for (whole, octet) in whole.as_chunks::<OCTET>().0.iter().zip(octets.by_ref()) {
                    Q::put(octet, column, whole.map(|number| number as i8));
                }
            }
        }
    }
    Ok(())
}

/// The scale of a group, 0 for one of zeros, or the first number that is not finite.
#[inline(always)]
fn choose_scale<S: Simd, Q: Quantized>(s: S, group: &[f32]) -> Result<bf16, (f32, usize)> {
    let (mut most, mut least, mut zeros) = (s.splat(0.0), s.splat(0.0), s.splat(0.0));
    for values in group.as_chunks::<COLUMNS>().0 {
        let values = s.load(values);
        (most, least) = (s.max(values, most), s.min(values, least));
        zeros = s.add(zeros, s.mul(values, s.splat(0.0)));
    }
    // A number that is not finite makes this NaN.
    if s.sum(zeros).is_nan() {
        let found = group.iter().position(|value| !value.is_finite()).unwrap_or_default();
        return Err((group[found], found));
    }
    let (most, least) = (s.largest(most), -s.largest(s.sub(s.splat(0.0), least)));
    let largest = if most >= -least { most } else { least };
    if largest.abs() < 256.0 * SMALLEST_SCALE { Ok(bf16::ZERO) } else { Ok(Q::scale(s, group, largest)) }
}

/// The scales of a group of `P` blocks.
///
/// # Safety
/// The scales of the group must be readable at each of `blocks`.
#[inline(always)]
unsafe fn scales<S: Simd, const P: usize>(s: S, blocks: [*const u8; P], group: usize) -> [S::V; P] {
    let mut scales = [s.splat(0.0); P];
    for p in 0..P {
        let at = blocks[p].wrapping_add(group / 2 * Bf16::PAIR_BYTES);
        // SAFETY: scales come in whole pairs, of which the caller vouches for this one.
        let (even, odd) = unsafe { Bf16::pair(s, at) };
        scales[p] = if group.is_multiple_of(2) { even } else { odd };
    }
    scales
}

impl<Q: Quantized> Weight for Grouped<Q> {
    const WIDENED_FOR_MANY: bool = true;
    const MOST_DIRECT_ROWS: usize = 4;

    fn panel_bytes(k: usize) -> usize {
        k / K_BLOCK * block_bytes::<Q>(K_BLOCK) + block_bytes::<Q>(k % K_BLOCK)
    }

    #[inline(always)]
    fn block(k: usize, start: usize) -> Range<usize> {
        let first = start / K_BLOCK * block_bytes::<Q>(K_BLOCK);
        first..first + block_bytes::<Q>((k - start).min(K_BLOCK))
    }

    #[inline(always)]
    fn prefetch(k: usize, start: usize, step: usize) -> Prefetch {
        Prefetch::new(Q::OCTET_BYTES, Self::block(k, start).start, Self::panel_bytes(k), step)
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(
        s: S,
        a: *const f32,
        blocks: [*const u8; P],
        k: usize,
        prefetch: Prefetch,
    ) -> [[S::V; P]; R] {
        // SAFETY: what the caller vouches for.
        unsafe { tile::<S, Q, R, P>(s, a, blocks, k, prefetch) }
    }

    #[inline(always)]
    fn widen<S: Simd>(s: S, block: &[u8], k: usize, to: &mut [Vector]) {
        widen::<S, Q>(s, block, k, to);
    }

    fn read(panel: &[u8], rows: usize, k: usize, column: usize) -> f32 {
        let start = k / K_BLOCK * K_BLOCK;
        let (block, k) = (&panel[Self::block(rows, start)], k - start);
        let octets = &block[scale_bytes::<Q>((rows - start).min(K_BLOCK))..];
        let octet = &octets[k / OCTET * Q::OCTET_BYTES..];
        f32::from(Q::get(octet, k % OCTET, column)) * Bf16::get(block, k / Q::GROUP, column)
    }
}

/// [`Weight::tile`] of quantised blocks.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn tile<S: Simd, Q: Quantized, const R: usize, const P: usize>(
    s: S,
    mut a: *const f32,
    blocks: [*const u8; P],
    k: usize,
    prefetch: Prefetch,
) -> [[S::V; P]; R] {
    let mut sums = [[s.splat(0.0); P]; R];
    let mut octets = blocks.map(|block| block.wrapping_add(scale_bytes::<Q>(k)));
    let mut index = 0;
    for group in 0..k.div_ceil(Q::GROUP) {
        if group % 2 == 0 {
            blocks.iter().for_each(|block| s.prefetch(block.wrapping_add(group / 2 * Bf16::PAIR_BYTES + AHEAD)));
        }
        // SAFETY: a block of `k` rows has the scales of all its groups.
        let scales = unsafe { scales(s, blocks, group) };
        let rows = (k - group * Q::GROUP).min(Q::GROUP);
        for _ in 0..rows / OCTET {
            let ahead = prefetch.ahead(index);
            index += 1;
            for p in 0..P {
                for line in 0..Q::OCTET_BYTES / 64 {
                    s.prefetch(octets[p].wrapping_add(ahead + 64 * line));
                }
                // SAFETY: one of the octets of the `k` rows that the caller vouches for.
                let weights = unsafe { Q::load(s, octets[p], scales[p]) };
                for (row, weight) in weights.into_iter().enumerate() {
                    for r in 0..R {
                        // SAFETY: an element of `a` that the caller vouches for.
                        sums[r][p] = s.fma(s.splat(unsafe { *a.add(row * R + r) }), weight, sums[r][p]);
                    }
                }
                octets[p] = octets[p].wrapping_add(Q::OCTET_BYTES);
            }
            a = a.wrapping_add(OCTET * R);
        }
        let rest = rows % OCTET;
        for p in 0..if rest > 0 { P } else { 0 } {
            // SAFETY: the last octet, which is whole although only `rest` of its rows count.
            let weights = unsafe { Q::load(s, octets[p], scales[p]) };
            for (row, weight) in weights.into_iter().enumerate().take(rest) {
                for r in 0..R {
                    // SAFETY: an element of `a` that the caller vouches for.
                    sums[r][p] = s.fma(s.splat(unsafe { *a.add(row * R + r) }), weight, sums[r][p]);
                }
            }
        }
    }
    sums
}

/// [`Weight::widen`] of a quantised block.
#[inline(always)]
fn widen<S: Simd, Q: Quantized>(s: S, block: &[u8], k: usize, to: &mut [Vector]) {
    let (scales, octets) = block.split_at(scale_bytes::<Q>(k));
    let mut octets = octets.chunks_exact(Q::OCTET_BYTES);
    for (group, to) in to[..k.next_multiple_of(OCTET)].chunks_mut(Q::GROUP).enumerate() {
        // SAFETY: the scales of a block of `k` rows are those of all its groups.
        let [scale] = unsafe { self::scales(s, [scales.as_ptr()], group) };
        for (to, octet) in to.as_chunks_mut::<OCTET>().0.iter_mut().zip(&mut octets) {
            for line in 0..Q::OCTET_BYTES / 64 {
                s.prefetch(octet.as_ptr().wrapping_add(AHEAD + 64 * line));
            }
            // SAFETY: a chunk is as long as an octet.
            let rows = unsafe { Q::load(s, octet.as_ptr(), scale) };
            to.iter_mut().zip(rows).for_each(|(to, row)| s.store(&mut to.0, row));
        }
    }
}
