//! Mixture of experts: the router's choice, and the experts' products with tokens bucketed by expert.

use crate::{Cpu, Matrix, Rows, RowsMut, Write, linear, softmax, swiglu, top_k};

/// One routed expert: a SwiGLU without bias.
#[derive(Clone, Copy, Debug)]
pub struct Expert<'a> {
    /// Gate and up projections, [`Layout::GateUp`](crate::Layout::GateUp) `[2 · inner, hidden]`.
    pub gate_up: &'a Matrix,
    /// Down projection `[hidden, inner]`.
    pub down: &'a Matrix,
}

/// The experts chosen for each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// Experts of a row.
    pub top_k: usize,
    /// `[rows, top_k]` expert numbers, by descending biased score.
    pub index: Vec<u32>,
    /// `[rows, top_k]` weights.
    pub weight: Vec<f32>,
}

/// Chooses experts: p = softmax(`logits`) over all experts; the `top_k` largest of p + `correction`; weights p / max(Σ
/// chosen p, `norm_min`), without the correction. `logits` `[rows, experts]`, `correction` `[experts]`.
///
/// # Panics
/// When the sizes contradict each other or `top_k` exceeds the number of experts.
pub fn route(cpu: &Cpu, logits: Rows<'_>, correction: Option<&[f32]>, top_k: usize, norm_min: f32) -> Routes {
    let experts = logits.width();
    assert!(0 < top_k && top_k <= experts, "route: {top_k} of {experts} experts");
    assert!(correction.is_none_or(|correction| correction.len() == experts), "route: correction bias");
    let mut routes = Routes { top_k, index: Vec::new(), weight: Vec::new() };
    let (mut probability, mut biased) = (vec![0.0; experts], vec![0.0; experts]);
    for row in 0..logits.rows() {
        probability.copy_from_slice(logits.row(row));
        softmax(cpu, &mut probability);
        biased.copy_from_slice(&probability);
        if let Some(correction) = correction {
            biased.iter_mut().zip(correction).for_each(|(score, correction)| *score += correction);
        }
        let chosen = self::top_k(cpu, &biased, top_k);
        let sum = chosen.iter().map(|&expert| probability[expert as usize]).sum::<f32>().max(norm_min);
        routes.weight.extend(chosen.iter().map(|&expert| probability[expert as usize] / sum));
        routes.index.extend(chosen);
    }
    routes
}

/// `out += Σ weight · expert(x)` for each row over its chosen experts, in ascending order of the expert's number; `x`
/// and `out` `[rows, hidden]`. The rows of one expert are computed together.
///
/// # Panics
/// When the sizes contradict each other.
pub fn moe(cpu: &Cpu, x: Rows<'_>, experts: &[Expert<'_>], routes: &Routes, mut out: RowsMut<'_>) {
    assert_eq!((x.rows(), x.width()), (out.rows(), out.width()), "moe: shape");
    assert_eq!(
        (routes.index.len(), routes.weight.len()),
        (x.rows() * routes.top_k, x.rows() * routes.top_k),
        "moe: routes"
    );
    for (number, expert) in experts.iter().enumerate() {
        for row in 0..x.rows() {
            for slot in row * routes.top_k..(row + 1) * routes.top_k {
                if routes.index[slot] as usize != number {
                    continue;
                }
                let mut inner = vec![0.0; expert.down.inputs()];
                let width = inner.len();
                swiglu(cpu, x.slice(row..row + 1), expert.gate_up, None, RowsMut::new(&mut inner, width));
                let mut y = vec![0.0; out.width()];
                let width = y.len();
                linear(
                    cpu,
                    Rows::new(&inner, inner.len()),
                    expert.down,
                    None,
                    Write::Store,
                    RowsMut::new(&mut y, width),
                );
                out.row_mut(row).iter_mut().zip(&y).for_each(|(out, y)| *out += routes.weight[slot] * y);
            }
        }
    }
}
