//! Products with packed weights.

use half::{bf16, f16};
use proptest::prelude::*;

use super::guard::{Guarded, gathered, side, strided};
use super::{assert_close, assert_same, config, cpus, fused, noise, reference, rounds, seen, stored};
use crate::linear::{Epilogue, Product, run};
use crate::{Cpu, Format, Layout, Matrix, Rows, RowsMut, WeightFormat, Write, linear, swiglu};

const FLOATS: [Format; 3] = [Format::F32, Format::Bf16, Format::F16];
const FORMATS: [WeightFormat; 5] = [
    WeightFormat::Float(Format::F32),
    WeightFormat::Float(Format::Bf16),
    WeightFormat::Float(Format::F16),
    WeightFormat::Int8,
    WeightFormat::Int4,
];

/// What a matrix of that format holds when it is given rows of `values`.
fn held(format: WeightFormat, inputs: usize, values: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    values.chunks_exact_mut(inputs).for_each(|row| format.round(row).expect("in range"));
    values
}

/// The first results of those that round activations and of those that do not: all others must have their bits.
#[derive(Default)]
struct Same([Option<Vec<f32>>; 2]);

impl Same {
    fn assert(&mut self, cpu: &Cpu, format: WeightFormat, got: &[f32]) {
        if cpu.is_fused() {
            let first = self.0[usize::from(rounds(cpu, format))].get_or_insert_with(|| got.to_vec());
            assert_same(cpu, "another level", got, first);
        }
    }
}

fn matrix(cpu: &Cpu, format: impl Into<WeightFormat>, layout: Layout, inputs: usize, values: &[f32]) -> Matrix {
    Matrix::from_f32(cpu, format, layout, inputs, values).expect("memory and range")
}

#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    outputs: usize,
    inputs: usize,
    stride: usize,
    format: WeightFormat,
    biased: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    // Over the blocks of k (256, on tiles 512), of panels (128 outputs), of rows (96) and all tile heights.
    let rows = prop_oneof![4 => 1usize..10, 2 => 10usize..40, 1 => 90usize..200];
    let outputs = prop_oneof![3 => 1usize..40, 1 => 120usize..300];
    let inputs = prop_oneof![3 => 1usize..40, 1 => 250usize..270, 1 => 500usize..600];
    (rows, outputs, inputs, 0usize..5, prop::sample::select(FORMATS.to_vec()), any::<bool>(), any::<u64>()).prop_map(
        |(rows, outputs, inputs, stride, format, biased, seed)| Case {
            rows,
            outputs,
            inputs,
            stride,
            format,
            biased,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_linear_is_the_sum_of_products_at_every_level(case in case()) {
        let Case { rows, outputs, inputs, stride, format, biased, seed } = case;
        let x = noise(seed, rows * inputs);
        let w = noise(seed ^ 1, outputs * inputs);
        let held = held(format, inputs, &w);
        let bias = Guarded::new(&noise(seed ^ 2, outputs), side());
        let bias = biased.then_some(&*bias);
        let before = noise(seed ^ 3, rows * outputs);
        let mut same = Same::default();
        for cpu in cpus() {
            let expected = reference::linear(&seen(cpu, format, &x), inputs, &held, bias);
            let weight = matrix(cpu, format, Layout::Plain, inputs, &w);
            let (x_stride, out_stride) = (inputs + stride, outputs + stride);
            let x = strided(&x, inputs, x_stride, side());
            let x = Rows::strided(&x, rows, inputs, x_stride);
            let mut out = strided(&before, outputs, out_stride, side());
            linear(cpu, x, &weight, bias, Write::Store, RowsMut::strided(&mut out, rows, outputs, out_stride));
            let stored = gathered(&out, rows, outputs, out_stride);
            assert_close(cpu, "linear", &stored, &expected, 1e-5 * (inputs as f64).sqrt());
            let weight_f32 = matrix(cpu, Format::F32, Layout::Plain, inputs, &held);
            let mut wide = Guarded::poisoned(rows * outputs, side());
            linear(cpu, x, &weight_f32, bias, Write::Store, RowsMut::new(&mut wide, outputs));
            if !rounds(cpu, format) {
                assert_same(cpu, "the f32 matrix of the same numbers", &stored, &wide);
            }
            let gaps = |memory: &[f32]| (0..rows - 1).all(|r| memory[r * out_stride + outputs..(r + 1) * out_stride].iter().all(|x| x.is_nan()));
            prop_assert!(gaps(&out), "written between the rows");

            let mut out = strided(&before, outputs, out_stride, side());
            linear(cpu, x, &weight, bias, Write::Add, RowsMut::strided(&mut out, rows, outputs, out_stride));
            let added: Vec<f32> = before.iter().zip(&stored).map(|(before, sum)| before + sum).collect();
            assert_same(cpu, "added", &gathered(&out, rows, outputs, out_stride), &added);
            same.assert(cpu, format, &stored);
        }
    }

    #[test]
    fn a_swiglu_is_silu_of_the_gate_times_up_at_every_level(case in case()) {
        let Case { rows, outputs: inner, inputs, format, biased, seed, .. } = case;
        let x = noise(seed, rows * inputs);
        let w = noise(seed ^ 1, 2 * inner * inputs);
        let bias = Guarded::new(&noise(seed ^ 2, 2 * inner), side());
        let bias = biased.then_some(&*bias);
        let held = held(format, inputs, &w);
        let mut same = Same::default();
        for cpu in cpus() {
            let both = reference::linear(&seen(cpu, format, &x), inputs, &held, bias);
            let expected = reference::swiglu(&both, inner);
            let weight = matrix(cpu, format, Layout::GateUp, inputs, &w);
            let x = Guarded::new(&x, side());
            let mut out = Guarded::poisoned(rows * inner, side());
            swiglu(cpu, Rows::new(&x, inputs), &weight, bias, RowsMut::new(&mut out, inner));
            let scale = 1e-5 * inputs as f64;
            assert_close(cpu, "swiglu", &out, &expected, scale);
            same.assert(cpu, format, &out);
            let mut out = Guarded::poisoned(rows * 2 * inner, side());
            linear(cpu, Rows::new(&x, inputs), &weight, bias, Write::Store, RowsMut::new(&mut out, 2 * inner));
            assert_close(cpu, "gate and up", &out, &both, scale);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_at_any_place_among_others(case in case(), place in 0usize..200) {
        let Case { rows, outputs, inputs, format, seed, .. } = case;
        let x = noise(seed, rows * inputs);
        let w = noise(seed ^ 1, outputs * inputs);
        let place = place % rows;
        for cpu in cpus() {
            let weight = matrix(cpu, format, Layout::Plain, inputs, &w);
            let mut all = vec![0.0; rows * outputs];
            linear(cpu, Rows::new(&x, inputs), &weight, None, Write::Store, RowsMut::new(&mut all, outputs));
            let mut alone = vec![0.0; outputs];
            let row = &x[place * inputs..][..inputs];
            linear(cpu, Rows::new(row, inputs), &weight, None, Write::Store, RowsMut::new(&mut alone, outputs));
            assert_same(cpu, "row", &alone, &all[place * outputs..][..outputs]);
        }
    }

    #[test]
    fn rows_packed_in_pieces_from_any_format_and_alignment_are_read_back(
        outputs in 1usize..80,
        inputs in prop_oneof![3 => 1usize..40, 1 => 250usize..530],
        layout in prop::sample::select(vec![Layout::Plain, Layout::GateUp]),
        piece in 1usize..20,
        source in prop::sample::select(FLOATS.to_vec()),
        target in prop::sample::select(FORMATS.to_vec()),
        seed in any::<u64>(),
    ) {
        let outputs = if layout == Layout::GateUp { 2 * outputs } else { outputs };
        let values: Vec<f32> = noise(seed, outputs * inputs).iter().map(|&value| stored(source, value)).collect();
        for cpu in cpus() {
            let mut builder = Matrix::builder(target, layout, outputs, inputs).expect("memory");
            for (number, rows) in values.chunks(piece * inputs).enumerate() {
                let bytes: Vec<u8> = std::iter::once(0)
                    .chain(rows.iter().flat_map(|value| match source {
                        Format::F32 => value.to_le_bytes().to_vec(),
                        Format::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
                        Format::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
                    }))
                    .collect();
                let bytes = Guarded::new(&bytes, side());
                builder.write_rows(cpu, number * piece, source, &bytes[1..]).expect("in range");
            }
            let matrix = builder.finish();
            let mut row = Guarded::poisoned(inputs, side());
            for (index, values) in values.chunks_exact(inputs).enumerate() {
                matrix.read_row(index, &mut row);
                assert_same(cpu, "row", &row, &held(target, inputs, values));
            }
        }
    }
}

#[test]
fn a_value_that_float16_cannot_hold_is_refused_with_its_place() {
    for cpu in cpus() {
        let mut values = vec![0.5f32; 40 * 7];
        values[33 * 7 + 4] = 65504.0;
        values[20 * 7 + 2] = -65520.0;
        values[35 * 7] = 1e30;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut builder = Matrix::builder(Format::F16, Layout::Plain, 50, 7).expect("memory");
        let error = builder.write_rows(cpu, 10, Format::F32, &bytes).expect_err("out of range");
        assert_eq!((error.row, error.column, error.value), (30, 2, -65520.0));
        assert!(error.to_string().contains("row 30, column 2"), "{error}");
        let bytes: Vec<u8> = [f32::INFINITY, f32::NAN].iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut builder = Matrix::builder(Format::F16, Layout::Plain, 1, 2).expect("memory");
        builder.write_rows(cpu, 0, Format::F32, &bytes).expect("what is not finite is no overflow");
    }
}

#[test]
fn a_row_that_is_not_finite_spoils_no_other_row() {
    let (rows, inputs, outputs) = (35, 300, 40);
    let w = noise(1, outputs * inputs);
    let clean = noise(2, rows * inputs);
    let mut spoiled = clean.clone();
    spoiled[4 * inputs..5 * inputs].fill(f32::NAN);
    for cpu in fused() {
        let weight = matrix(cpu, Format::Bf16, Layout::Plain, inputs, &w);
        let product = |x: &[f32]| {
            let mut out = vec![0.0; rows * outputs];
            linear(cpu, Rows::new(x, inputs), &weight, None, Write::Store, RowsMut::new(&mut out, outputs));
            out
        };
        let (mut expected, got) = (product(&clean), product(&spoiled));
        assert!(got[4 * outputs..5 * outputs].iter().all(|x| x.is_nan()));
        expected[4 * outputs..5 * outputs].copy_from_slice(&got[4 * outputs..5 * outputs]);
        assert_same(cpu, "row", &got, &expected);
    }
}

#[test]
fn rows_have_the_same_bits_in_every_block_of_rows() {
    // Of so many inputs a task on tiles takes 32 rows.
    let (rows, inputs, outputs) = (70, 8200, 20);
    let (x, w) = (noise(3, rows * inputs), noise(4, outputs * inputs));
    for cpu in fused() {
        let weight = matrix(cpu, Format::Bf16, Layout::Plain, inputs, &w);
        let mut all = vec![0.0; rows * outputs];
        linear(cpu, Rows::new(&x, inputs), &weight, None, Write::Store, RowsMut::new(&mut all, outputs));
        for row in [0, 31, 32, 63, 69] {
            let mut alone = vec![0.0; outputs];
            let x = Rows::new(&x[row * inputs..][..inputs], inputs);
            linear(cpu, x, &weight, None, Write::Store, RowsMut::new(&mut alone, outputs));
            assert_same(cpu, "row", &all[row * outputs..][..outputs], &alone);
        }
    }
}

#[test]
fn products_of_different_formats_are_computed_as_each_alone() {
    let (rows, inputs, outputs) = (5, 70, 20);
    let x = noise(5, rows * inputs);
    for cpu in cpus() {
        let weights = [Format::F32, Format::Bf16, Format::F16]
            .map(|format| matrix(cpu, format, Layout::Plain, inputs, &noise(6, outputs * inputs)));
        let mut together = [(); 3].map(|()| vec![0.0; rows * outputs]);
        let mut products: Vec<Product<'_>> = weights
            .iter()
            .zip(&mut together)
            .map(|(weight, out)| Product {
                x: Rows::new(&x, inputs),
                rows: None,
                weight,
                bias: None,
                epilogue: Epilogue::Store,
                out: RowsMut::new(out, outputs),
            })
            .collect();
        run(cpu, &mut products);
        drop(products);
        for (weight, together) in weights.iter().zip(&together) {
            let mut alone = vec![0.0; rows * outputs];
            linear(cpu, Rows::new(&x, inputs), weight, None, Write::Store, RowsMut::new(&mut alone, outputs));
            assert_same(cpu, "alone", together, &alone);
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    for cpu in cpus() {
        for format in FORMATS {
            let weight = matrix(cpu, format, Layout::Plain, 3, &[1.0; 6]);
            linear(cpu, Rows::new(&[], 3), &weight, None, Write::Store, RowsMut::new(&mut [], 2));
        }
    }
}

#[test]
#[should_panic(expected = "input width")]
fn an_input_of_another_width_is_refused() {
    let cpu = &cpus()[0];
    let weight = matrix(cpu, Format::F32, Layout::Plain, 3, &[1.0; 6]);
    linear(cpu, Rows::new(&[0.0; 4], 4), &weight, None, Write::Store, RowsMut::new(&mut [0.0; 2], 2));
}
