//! Damaged adapter folders.

use std::fs;
use std::path::Path;

use ernie_proto::failure::Reason;
use ernie_worker::model::adapter::Adapter;
use ernie_worker::model::inventory::check_adapters;
use ernie_worker::model::{Checkpoint, LoadError};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::header::damage;
use super::{Random, cases, join, split, tally};
use crate::reference::folder;

const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// A copy of a golden adapter that may be damaged, and the model that it belongs to.
struct Copy {
    folder: TempDir,
    base: Checkpoint,
}

impl Copy {
    fn new() -> Self {
        let base = Checkpoint::inspect(&folder("dense-lora")).expect("a checkpoint");
        let copy = Self { folder: tempfile::tempdir().expect("a folder"), base };
        [WEIGHTS, CONFIG].into_iter().for_each(|file| copy.write(file, &original(file)));
        copy.check().expect("whole");
        copy
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.folder.path().join(file), bytes).expect("written");
    }

    fn inspect(&self) -> Result<Adapter, LoadError> {
        Adapter::inspect("mine", self.folder.path())
    }

    fn check(&self) -> Result<Adapter, LoadError> {
        let adapters = [self.inspect()?];
        check_adapters(&self.base, &adapters)?;
        let [adapter] = adapters;
        Ok(adapter)
    }

    /// Fails unless the adapter is refused in one sentence.
    fn refused(&self, what: &str) {
        let Err(error) = self.check() else { panic!("accepted: {what}") };
        let text = error.to_string();
        assert!(text.len() > 20 && text.len() < 1000 && !text.contains('\n'), "{what}: {text}");
        assert!(matches!(error.reason(), Reason::CorruptModel | Reason::UnsupportedModel), "{what}: {text}");
        tally::refused();
    }
}

fn original(file: &str) -> Vec<u8> {
    fs::read(Path::new(&folder("dense-lora/adapter")).join(file)).expect("a golden file")
}

#[test]
pub(super) fn adapter_headers_that_are_damaged_are_refused_unless_they_say_the_same() {
    let copy = Copy::new();
    let (header, data) = split(&original(WEIGHTS));
    let entries: Map<String, Value> = serde_json::from_slice(&header).expect("JSON");
    let expected = copy.inspect().expect("whole").tensors.places;
    let mut random = Random(11);
    for _ in 0..cases() / 4 {
        let mut changed = header.clone();
        let place = random.below(changed.len());
        changed[place] =
            if random.below(2) == 0 { random.next() as u8 } else { *random.pick(b"0123456789{}[]\",:\\ -") };
        copy.write(WEIGHTS, &join(&changed, &data));
        match copy.check() {
            Ok(adapter) => {
                assert_eq!(adapter.tensors.places, expected, "byte {place}");
                tally::same();
            }
            Err(_) => copy.refused("changed byte"),
        }
        let mut entries = entries.clone();
        let what = damage(&mut random, &mut entries);
        copy.write(WEIGHTS, &join(Value::Object(entries).to_string().as_bytes(), &data));
        copy.refused(&what);
    }
}

#[test]
pub(super) fn adapter_files_of_another_length_are_refused() {
    let copy = Copy::new();
    let mut random = Random(12);
    for _ in 0..cases() / 4 {
        let mut bytes = original(WEIGHTS);
        if random.below(4) == 0 {
            bytes.extend(std::iter::repeat_n(0, 1 + random.below(4096)));
        } else {
            bytes.truncate(random.below(bytes.len()));
        }
        copy.write(WEIGHTS, &bytes);
        copy.refused(&format!("{} bytes", bytes.len()));
    }
}

#[test]
pub(super) fn adapter_configs_that_are_damaged_are_refused() {
    let copy = Copy::new();
    let text = original(CONFIG);
    let end = text.iter().rposition(|&byte| byte == b'}').expect("an object");
    let config: Map<String, Value> = serde_json::from_slice(&text).expect("JSON");
    let wrong = [json!(-1), json!(0), json!(0.5), json!(u64::MAX), json!("many"), json!([1, 2]), json!({"a": 1})];
    let mut random = Random(13);
    for case in 0..cases() / 4 {
        let mut config = config.clone();
        match case % 4 {
            0 => {
                let length = random.below(end);
                copy.write(CONFIG, &text[..length]);
                copy.refused(&format!("cut to {length} bytes"));
                continue;
            }
            1 => config.insert("r".to_owned(), random.pick(&wrong).clone()),
            2 => config.insert("r".to_owned(), json!(5 + random.below(4000))),
            _ => config.insert(format!("use_{}", random.next()), json!(true)),
        };
        let config = Value::Object(config).to_string();
        copy.write(CONFIG, config.as_bytes());
        copy.refused(&config);
    }
}
