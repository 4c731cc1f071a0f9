//! Softmax and selection over one row: routers and sampling.

use crate::Cpu;

/// `row = softmax(row)` in f32. A row with a NaN becomes all NaN; an empty row stays.
pub fn softmax(cpu: &Cpu, row: &mut [f32]) {
    let _ = cpu;
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in row.iter_mut() {
        *value = (*value - max).exp();
        sum += *value;
    }
    for value in row {
        *value /= sum;
    }
}

/// ln Σ eˣ over the row; −∞ for an empty one.
pub fn log_sum_exp(cpu: &Cpu, row: &[f32]) -> f32 {
    let _ = cpu;
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY { max } else { max + row.iter().map(|x| (x - max).exp()).sum::<f32>().ln() }
}

/// Index of the largest value, the first of equals; NaN counts as smaller than everything. `None` for an empty row.
pub fn argmax(cpu: &Cpu, row: &[f32]) -> Option<usize> {
    let _ = cpu;
    let mut best: Option<usize> = None;
    for (index, &value) in row.iter().enumerate() {
        if best.is_none_or(|best| value > row[best] || (row[best].is_nan() && !value.is_nan())) {
            best = Some(index);
        }
    }
    best
}

/// Indices of the `k` largest values in descending order, equal values by ascending index; NaN counts as smaller than
/// everything. Fewer when the row is shorter.
pub fn top_k(cpu: &Cpu, row: &[f32], k: usize) -> Vec<u32> {
    let _ = cpu;
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let key = |index: u32| row[index as usize];
    order.sort_by(|&a, &b| match (key(a).is_nan(), key(b).is_nan()) {
        (false, false) => key(b).total_cmp(&key(a)).then(a.cmp(&b)),
        (a_nan, b_nan) => a_nan.cmp(&b_nan).then(a.cmp(&b)),
    });
    order.truncate(k);
    order
}
