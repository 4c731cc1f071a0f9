//! `tokenizer.json`: a BPE model as the `tokenizers` crate writes it.
//!
//! The crate encodes. Decoding needs bytes by id, so the decoder's rules are read here and applied to each piece once.
//! What would make the crate panic or answer differently from call to call is refused first.

use std::{borrow::Cow, collections::HashMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use tokenizers::PostProcessorWrapper;

use super::{
    Parts, TokenizerError,
    pieces::{Pieces, fallback_byte},
    stages::{self, Pattern, Stage},
};

/// The parts of the file that are looked at beside the crate. Strings borrow from the file where they can.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: Model<'a>,
    #[serde(default, borrow)]
    added_tokens: Vec<Added<'a>>,
    #[serde(default)]
    normalizer: Option<Stage>,
    #[serde(default)]
    pre_tokenizer: Option<Stage>,
    /// With every value in it, because the crate panics where it cannot read one.
    #[serde(default)]
    decoder: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(default, borrow)]
    merges: Vec<Merge<'a>>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default, borrow)]
    continuing_subword_prefix: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    end_of_word_suffix: Option<Cow<'a, str>>,
}

/// BPE has a map; other kinds have lists, which are told apart here only to be refused by name.
enum Vocab<'a> {
    Map(HashMap<Cow<'a, str>, u32>),
    List,
}

/// Two pieces that are joined: a pair, or a line with a space between them in older files.
enum Merge<'a> {
    Pair(Cow<'a, str>, Cow<'a, str>),
    Line(Cow<'a, str>),
}

/// A string that borrows from the file where it can.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

// Written by hand because serde's untagged enums would keep a copy of every entry first.
impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from pieces to ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
                let mut map = HashMap::new();
                while let Some((Text(piece), id)) = entries.next_entry()? {
                    map.insert(piece, id);
                }
                Ok(Vocab::Map(map))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Vocab::List)
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pieces;
        impl<'de> Visitor<'de> for Pieces {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two pieces")
            }

            fn visit_str<E: de::Error>(self, line: &str) -> Result<Self::Value, E> {
                Ok(Merge::Line(Cow::Owned(line.to_owned())))
            }

            fn visit_borrowed_str<E: de::Error>(self, line: &'de str) -> Result<Self::Value, E> {
                Ok(Merge::Line(Cow::Borrowed(line)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pieces: A) -> Result<Self::Value, A::Error> {
                let mut piece = |index| pieces.next_element()?.ok_or_else(|| de::Error::invalid_length(index, &self));
                let (Text(left), Text(right)) = (piece(0)?, piece(1)?);
                Ok(Merge::Pair(left, right))
            }
        }
        deserializer.deserialize_any(Pieces)
    }
}

#[derive(Deserialize)]
struct Added<'a> {
    id: u32,
    #[serde(borrow)]
    content: Cow<'a, str>,
    #[serde(default)]
    special: bool,
}

/// How a piece becomes bytes.
#[derive(Debug, Default)]
struct DecodeRules {
    replacements: Vec<(String, String)>,
    byte_fallback: bool,
    byte_level: bool,
    strip_start: usize,
}

pub(super) fn read(bytes: &[u8], vocab: usize) -> Result<Parts, TokenizerError> {
    let corrupt = |error: &dyn std::fmt::Display| TokenizerError::Corrupt(format!("tokenizer.json: {error}"));
    let file: File<'_> = serde_json::from_slice(bytes).map_err(|error| corrupt(&error))?;
    check_model(&file.model)?;
    let decoder = file.decoder.as_ref().filter(|decoder| !decoder.is_null()).map(Stage::deserialize);
    let decoder = decoder.transpose().map_err(|error| corrupt(&format!("decoder: {error}")))?;
    stages::check([file.normalizer.as_ref(), file.pre_tokenizer.as_ref(), decoder.as_ref()])?;
    let mut rules = DecodeRules::default();
    if let Some(decoder) = &decoder {
        rules.add(decoder)?;
    }
    let (pieces, specials) = table(&file, &rules, vocab)?;

    let mut encoder = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| corrupt(&error))?;
    for token in &file.added_tokens {
        if encoder.token_to_id(&token.content) != Some(token.id) {
            return Err(corrupt(&format!(
                "the added token {:?} has the id {}, which the vocabulary contradicts",
                token.content, token.id
            )));
        }
    }
    encoder.with_truncation(None).map_err(|error| corrupt(&error))?;
    encoder.with_padding(None);
    // it adds what nobody asks for, or the same once more
    encoder.with_post_processor(None::<PostProcessorWrapper>);
    Ok(Parts { encoder, pieces, specials, strip_start: rules.strip_start })
}

fn check_model(model: &Model<'_>) -> Result<(), TokenizerError> {
    let unsupported = |text: String| Err(TokenizerError::Unsupported(format!("tokenizer.json: {text}")));
    let kind = model.kind.as_deref().unwrap_or("BPE");
    let Vocab::Map(vocab) = &model.vocab else {
        return unsupported(format!("model.type is {kind:?}; only \"BPE\" is implemented"));
    };
    if kind != "BPE" {
        return unsupported(format!("model.type is {kind:?}; only \"BPE\" is implemented"));
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return unsupported("model.dropout is set, so encoding would be random; remove it".into());
    }
    for (key, value) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if value.as_deref().is_some_and(|value| !value.is_empty()) {
            return unsupported(format!("model.{key} is not implemented"));
        }
    }
    let mut joined = String::new();
    for merge in &model.merges {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_ref(), right.as_ref()),
            Merge::Line(line) => line.split_once(' ').unwrap_or((line.as_ref(), "")),
        };
        joined.clear();
        joined.extend([left, right]);
        if ![left, right, &joined].iter().all(|&piece| vocab.contains_key(piece)) {
            return Err(TokenizerError::Corrupt(format!(
                "tokenizer.json: the merge of {left:?} and {right:?} names a piece that the vocabulary lacks"
            )));
        }
    }
    Ok(())
}

impl DecodeRules {
    fn add(&mut self, stage: &Stage) -> Result<(), TokenizerError> {
        match stage.kind.as_str() {
            "Sequence" => stage.decoders.iter().try_for_each(|stage| self.add(stage))?,
            "Fuse" => {}
            "ByteFallback" => self.byte_fallback = true,
            "ByteLevel" => self.byte_level = true,
            "Replace" => match (&stage.pattern, &stage.content) {
                (Some(Pattern::String(from)), Some(to)) if !from.is_empty() => {
                    self.replacements.push((from.clone(), to.clone()));
                }
                (Some(Pattern::Regex(regex)), _) => {
                    return Err(TokenizerError::Unsupported(format!(
                        "tokenizer.json: a decoder replaces the regular expression {regex:?}; only strings are implemented"
                    )));
                }
                _ => {
                    return Err(TokenizerError::Corrupt(
                        "tokenizer.json: a Replace decoder without pattern or content".into(),
                    ));
                }
            },
            "Metaspace" => {
                self.replacements.push((stage.replacement.clone().unwrap_or_else(|| "▁".into()), " ".into()));
                if stage.prepend_scheme.as_deref() != Some("never") {
                    self.strip_start = 1;
                }
            }
            "Strip" if stage.content.as_deref() == Some(" ") && stage.stop == 0 => self.strip_start = stage.start,
            other => {
                return Err(TokenizerError::Unsupported(format!(
                    "tokenizer.json: the decoder {other:?} is not implemented"
                )));
            }
        }
        Ok(())
    }

    fn bytes(&self, piece: &str) -> Vec<u8> {
        if let Some(byte) = fallback_byte(piece).filter(|_| self.byte_fallback) {
            return vec![byte];
        }
        if self.byte_level {
            let bytes: Option<Vec<u8>> = piece.chars().map(byte_of_visible).collect();
            return bytes.unwrap_or_else(|| piece.as_bytes().to_vec());
        }
        let mut text = Cow::Borrowed(piece);
        for (from, to) in &self.replacements {
            if text.contains(from.as_str()) {
                text = Cow::Owned(text.replace(from.as_str(), to));
            }
        }
        text.into_owned().into_bytes()
    }
}

fn table(file: &File<'_>, rules: &DecodeRules, vocab: usize) -> Result<(Pieces, HashMap<String, u32>), TokenizerError> {
    let mut pieces = Pieces::default();
    let mut specials = HashMap::new();
    let added: HashMap<&str, &Added<'_>> =
        file.added_tokens.iter().map(|token| (token.content.as_ref(), token)).collect();
    for token in added.values() {
        pieces.insert(token.id, &token.content, &rules.added_bytes(&token.content), token.special, vocab)?;
        if token.special {
            specials.insert(token.content.clone().into_owned(), token.id);
        }
    }
    if let Vocab::Map(map) = &file.model.vocab {
        for (piece, &id) in map {
            if added.get(piece.as_ref()).is_none_or(|token| token.id != id) {
                pieces.insert(id, piece, &rules.bytes(piece), false, vocab)?;
            }
        }
    }
    Ok((pieces, specials))
}

impl DecodeRules {
    /// Added tokens are text as they stand, except for the replacements.
    fn added_bytes(&self, content: &str) -> Vec<u8> {
        if self.byte_level { content.as_bytes().to_vec() } else { self.bytes(content) }
    }
}

/// The byte that a character of GPT-2's visible alphabet stands for: printable Latin-1 characters are themselves, the
/// other 68 bytes are written as U+0100 and following, in order.
fn byte_of_visible(character: char) -> Option<u8> {
    let visible = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(character);
    if let Ok(byte) = u8::try_from(code) {
        return visible(byte).then_some(byte);
    }
    let rank = usize::try_from(code.checked_sub(0x100)?).ok()?;
    (0..=255u8).filter(|&byte| !visible(byte)).nth(rank)
}
