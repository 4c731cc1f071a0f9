//! Mixture of experts: the router's choice, and the experts' products with rows bucketed by expert.

use std::ops::Range;

use crate::elementwise::{for_row_ranges, load, store, vectors};
use crate::linear::{Epilogue, Product, run};
use crate::memory::Disjoint;
use crate::select::select;
use crate::simd::{Kernel, Simd};
use crate::{Cpu, Matrix, Rows, RowsMut, scratch, softmax};

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
    let chosen = logits.rows() * top_k;
    let mut routes = Routes { top_k, index: vec![0; chosen], weight: vec![0.0; chosen] };
    let (mut probability, mut biased) = (vec![0.0; experts], vec![0.0; experts]);
    let picked = routes.index.chunks_exact_mut(top_k).zip(routes.weight.chunks_exact_mut(top_k));
    for (row, (index, weight)) in picked.enumerate() {
        probability.copy_from_slice(logits.row(row));
        softmax(cpu, &mut probability);
        biased.copy_from_slice(&probability);
        if let Some(correction) = correction {
            biased.iter_mut().zip(correction).for_each(|(score, correction)| *score += correction);
        }
        select(&biased, index);
        let sum = index.iter().map(|&expert| probability[expert as usize]).sum::<f32>().max(norm_min);
        weight.iter_mut().zip(index).for_each(|(weight, expert)| *weight = probability[*expert as usize] / sum);
    }
    routes
}

/// `out += Σ weight · expert(x)` for each row over its chosen experts, in ascending order of the expert's number; `x`
/// and `out` `[rows, hidden]`. The rows of one expert are computed together, all experts in one parallel loop.
///
/// # Panics
/// When the sizes contradict each other or a route names an expert that does not exist.
pub fn moe(cpu: &Cpu, x: Rows<'_>, experts: &[Expert<'_>], routes: &Routes, mut out: RowsMut<'_>) {
    let (rows, hidden, chosen) = (x.rows(), x.width(), x.rows() * routes.top_k);
    assert_eq!((rows, hidden), (out.rows(), out.width()), "moe: shape");
    assert_eq!((routes.index.len(), routes.weight.len()), (chosen, chosen), "moe: routes");
    let Some(inner) = experts.first().map(|expert| expert.down.inputs()) else {
        assert_eq!(chosen, 0, "moe: routes to no experts");
        return;
    };
    if chosen == 0 {
        return;
    }
    let buckets = Buckets::new(routes, experts.len());
    scratch::with(&scratch::EXPERTS, chosen * (inner + hidden), 0.0, |memory| {
        let (activated, results) = memory.split_at_mut(chosen * inner);
        let mut rest = &mut *activated;
        let mut products: Vec<Product<'_>> = Vec::new();
        for (expert, bucket) in buckets.used() {
            let own = rest.split_off_mut(..bucket.len() * inner).unwrap_or_default();
            products.push(Product {
                x,
                rows: Some(&buckets.rows[bucket]),
                weight: experts[expert].gate_up,
                bias: None,
                epilogue: Epilogue::SwiGlu,
                out: RowsMut::new(own, inner),
            });
        }
        run(cpu, &mut products);
        drop(products);
        let activated = Rows::new(activated, inner);
        let mut rest = &mut *results;
        let mut products: Vec<Product<'_>> = Vec::new();
        for (expert, bucket) in buckets.used() {
            let own = rest.split_off_mut(..bucket.len() * hidden).unwrap_or_default();
            products.push(Product {
                x: activated.slice(bucket),
                rows: None,
                weight: experts[expert].down,
                bias: None,
                epilogue: Epilogue::Store,
                out: RowsMut::new(own, hidden),
            });
        }
        run(cpu, &mut products);
        drop(products);
        let (results, stride) = (Rows::new(results, hidden), out.stride());
        let (buckets, out) = (&buckets, out.disjoint());
        for_row_ranges(cpu, rows, hidden * routes.top_k, |range| {
            cpu.dispatch(Combine { range, routes, buckets, results, out, stride });
        });
    });
}

/// The chosen (row, expert) pairs, sorted by expert and within an expert by row.
struct Buckets {
    /// Row of each pair.
    rows: Vec<u32>,
    /// `[rows, top_k]`: each row's pairs, ascending, and the slot of the routes each comes from.
    pairs: Vec<(u32, u32)>,
    /// Where each expert's pairs start; one more at the end.
    starts: Vec<usize>,
}

impl Buckets {
    fn new(routes: &Routes, experts: usize) -> Buckets {
        let mut starts = vec![0; experts + 1];
        for &expert in &routes.index {
            assert!((expert as usize) < experts, "moe: a route to expert {expert} of {experts}");
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        let mut next = starts.clone();
        let (mut rows, mut pairs) = (vec![0; routes.index.len()], vec![(0, 0); routes.index.len()]);
        for (slot, &expert) in routes.index.iter().enumerate() {
            let pair = next[expert as usize];
            next[expert as usize] += 1;
            rows[pair] = (slot / routes.top_k) as u32;
            pairs[slot] = (pair as u32, slot as u32);
        }
        pairs.chunks_exact_mut(routes.top_k).for_each(<[(u32, u32)]>::sort_unstable);
        Buckets { rows, pairs, starts }
    }

    /// The experts that have rows, and where their pairs are.
    fn used(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let ranges = self.starts.windows(2).map(|ends| ends[0]..ends[1]);
        ranges.enumerate().filter(|(_, range)| !range.is_empty())
    }
}

/// Adds the weighted results of each row, in ascending order of the expert.
struct Combine<'a> {
    range: Range<usize>,
    routes: &'a Routes,
    buckets: &'a Buckets,
    results: Rows<'a>,
    out: Disjoint<'a, f32>,
    stride: usize,
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (top_k, hidden) = (self.routes.top_k, self.results.width());
        for row in self.range {
            // SAFETY: each row belongs to one task.
            let out = unsafe { self.out.slice(row * self.stride, hidden) };
            for &(pair, slot) in &self.buckets.pairs[row * top_k..][..top_k] {
                let weight = s.splat(self.routes.weight[slot as usize]);
                let result = self.results.row(pair as usize);
                for at in vectors(hidden) {
                    store(s, out, at, s.fma(weight, load(s, result, at), load(s, out, at)));
                }
            }
        }
    }
}
