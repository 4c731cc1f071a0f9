//! `tokenizer.model`: as for `tokenizer.json`.
#![no_main]

use ernie_worker::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

const VOCAB: usize = 4096;
const TEXTS: [&str; 3] =
    ["The river runs 你好 past 🙂 12 <s>", "  a\u{0301}\r\n\t ▁ <0x0A>", "\u{0}\u{feff}\u{10ffff}"];

fuzz_target!(|bytes: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_sentencepiece(bytes, &[], VOCAB) else { return };
    assert!(tokenizer.len() <= VOCAB);
    for text in TEXTS {
        if let Ok(ids) = tokenizer.encode(text) {
            assert!(ids.iter().all(|&id| (id as usize) < VOCAB), "{ids:?}");
            tokenizer.decode(&ids, false);
        }
    }
});
