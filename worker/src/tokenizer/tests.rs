use std::path::PathBuf;

use super::*;
use crate::chat::{ChatTemplate, Conversation, Role, Turn};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer")
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/austen-2.6m")
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("readable")).expect("JSON")
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Both file forms of a folder.
fn both(folder: &Path, vocab: usize) -> [(&'static str, Tokenizer); 2] {
    let fast = Tokenizer::load(folder, vocab).expect("tokenizer.json loads");
    let copy = tempfile::tempdir().expect("a folder");
    for name in ["tokenizer.model", "tokenizer_config.json"] {
        fs::copy(folder.join(name), copy.path().join(name)).expect("copies");
    }
    let piece = Tokenizer::load(copy.path(), vocab).expect("tokenizer.model loads");
    [("tokenizer.json", fast), ("tokenizer.model", piece)]
}

fn text(sample: &serde_json::Value, key: &str) -> String {
    sample[key].as_str().expect("text").to_owned()
}

#[test]
fn both_forms_equal_the_golden_samples() {
    let golden_json = json(&golden().join("golden.json"));
    for (form, tokenizer) in both(&golden(), 640) {
        let samples = golden_json["samples"].as_array().expect("samples");
        assert_eq!(samples.len(), 21);
        for sample in samples {
            let expected = ids(&sample["ids"]);
            assert_eq!(tokenizer.encode(&text(sample, "text")).expect("encodes"), expected, "{form}: {sample}");
            assert_eq!(tokenizer.decode(&expected, false), text(sample, "decoded"), "{form}: {sample}");
            assert_eq!(tokenizer.decode(&expected, true), text(sample, "decoded_skip"), "{form}: {sample}");
        }
    }
}

#[test]
fn both_forms_and_the_template_equal_the_golden_chats() {
    let golden_json = json(&golden().join("golden.json"));
    let template = ChatTemplate::load(&golden()).expect("loads").expect("present");
    let forms = both(&golden(), 640);
    for chat in golden_json["chats"].as_array().expect("chats") {
        let turns: Vec<Turn> = chat["messages"]
            .as_array()
            .expect("messages")
            .iter()
            .map(|message| {
                let role = match message["role"].as_str() {
                    Some("system") => Role::System,
                    Some("user") => Role::User,
                    Some("assistant") => Role::Assistant,
                    other => panic!("{other:?}"),
                };
                Turn::new(role, text(message, "content"))
            })
            .collect();
        let prompt = template.render(&Conversation::new(turns)).expect("renders");
        assert_eq!(prompt, text(chat, "text"));
        for (form, tokenizer) in &forms {
            assert_eq!(tokenizer.encode(&prompt).expect("encodes"), ids(&chat["ids"]), "{form}");
        }
    }
}

#[test]
fn both_forms_equal_the_demo_models_prompts() {
    let golden_json = json(&demo().join("../golden.json"));
    let prompts = golden_json["prompts"].as_array().expect("prompts");
    assert!(prompts.len() >= 5);
    for (form, tokenizer) in both(&demo(), 1024) {
        for prompt in prompts.iter().filter(|prompt| prompt["text"].is_string()) {
            assert_eq!(
                tokenizer.encode(&text(prompt, "text")).expect("encodes"),
                ids(&prompt["ids"]),
                "{form}: {prompt}"
            );
            let greedy = ids(&prompt["greedy_ids"]);
            assert_eq!(tokenizer.decode(&greedy, true), text(prompt, "greedy_text"), "{form}");
        }
    }
}

#[test]
fn a_stream_gives_the_text_of_the_whole() {
    let golden_json = json(&golden().join("golden.json"));
    let tokenizer = Tokenizer::load(&golden(), 640).expect("loads");
    for sample in golden_json["samples"].as_array().expect("samples") {
        let (mut stream, mut out) = (TextStream::new(Vec::new()), String::new());
        for id in ids(&sample["ids"]) {
            stream.push(&tokenizer, id, &mut out);
        }
        stream.finish(&mut out);
        assert_eq!(out, text(sample, "decoded_skip"));
    }
}

#[test]
fn ids_without_a_piece_decode_to_nothing() {
    let tokenizer = Tokenizer::load(&golden(), 103_424).expect("loads");
    assert_eq!(tokenizer.decode(&[640, 103_423, u32::MAX], false), "");
    assert_eq!(tokenizer.bytes(9999), b"");
}

#[test]
fn special_tokens_are_found_by_name() {
    for (form, tokenizer) in both(&golden(), 640) {
        assert_eq!(tokenizer.special("<|end_of_sentence|>"), Some(4), "{form}");
        assert_eq!(tokenizer.special("<mask:7>"), Some(12), "{form}");
        assert_eq!(tokenizer.special("hello"), None, "{form}");
    }
}

#[test]
fn a_tokenizer_for_a_larger_vocabulary_is_refused() {
    let json_error = Tokenizer::load(&golden(), 320).expect_err("refused");
    assert_eq!(json_error.reason(), Reason::CorruptModel);
    assert!(json_error.to_string().contains("vocab_size is 320"), "{json_error}");
    let bytes = fs::read(golden().join("tokenizer.model")).expect("readable");
    let error = Tokenizer::from_sentencepiece(&bytes, &[], 320).expect_err("refused");
    assert!(error.to_string().contains("640 pieces") && error.to_string().contains("vocab_size is 320"), "{error}");
}

#[test]
fn a_folder_without_a_tokenizer_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().expect("a folder");
    let error = Tokenizer::load(folder.path(), 640).expect_err("refused");
    assert_eq!(error.reason(), Reason::ModelNotFound);
    assert!(error.to_string().contains("neither tokenizer.json nor tokenizer.model"), "{error}");
}

#[test]
fn files_that_are_none_are_refused_and_not_waited_for() {
    for name in ["tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json"] {
        let folder = tempfile::tempdir().expect("a folder");
        fs::copy(golden().join("tokenizer.model"), folder.path().join("tokenizer.model")).expect("copied");
        Tokenizer::load(folder.path(), 640).expect("whole");
        let path = folder.path().join(name);
        let _ = fs::remove_file(&path);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .expect("made");
        let error = Tokenizer::load(folder.path(), 640).expect_err("refused").to_string();
        assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn pieces_that_are_made_of_each_other_without_end_are_refused() {
    use prost::Message;
    #[derive(Message)]
    struct Model {
        #[prost(message, repeated, tag = "1")]
        pieces: Vec<Piece>,
        #[prost(message, optional, tag = "2")]
        trainer: Option<Trainer>,
    }
    #[derive(Message)]
    struct Piece {
        #[prost(string, tag = "1")]
        piece: String,
    }
    #[derive(Message)]
    struct Trainer {
        #[prost(int32, tag = "3")]
        model_type: i32,
    }
    let model = |lengths: &mut dyn Iterator<Item = usize>| {
        let pieces = lengths.map(|length| Piece { piece: "a".repeat(length) }).collect();
        Model { pieces, trainer: Some(Trainer { model_type: 2 }) }.encode_to_vec()
    };
    Tokenizer::from_sentencepiece(&model(&mut (1..=64)), &[], 4096).expect("short ones");
    for bytes in [model(&mut (1..=1000)), model(&mut [1, 1 << 20].into_iter())] {
        let error = Tokenizer::from_sentencepiece(&bytes, &[], 4096).expect_err("refused").to_string();
        assert!(error.contains("so long"), "{error}");
    }
}

#[test]
fn other_kinds_are_refused_by_name() {
    for (source, word) in [
        (r#"{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}"#, "Unigram"),
        (r#"{"model": {"type": "WordPiece", "vocab": {"a": 0}}}"#, "WordPiece"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}}"#, "dropout"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "CTC"}}"#, "CTC"),
        (
            r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": {"type": "Precompiled"}}"#,
            "Precompiled",
        ),
    ] {
        let error = Tokenizer::from_json(source.as_bytes(), 640).expect_err(source);
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn contradictions_are_refused_with_their_place() {
    for (source, word) in [
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}"#, "the id 0"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}"#, "merge"),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": []}}"#, "4294967295"),
        (
            r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"id": 9, "content": "a", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]}"#,
            "\"a\"",
        ),
        (r#"{"model": {"type": "BPE", "vocab": {"a": 0}"#, "EOF"),
    ] {
        let error = Tokenizer::from_json(source.as_bytes(), 640).expect_err(source);
        assert_eq!(error.reason(), Reason::CorruptModel, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

/// A small reproducible source of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

#[test]
fn corrupted_files_are_refused_or_load_but_never_panic() {
    let mut numbers = Numbers(7);
    for (name, vocab) in [("tokenizer.json", 640), ("tokenizer.model", 640)] {
        let whole = fs::read(golden().join(name)).expect("readable");
        for _ in 0..400 {
            let mut bytes = whole.clone();
            match numbers.below(4) {
                0 => bytes.truncate(numbers.below(whole.len())),
                1 => {
                    let (from, to) = (numbers.below(whole.len()), numbers.below(whole.len()));
                    bytes.drain(from.min(to)..from.max(to).min(from.min(to) + 200));
                }
                _ => {
                    for _ in 0..=numbers.below(4) {
                        let at = numbers.below(bytes.len());
                        bytes[at] = numbers.below(256) as u8;
                    }
                }
            }
            let read = match name {
                "tokenizer.json" => Tokenizer::from_json(&bytes, vocab),
                _ => Tokenizer::from_sentencepiece(&bytes, &[], vocab),
            };
            if let Ok(tokenizer) = read {
                let encoded = tokenizer.encode("The river runs 你好 past 🙂 <s>").unwrap_or_default();
                assert!(encoded.iter().all(|&id| (id as usize) < vocab));
                tokenizer.decode(&encoded, false);
            }
        }
    }
}
