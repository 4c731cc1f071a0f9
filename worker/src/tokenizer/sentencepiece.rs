//! `tokenizer.model`: a SentencePiece BPE model.
//!
//! SentencePiece merges the adjacent pair whose concatenation is the piece of the highest score. The same ids come from
//! byte-pair merges ranked by that score, so the encoder of the `tokenizers` crate serves this form too.

use std::{collections::HashMap, path::Path};

use prost::Message;
use tokenizers::{
    AddedToken, NormalizerWrapper,
    models::bpe::{BPE, Vocab},
    normalizers::{Prepend, Replace, Sequence, Strip, replace::ReplacePattern},
};

use super::{
    AddedName, Parts, TokenizerError,
    pieces::{Pieces, fallback_byte},
};

/// The character that stands for a space in pieces.
const SPACE: char = '▁';
/// The most bytes that are looked up to find how pieces are made of each other: the square of a piece's length for each.
const LOOK_UP_LIMIT: u64 = 1 << 31;
/// The most pairs of pieces that make a piece, and the most bytes of all of them.
const MERGE_LIMIT: usize = 1 << 21;
const MERGE_BYTES_LIMIT: usize = 64 << 20;

/// `sentencepiece.ModelProto`, the fields that matter.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(enumeration = "PieceKind", optional, tag = "3", default = "Normal")]
    kind: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
enum PieceKind {
    Unspecified = 0,
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    /// 1 unigram, 2 BPE, 3 word, 4 char.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
}

/// Absent booleans are true here, as in SentencePiece.
#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

impl Piece {
    fn text(&self) -> &str {
        self.piece.as_deref().unwrap_or_default()
    }
}

fn unsupported(text: String) -> TokenizerError {
    TokenizerError::Unsupported(format!("tokenizer.model: {text}"))
}

fn corrupt(error: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Corrupt(format!("tokenizer.model: {error}"))
}

pub(super) fn read(bytes: &[u8], added: &[AddedName], vocab: usize) -> Result<Parts, TokenizerError> {
    let proto = ModelProto::decode(bytes).map_err(|_| corrupt("not a SentencePiece model, or cut short"))?;
    check(&proto, vocab)?;
    let byte_fallback = proto.trainer.as_ref().and_then(|trainer| trainer.byte_fallback).unwrap_or(false);
    let dummy_prefix = proto.normalizer.as_ref().is_none_or(|normalizer| normalizer.add_dummy_prefix.unwrap_or(true));

    let mut ids: HashMap<String, u32> = HashMap::with_capacity(proto.pieces.len());
    for (id, piece) in (0u32..).zip(&proto.pieces) {
        if piece.text().is_empty() {
            return Err(corrupt(format!("the piece with the id {id} is empty")));
        }
        if let Some(other) = ids.insert(piece.text().to_owned(), id) {
            return Err(corrupt(format!("the ids {other} and {id} are both the piece {:?}", piece.text())));
        }
    }
    let mut extra: Vec<(String, u32, bool)> = Vec::new();
    for token in added {
        match (ids.get(&token.name).copied(), token.id) {
            (Some(id), Some(other)) if id != other => {
                return Err(corrupt(format!(
                    "{:?} has the id {id} there and {other} in added_tokens.json or tokenizer_config.json",
                    token.name
                )));
            }
            (Some(_), _) => {}
            (None, Some(id)) => {
                ids.insert(token.name.clone(), id);
                extra.push((token.name.clone(), id, token.special));
            }
            (None, None) => {}
        }
    }
    let named_special = |name: &str| added.iter().any(|token| token.special && token.name == name);

    let mut pieces = Pieces::default();
    let mut specials = HashMap::new();
    let mut atoms = Vec::new();
    for (id, piece) in (0u32..).zip(&proto.pieces) {
        let text = piece.text();
        let kind = piece.kind();
        let special = matches!(kind, PieceKind::Unknown | PieceKind::Control) || named_special(text);
        let content = match fallback_byte(text).filter(|_| kind == PieceKind::Byte) {
            Some(byte) => vec![byte],
            None => text.replace(SPACE, " ").into_bytes(),
        };
        pieces.insert(id, text, &content, special, vocab)?;
        if special || kind == PieceKind::UserDefined {
            atoms.push(AddedToken::from(text, special).normalized(!special));
        }
        if special {
            specials.insert(text.to_owned(), id);
        }
    }
    for (name, id, special) in extra {
        pieces.insert(id, &name, name.as_bytes(), special, vocab)?;
        atoms.push(AddedToken::from(name.clone(), special).normalized(!special));
        if special {
            specials.insert(name, id);
        }
    }

    let merges = merges(&proto.pieces, &ids)?;
    let unknown =
        proto.pieces.iter().find(|piece| piece.kind() == PieceKind::Unknown).map(|piece| piece.text().to_owned());
    let mut model = BPE::builder()
        .vocab_and_merges(ids.into_iter().collect::<Vocab>(), merges)
        .byte_fallback(byte_fallback)
        .fuse_unk(true);
    if let Some(unknown) = unknown.filter(|_| !byte_fallback) {
        model = model.unk_token(unknown);
    }
    let mut encoder = tokenizers::Tokenizer::new(model.build().map_err(corrupt)?);
    encoder.with_normalizer(Some(normalizer(&proto, dummy_prefix)?)).map_err(corrupt)?;
    encoder.add_tokens(atoms).map_err(corrupt)?;
    Ok(Parts { encoder, pieces, specials, strip_start: usize::from(dummy_prefix) })
}

fn check(proto: &ModelProto, vocab: usize) -> Result<(), TokenizerError> {
    if proto.pieces.is_empty() {
        return Err(corrupt("it holds no pieces"));
    }
    if proto.pieces.len() > vocab {
        return Err(corrupt(format!(
            "it holds {} pieces, but the model's vocab_size is {vocab}: tokenizer and config.json belong to different \
             models",
            proto.pieces.len()
        )));
    }
    let trainer = proto.trainer.clone().unwrap_or_default();
    match trainer.model_type.unwrap_or(1) {
        2 => {}
        1 => return Err(unsupported("it is a unigram model; only BPE is implemented".into())),
        other => return Err(unsupported(format!("its model type is {other}; only BPE (2) is implemented"))),
    }
    if trainer.treat_whitespace_as_suffix.unwrap_or(false) {
        return Err(unsupported("treat_whitespace_as_suffix is not implemented".into()));
    }
    let normalizer = proto.normalizer.clone().unwrap_or_default();
    if normalizer.precompiled_charsmap.is_some_and(|map| !map.is_empty()) {
        return Err(unsupported(format!(
            "its normalization {:?} is not implemented; use a model folder that has tokenizer.json",
            normalizer.name.unwrap_or_default()
        )));
    }
    if !normalizer.escape_whitespaces.unwrap_or(true) {
        return Err(unsupported("escape_whitespaces = false is not implemented".into()));
    }
    Ok(())
}

/// Every pair of pieces whose concatenation is a piece, the best-scored concatenation first.
fn merges(pieces: &[Piece], ids: &HashMap<String, u32>) -> Result<Vec<(String, String)>, TokenizerError> {
    let joinable = |text: &str| {
        let piece = ids.get(text).and_then(|&id| pieces.get(id as usize));
        piece.is_some_and(|piece| matches!(piece.kind(), PieceKind::Normal | PieceKind::Unused)).then(|| ids[text])
    };
    let too_long =
        || corrupt("its pieces are so long, and made of each other so often, that it is no tokenizer of a text");
    let (mut ranked, mut looked_up, mut bytes) = (Vec::new(), 0u64, 0usize);
    for (id, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.kind() == PieceKind::Normal) {
        let text = piece.text();
        looked_up = looked_up.saturating_add((text.len() as u64).saturating_pow(2));
        if looked_up > LOOK_UP_LIMIT {
            return Err(too_long());
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (joinable(left), joinable(right)) {
                ranked.push((piece.score.unwrap_or(0.0), id, left_id, right_id, left, right));
                bytes += text.len();
            }
        }
        if ranked.len() > MERGE_LIMIT || bytes > MERGE_BYTES_LIMIT {
            return Err(too_long());
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    Ok(ranked.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

fn normalizer(proto: &ModelProto, dummy_prefix: bool) -> Result<NormalizerWrapper, TokenizerError> {
    let replace = |pattern: ReplacePattern, content: &str| {
        Replace::new(pattern, content).map(NormalizerWrapper::Replace).map_err(corrupt)
    };
    let mut stages = Vec::new();
    if proto.normalizer.as_ref().is_none_or(|normalizer| normalizer.remove_extra_whitespaces.unwrap_or(true)) {
        stages.push(NormalizerWrapper::StripNormalizer(Strip::new(true, true)));
        stages.push(replace(ReplacePattern::Regex(" {2,}".into()), " ")?);
    }
    if dummy_prefix {
        stages.push(NormalizerWrapper::Prepend(Prepend::new("▁".into())));
    }
    stages.push(replace(ReplacePattern::String(" ".into()), "▁")?);
    Ok(NormalizerWrapper::Sequence(Sequence::new(stages)))
}

/// Tokens that a folder names beside its `tokenizer.model`: `added_tokens.json`, and the tokens of
/// `tokenizer_config.json` (`added_tokens_decoder`, `*_token`, `additional_special_tokens`).
pub(super) fn added_names(folder: &Path) -> Result<Vec<AddedName>, TokenizerError> {
    let mut names: Vec<AddedName> = Vec::new();
    let mut note = |name: &str, id: Option<u32>, special: bool| match names.iter_mut().find(|known| known.name == name)
    {
        Some(known) => {
            known.id = known.id.or(id);
            known.special |= special;
        }
        None => names.push(AddedName { name: name.to_owned(), id, special }),
    };
    let as_id = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    if let Some(serde_json::Value::Object(tokens)) = read_json(&folder.join("added_tokens.json"))? {
        for (name, id) in &tokens {
            let id = as_id(id).ok_or_else(|| {
                TokenizerError::Corrupt(format!("added_tokens.json: the id of {name:?} is {id}, not a token id"))
            })?;
            note(name, Some(id), true);
        }
    }
    if let Some(config) = read_json(&folder.join("tokenizer_config.json"))? {
        let entries = config.get("added_tokens_decoder").and_then(serde_json::Value::as_object);
        for (id, token) in entries.into_iter().flatten() {
            let id = id.parse().map_err(|_| {
                TokenizerError::Corrupt(format!("tokenizer_config.json: added_tokens_decoder has the id {id:?}"))
            })?;
            if let Some(name) = token.get("content").and_then(serde_json::Value::as_str) {
                note(name, Some(id), token.get("special").and_then(serde_json::Value::as_bool).unwrap_or(false));
            }
        }
        for (key, value) in config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token")) {
            if !key.starts_with("add_")
                && let Some(name) = token_text(value)
            {
                note(name, None, true);
            }
        }
        let lists = ["additional_special_tokens", "extra_special_tokens"].map(|key| config.get(key));
        for name in lists.into_iter().flatten().filter_map(serde_json::Value::as_array).flatten().filter_map(token_text)
        {
            note(name, None, true);
        }
    }
    Ok(names)
}

/// A token is written as a string or as an object with its content.
fn token_text(value: &serde_json::Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>, TokenizerError> {
    let Some(bytes) = super::read(path)? else { return Ok(None) };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|error| TokenizerError::Corrupt(format!("{name}: {error}")))
}
