//! Elementary functions, the same operations at every level.

use super::{LANES, Simd};

/// Below this e^x is given as 0: the smallest normal number's logarithm.
const EXP_FLOOR: f32 = -87.336_54;
/// Above this e^x is given as e^88 ≈ 1.65e38.
const EXP_CEILING: f32 = 88.0;

/// eˣ within 2 ulp: 2ⁿ · e^r with n = round(x / ln 2), |r| ≤ ln 2 / 2, ln 2 in two parts (Cody and Waite) and the Taylor
/// polynomial of degree 7. 0 below −87.3, 1.65e38 above 88; a NaN stays.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let floor = s.splat(EXP_FLOOR);
    let clamped = s.min(s.splat(EXP_CEILING), s.max(floor, x));
    let shifted = s.fma(clamped, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2_HIGH), clamped);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    s.zero_below(floor, x, s.mul(p, s.exp2_bits(shifted)))
}

/// x / (1 + e⁻ˣ).
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(x, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// The bits of the lanes rounded to bf16, to nearest even; a NaN stays one.
#[inline(always)]
pub(crate) fn to_bf16<S: Simd>(s: S, v: S::V) -> [u16; LANES] {
    let mut numbers = [0.0; LANES];
    s.store(&mut numbers, v);
    let mut bits = [0; LANES];
    for (bits, number) in bits.iter_mut().zip(numbers) {
        let word = number.to_bits();
        let rounded = word.wrapping_add(0x7fff + (word >> 16 & 1)) >> 16;
        *bits = if number.is_nan() { word >> 16 | 0x40 } else { rounded } as u16;
    }
    bits
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::simd::Portable;

    proptest! {
        #[test]
        fn rounding_to_bf16_is_that_of_the_half_crate(words in prop::array::uniform16(any::<u32>())) {
            let numbers = words.map(f32::from_bits);
            let bits = to_bf16(Portable::<false>, numbers);
            prop_assert_eq!(bits, numbers.map(|number| bf16::from_f32(number).to_bits()));
        }

        #[test]
        fn the_exponential_is_within_two_units_in_the_last_place(x in -87.3f32..88.0) {
            let y = exp(Portable::<true>, [x; LANES])[0];
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * exact;
            prop_assert!((f64::from(y) - exact).abs() <= 2.0 * unit, "e^{} is {} instead of {}", x, y, exact);
        }
    }

    #[test]
    fn the_exponential_of_extremes_is_defined() {
        let of = |x: f32| exp(Portable::<false>, [x; LANES])[0];
        assert_eq!(of(0.0), 1.0);
        assert_eq!(of(-88.0), 0.0);
        assert_eq!(of(f32::NEG_INFINITY), 0.0);
        assert_eq!(of(f32::INFINITY), of(88.0));
        assert!(of(f32::NAN).is_nan());
    }
}
