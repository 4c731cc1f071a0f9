//! RMSNorm.

use crate::{Cpu, Rows, RowsMut};

/// `out = x · rsqrt(mean(x²) + eps) · weight` for each row; `x` and `out` `[rows, width]`, `weight` `[width]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn rms_norm(cpu: &Cpu, x: Rows<'_>, weight: &[f32], eps: f32, mut out: RowsMut<'_>) {
    let _ = cpu;
    assert_eq!((x.rows(), x.width()), (out.rows(), out.width()), "rms_norm: shape");
    assert_eq!(weight.len(), x.width(), "rms_norm: weight");
    for row in 0..x.rows() {
        let x = x.row(row);
        let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((out, x), weight) in out.row_mut(row).iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// `residual += delta`, then `out = rms_norm(residual)`, in one pass; all `[rows, width]`.
///
/// # Panics
/// When the sizes contradict each other.
pub fn add_rms_norm(cpu: &Cpu, mut residual: RowsMut<'_>, delta: Rows<'_>, weight: &[f32], eps: f32, out: RowsMut<'_>) {
    crate::add(cpu, delta, residual.reborrow());
    rms_norm(cpu, residual.as_rows(), weight, eps, out);
}
