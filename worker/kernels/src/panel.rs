//! The panel: the layout in which every product reads its second operand.
//!
//! A panel holds sixteen columns of a `k` × 16 operand, so that a vector's lanes are columns and a column's sum runs
//! along `k` in one lane. Rows of `k` come in pairs, padded with zeros to an even number:
//!
//! | format | a pair of `k` | bytes |
//! |---|---|---|
//! | f32 | 16 numbers of the even row, then 16 of the odd | 128 |
//! | bf16 | for each column the even and the odd number beside each other, as AMX tiles have them | 64 |
//! | f16 | 16 numbers of the even row, then 16 of the odd | 64 |
//!
//! Weights (columns are outputs), keys (columns are positions, `k` the head's dimensions) and values (columns are
//! dimensions, `k` the positions) are all kept like this, and [`tile`] multiplies all of them.

use half::{bf16, f16};

use crate::scratch::Vector;
use crate::simd::{LANES, Simd, math};

/// Columns of a panel.
pub(crate) const COLUMNS: usize = LANES;

/// How far ahead of the products a panel is prefetched, in bytes.
pub(crate) const AHEAD: usize = 2048;

/// A number format of panels.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Bytes of a pair of `k`.
    const PAIR_BYTES: usize;
    /// Whether loading widens, which is then worth doing once for many rows.
    const NARROW: bool;
    /// The largest number that rounding to the format leaves finite, or the largest of all.
    const LARGEST: f32 = f32::MAX;
    /// A number as it is stored.
    type Stored: Copy;

    /// The even and the odd row of a pair, widened.
    ///
    /// # Safety
    /// `PAIR_BYTES` at `from` must be readable.
    unsafe fn pair<S: Simd>(s: S, from: *const u8) -> (S::V, S::V);

    /// Byte offset of a number in its panel.
    fn offset(k: usize, column: usize) -> usize;

    /// `value`, rounded.
    fn round(value: f32) -> Self::Stored;

    /// Sixteen numbers, rounded.
    fn round_all<S: Simd>(s: S, values: S::V) -> [Self::Stored; COLUMNS];

    /// Writes a number to its place in `panel`.
    fn put(panel: &mut [u8], k: usize, column: usize, value: Self::Stored);

    /// Reads a number from its place in `panel`.
    fn get(panel: &[u8], k: usize, column: usize) -> f32;
}

/// f32 panels.
#[derive(Clone, Copy)]
pub(crate) struct F32;
/// bf16 panels.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;
/// f16 panels.
#[derive(Clone, Copy)]
pub(crate) struct F16;

/// Bytes of a panel of `k` rows.
pub(crate) fn panel_bytes<E: Element>(k: usize) -> usize {
    k.div_ceil(2) * E::PAIR_BYTES
}

/// The two or four bytes at `at`.
#[inline(always)]
fn bytes<const N: usize>(panel: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&panel[at..at + N]);
    out
}

impl Element for F32 {
    const PAIR_BYTES: usize = 2 * COLUMNS * 4;
    const NARROW: bool = false;
    type Stored = f32;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller vouches for 128 readable bytes.
        unsafe { (s.load_f32(from), s.load_f32(from.add(64))) }
    }

    #[inline(always)]
    fn offset(k: usize, column: usize) -> usize {
        (k * COLUMNS + column) * 4
    }

    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn round_all<S: Simd>(s: S, values: S::V) -> [f32; COLUMNS] {
        let mut stored = [0.0; COLUMNS];
        s.store(&mut stored, values);
        stored
    }

    #[inline(always)]
    fn put(panel: &mut [u8], k: usize, column: usize, value: f32) {
        let at = Self::offset(k, column);
        panel[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    #[inline(always)]
    fn get(panel: &[u8], k: usize, column: usize) -> f32 {
        f32::from_ne_bytes(bytes(panel, Self::offset(k, column)))
    }
}

impl Element for Bf16 {
    const PAIR_BYTES: usize = 2 * COLUMNS * 2;
    const NARROW: bool = true;
    type Stored = u16;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller vouches for 64 readable bytes.
        unsafe { s.load_bf16_pair(from) }
    }

    #[inline(always)]
    fn offset(k: usize, column: usize) -> usize {
        // As the halves of one 32-bit word, the even number in the lower one.
        (k / 2 * COLUMNS + column) * 4 + if cfg!(target_endian = "little") { k % 2 } else { 1 - k % 2 } * 2
    }

    #[inline(always)]
    fn round(value: f32) -> u16 {
        bf16::from_f32(value).to_bits()
    }

    #[inline(always)]
    fn round_all<S: Simd>(s: S, values: S::V) -> [u16; COLUMNS] {
        math::to_bf16(s, values)
    }

    #[inline(always)]
    fn put(panel: &mut [u8], k: usize, column: usize, value: u16) {
        let at = Self::offset(k, column);
        panel[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    #[inline(always)]
    fn get(panel: &[u8], k: usize, column: usize) -> f32 {
        bf16::from_ne_bytes(bytes(panel, Self::offset(k, column))).to_f32()
    }
}

impl Element for F16 {
    const PAIR_BYTES: usize = 2 * COLUMNS * 2;
    const NARROW: bool = true;
    type Stored = u16;
    const LARGEST: f32 = 65504.0;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller vouches for 64 readable bytes.
        unsafe { (s.load_f16(from), s.load_f16(from.add(32))) }
    }

    #[inline(always)]
    fn offset(k: usize, column: usize) -> usize {
        (k * COLUMNS + column) * 2
    }

    #[inline(always)]
    fn round(value: f32) -> u16 {
        f16::from_f32(value).to_bits()
    }

    #[inline(always)]
    fn round_all<S: Simd>(s: S, values: S::V) -> [u16; COLUMNS] {
        s.to_f16(values)
    }

    #[inline(always)]
    fn put(panel: &mut [u8], k: usize, column: usize, value: u16) {
        let at = Self::offset(k, column);
        panel[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }

    #[inline(always)]
    fn get(panel: &[u8], k: usize, column: usize) -> f32 {
        f16::from_ne_bytes(bytes(panel, Self::offset(k, column))).to_f32()
    }
}

/// Where [`tile`] prefetches: `AHEAD` bytes on, and past the end of a panel at the panel that comes next.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    /// Steps for which the bytes ahead belong to the same panel.
    near: usize,
    /// Distance from a step after those to the same place ahead in the next panel.
    far: usize,
}

impl Prefetch {
    /// Always the bytes ahead.
    pub(crate) const ON: Prefetch = Prefetch { near: usize::MAX, far: AHEAD };

    /// In steps of `step` bytes from byte `done` of a panel of `panel` bytes, when the panel `wide` panels on comes next.
    #[inline(always)]
    pub(crate) fn new(step: usize, done: usize, panel: usize, wide: usize) -> Prefetch {
        Prefetch { near: panel.saturating_sub(done + AHEAD) / step, far: AHEAD + (wide - 1) * panel }
    }

    /// `steps` cut in two, each part with the distance to what is prefetched beside its steps.
    #[inline(always)]
    pub(crate) fn split(self, steps: usize) -> [(usize, usize); 2] {
        let near = self.near.min(steps);
        [(near, AHEAD), (steps - near, self.far)]
    }

    /// The distance from step `index` to what is prefetched beside it.
    #[inline(always)]
    pub(crate) fn ahead(self, index: usize) -> usize {
        if index < self.near { AHEAD } else { self.far }
    }
}

/// Whether a level has tiles of `R` rows and `P` panels. What it has not is not compiled.
pub(crate) const fn has_tile<S: Simd, const R: usize, const P: usize>() -> bool {
    R <= S::ROWS
        && match R {
            1 => P == 1 || P == 4,
            2 => P <= 2,
            _ => P == 1 || (P == 2 && S::WIDE),
        }
}

/// Adds the products of `R` rows with `P` panels over `k` to `sums`: lane `c` of `[r][p]` gains a\[r, k\] · panel
/// p\[k, c\] in ascending k, whatever `R` and `P` are.
///
/// `a[r, k]` is at `a + r · ROW_STEP + k · K_STEP`. A last odd row of `k` is multiplied alone: its pair's other half is
/// loaded but does not enter.
///
/// # Safety
/// All those elements of `a`, and `k.div_ceil(2)` pairs at each of `panels`, must be readable.
#[inline(always)]
pub(crate) unsafe fn tile<
    S: Simd,
    E: Element,
    const R: usize,
    const P: usize,
    const ROW_STEP: usize,
    const K_STEP: usize,
>(
    s: S,
    mut a: *const f32,
    mut panels: [*const u8; P],
    k: usize,
    prefetch: Prefetch,
    mut sums: [[S::V; P]; R],
) -> [[S::V; P]; R] {
    for (pairs, ahead) in prefetch.split(k / 2) {
        for _ in 0..pairs {
            for p in 0..P {
                for line in 0..E::PAIR_BYTES / 64 {
                    s.prefetch(panels[p].wrapping_add(ahead + 64 * line));
                }
                // SAFETY: this pair is one of the `k / 2` whole pairs that the caller vouches for.
                let (even, odd) = unsafe { E::pair(s, panels[p]) };
                for r in 0..R {
                    // SAFETY: an element of `a` that the caller vouches for.
                    let x = s.splat(unsafe { *a.add(r * ROW_STEP) });
                    sums[r][p] = s.fma(x, even, sums[r][p]);
                }
                for r in 0..R {
                    // SAFETY: as above.
                    let x = s.splat(unsafe { *a.add(r * ROW_STEP + K_STEP) });
                    sums[r][p] = s.fma(x, odd, sums[r][p]);
                }
                panels[p] = panels[p].wrapping_add(E::PAIR_BYTES);
            }
            a = a.wrapping_add(2 * K_STEP);
        }
    }
    if k % 2 == 1 {
        for p in 0..P {
            // SAFETY: the last pair, of which the caller vouches for both halves.
            let (even, _) = unsafe { E::pair(s, panels[p]) };
            for r in 0..R {
                // SAFETY: an element of `a` that the caller vouches for.
                sums[r][p] = s.fma(s.splat(unsafe { *a.add(r * ROW_STEP) }), even, sums[r][p]);
            }
        }
    }
    sums
}

/// Asks for the first bytes of a panel that will be read soon.
#[inline(always)]
pub(crate) fn prefetch_start<S: Simd>(s: S, panel: &[u8]) {
    for line in panel[..panel.len().min(AHEAD)].chunks(64) {
        s.prefetch(line.as_ptr());
    }
}

/// Widens pairs of a panel to f32: `[k]`, one vector each.
#[inline(always)]
pub(crate) fn widen<S: Simd, E: Element>(s: S, pairs: &[u8], to: &mut [Vector]) {
    let pairs = pairs.chunks_exact(E::PAIR_BYTES);
    for (pair, to) in pairs.zip(to.as_chunks_mut::<2>().0) {
        s.prefetch(pair.as_ptr().wrapping_add(AHEAD));
        // SAFETY: a chunk is as long as a pair.
        let (even, odd) = unsafe { E::pair(s, pair.as_ptr()) };
        s.store(&mut to[0].0, even);
        s.store(&mut to[1].0, odd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<E: Element>(k: usize) {
        let mut panel = vec![0; panel_bytes::<E>(k)];
        let value = |k: usize, column: usize| (k * COLUMNS + column) as f32 / 4.0;
        for k in 0..k {
            (0..COLUMNS).for_each(|column| E::put(&mut panel, k, column, E::round(value(k, column))));
        }
        for k in 0..k {
            for column in 0..COLUMNS {
                assert_eq!(E::get(&panel, k, column), value(k, column), "{k} {column}");
            }
        }
    }

    #[test]
    fn every_number_has_its_own_place_in_a_panel() {
        for k in [1, 2, 5, 16] {
            round_trip::<F32>(k);
            round_trip::<Bf16>(k.min(4));
            round_trip::<F16>(k);
        }
    }
}
