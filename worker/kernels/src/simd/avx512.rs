//! Sixteen lanes as one 512-bit register.

use std::arch::x86_64::*;

use super::{LANES, Simd, TOP_BYTE, top_bytes};

/// AVX-512 F, BW, DQ and VL, with AVX2, FMA and F16C. Holding one proves that the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU must have AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Avx512(())
    }
}

/// Calls intrinsics that need nothing but the CPU's instructions.
macro_rules! with_cpu {
    ($value:expr) => {
        // SAFETY: `self` proves that the CPU has the instructions; nothing here reads or writes through a pointer.
        unsafe { $value }
    };
}

/// The lanes below `n`.
#[inline(always)]
fn below(n: usize) -> __mmask16 {
    if n >= LANES { !0 } else { (1 << n) - 1 }
}

impl Simd for Avx512 {
    type V = __m512;
    const ROWS: usize = 8;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with_cpu!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> __m512 {
        // SAFETY: the CPU has AVX-512; sixteen elements are readable and the load does not need alignment.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: __m512) {
        // SAFETY: the CPU has AVX-512; sixteen elements are writable and the store does not need alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn load_part(self, from: &[f32]) -> __m512 {
        // SAFETY: the CPU has AVX-512; masked-out lanes are not accessed, the others lie inside `from`.
        unsafe { _mm512_maskz_loadu_ps(below(from.len()), from.as_ptr()) }
    }

    #[inline(always)]
    fn store_part(self, to: &mut [f32], v: __m512) {
        // SAFETY: as in `load_part`.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), below(to.len()), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_cpu!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        with_cpu!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn zero_below(self, limit: __m512, x: __m512, v: __m512) -> __m512 {
        with_cpu!(_mm512_maskz_mov_ps(!_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit), v))
    }

    #[inline(always)]
    fn within(self, from: usize, to: usize, v: __m512, fill: f32) -> __m512 {
        with_cpu!(_mm512_mask_mov_ps(_mm512_set1_ps(fill), below(to) & !below(from), v))
    }

    #[inline(always)]
    fn exp2_bits(self, v: __m512) -> __m512 {
        with_cpu!({
            let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<23>(_mm512_castps_si512(v)), one))
        })
    }

    #[inline(always)]
    fn swap_pairs(self, v: __m512) -> __m512 {
        with_cpu!(_mm512_permute_ps::<0b10_11_00_01>(v))
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        with_cpu!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        with_cpu!({
            let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }

    #[inline(always)]
    fn to_f16(self, v: __m512) -> [u16; LANES] {
        let mut bits = [0; LANES];
        // SAFETY: the CPU has AVX-512; sixteen elements are writable and the store does not need alignment.
        unsafe { _mm256_storeu_si256(bits.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) };
        bits
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const u8) -> __m512 {
        // SAFETY: the CPU has AVX-512; the caller vouches for 64 readable bytes; the load does not need alignment.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(self, from: *const u8) -> (__m512, __m512) {
        // SAFETY: the CPU has AVX-512; the caller vouches for 64 readable bytes; the load does not need alignment.
        unsafe {
            let raw = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi32(0xffff_0000u32 as i32);
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(raw)), _mm512_castsi512_ps(_mm512_and_si512(raw, mask)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m512 {
        // SAFETY: the CPU has AVX-512; the caller vouches for 32 readable bytes; the load does not need alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8, scale: __m512) -> [__m512; 4] {
        // SAFETY: the CPU has AVX-512 BW; the caller vouches for 64 readable bytes; the load does not need alignment.
        unsafe {
            let raw = _mm512_loadu_si512(from.cast());
            // A byte at the top of its word is the number times 2²⁴, and no other byte enters.
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(TOP_BYTE));
            let top = |byte: i32| {
                let places =
                    _mm512_set4_epi32(top_bytes(byte + 12), top_bytes(byte + 8), top_bytes(byte + 4), top_bytes(byte));
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(raw, places)), scale)
            };
            [top(0), top(1), top(2), top(3)]
        }
    }

    #[inline(always)]
    unsafe fn load_i4(self, from: *const u8, scale: __m512) -> [__m512; 8] {
        // SAFETY: the CPU has AVX-512; the caller vouches for 64 readable bytes; the load does not need alignment.
        unsafe {
            let raw = _mm512_loadu_si512(from.cast());
            let numbers =
                _mm512_setr_ps(-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            // The permutation looks at the lowest four bits of each word only.
            let number = |bits: __m512i| _mm512_mul_ps(_mm512_permutexvar_ps(bits, numbers), scale);
            [
                number(raw),
                number(_mm512_srli_epi32::<8>(raw)),
                number(_mm512_srli_epi32::<16>(raw)),
                number(_mm512_srli_epi32::<24>(raw)),
                number(_mm512_srli_epi32::<4>(raw)),
                number(_mm512_srli_epi32::<12>(raw)),
                number(_mm512_srli_epi32::<20>(raw)),
                number(_mm512_srli_epi32::<28>(raw)),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch of any address is harmless: it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
