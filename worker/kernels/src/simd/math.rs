//! Elementary functions, the same operations at every level.

use super::Simd;

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
