//! AVX-512's shape in plain Rust: the same cuts of the work and the same roundings, at a tenth of the speed.

use crate::simd::{LANES, Portable, Simd};

/// Eight rows by two panels, as AVX-512 has it. Nothing is inlined, which keeps its build short.
#[derive(Clone, Copy)]
pub(crate) struct Emulated;

const PLAIN: Portable<true> = Portable;

macro_rules! forward {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {$(
        #[inline(never)]
        fn $name(self, $($arg: $type),*) -> $result {
            PLAIN.$name($($arg),*)
        }
    )*};
}

type V = [f32; LANES];

impl Simd for Emulated {
    type V = V;
    const ROWS: usize = 8;
    const WIDE: bool = true;

    forward! {
        fn splat(x: f32) -> V;
        fn load(from: &[f32; LANES]) -> V;
        fn store(to: &mut [f32; LANES], v: V) -> ();
        fn load_part(from: &[f32]) -> V;
        fn store_part(to: &mut [f32], v: V) -> ();
        fn add(a: V, b: V) -> V;
        fn sub(a: V, b: V) -> V;
        fn mul(a: V, b: V) -> V;
        fn div(a: V, b: V) -> V;
        fn fma(a: V, b: V, c: V) -> V;
        fn max(a: V, b: V) -> V;
        fn min(a: V, b: V) -> V;
        fn zero_below(limit: V, x: V, v: V) -> V;
        fn within(from: usize, to: usize, v: V, fill: f32) -> V;
        fn exp2_bits(v: V) -> V;
        fn swap_pairs(v: V) -> V;
        fn sum(v: V) -> f32;
        fn largest(v: V) -> f32;
        fn to_f16(v: V) -> [u16; LANES];
        fn prefetch(address: *const u8) -> ();
    }

    #[inline(never)]
    unsafe fn load_f32(self, from: *const u8) -> V {
        // SAFETY: the caller vouches for what `Portable` asks for.
        unsafe { PLAIN.load_f32(from) }
    }

    #[inline(never)]
    unsafe fn load_bf16_pair(self, from: *const u8) -> (V, V) {
        // SAFETY: the caller vouches for what `Portable` asks for.
        unsafe { PLAIN.load_bf16_pair(from) }
    }

    #[inline(never)]
    unsafe fn load_i8(self, from: *const u8, scale: V) -> [V; 4] {
        // SAFETY: the caller vouches for what `Portable` asks for.
        unsafe { PLAIN.load_i8(from, scale) }
    }

    #[inline(never)]
    unsafe fn load_i4(self, from: *const u8, scale: V) -> [V; 8] {
        // SAFETY: the caller vouches for what `Portable` asks for.
        unsafe { PLAIN.load_i4(from, scale) }
    }

    #[inline(never)]
    unsafe fn load_f16(self, from: *const u8) -> V {
        // SAFETY: the caller vouches for what `Portable` asks for.
        unsafe { PLAIN.load_f16(from) }
    }
}
