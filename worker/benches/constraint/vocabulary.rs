//! A vocabulary of ERNIE's size and make: byte tokens, words with and without a space before them, Chinese, numbers, and
//! what programs and JSON are written with.

use std::collections::{BTreeMap, HashSet};

use ernie_worker::tokenizer::Tokenizer;
use ernie_workload::Chance;
use serde_json::{Map, Value, json};

/// Tokens.
pub const VOCAB: usize = 103_424;
/// The end of a sequence.
pub const END: u32 = 2;
/// Special tokens at the end, which stand for no text.
const SPECIAL: usize = 1_100;

const SYLLABLES: &[&str] = &[
    "a", "an", "ar", "be", "bo", "ca", "ce", "ch", "con", "da", "de", "di", "e", "ed", "en", "er", "es", "ex", "fa",
    "for", "ga", "ge", "ha", "he", "i", "in", "ing", "ion", "is", "ka", "ki", "la", "le", "li", "ly", "ma", "me",
    "ment", "mi", "na", "ne", "no", "o", "on", "or", "pa", "per", "pro", "ra", "re", "ri", "sa", "se", "sh", "st",
    "ta", "te", "th", "ti", "tion", "un", "ur", "us", "va", "ve", "wa", "we", "y", "za",
];
const MARKS: &[&str] = &[
    "{", "}", "[", "]", ":", ",", "\"", "'", "(", ")", ".", "-", "_", "/", "\\", "@", "#", "$", "%", "&", "*", "+",
    "=", "<", ">", "?", "!", ";", "|", "~", "^", "`", "\n", "\t",
];

/// A tokenizer that spells; it joins nothing, since nothing is encoded here.
pub fn tokenizer() -> Tokenizer {
    let mut chance = Chance::new(7, 0);
    let (mut seen, mut pieces) = (HashSet::new(), Vec::new());
    // Gives how many there are.
    let mut add = |piece: String| {
        if seen.insert(piece.clone()) {
            pieces.push(piece);
        }
        pieces.len()
    };
    for name in ["<unk>", "<s>", "</s>"] {
        add(name.to_owned());
    }
    for byte in 0..=255u8 {
        add(format!("<0x{byte:02X}>"));
    }
    for letter in b'!'..=b'~' {
        add(char::from(letter).to_string());
    }
    for first in MARKS {
        add((*first).to_owned());
        for second in MARKS {
            add(format!("{first}{second}"));
            add(format!("▁{first}{second}"));
        }
        for times in 1..5 {
            add(format!("{first}{}", "▁".repeat(times)));
        }
    }
    for spaces in 1..=40 {
        add("▁".repeat(spaces));
    }
    let mut count = 0;
    for number in 0..1000 {
        count = add(number.to_string());
    }
    while count < 30_000 {
        let length = 1 + chance.below(4);
        let first = 0x4E00 + chance.below(5000) as u32;
        let characters = (0..length).map(|at| if at == 0 { first } else { 0x4E00 + chance.below(5000) as u32 });
        count = add(characters.filter_map(char::from_u32).collect());
    }
    while count < VOCAB - SPECIAL {
        let word: String = (0..1 + chance.below(4)).map(|_| SYLLABLES[chance.below(SYLLABLES.len())]).collect();
        let word = if chance.below(6) == 0 { word[..1].to_uppercase() + &word[1..] } else { word };
        count = add(if chance.below(3) == 0 { word } else { format!("▁{word}") });
    }
    from_pieces(&pieces)
}

fn from_pieces(pieces: &[String]) -> Tokenizer {
    let vocab: Map<String, Value> = pieces.iter().zip(0u64..).map(|(piece, id)| (piece.clone(), id.into())).collect();
    let special = |id: usize, name: String| {
        json!({"id": id, "content": name, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let named = ["<unk>", "<s>", "</s>"].into_iter().enumerate().map(|(id, name)| special(id, name.to_owned()));
    let more = (pieces.len()..VOCAB).map(|id| special(id, format!("<|special_{id}|>")));
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "added_tokens": named.chain(more).collect::<Vec<_>>(),
        "model": {"type": "BPE", "byte_fallback": true, "merges": [], "vocab": vocab}
    });
    Tokenizer::from_json(json.to_string().as_bytes(), VOCAB).unwrap()
}

/// Ids by the bytes that they stand for.
pub struct Ids(BTreeMap<Vec<u8>, u32>);

impl Ids {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let ids = (0..VOCAB as u32).filter(|&id| !tokenizer.visible_bytes(id).is_empty());
        Self(ids.map(|id| (tokenizer.visible_bytes(id).to_vec(), id)).collect())
    }

    /// The longest token that a text begins with, of those that may come.
    pub fn longest(&self, text: &[u8], may_come: impl Fn(u32) -> bool) -> Option<u32> {
        (1..=text.len().min(40))
            .rev()
            .find_map(|length| self.0.get(&text[..length]).copied().filter(|&id| may_come(id)))
    }
}
