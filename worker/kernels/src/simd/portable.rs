//! Sixteen lanes in plain Rust.

use half::f16;

use super::{LANES, Simd};

/// Plain Rust. `FUSED` rounds a · b + c once, as the levels with FMA do; without the instruction that is slow, so the
/// scalar level does not.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const FUSED: bool>;

macro_rules! lanes {
    (|$i:ident| $value:expr) => {{
        let mut out = [0.0f32; LANES];
        for ($i, out) in out.iter_mut().enumerate() {
            *out = $value;
        }
        out
    }};
}

impl<const FUSED: bool> Simd for Portable<FUSED> {
    type V = [f32; LANES];
    const ROWS: usize = 2;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Self::V) {
        *to = v;
    }

    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::V {
        lanes!(|i| if i < from.len() { from[i] } else { 0.0 })
    }

    #[inline(always)]
    fn store_part(self, to: &mut [f32], v: Self::V) {
        let n = to.len();
        to.copy_from_slice(&v[..n]);
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes!(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        lanes!(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn zero_below(self, limit: Self::V, x: Self::V, v: Self::V) -> Self::V {
        lanes!(|i| if x[i] < limit[i] { 0.0 } else { v[i] })
    }

    #[inline(always)]
    fn within(self, from: usize, to: usize, v: Self::V, fill: f32) -> Self::V {
        lanes!(|i| if from <= i && i < to { v[i] } else { fill })
    }

    #[inline(always)]
    fn exp2_bits(self, v: Self::V) -> Self::V {
        lanes!(|i| f32::from_bits((v[i].to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }

    #[inline(always)]
    fn swap_pairs(self, v: Self::V) -> Self::V {
        lanes!(|i| v[i ^ 1])
    }

    #[inline(always)]
    fn sum(self, mut v: Self::V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }

    #[inline(always)]
    fn largest(self, mut v: Self::V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] = if v[i] > v[i + half] { v[i] } else { v[i + half] };
            }
        }
        v[0]
    }

    #[inline(always)]
    fn to_f16(self, v: Self::V) -> [u16; LANES] {
        v.map(|x| f16::from_f32(x).to_bits())
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 64 readable bytes; the read does not need alignment.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16_pair(self, from: *const u8) -> (Self::V, Self::V) {
        // SAFETY: the caller vouches for 64 readable bytes; the read does not need alignment.
        let raw = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        (lanes!(|i| f32::from_bits(raw[i] << 16)), lanes!(|i| f32::from_bits(raw[i] & 0xffff_0000)))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 readable bytes; the read does not need alignment.
        let raw = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        lanes!(|i| widen_f16(raw[i]))
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const u8, scale: Self::V) -> [Self::V; 4] {
        // SAFETY: the caller vouches for 64 readable bytes; an array of bytes needs no alignment.
        let raw = unsafe { from.cast::<[[u8; 4]; LANES]>().read() };
        std::array::from_fn(|k| lanes!(|i| f32::from(raw[i][k].cast_signed()) * scale[i]))
    }

    #[inline(always)]
    unsafe fn load_i4(self, from: *const u8, scale: Self::V) -> [Self::V; 8] {
        // SAFETY: the caller vouches for 64 readable bytes; an array of bytes needs no alignment.
        let raw = unsafe { from.cast::<[[u8; 4]; LANES]>().read() };
        let number = |bytes: [u8; 4], k: usize| (bytes[k % 4] >> (k / 4 * 4) & 15).cast_signed() - 8;
        std::array::from_fn(|k| lanes!(|i| f32::from(number(raw[i], k)) * scale[i]))
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}

/// An f16 number's bits as f32, without branches, so that compilers vectorise it.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    // The exponent's bias differs by 112; a product also gets subnormal numbers right.
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let widened = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { scaled.to_bits() };
    f32::from_bits(widened | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_number_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (expected, widened) = (f16::from_bits(bits).to_f32(), widen_f16(bits));
            assert!(
                widened.to_bits() == expected.to_bits() || (widened.is_nan() && expected.is_nan()),
                "{bits:#x}: {widened} instead of {expected}"
            );
        }
    }
}
