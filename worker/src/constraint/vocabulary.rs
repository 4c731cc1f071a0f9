//! A tokenizer's pieces as llguidance sees them.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::thinking::Crossings;
use super::{ConstraintError, unexpected};
use crate::sampling::Mask;
use crate::tokenizer::Tokenizer;

/// The longest piece that the trie takes; longer ones are never written under a constraint.
const LONGEST_PIECE: usize = 1000;
/// Begins the names of special tokens in the trie, and no text.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// What all grammars of a model share: its trie, and what compiles for it.
pub(super) struct Vocabulary {
    pub(super) factory: ParserFactory,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Tokens that stand for text, and those that end an answer.
    pub(super) known: Mask,
    /// Tokens that end an answer.
    pub(super) ends: Mask,
    pub(super) crossings: Crossings,
}

impl Vocabulary {
    /// The pieces of the ids below `vocab`. Ids without a piece, special tokens and pieces that are no text are left out, so
    /// no grammar writes them; `eos` end its sentences.
    pub(super) fn new(tokenizer: &Arc<Tokenizer>, vocab: usize, eos: &[u32]) -> Result<Self, ConstraintError> {
        let words = words(tokenizer, vocab, eos);
        let end = eos.iter().copied().find(|&id| (id as usize) < vocab);
        let (size, end) = u32::try_from(vocab).ok().zip(end).ok_or_else(|| unexpected("the model has no end"))?;
        let written = (0..size).filter(|&id| !words[id as usize].is_empty());
        let (known, ends) = (Mask::of(written.chain(eos.iter().copied()), vocab), Mask::of(eos.iter().copied(), vocab));
        let mut trie = TokTrie::from(&TokRxInfo::new(size, end), &words);
        drop(words);
        if eos.len() > 1 {
            let ends: Vec<u32> = eos.iter().copied().filter(|&id| id < size).collect();
            trie = trie.with_eos_tokens(&ends);
        }
        // It does not tokenise as the model does, so no token is forced where several spell the same text.
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| unexpected(&error.to_string()))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = 5_000;
        limits.max_grammar_size = 200_000;
        limits.verbose_errors = false;
        let crossings = Crossings::new(tokenizer, size);
        Ok(Self { factory, tokenizer: Arc::clone(tokenizer), known, ends, crossings })
    }
}

/// The text of each id; empty for those that stand for none.
fn words(tokenizer: &Tokenizer, vocab: usize, eos: &[u32]) -> Vec<Vec<u8>> {
    let word = |id: u32| {
        let bytes = tokenizer.visible_bytes(id);
        let is_text = bytes.len() <= LONGEST_PIECE && !bytes.contains(&MARKER) && !eos.contains(&id);
        if is_text { bytes.to_vec() } else { Vec::new() }
    };
    (0u32..).take(vocab).map(word).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn special_tokens_ends_and_ids_without_a_piece_stand_for_no_text() {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "added_tokens": [{"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false}],
            "model": {"type": "BPE", "byte_fallback": true, "merges": [],
                "vocab": {"a": 0, "<s>": 1, "</s>": 2, "▁b": 3, "<0xE4>": 5, "<0xFF>": 6, "<0x61>": 7}}
        });
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), 10).expect("a tokenizer");
        let words = words(&tokenizer, 10, &[2]);
        let expected: [&[u8]; 10] = [b"a", b"", b"", b" b", b"", b"\xE4", b"", b"a", b"", b""];
        assert_eq!(words, expected);
        let vocabulary = Vocabulary::new(&Arc::new(tokenizer), 10, &[2]).expect("a vocabulary");
        let known: Vec<u32> = (0..20).filter(|&id| vocabulary.known.allows(id)).collect();
        assert_eq!(known, [0, 2, 3, 5, 7]);
    }
}
