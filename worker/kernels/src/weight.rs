//! How weights lie in panels and how products read them: numbers as they are ([`crate::panel`]), or quantised in groups
//! ([`crate::quantized`]).

use std::ops::Range;

use crate::panel::{self, Element, Prefetch};
use crate::scratch::Vector;
use crate::simd::Simd;

/// Length of the blocks in which `k` is summed. Sixteen columns of a block are 8 KiB in bf16, which stay in the first
/// cache beside a tile of activations. Part of the order of summation: changing it changes results in the last bits.
pub(crate) const K_BLOCK: usize = 256;

/// A format of weights.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    /// Whether reading a number takes work that is worth doing once for many rows.
    const WIDENED_FOR_MANY: bool;
    /// The most rows of a register tile that reads the weights as they are.
    const MOST_DIRECT_ROWS: usize;

    /// Bytes of a panel of `k` rows.
    fn panel_bytes(k: usize) -> usize;

    /// Where the block that begins at row `start`, a multiple of [`K_BLOCK`], lies in a panel of `k` rows.
    fn block(k: usize, start: usize) -> Range<usize>;

    /// What is prefetched beside that block when the panel `step` panels on comes next.
    fn prefetch(k: usize, start: usize, step: usize) -> Prefetch;

    /// The products of `R` rows with the first `k` rows of `P` blocks: lane `c` of `[r][p]` is Σ a\[k, r\] · block p\[k,
    /// c\], fused or not as the level does, in ascending k. `a[k, r]` is at `a + k · R + r`.
    ///
    /// # Safety
    /// All those elements of `a`, and at each of `blocks` a block of `k` rows, must be readable.
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(
        s: S,
        a: *const f32,
        blocks: [*const u8; P],
        k: usize,
        prefetch: Prefetch,
    ) -> [[S::V; P]; R];

    /// Widens a block of `k` rows to f32: `[k]`, one vector each. `to` has [`K_BLOCK`] of them.
    fn widen<S: Simd>(s: S, block: &[u8], k: usize, to: &mut [Vector]);

    /// The number at `k` and `column` of a panel of `rows` rows.
    fn read(panel: &[u8], rows: usize, k: usize, column: usize) -> f32;
}

impl<E: Element> Weight for E {
    const WIDENED_FOR_MANY: bool = E::NARROW;
    const MOST_DIRECT_ROWS: usize = usize::MAX;

    fn panel_bytes(k: usize) -> usize {
        panel::panel_bytes::<E>(k)
    }

    #[inline(always)]
    fn block(k: usize, start: usize) -> Range<usize> {
        let pairs = (k - start).min(K_BLOCK).div_ceil(2);
        start / 2 * E::PAIR_BYTES..(start / 2 + pairs) * E::PAIR_BYTES
    }

    #[inline(always)]
    fn prefetch(k: usize, start: usize, step: usize) -> Prefetch {
        Prefetch::new(E::PAIR_BYTES, start / 2 * E::PAIR_BYTES, panel::panel_bytes::<E>(k), step)
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(
        s: S,
        a: *const f32,
        blocks: [*const u8; P],
        k: usize,
        prefetch: Prefetch,
    ) -> [[S::V; P]; R] {
        // SAFETY: what the caller vouches for; a block of `k` rows has `k.div_ceil(2)` pairs.
        unsafe { panel::tile::<S, E, R, P, 1, R>(s, a, blocks, k, prefetch, [[s.splat(0.0); P]; R]) }
    }

    #[inline(always)]
    fn widen<S: Simd>(s: S, block: &[u8], _: usize, to: &mut [Vector]) {
        panel::widen::<S, E>(s, block, to);
    }

    fn read(panel: &[u8], _: usize, k: usize, column: usize) -> f32 {
        E::get(panel, k, column)
    }
}
