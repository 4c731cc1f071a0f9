//! Where the reasoning of a thinking model ends.
//!
//! It ends with the first `</think>` in the text of its tokens, as the parser of outputs has it. A token that crosses that
//! border is not chosen, so that the grammar begins with a token.

use crate::chat::output::{END_OF_THINK, MARKS};
use crate::tokenizer::Tokenizer;

/// The text of a token as the parser of outputs sees it, which sees marks even where they are special tokens.
fn seen(tokenizer: &Tokenizer, id: u32) -> &[u8] {
    let bytes = tokenizer.bytes(id);
    if MARKS.iter().any(|mark| mark.as_bytes() == bytes) { bytes } else { tokenizer.visible_bytes(id) }
}

/// How much of `</think>` the reasoning ends with, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Reasoning(usize);

impl Reasoning {
    /// Takes the next token. Whether the reasoning ended in it.
    pub(super) fn ends(&mut self, tokenizer: &Tokenizer, id: u32) -> bool {
        self.read(seen(tokenizer, id)).is_some()
    }

    /// Reads on; gives the place behind the first `</think>`.
    fn read(&mut self, bytes: &[u8]) -> Option<usize> {
        let tag = END_OF_THINK.as_bytes();
        for (at, &byte) in bytes.iter().enumerate() {
            // `<` stands nowhere else in the tag, so nothing shorter is left of a beginning that goes wrong.
            self.0 = if byte == tag[self.0] { self.0 + 1 } else { usize::from(byte == tag[0]) };
            if self.0 == tag.len() {
                return Some(at + 1);
            }
        }
        None
    }
}

/// For each length of a beginning of `</think>`: the tokens that complete it and go on.
#[derive(Debug)]
pub(super) struct Crossings([Vec<u32>; END_OF_THINK.len()]);

impl Crossings {
    pub(super) fn new(tokenizer: &Tokenizer, vocab: u32) -> Self {
        let last = END_OF_THINK.as_bytes()[END_OF_THINK.len() - 1];
        let candidates = (0..vocab).filter(|&id| {
            let bytes = seen(tokenizer, id);
            bytes.split_last().is_some_and(|(_, before)| before.contains(&last))
        });
        let candidates: Vec<u32> = candidates.collect();
        Self(std::array::from_fn(|length| {
            let crosses = |id: &u32| {
                let bytes = seen(tokenizer, *id);
                Reasoning(length).read(bytes).is_some_and(|end| end < bytes.len())
            };
            candidates.iter().copied().filter(crosses).collect()
        }))
    }

    /// The tokens that would cross the border there.
    pub(super) fn after(&self, reasoning: Reasoning) -> &[u32] {
        self.0.get(reasoning.0).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(pieces: &[&str], special: &[&str]) -> Tokenizer {
        let added: Vec<_> = pieces
            .iter()
            .enumerate()
            .map(|(id, piece)| {
                serde_json::json!({"id": id + 1, "content": piece, "special": special.contains(piece), "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null, "added_tokens": added,
            "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}
        });
        Tokenizer::from_json(json.to_string().as_bytes(), 100).expect("a tokenizer")
    }

    #[test]
    fn reasoning_ends_with_its_tag_however_that_is_spelt() {
        let tokenizer = tokenizer(&["</think>", "<", "</", "think", ">", "</thi", "nk>", "<s>"], &["</think>", "<s>"]);
        let end = |ids: &[u32]| {
            let mut reasoning = Reasoning::default();
            ids.iter().position(|&id| reasoning.ends(&tokenizer, id))
        };
        assert_eq!(end(&[5, 1, 5]), Some(1));
        assert_eq!(end(&[2, 3, 4, 5]), Some(3));
        assert_eq!(end(&[6, 2, 6, 7]), Some(3));
        assert_eq!(end(&[6, 8, 7]), Some(2), "special tokens are not seen");
        assert_eq!(end(&[6, 4, 7]), None);
    }

    #[test]
    fn tokens_that_cross_the_border_are_known_for_every_beginning() {
        let tokenizer = tokenizer(&["</think>", ">\n", ">", "</think>{", "k>k>", "hink> ", "a </think>"], &[]);
        let crossings = Crossings::new(&tokenizer, 9);
        assert_eq!(crossings.after(Reasoning(0)), [4]);
        assert_eq!(crossings.after(Reasoning(7)), [2, 4]);
        assert_eq!(crossings.after(Reasoning(6)), [4, 5]);
        assert_eq!(crossings.after(Reasoning(3)), [4, 6]);
    }
}
