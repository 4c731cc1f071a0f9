//! AVX-512's shape in plain Rust: the same cuts of the work and the same roundings, at a tenth of the speed.

use half::bf16;

use crate::amx::{Operands, TILE_BYTES, TILE_ROWS};
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

/// What `TDPBF16PS` does along `k`, in plain Rust.
///
/// # Safety
/// As [`crate::amx::TileUnit::multiply`].
pub(crate) unsafe fn multiply(operands: &Operands) {
    let normal = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    let number = |bits: u16| normal(bf16::from_bits(bits).to_f32());
    // The product of two bf16 numbers is exact where it is neither subnormal nor infinite, which tests keep away from;
    // so this rounds once.
    let fma = |a: f32, b: f32, c: f32| normal(a * b + c);
    for step in 0..operands.steps {
        for tile in 0..2 {
            let rows = operands.rows[tile];
            for row in 0..rows {
                // SAFETY: the caller vouches for the rows of each step.
                let a = unsafe { (*operands.a[tile].add(step * rows + row)).0 };
                for panel in 0..2 {
                    // SAFETY: the caller vouches for a full tile at each step, and for the sums.
                    let (b, sums) = unsafe {
                        let b = operands.b[panel].add(step * TILE_BYTES).cast::<[[u16; 2]; LANES]>();
                        (b, &mut (*operands.c[panel].add(tile * TILE_ROWS + row)).0)
                    };
                    for column in 0..LANES {
                        let (mut even, mut odd) = (0.0, 0.0);
                        for pair in 0..TILE_ROWS {
                            // SAFETY: as above.
                            let b = unsafe { b.add(pair).read_unaligned()[column] };
                            even = fma(number(a[2 * pair]), number(b[0]), even);
                            odd = fma(number(a[2 * pair + 1]), number(b[1]), odd);
                        }
                        sums[column] = normal(sums[column] + normal(even + odd));
                    }
                }
            }
        }
    }
}
