//! Rotary position embedding, interleaved: the pairs are (2i, 2i + 1).

use std::ops::Range;

use crate::elementwise::{for_row_ranges, load, store, vectors};
use crate::memory::Disjoint;
use crate::simd::{Kernel, Simd};
use crate::{Cpu, RowsMut};

/// The inverse frequencies of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    inverse: Vec<f32>,
}

/// Cosines and sines of a step's positions, computed once and used by every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Angles {
    head_dim: usize,
    /// `[positions, head_dim]`: each cosine twice.
    cos: Vec<f32>,
    /// `[positions, head_dim]`: −sin, sin for each pair.
    sin: Vec<f32>,
}

impl Rotary {
    /// Inverse frequencies 1 / theta^(2i / head_dim), rounded as the reference rounds them: the exponent, the power
    /// and its inverse each to f32.
    ///
    /// # Panics
    /// When `head_dim` is odd or 0.
    pub fn new(theta: f32, head_dim: usize) -> Rotary {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rotary embedding of {head_dim} dimensions");
        let power = |pair: usize| theta.powf((2 * pair) as f32 / head_dim as f32);
        Rotary { inverse: (0..head_dim / 2).map(|pair| 1.0 / power(pair)).collect() }
    }

    /// The angles of `positions`: f32(position) × f32(inverse frequency), as the reference computes them.
    pub fn angles(&self, positions: &[u32]) -> Angles {
        let head_dim = 2 * self.inverse.len();
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * head_dim), Vec::with_capacity(positions.len() * head_dim));
        for &position in positions {
            for inverse in &self.inverse {
                let (s, c) = (position as f32 * inverse).sin_cos();
                cos.extend([c, c]);
                sin.extend([-s, s]);
            }
        }
        Angles { head_dim, cos, sin }
    }
}

/// Rotates every head of every row in place: `x` `[rows, heads · head_dim]`, one row for each position of `angles`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn rope(cpu: &Cpu, mut x: RowsMut<'_>, angles: &Angles) {
    let dim = angles.head_dim;
    assert!(x.width().is_multiple_of(dim), "rope: width {} in heads of {dim}", x.width());
    assert_eq!(x.rows() * dim, angles.cos.len(), "rope: rows");
    let (rows, width, stride) = (x.rows(), x.width(), x.stride());
    let x = x.disjoint();
    for_row_ranges(cpu, rows, width, |rows| cpu.dispatch(Rotate { rows, width, x, stride, angles }));
}

struct Rotate<'a> {
    rows: Range<usize>,
    width: usize,
    x: Disjoint<'a, f32>,
    stride: usize,
    angles: &'a Angles,
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let dim = self.angles.head_dim;
        for row in self.rows {
            let (cos, sin) = (&self.angles.cos[row * dim..][..dim], &self.angles.sin[row * dim..][..dim]);
            // SAFETY: each row belongs to one task.
            let row = unsafe { self.x.slice(row * self.stride, self.width) };
            for head in row.chunks_exact_mut(dim) {
                for at in vectors(dim) {
                    let v = load(s, head, at);
                    let crossed = s.mul(s.swap_pairs(v), load(s, sin, at));
                    store(s, head, at, s.fma(v, load(s, cos, at), crossed));
                }
            }
        }
    }
}
