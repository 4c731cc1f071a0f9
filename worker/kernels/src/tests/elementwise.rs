//! Norms, rotary embedding and activations.

use proptest::prelude::*;

use super::guard::{Guarded, gathered, side, strided};
use super::{assert_close, assert_same, config, cpus, noise, reference};
use crate::{Rotary, Rows, RowsMut, add, add_rms_norm, rms_norm, rope, silu_mul};

proptest! {
    #![proptest_config(config())]

    #[test]
    fn rms_norm_divides_by_the_root_of_the_mean_square(
        rows in 1usize..6,
        width in prop_oneof![1usize..80, 500usize..3000],
        gap in 0usize..4,
        seed in any::<u64>(),
    ) {
        let (x, delta, eps) = (noise(seed, rows * width), noise(seed ^ 1, rows * width), 1e-5);
        let weight = Guarded::new(&noise(seed ^ 2, width), side());
        let stride = width + gap;
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let summed: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
        let wide_sum: Vec<f64> = summed.iter().map(|&x| f64::from(x)).collect();
        let mut same: Option<Vec<f32>> = None;
        for cpu in cpus() {
            let x = strided(&x, width, stride, side());
            let mut out = Guarded::poisoned(x.len(), side());
            let target = RowsMut::strided(&mut out, rows, width, stride);
            rms_norm(cpu, Rows::strided(&x, rows, width, stride), &weight, eps, target);
            let out = gathered(&out, rows, width, stride);
            assert_close(cpu, "norm", &out, &reference::rms_norm(&wide, &weight, eps), 2e-6);
            if cpu.is_fused() {
                assert_same(cpu, "another level", &out, same.get_or_insert_with(|| out.clone()));
            }

            let mut residual = x;
            let delta = strided(&delta, width, stride, side());
            let mut out = Guarded::poisoned(residual.len(), side());
            add_rms_norm(
                cpu,
                RowsMut::strided(&mut residual, rows, width, stride),
                Rows::strided(&delta, rows, width, stride),
                &weight,
                eps,
                RowsMut::strided(&mut out, rows, width, stride),
            );
            assert_same(cpu, "residual", &gathered(&residual, rows, width, stride), &summed);
            let expected = reference::rms_norm(&wide_sum, &weight, eps);
            assert_close(cpu, "norm of a sum", &gathered(&out, rows, width, stride), &expected, 2e-6);
        }
    }

    #[test]
    fn rope_turns_each_pair_by_its_angle(
        heads in 1usize..5,
        half in 1usize..70,
        positions in prop::collection::vec(0u32..131_072, 1..6),
        gap in 0usize..4,
        seed in any::<u64>(),
    ) {
        let (dim, rows) = (2 * half, positions.len());
        let width = heads * dim;
        let x = noise(seed, rows * width);
        let rotary = Rotary::new(500_000.0, dim);
        let angles = rotary.angles(&positions);
        let mut expected = Vec::new();
        for (row, &position) in x.chunks_exact(width).zip(&positions) {
            for head in row.chunks_exact(dim) {
                for (pair, x) in head.chunks_exact(2).enumerate() {
                    let inverse = 1.0 / 500_000.0f32.powf((2 * pair) as f32 / dim as f32);
                    let (sin, cos) = f64::from(position as f32 * inverse).sin_cos();
                    let (a, b) = (f64::from(x[0]), f64::from(x[1]));
                    expected.extend([a * cos - b * sin, b * cos + a * sin]);
                }
            }
        }
        for cpu in cpus() {
            let stride = width + gap;
            let mut x = strided(&x, width, stride, side());
            rope(cpu, RowsMut::strided(&mut x, rows, width, stride), &angles);
            assert_close(cpu, "rope", &gathered(&x, rows, width, stride), &expected, 1e-6);
        }
    }

    #[test]
    fn silu_mul_and_add_are_done_element_by_element(rows in 1usize..5, width in 1usize..100, gap in 0usize..4, scale in 0.1f32..100.0, seed in any::<u64>()) {
        let gate: Vec<f32> = noise(seed, rows * width).iter().map(|x| x * scale).collect();
        let up = noise(seed ^ 1, rows * width);
        let stride = width + gap;
        let expected: Vec<f64> =
            gate.iter().zip(&up).map(|(&gate, &up)| reference::silu(f64::from(gate)) * f64::from(up)).collect();
        let sums: Vec<f32> = gate.iter().zip(&up).map(|(gate, up)| gate + up).collect();
        for cpu in cpus() {
            let (mut gate, up) = (strided(&gate, width, stride, side()), strided(&up, width, stride, side()));
            let mut out = Guarded::poisoned(gate.len(), side());
            let up = Rows::strided(&up, rows, width, stride);
            let target = RowsMut::strided(&mut out, rows, width, stride);
            silu_mul(cpu, Rows::strided(&gate, rows, width, stride), up, target);
            assert_close(cpu, "silu", &gathered(&out, rows, width, stride), &expected, 1e-6);
            add(cpu, up, RowsMut::strided(&mut gate, rows, width, stride));
            assert_same(cpu, "sum", &gathered(&gate, rows, width, stride), &sums);
        }
    }
}

#[test]
fn silu_of_extreme_and_undefined_numbers_is_right() {
    let gate = [f32::NAN, 100.0, -100.0, 1e30, -1e30, f32::INFINITY, 0.0, -0.0];
    for cpu in cpus() {
        let mut out = [0.0; 8];
        silu_mul(cpu, Rows::new(&gate, 8), Rows::new(&[1.0; 8], 8), RowsMut::new(&mut out, 8));
        assert!(out[0].is_nan(), "{out:?}");
        assert_eq!(out[1], 100.0);
        assert!(out[2] <= 0.0 && out[2] > -1e-30, "{out:?}");
        assert_eq!(out[3], 1e30);
        assert!(out[4] <= 0.0 && out[4] > -1e-5, "{out:?}");
        assert_eq!(out[5], f32::INFINITY);
        assert_eq!((out[6], out[7]), (0.0, 0.0));
    }
}

#[test]
fn the_angle_is_rounded_as_a_product_of_two_singles() {
    // At position 131071 the angle of the second pair differs by more than a degree when it is computed in f64.
    let angles = Rotary::new(500_000.0, 128).angles(&[131_071]);
    let inverse = 1.0 / 500_000.0f32.powf(2.0 / 128.0);
    for cpu in cpus() {
        let mut x = [0.0; 128];
        x[2] = 1.0;
        rope(cpu, RowsMut::new(&mut x, 128), &angles);
        let (sin, cos) = f64::from(131_071.0f32 * inverse).sin_cos();
        assert_close(cpu, "pair", &x[2..4], &[cos, sin], 1e-6);
    }
}
