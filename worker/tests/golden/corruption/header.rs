//! Damaged tensor headers, and files of another length.

use serde_json::{Map, Value, json};

use super::{Copy, Random, cases, join, split, tally};

#[test]
pub(super) fn headers_with_a_changed_byte_are_refused_unless_they_say_the_same() {
    for name in ["dense-bf16", "moe-shared"] {
        let copy = Copy::of(name);
        let (header, data) = split(&copy.original("model.safetensors"));
        let expected = copy.inspect().expect("whole").tensors.places;
        let mut random = Random(2);
        let mut refused = 0;
        for _ in 0..cases() / 4 {
            let mut changed = header.clone();
            let place = random.below(changed.len());
            changed[place] = match random.below(3) {
                0 => random.next() as u8,
                1 => *random.pick(b"0123456789"),
                _ => *random.pick(b"{}[]\",:\\ -.eE\n"),
            };
            copy.write("model.safetensors", &join(&changed, &data));
            match copy.inspect() {
                Ok(checkpoint) => {
                    assert_eq!(checkpoint.tensors.places, expected, "byte {place}");
                    tally::same();
                }
                Err(_) => {
                    copy.refused("changed byte");
                    refused += 1;
                }
            }
        }
        assert!(refused > cases() / 8, "{name}: {refused}");
    }
}

/// A way to damage one entry of a header.
pub(super) fn damage(random: &mut Random, header: &mut Map<String, Value>) -> String {
    let names: Vec<String> = header.keys().filter(|name| *name != "__metadata__").cloned().collect();
    let name = random.pick(&names).clone();
    let entry = header.get_mut(&name).and_then(Value::as_object_mut).expect("an entry");
    let offsets: Vec<u64> = serde_json::from_value(entry["data_offsets"].clone()).expect("offsets");
    let kind = random.below(9);
    match kind {
        0 => entry["dtype"] = json!(random.pick(&["I64", "U8", "F64", "F8_E4M3", "bf16", "F128", ""])),
        1 => entry["shape"][0] = json!(random.next()),
        2 => entry["shape"][0] = json!(entry["shape"][0].as_u64().expect("a size") + 1 + random.next() % 1000),
        3 => entry["data_offsets"] = json!([offsets[0] + 4, offsets[1] + 4]),
        4 => entry["data_offsets"] = json!([offsets[1], offsets[0]]),
        5 => entry["data_offsets"] = json!([random.next(), random.next()]),
        6 => entry["shape"] = json!([1u64 << 40, 1u64 << 40]),
        7 => {
            entry.shift_remove(*random.pick(&["dtype", "shape", "data_offsets"]));
        }
        _ => {
            let entry = Value::Object(entry.clone());
            header.shift_remove(&name);
            header.insert(format!("{name}.old"), entry);
        }
    }
    format!("{name}, kind {kind}")
}

#[test]
pub(super) fn headers_with_a_damaged_entry_are_refused() {
    for name in ["dense-untied", "moe-bf16"] {
        let copy = Copy::of(name);
        let (header, data) = split(&copy.original("model.safetensors"));
        let header: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
        let mut random = Random(3);
        for _ in 0..cases() / 4 {
            let mut header = header.clone();
            let what = damage(&mut random, &mut header);
            copy.write("model.safetensors", &join(Value::Object(header).to_string().as_bytes(), &data));
            copy.refused(&what);
        }
    }
}

#[test]
pub(super) fn files_of_another_length_are_refused() {
    let copy = Copy::of("dense-mha");
    let original = copy.original("model.safetensors");
    let mut random = Random(4);
    for _ in 0..cases() / 4 {
        let mut bytes = original.clone();
        if random.below(4) == 0 {
            bytes.extend(std::iter::repeat_n(0, 1 + random.below(4096)));
        } else {
            bytes.truncate(random.below(bytes.len()));
        }
        copy.write("model.safetensors", &bytes);
        copy.refused(&format!("{} of {} bytes", bytes.len(), original.len()));
    }
}
