//! Weights that are damaged, which the header cannot tell.

use ernie_proto::failure::Reason;
use ernie_worker::executor::{Executor, LogitRows, SequenceStep, StepPlan};
use ernie_worker::model::{BackendChoice, DtypeChoice, LoadOptions, load};
use serde_json::{Map, Value};

use super::{Copy, Random, cases, join, manifest, small, split};

#[test]
fn a_file_that_is_cut_between_the_look_and_the_reading_is_refused() {
    let copy = Copy::of("dense-tied");
    let checkpoint = copy.inspect().expect("whole");
    let bytes = copy.original("model.safetensors");
    copy.write("model.safetensors", &bytes[..bytes.len() / 2]);
    let Err(error) = load(&checkpoint, &small(), &|_| {}) else { panic!("loaded") };
    assert_eq!(error.reason(), Reason::CorruptModel);
    assert!(error.to_string().contains("cut short"), "{error}");
}

#[test]
fn every_flipped_bit_of_any_file_is_refused_where_a_digest_is_given() {
    let copy = Copy::of("moe-bf16");
    let expected = copy.digest;
    let (header, data) = split(&copy.original("model.safetensors"));
    let mut random = Random(6);
    for case in 0..cases() / 4 {
        let (file, first) = match case % 8 {
            0 => ("config.json", 0),
            1 => ("generation_config.json", 0),
            // weights, of which no other check could tell
            _ => ("model.safetensors", 8 + header.len()),
        };
        let mut bytes = copy.original(file);
        let place = first + random.below(bytes.len() - first);
        bytes[place] ^= 1 << random.below(8);
        copy.write(file, &bytes);
        if first > 0 {
            copy.inspect().expect("the header is whole");
        }
        let error = manifest(copy.path()).check(expected).expect_err("refused");
        assert_eq!(error.reason(), Reason::DigestMismatch, "{file}, byte {place}");
        copy.restore(file);
    }
    manifest(copy.path()).check(expected).expect("whole again");
    copy.write("model-00002-of-00002.safetensors", &data[..8]);
    assert_eq!(manifest(copy.path()).check(expected).expect_err("one more").reason(), Reason::DigestMismatch);
}

#[test]
fn values_beyond_half_precision_are_refused_by_tensor_and_place() {
    let copy = Copy::of("dense-tied");
    let (header, mut data) = split(&copy.original("model.safetensors"));
    let entries: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let name = "model.layers.1.mlp.up_proj.weight";
    let start = entries[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    let place = start + (3 * 64 + 5) * 4;
    data[place..place + 4].copy_from_slice(&70000f32.to_le_bytes());
    copy.write("model.safetensors", &join(&header, &data));
    for backend in [BackendChoice::Cpu, BackendChoice::Candle] {
        let options = LoadOptions { dtype: DtypeChoice::Float16, backend, ..small() };
        let Err(error) = load(&copy.inspect().expect("well formed"), &options, &|_| {}) else { panic!("loaded") };
        let text = error.to_string();
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{text}");
        assert!(text.contains(name) && text.contains("row 3, column 5") && text.contains("70000"), "{text}");
        load(&copy.inspect().expect("well formed"), &small(), &|_| {}).expect("single precision holds it");
    }
}

#[test]
fn weights_that_are_not_numbers_show_in_the_logits() {
    let copy = Copy::of("dense-tied");
    let (header, mut data) = split(&copy.original("model.safetensors"));
    let entries: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let start = entries["model.layers.0.mlp.down_proj.weight"]["data_offsets"][0].as_u64().expect("an offset") as usize;
    data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    copy.write("model.safetensors", &join(&header, &data));
    let mut executor = load(&copy.inspect().expect("well formed"), &small(), &|_| {}).expect("loaded");
    let step = SequenceStep {
        tokens: vec![3, 4],
        start: 0,
        position_ids: None,
        blocks: vec![0],
        adapter: None,
        logits: LogitRows::Last,
        reading: None,
    };
    let output = executor.execute(&StepPlan { sequences: vec![step] }).expect("computed");
    assert!(output.logits[0].iter().all(|logit| !logit.is_finite()));
}
