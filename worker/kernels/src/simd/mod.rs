//! Sixteen f32 lanes at every level.
//!
//! Kernels are written once over [`Simd`]; a level supplies the lanes (one register of AVX-512, two of AVX2, an array
//! in plain Rust). Every level does the same operations in the same order, so the fused levels give the same bits.
//!
//! A `Simd` value is the proof that the CPU has its instructions: only [`dispatch`] makes one, inside a function that
//! is compiled with them. Everything that takes one is `#[inline(always)]`, so that it ends up in that function.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
mod portable;

use crate::level::Level;

pub(crate) use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Operations on sixteen f32 lanes.
pub(crate) trait Simd: Copy {
    /// Sixteen f32 lanes.
    type V: Copy;
    /// Most rows of a register tile one panel wide.
    const ROWS: usize;
    /// Whether a tile of `ROWS` rows may be two panels wide.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, to: &mut [f32; LANES], v: Self::V);
    /// Lanes from fewer than sixteen elements; the others are 0.
    fn load_part(self, from: &[f32]) -> Self::V;
    /// Stores the first `to.len()` lanes, fewer than sixteen.
    fn store_part(self, to: &mut [f32], v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the level has FMA.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: a NaN in `b` stays, one in `a` is dropped.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `v`, with 0 in the lanes where `x < limit`.
    fn zero_below(self, limit: Self::V, x: Self::V, v: Self::V) -> Self::V;
    /// `v` in the lanes `from..to`, `fill` in the others.
    fn within(self, from: usize, to: usize, v: Self::V, fill: f32) -> Self::V;
    /// 2ⁿ where the low bits of each lane hold the integer n, −126 ≤ n ≤ 127 (see [`math::exp`]).
    fn exp2_bits(self, v: Self::V) -> Self::V;
    /// Exchanges lanes 2i and 2i + 1.
    fn swap_pairs(self, v: Self::V) -> Self::V;
    /// Sum of the lanes: halves are added until one is left.
    fn sum(self, v: Self::V) -> f32;
    /// Largest lane by [`Simd::max`], folding halves.
    fn largest(self, v: Self::V) -> f32;

    /// The bits of the lanes rounded to f16, to nearest even.
    fn to_f16(self, v: Self::V) -> [u16; LANES];

    /// # Safety
    /// 64 bytes at `from` must be readable.
    unsafe fn load_f32(self, from: *const u8) -> Self::V;
    /// The even and the odd of 32 bf16 numbers, widened.
    ///
    /// # Safety
    /// 64 bytes at `from` must be readable.
    unsafe fn load_bf16_pair(self, from: *const u8) -> (Self::V, Self::V);
    /// Sixteen f16 numbers, widened.
    ///
    /// # Safety
    /// 32 bytes at `from` must be readable.
    unsafe fn load_f16(self, from: *const u8) -> Self::V;
    /// Four whole numbers of 8 bits for each lane, as bytes of its 32-bit word from the lowest on, times `scale`. Exact
    /// where a lane's scale has a significand of 8 bits and is 0 or at least 2⁻¹⁰⁰.
    ///
    /// # Safety
    /// 64 bytes at `from` must be readable.
    unsafe fn load_i8(self, from: *const u8, scale: Self::V) -> [Self::V; 4];
    /// Eight numbers of 4 bits for each lane, less 8, times `scale`: the low halves of the bytes of its 32-bit word from
    /// the lowest on, then the high halves. Exact as [`Simd::load_i8`].
    ///
    /// # Safety
    /// 64 bytes at `from` must be readable.
    unsafe fn load_i4(self, from: *const u8, scale: Self::V) -> [Self::V; 8];
    /// Asks for the cache line at `address`, which may be any address.
    fn prefetch(self, address: *const u8);
}

/// 2⁻²⁴: what makes a byte at the top of a 32-bit word the number that it is.
#[cfg(target_arch = "x86_64")]
const TOP_BYTE: f32 = 1.0 / (1 << 24) as f32;

/// The control word of a byte shuffle that puts byte `from` of the lane at the top of a word, and zeros below it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
const fn top_bytes(from: i32) -> i32 {
    (from << 24) | 0x0080_8080
}

/// A computation over any level.
pub(crate) trait Kernel {
    /// What it gives back.
    type Output;
    /// Computes; must be `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` compiled for `level`.
///
/// # Safety
/// The CPU must have `level`; [`crate::Cpu`] holds only such levels.
pub(crate) unsafe fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level {
        Level::Scalar => kernel.run(Portable::<FUSED>),
        // SAFETY: the caller vouches that the CPU has the level.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx => unsafe { run_avx512(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx2 | Level::Avx512 | Level::Amx => unreachable!("levels of another architecture are never available"),
    }
}

/// Whether the scalar level fuses multiply and add: only where the baseline has the instruction.
pub(crate) const FUSED: bool = cfg!(target_arch = "aarch64");

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function is compiled with, and only called on CPUs with, what the value stands for.
    kernel.run(unsafe { avx2::Avx2::assume() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function is compiled with, and only called on CPUs with, what the value stands for.
    kernel.run(unsafe { avx512::Avx512::assume() })
}
