//! Softmax and selection.

use proptest::prelude::*;

use super::guard::{Guarded, side};
use super::{assert_close, assert_same, config, cpus, noise, reference};
use crate::{Rows, argmax, log_sum_exp, route, softmax, top_k};

/// Rows with equal values, infinities and NaN among them.
fn awkward_row() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        20 => -1.0f32..1.0,
        5 => (-3i32..3).prop_map(|x| x as f32),
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(f32::INFINITY),
        1 => Just(-0.0),
    ];
    let length = prop_oneof![3 => 1usize..60, 1 => 500usize..2500];
    length.prop_flat_map(move |length| prop::collection::vec(value.clone(), length))
}

/// All indices by descending value, equal ones ascending, NaN last.
fn sorted(row: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (row[a as usize], row[b as usize]);
        x.is_nan().cmp(&y.is_nan()).then(y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal))
    });
    order
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn softmax_and_log_sum_exp_are_exact_for_any_offset(len in 1usize..700, offset in -1e4f32..1e4, scale in 0.1f32..30.0, seed in any::<u64>()) {
        let row: Vec<f32> = noise(seed, len).iter().map(|x| x * scale + offset).collect();
        let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
        let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + wide.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let mut same: Option<Vec<f32>> = None;
        for cpu in cpus() {
            let mut memory = Guarded::new(&row, side());
            assert_close(cpu, "log sum", &[log_sum_exp(cpu, &memory)], &[log_sum], 1e-6);
            softmax(cpu, &mut memory);
            assert_close(cpu, "softmax", &memory, &reference::softmax(&wide), 1e-6);
            if cpu.is_fused() {
                assert_same(cpu, "another level", &memory, same.get_or_insert_with(|| memory.to_vec()));
            }
        }
    }

    #[test]
    fn the_largest_are_found_in_order_whatever_the_row_holds(row in awkward_row(), k in 0usize..40) {
        let expected = sorted(&row);
        for cpu in cpus() {
            let row = Guarded::new(&row, side());
            prop_assert_eq!(argmax(cpu, &row), Some(expected[0] as usize));
            prop_assert_eq!(top_k(cpu, &row, k), &expected[..k.min(row.len())]);
            prop_assert_eq!(top_k(cpu, &row, row.len()), &expected[..]);
        }
    }

    #[test]
    fn a_router_takes_the_largest_biased_and_weighs_the_unbiased(
        rows in 1usize..5,
        experts in 1usize..70,
        k in 1usize..9,
        corrected in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let k = k.min(experts);
        let logits: Vec<f32> = noise(seed, rows * experts).iter().map(|x| x * 3.0).collect();
        let correction = noise(seed ^ 1, experts);
        let correction = corrected.then_some(&correction[..]);
        for cpu in cpus() {
            let logits = Guarded::new(&logits, side());
            let routes = route(cpu, Rows::new(&logits, experts), correction, k, 1e-12);
            prop_assert_eq!(routes.top_k, k);
            for row in 0..rows {
                let mut p = logits[row * experts..][..experts].to_vec();
                softmax(cpu, &mut p);
                let biased: Vec<f32> =
                    p.iter().enumerate().map(|(i, p)| p + correction.map_or(0.0, |correction| correction[i])).collect();
                let chosen = &routes.index[row * k..][..k];
                prop_assert_eq!(chosen, &sorted(&biased)[..k]);
                let sum: f64 = chosen.iter().map(|&expert| f64::from(p[expert as usize])).sum();
                let expected: Vec<f64> = chosen.iter().map(|&expert| f64::from(p[expert as usize]) / sum).collect();
                assert_close(cpu, "weights", &routes.weight[row * k..][..k], &expected, 1e-6);
            }
        }
    }
}

#[test]
fn empty_and_undefined_rows_have_defined_results() {
    for cpu in cpus() {
        assert_eq!(argmax(cpu, &[]), None);
        assert_eq!(argmax(cpu, &[f32::NAN, f32::NAN]), Some(0));
        assert_eq!(argmax(cpu, &[f32::NAN, f32::NEG_INFINITY]), Some(1));
        assert_eq!(top_k(cpu, &[], 3), [0u32; 0]);
        assert_eq!(log_sum_exp(cpu, &[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(cpu, &[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
        assert!(log_sum_exp(cpu, &[0.0, f32::NAN]).is_nan());
        let mut row = [1.0, f32::NAN, 2.0];
        softmax(cpu, &mut row);
        assert!(row.iter().all(|x| x.is_nan()), "{row:?}");
        softmax(cpu, &mut []);
    }
}

#[test]
fn a_router_whose_chosen_probabilities_vanish_divides_by_the_minimum() {
    for cpu in cpus() {
        let routes = route(cpu, Rows::new(&[0.0, -80.0], 2), Some(&[-9.0, 9.0]), 1, 1e-12);
        assert_eq!(routes.index, [1]);
        assert!(routes.weight[0] < 1e-20, "{routes:?}");
    }
}
