//! Mixture of experts.

use proptest::prelude::*;

use super::guard::{Guarded, side};
use super::{assert_close, assert_same, config, cpus, noise, reference, rounds, seen, stored};
use crate::{Expert, Format, Layout, Matrix, Routes, Rows, RowsMut, moe};

/// Distinct experts for each row.
fn routes(seed: u64, rows: usize, experts: usize, top_k: usize) -> Routes {
    let order = noise(seed, rows * experts);
    let mut routes = Routes { top_k, index: Vec::new(), weight: noise(seed ^ 7, rows * top_k) };
    for order in order.chunks_exact(experts) {
        let mut numbers: Vec<u32> = (0..experts as u32).collect();
        numbers.sort_by(|&a, &b| order[a as usize].total_cmp(&order[b as usize]));
        routes.index.extend(&numbers[..top_k]);
    }
    routes
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn experts_are_summed_by_weight_and_a_row_has_the_same_bits_alone(
        rows in prop_oneof![1usize..4, 4usize..60],
        hidden in 1usize..70,
        inner in 1usize..50,
        experts in 1usize..10,
        top_k in 1usize..4,
        format in prop::sample::select(vec![Format::F32, Format::Bf16]),
        seed in any::<u64>(),
    ) {
        let top_k = top_k.min(experts);
        let x = noise(seed, rows * hidden);
        let before = noise(seed ^ 1, rows * hidden);
        let weights: Vec<(Vec<f32>, Vec<f32>)> = (0..experts as u64)
            .map(|expert| {
                (noise(seed ^ (expert << 8), 2 * inner * hidden), noise(seed ^ (expert << 16) ^ 3, hidden * inner))
            })
            .collect();
        let routes = routes(seed, rows, experts, top_k);
        let round = |values: &[f32]| -> Vec<f32> { values.iter().map(|&value| stored(format, value)).collect() };
        let weights: Vec<_> = weights.iter().map(|(gate_up, down)| (round(gate_up), round(down))).collect();
        for cpu in cpus() {
            let seen = |x: &[f32]| seen(cpu, format.into(), x);
            let mut expected: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
            for row in 0..rows {
                for slot in row * top_k..(row + 1) * top_k {
                    let (gate_up, down) = &weights[routes.index[slot] as usize];
                    let both = reference::linear(&seen(&x[row * hidden..][..hidden]), hidden, gate_up, None);
                    let activated: Vec<f32> = reference::swiglu(&both, inner).iter().map(|&x| x as f32).collect();
                    let result = reference::linear(&seen(&activated), inner, down, None);
                    for (i, result) in result.iter().enumerate() {
                        expected[row * hidden + i] += f64::from(routes.weight[slot]) * result;
                    }
                }
            }
            let matrices: Vec<(Matrix, Matrix)> = weights
                .iter()
                .map(|(gate_up, down)| {
                    let pack = |layout, inputs, values| Matrix::from_f32(cpu, format, layout, inputs, values);
                    (pack(Layout::GateUp, hidden, gate_up).expect("memory"), pack(Layout::Plain, inner, down).expect("memory"))
                })
                .collect();
            let experts: Vec<Expert<'_>> = matrices.iter().map(|(gate_up, down)| Expert { gate_up, down }).collect();
            let x = Guarded::new(&x, side());
            let mut out = Guarded::new(&before, side());
            moe(cpu, Rows::new(&x, hidden), &experts, &routes, RowsMut::new(&mut out, hidden));
            // Activations at the border of two bf16 numbers may be rounded to either.
            let tolerance = if rounds(cpu, format.into()) { 5e-2 } else { 1e-4 };
            assert_close(cpu, "moe", &out, &expected, tolerance);
            let row = rows / 2;
            let own = Routes {
                top_k,
                index: routes.index[row * top_k..][..top_k].to_vec(),
                weight: routes.weight[row * top_k..][..top_k].to_vec(),
            };
            let mut alone = before[row * hidden..][..hidden].to_vec();
            moe(cpu, Rows::new(&x[row * hidden..][..hidden], hidden), &experts, &own, RowsMut::new(&mut alone, hidden));
            assert_same(cpu, "row", &alone, &out[row * hidden..][..hidden]);
        }
    }
}

#[test]
#[should_panic(expected = "a route to expert 1 of 1")]
fn a_route_to_an_expert_that_does_not_exist_is_refused() {
    let cpu = &cpus()[0];
    let pack = |layout, values: &[f32]| Matrix::from_f32(cpu, Format::F32, layout, 1, values).expect("memory");
    let (gate_up, down) = (pack(Layout::GateUp, &[1.0, 1.0]), pack(Layout::Plain, &[1.0]));
    let routes = Routes { top_k: 1, index: vec![1], weight: vec![1.0] };
    let experts = [Expert { gate_up: &gate_up, down: &down }];
    moe(cpu, Rows::new(&[1.0], 1), &experts, &routes, RowsMut::new(&mut [0.0], 1));
}
