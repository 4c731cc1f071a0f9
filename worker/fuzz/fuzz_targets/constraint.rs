//! Constraints as clients send them: each is compiled or refused, and an answer follows it to its end, a limit or a sentence.
#![no_main]

use std::sync::{Arc, OnceLock};

use ernie_worker::constraint::{Constraint, Grammars};
use ernie_worker::engine::Next;
use ernie_worker::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

const END: u32 = 2;
const VOCAB: usize = 3 + 256;

/// A vocabulary of bytes.
fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| {
        let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte + 3));
        let named = ["<unk>", "<s>", "</s>"].into_iter().map(str::to_owned).zip(0..);
        let vocab: serde_json::Map<String, serde_json::Value> =
            named.chain(bytes).map(|(piece, id)| (piece, id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "ByteFallback"}, "added_tokens": [],
            "model": {"type": "BPE", "byte_fallback": true, "merges": [], "vocab": vocab}
        });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), VOCAB).expect("a tokenizer");
        Grammars::new(Arc::new(tokenizer), VOCAB, [END].into(), Arc::new(()))
    })
}

fuzz_target!(|input: (u8, String, Vec<u8>)| {
    let (kind, text, picks) = input;
    let constraint = match kind % 4 {
        0 => Constraint::JsonSchema(text),
        1 => Constraint::Regex(text),
        2 => Constraint::Grammar(text),
        _ => Constraint::Choice(text.split('\n').filter(|option| !option.is_empty()).map(str::to_owned).collect()),
    };
    let Ok(grammar) = grammars().compile(&constraint) else { return };
    let mut guide = grammar.start(false, &[]).expect("nothing was emitted");
    for pick in picks {
        let Ok(Next::Within(mask)) = guide.next() else { return };
        let ids: Vec<u32> = (0..VOCAB as u32).filter(|&id| id != END && mask.allows(id)).collect();
        let Some(&id) = ids.get(usize::from(pick) % ids.len().max(1)) else { return };
        guide.advance(id);
    }
});
