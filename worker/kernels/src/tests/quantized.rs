//! What becomes of numbers that are quantised.

use half::bf16;
use proptest::prelude::*;

use super::{config, cpus, noise};
use crate::{Format, Layout, Matrix, WeightFormat};

/// Formats with the numbers that share a scale, and the most that a number of magnitude 1 or less may lose.
const FORMATS: [(WeightFormat, usize, f32); 2] = [(WeightFormat::Int8, 128, 0.0045), (WeightFormat::Int4, 32, 0.25)];

fn rounded(format: WeightFormat, row: &[f32]) -> Vec<f32> {
    let mut row = row.to_vec();
    format.round(&mut row).expect("finite");
    row
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_quantised_number_is_a_whole_multiple_of_its_group_s_bf16_scale_and_near_what_it_was(
        len in 1usize..600,
        exponent in -60i32..60,
        seed in any::<u64>(),
    ) {
        let unit = 2f32.powi(exponent);
        let row: Vec<f32> = noise(seed, len).iter().map(|value| value * unit).collect();
        for (format, group, loss) in FORMATS {
            let held = rounded(format, &row);
            for (values, held) in row.chunks(group).zip(held.chunks(group)) {
                let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                for (value, held) in values.iter().zip(held) {
                    prop_assert!((value - held).abs() <= loss * most, "{value} became {held} in {format:?}");
                }
            }
        }
    }

    #[test]
    fn a_group_is_quantised_whatever_lies_beside_it(
        groups in 1usize..6,
        group in 0usize..6,
        rest in 0usize..32,
        seed in any::<u64>(),
    ) {
        for (format, size, _) in FORMATS {
            let (group, row) = (group % groups, noise(seed, groups * size + rest));
            let alone = rounded(format, &row[group * size..(group + 1) * size]);
            prop_assert_eq!(&rounded(format, &row)[group * size..(group + 1) * size], &alone[..]);
        }
    }
}

#[test]
fn numbers_that_are_multiples_of_a_scale_are_kept() {
    for scale in [1.0, -0.375, 2f32.powi(-90)].map(|scale| bf16::from_f32(scale).to_f32()) {
        let row: Vec<f32> = (0..300).map(|k| (k * 37 % 255 - 127) as f32 * scale).collect();
        let mut eight = row.clone();
        eight.chunks_mut(128).for_each(|group| group[0] = 127.0 * scale);
        assert_eq!(rounded(WeightFormat::Int8, &eight), eight);
        let mut four: Vec<f32> = (0..300).map(|k| (k * 5 % 16 - 8) as f32 * scale).collect();
        four.chunks_mut(32).for_each(|group| group[0] = -8.0 * scale);
        assert_eq!(rounded(WeightFormat::Int4, &four), four);
    }
}

#[test]
fn zeros_and_what_is_nearly_zero_become_zero() {
    for (format, ..) in FORMATS {
        assert_eq!(rounded(format, &[0.0; 300]), [0.0; 300]);
        assert_eq!(rounded(format, &[1e-30, -1e-38, 1e-45]), [0.0; 3]);
        let large = rounded(format, &[f32::MAX, -1e38, 1.0]);
        assert!(large.iter().all(|value| value.is_finite()), "{large:?}");
        assert!((large[0] / f32::MAX - 1.0).abs() < 0.15 && large[1] < -0.8e38, "{large:?}");
    }
}

#[test]
fn a_number_that_is_not_finite_is_refused_with_its_place() {
    for (format, ..) in FORMATS {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for cpu in cpus() {
                let mut values = vec![0.5f32; 40 * 300];
                values[33 * 300 + 4] = value;
                values[20 * 300 + 290] = value;
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let mut builder = Matrix::builder(format, Layout::Plain, 50, 300).expect("memory");
                let error = builder.write_rows(cpu, 10, Format::F32, &bytes).expect_err("not finite");
                assert_eq!((error.row, error.column), (30, 290));
                assert!(error.to_string().contains("row 30, column 290 cannot be quantised"), "{error}");
            }
        }
    }
}

#[test]
fn bytes_are_those_of_whole_panels_with_their_scales() {
    for (format, panel) in
        [(WeightFormat::Int8, 2 * (64 + 4096) + 64 + 128), (WeightFormat::Int4, 2 * (256 + 2048) + 64 + 64)]
    {
        for (layout, outputs, panels) in [(Layout::Plain, 33, 3), (Layout::GateUp, 34, 4)] {
            assert_eq!(format.bytes(layout, outputs, 517), panels * panel);
            let matrix = Matrix::builder(format, layout, outputs, 517).expect("memory").finish();
            assert_eq!(matrix.bytes(), panels * panel);
        }
    }
}
