//! Rotary position embedding, interleaved: the pairs are (2i, 2i + 1).

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
    let _ = cpu;
    let dim = angles.head_dim;
    assert!(x.width().is_multiple_of(dim), "rope: width {} in heads of {dim}", x.width());
    assert_eq!(x.rows() * dim, angles.cos.len(), "rope: rows");
    for row in 0..x.rows() {
        let (cos, sin) = (&angles.cos[row * dim..][..dim], &angles.sin[row * dim..][..dim]);
        for head in x.row_mut(row).chunks_exact_mut(dim) {
            for pair in (0..dim).step_by(2) {
                let (a, b) = (head[pair], head[pair + 1]);
                head[pair] = a * cos[pair] + b * sin[pair];
                head[pair + 1] = b * cos[pair + 1] + a * sin[pair + 1];
            }
        }
    }
}
