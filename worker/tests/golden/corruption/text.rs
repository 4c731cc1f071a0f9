//! Damaged tokenizers and chat templates.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ernie_proto::failure::Reason;
use ernie_worker::chat::{ChatTemplate, Conversation, Role, Turn};
use ernie_worker::tokenizer::{Tokenizer, TokenizerError};
use serde_json::{Value, json};

use super::{Random, cases, tally};
use crate::reference::folder;

/// Ids of the golden tokenizer.
const VOCAB: usize = 640;
const SAMPLE: &str = "The river runs 你好 past 🙂 12 <s>";

fn original(file: &str) -> Vec<u8> {
    fs::read(folder("tokenizer").join(file)).expect("a golden file")
}

/// Fails unless a tokenizer is refused in one sentence.
fn refused(what: &str, result: Result<Tokenizer, TokenizerError>) {
    let Err(error) = result else { panic!("accepted: {what}") };
    let text = error.to_string();
    assert!(text.len() > 10 && text.len() < 1000 && !text.contains('\n'), "{what}: {text}");
    assert!(matches!(error.reason(), Reason::CorruptModel | Reason::UnsupportedModel), "{what}: {text}");
    tally::refused();
}

#[test]
pub(super) fn tokenizers_with_a_damaged_entry_are_refused() {
    let text = original("tokenizer.json");
    let whole: Value = serde_json::from_slice(&text).expect("JSON");
    let vocab = whole["model"]["vocab"].as_object().expect("a vocabulary");
    let names: Vec<&String> = vocab.keys().collect();
    let merges = whole["model"]["merges"].as_array().expect("merges").len();
    let mut random = Random(21);
    for case in 0..cases() / 2 {
        let mut damaged = whole.clone();
        let (name, other) = (*random.pick(&names), *random.pick(&names));
        let model = &mut damaged["model"];
        let merge = random.below(merges);
        let kind = case % 8;
        match kind {
            0 => {
                let length = random.below(text.len() - 2);
                refused(&format!("cut to {length} bytes"), Tokenizer::from_json(&text[..length], VOCAB));
                continue;
            }
            1 => model["vocab"][name] = json!(VOCAB as u64 + random.next() % 100_000),
            2 if vocab[name] == vocab[other] => continue,
            2 => model["vocab"][name] = vocab[other].clone(),
            3 => model["vocab"][name] = random.pick(&[json!(-1), json!("x"), json!(1.5), json!(null)]).clone(),
            4 => model["merges"][merge] = json!(["no such", "piece"]),
            5 => model["merges"][merge] = random.pick(&[json!(7), json!(["a"]), json!("ab"), json!({})]).clone(),
            6 => model["type"] = random.pick(&[json!("Unigram"), json!("WordPiece"), json!("bpe"), json!(3)]).clone(),
            _ => damaged["added_tokens"][0]["id"] = random.pick(&[json!(-5), json!("x"), json!(1u64 << 40)]).clone(),
        }
        let bytes = damaged.to_string();
        refused(&format!("kind {kind}, {name:?}"), Tokenizer::from_json(bytes.as_bytes(), VOCAB));
    }
}

#[test]
pub(super) fn sentencepiece_models_that_are_cut_are_refused_and_garbled_ones_never_panic() {
    let whole = original("tokenizer.model");
    let mut random = Random(22);
    for case in 0..cases() / 2 {
        if case % 2 == 0 {
            let length = random.below(whole.len());
            refused(&format!("cut to {length} bytes"), Tokenizer::from_sentencepiece(&whole[..length], &[], VOCAB));
            continue;
        }
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let place = random.below(bytes.len());
            bytes[place] = random.next() as u8;
        }
        let result = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_sentencepiece(&bytes, &[], VOCAB)));
        // another letter in a piece makes another tokenizer, which must keep to its vocabulary
        match result.expect("no panic") {
            Ok(tokenizer) => {
                let ids = tokenizer.encode(SAMPLE).expect("encoded");
                assert!(ids.iter().all(|&id| (id as usize) < VOCAB));
                if bytes == whole { tally::same() } else { tally::other() }
            }
            Err(_) => tally::refused(),
        }
    }
}

#[test]
pub(super) fn garbled_chat_templates_are_refused_or_show_what_the_user_says() {
    let whole = String::from_utf8(original("chat_template.jinja")).expect("text");
    let config: Value = serde_json::from_slice(&original("tokenizer_config.json")).expect("JSON");
    let characters: Vec<char> = whole.chars().collect();
    let conversation = Conversation::new(vec![Turn::new(Role::User, "what is said")]);
    let mut random = Random(23);
    let mut refused = 0;
    for _ in 0..cases() / 2 {
        let mut damaged = characters.clone();
        for _ in 0..=random.below(3) {
            let place = random.below(damaged.len());
            match random.below(3) {
                0 => {
                    damaged[place] =
                        *random.pick(&['{', '}', '%', '\'', '[', ']', '(', '|', '.', '~', '0', '*', '\u{0}'])
                }
                1 => drop(damaged.remove(place)),
                _ => {
                    let piece: Vec<char> = damaged[place..].iter().copied().take(1 + random.below(40)).collect();
                    damaged.splice(place..place, piece);
                }
            }
        }
        let damaged: String = damaged.into_iter().collect();
        let same = damaged == whole;
        match ChatTemplate::new(damaged, &config) {
            Ok(template) => match template.render(&conversation) {
                Ok(text) => {
                    assert!(text.contains("what is said"), "{text:?}");
                    if same { tally::same() } else { tally::other() }
                }
                Err(error) => panic!("accepted, but cannot show a user's message: {error}"),
            },
            Err(error) => {
                let text = error.to_string();
                assert!(text.len() > 10 && text.len() < 1000, "{text}");
                tally::refused();
                refused += 1;
            }
        }
    }
    assert!(refused > cases() / 8, "{refused}");
}
