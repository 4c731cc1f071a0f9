//! Sixteen lanes as two 256-bit registers.

use std::arch::x86_64::*;

use super::{LANES, Simd, TOP_BYTE, top_bytes};

/// AVX2 with FMA and F16C. Holding one proves that the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU must have AVX2, FMA and F16C.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Avx2(())
    }
}

/// Lanes 0–7 and 8–15.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

/// Calls intrinsics that need nothing but the CPU's instructions.
macro_rules! with_cpu {
    ($value:expr) => {
        // SAFETY: `self` proves that the CPU has the instructions; nothing here reads or writes through a pointer.
        unsafe { $value }
    };
}

/// The same intrinsic on both halves.
macro_rules! both {
    ($op:ident, $a:ident $(, $rest:ident)*) => {
        with_cpu!(Pair($op($a.0 $(, $rest.0)*), $op($a.1 $(, $rest.1)*)))
    };
}

/// The integers 0–7 and 8–15.
#[inline(always)]
fn lane_numbers(_: Avx2) -> (__m256i, __m256i) {
    // SAFETY: the argument proves that the CPU has AVX2.
    unsafe { (_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)) }
}

/// Masks of the lanes below `n`, n ≤ 16.
#[inline(always)]
fn below(s: Avx2, n: usize) -> (__m256i, __m256i) {
    let (low, high) = lane_numbers(s);
    // SAFETY: `s` proves that the CPU has AVX2.
    unsafe {
        let n = _mm256_set1_epi32(n as i32);
        (_mm256_cmpgt_epi32(n, low), _mm256_cmpgt_epi32(n, high))
    }
}

/// The four bytes of each 32-bit word of both halves as signed numbers, times `scale`.
#[inline(always)]
fn scaled_bytes(_: Avx2, low: __m256i, high: __m256i, scale: Pair) -> [Pair; 4] {
    // SAFETY: the argument proves that the CPU has AVX2.
    unsafe {
        // A byte at the top of its word is the number times 2²⁴, and no other byte enters.
        let factor = _mm256_set1_ps(TOP_BYTE);
        let scale = Pair(_mm256_mul_ps(scale.0, factor), _mm256_mul_ps(scale.1, factor));
        let top = |byte: i32| {
            let places =
                _mm_setr_epi32(top_bytes(byte), top_bytes(byte + 4), top_bytes(byte + 8), top_bytes(byte + 12));
            let places = _mm256_broadcastsi128_si256(places);
            Pair(
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(low, places)), scale.0),
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(high, places)), scale.1),
            )
        };
        [top(0), top(1), top(2), top(3)]
    }
}

impl Simd for Avx2 {
    type V = Pair;
    const ROWS: usize = 6;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        with_cpu!(Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Pair {
        // SAFETY: the CPU has AVX; sixteen elements are readable and the loads do not need alignment.
        unsafe { Pair(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Pair) {
        // SAFETY: the CPU has AVX; sixteen elements are writable and the stores do not need alignment.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v.0);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v.1);
        }
    }

    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Pair {
        let (low, high) = below(self, from.len().min(LANES));
        // SAFETY: the CPU has AVX2; masked-out lanes are not accessed, the others lie inside `from`. The address of the
        // second half may lie outside, but is then not accessed.
        unsafe { Pair(_mm256_maskload_ps(from.as_ptr(), low), _mm256_maskload_ps(from.as_ptr().wrapping_add(8), high)) }
    }

    #[inline(always)]
    fn store_part(self, to: &mut [f32], v: Pair) {
        let (low, high) = below(self, to.len().min(LANES));
        // SAFETY: as in `load_part`.
        unsafe {
            _mm256_maskstore_ps(to.as_mut_ptr(), low, v.0);
            _mm256_maskstore_ps(to.as_mut_ptr().wrapping_add(8), high, v.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        both!(_mm256_fmadd_ps, a, b, c)
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn zero_below(self, limit: Pair, x: Pair, v: Pair) -> Pair {
        with_cpu!(Pair(
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.0, limit.0), v.0),
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x.1, limit.1), v.1),
        ))
    }

    #[inline(always)]
    fn within(self, from: usize, to: usize, v: Pair, fill: f32) -> Pair {
        let (before, end) = (below(self, from.min(LANES)), below(self, to.min(LANES)));
        with_cpu!({
            let fill = _mm256_set1_ps(fill);
            let low = _mm256_castsi256_ps(_mm256_andnot_si256(before.0, end.0));
            let high = _mm256_castsi256_ps(_mm256_andnot_si256(before.1, end.1));
            Pair(_mm256_blendv_ps(fill, v.0, low), _mm256_blendv_ps(fill, v.1, high))
        })
    }

    #[inline(always)]
    fn exp2_bits(self, v: Pair) -> Pair {
        with_cpu!({
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(v.0));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(v.1));
            Pair(_mm256_castsi256_ps(_mm256_add_epi32(low, one)), _mm256_castsi256_ps(_mm256_add_epi32(high, one)))
        })
    }

    #[inline(always)]
    fn swap_pairs(self, v: Pair) -> Pair {
        with_cpu!(Pair(_mm256_permute_ps::<0b10_11_00_01>(v.0), _mm256_permute_ps::<0b10_11_00_01>(v.1)))
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        with_cpu!({
            let eight = _mm256_add_ps(v.0, v.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn largest(self, v: Pair) -> f32 {
        with_cpu!({
            let eight = _mm256_max_ps(v.0, v.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn to_f16(self, v: Pair) -> [u16; LANES] {
        let mut bits = [0; LANES];
        // SAFETY: the CPU has F16C; sixteen elements are writable and the stores do not need alignment.
        unsafe {
            _mm_storeu_si128(bits.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0));
            _mm_storeu_si128(bits.as_mut_ptr().add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1));
        }
        bits
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const u8) -> Pair {
        // SAFETY: the CPU has AVX; the caller vouches for 64 readable bytes; the loads do not need alignment.
        unsafe { Pair(_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(self, from: *const u8) -> (Pair, Pair) {
        // SAFETY: the CPU has AVX2; the caller vouches for 64 readable bytes; the loads do not need alignment.
        unsafe {
            let low = _mm256_loadu_si256(from.cast());
            let high = _mm256_loadu_si256(from.add(32).cast());
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            let even = Pair(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            );
            let odd = Pair(
                _mm256_castsi256_ps(_mm256_and_si256(low, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(high, mask)),
            );
            (even, odd)
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> Pair {
        // SAFETY: the CPU has F16C; the caller vouches for 32 readable bytes; the loads do not need alignment.
        unsafe {
            Pair(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8, scale: Pair) -> [Pair; 4] {
        // SAFETY: the CPU has AVX2; the caller vouches for 64 readable bytes; the loads do not need alignment.
        unsafe { scaled_bytes(self, _mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()), scale) }
    }

    #[inline(always)]
    unsafe fn load_i4(self, from: *const u8, scale: Pair) -> [Pair; 8] {
        // SAFETY: the CPU has AVX2; the caller vouches for 64 readable bytes; the loads do not need alignment.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast()));
            let half = _mm256_set1_epi8(15);
            let number = |bits: __m256i| _mm256_sub_epi8(_mm256_and_si256(bits, half), _mm256_set1_epi8(8));
            let [a, b, c, d] = scaled_bytes(self, number(low), number(high), scale);
            let (low, high) = (_mm256_srli_epi16::<4>(low), _mm256_srli_epi16::<4>(high));
            let [e, f, g, h] = scaled_bytes(self, number(low), number(high), scale);
            [a, b, c, d, e, f, g, h]
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch of any address is harmless: it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
