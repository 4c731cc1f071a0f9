//! The kernels as the formulas say, in f64.

/// x · wᵀ + bias; `w` `[outputs, inputs]`.
pub(super) fn linear(x: &[f32], inputs: usize, w: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks_exact(inputs) {
        for (column, w) in w.chunks_exact(inputs).enumerate() {
            let sum: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            out.push(sum + bias.map_or(0.0, |bias| f64::from(bias[column])));
        }
    }
    out
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// silu(gate) · up of rows `[gate, up]`.
pub(super) fn swiglu(both: &[f64], inner: usize) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> { (0..inner).map(|i| silu(row[i]) * row[inner + i]).collect() };
    both.chunks_exact(2 * inner).flat_map(row).collect()
}

pub(super) fn rms_norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        row.iter().zip(weight).map(|(x, w)| x / (mean + f64::from(eps)).sqrt() * f64::from(*w)).collect()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

pub(super) fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|x| x / sum).collect()
}

/// One query head over the positions it sees; `keys` and `values` `[positions, dim]`.
pub(super) fn attend(q: &[f32], keys: &[f32], values: &[f32], scale: f32) -> Vec<f64> {
    let dim = q.len();
    let scores: Vec<f64> = keys
        .chunks_exact(dim)
        .map(|key| q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale))
        .collect();
    let weights = softmax(&scores);
    let mut out = vec![0.0; dim];
    for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
        out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * f64::from(*value));
    }
    out
}
