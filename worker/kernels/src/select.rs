//! Softmax and selection over one row: routers and sampling.

use std::cmp::Ordering;

use crate::Cpu;
use crate::elementwise::{load, store, vectors};
use crate::simd::{Kernel, LANES, Simd, math};

/// Numbers that are looked at together when searching for large ones.
const BLOCK: usize = 512;

/// `row = softmax(row)` in f32. A row with a NaN or +∞ becomes all NaN.
pub fn softmax(cpu: &Cpu, row: &mut [f32]) {
    cpu.dispatch(Softmax { row });
}

/// ln Σ eˣ over the row: −∞ for an empty one or nothing but −∞, NaN for one with a NaN or +∞.
pub fn log_sum_exp(cpu: &Cpu, row: &[f32]) -> f32 {
    cpu.dispatch(LogSumExp { row })
}

/// Index of the largest value, the first of equals; NaN counts as smaller than everything. `None` for an empty row.
pub fn argmax(cpu: &Cpu, row: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (number, block) in row.chunks(BLOCK).enumerate() {
        let largest = cpu.dispatch(Largest { row: block });
        if best.is_none_or(|(_, value)| largest > value) {
            best = Some((number * BLOCK, largest));
        }
    }
    let (start, largest) = best?;
    // Nothing equals −∞ in a block of NaN: then there is no number before it either.
    let place = row[start..].iter().position(|&value| value == largest);
    Some(place.map_or(0, |place| start + place))
}

/// Indices of the `k` largest values in descending order, equal values by ascending index; NaN counts as smaller than
/// everything. Fewer when the row is shorter.
pub fn top_k(cpu: &Cpu, row: &[f32], k: usize) -> Vec<u32> {
    if k == 0 {
        return Vec::new();
    }
    let better = |&a: &u32, &b: &u32| {
        let (x, y) = (row[a as usize], row[b as usize]);
        y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan())).then(a.cmp(&b))
    };
    let mut found: Vec<u32> = Vec::new();
    // What is not larger than this cannot be among the first k: k earlier ones are at least as large.
    let mut bar = None;
    for (number, block) in row.chunks(BLOCK).enumerate() {
        if bar.is_some_and(|bar| !(cpu.dispatch(Largest { row: block }) > bar)) {
            continue;
        }
        let start = number * BLOCK;
        let passes = |&index: &usize| bar.is_none_or(|bar| row[index] > bar);
        found.extend((start..start + block.len()).filter(passes).map(|index| index as u32));
        if found.len() > k {
            found.select_nth_unstable_by(k - 1, better);
            found.truncate(k);
            // A bar of NaN would let nothing pass.
            bar = Some(row[found[k - 1] as usize]).filter(|bar| !bar.is_nan());
        }
    }
    found.sort_unstable_by(better);
    found
}

struct Softmax<'a> {
    row: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let row = self.row;
        let max = largest(s, row);
        let sum = exp_sum(s, row, max);
        let (max, scale) = (s.splat(max), s.splat(1.0 / sum));
        for at in vectors(row.len()) {
            let x = load(s, row, at);
            store(s, row, at, s.mul(math::exp(s, s.sub(x, max)), scale));
        }
    }
}

struct LogSumExp<'a> {
    row: &'a [f32],
}

impl Kernel for LogSumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let max = largest(s, self.row);
        if max == f32::NEG_INFINITY && !self.row.iter().any(|x| x.is_nan()) {
            return max;
        }
        max + exp_sum(s, self.row, max).ln()
    }
}

struct Largest<'a> {
    row: &'a [f32],
}

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        largest(s, self.row)
    }
}

/// The largest number, −∞ if there is none; NaN is passed over.
#[inline(always)]
fn largest<S: Simd>(s: S, row: &[f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    for at in vectors(row.len()) {
        let n = (row.len() - at).min(LANES);
        max = s.max(s.within(0, n, load(s, row, at), f32::NEG_INFINITY), max);
    }
    s.largest(max)
}

/// Σ e^(x − max).
#[inline(always)]
fn exp_sum<S: Simd>(s: S, row: &[f32], max: f32) -> f32 {
    let max = s.splat(max);
    let mut sum = s.splat(0.0);
    for at in vectors(row.len()) {
        let n = (row.len() - at).min(LANES);
        let v = math::exp(s, s.sub(load(s, row, at), max));
        sum = s.add(sum, s.within(0, n, v, 0.0));
    }
    s.sum(sum)
}

/// Places the `k` largest of a short row, by [`top_k`]'s order, into `chosen`; for routers.
pub(crate) fn select(row: &[f32], chosen: &mut [u32]) {
    let mut filled = 0;
    for index in 0..row.len() {
        let before = |&other: &u32| match row[other as usize].partial_cmp(&row[index]) {
            Some(order) => order != Ordering::Less,
            None => row[index].is_nan(),
        };
        let place = chosen[..filled].iter().position(|other| !before(other)).unwrap_or(filled);
        if place < chosen.len() {
            filled = (filled + 1).min(chosen.len());
            chosen[place..filled].rotate_right(1);
            chosen[place] = index as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn selecting_from_a_short_row_is_top_k(
            row in prop::collection::vec(prop_oneof![Just(f32::NAN), Just(0.0), -2.0f32..2.0], 1..70),
            k in 1usize..10,
        ) {
            let cpu = Cpu::new(crate::Level::Scalar, 1).expect("scalar runs everywhere");
            let mut chosen = vec![0; k.min(row.len())];
            select(&row, &mut chosen);
            prop_assert_eq!(chosen, top_k(&cpu, &row, k));
        }
    }
}
