//! The demo model.

use std::path::{Path, PathBuf};

use ernie_worker::eval::evaluate::{Rows, Sequence, Settings};
use ernie_worker::model::DtypeChoice;
use serde_json::Value;

use crate::reference::{Engine, single};

pub(crate) fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn the_demo_model_continues_its_prompts_as_the_reference_does() {
    let text = std::fs::read_to_string(models().join("golden.json")).expect("golden.json");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    let prompts = golden["prompts"].as_array().expect("prompts");
    assert!(prompts.len() >= 6);
    for engine in Engine::all() {
        let mut executor = engine.load(&models().join("austen-2.6m"), DtypeChoice::Float32, &[]);
        for prompt in prompts {
            let expected = ids(&prompt["greedy_ids"]);
            let settings = Settings { generate: expected.len(), rows: Rows::Last, ..Settings::default() };
            let sequence = Sequence { ids: ids(&prompt["ids"]), positions: None };
            let result = single(&mut executor, &sequence, &settings);
            assert_eq!(result.greedy_tokens, expected, "{engine:?} {}", prompt["text"]);
            let vocab = result.greedy_logits.len() / expected.len();
            let top5 = prompt["top5"].as_array().expect("top5");
            assert!(!top5.is_empty());
            for (row, top5) in result.greedy_logits.chunks(vocab).zip(top5) {
                for pair in top5.as_array().expect("pairs") {
                    let (id, logit) = (pair[0].as_u64().expect("an id"), pair[1].as_f64().expect("a logit"));
                    let ours = f64::from(row[id as usize]);
                    assert!((ours - logit).abs() <= 5e-4, "{engine:?} token {id}: {ours}, expected {logit}");
                }
            }
        }
    }
}
