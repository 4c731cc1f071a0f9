//! Text to token ids and back.
//!
//! A model folder holds `tokenizer.json` (read by the `tokenizers` crate) or, in first revisions and Paddle folders,
//! `tokenizer.model` (SentencePiece, see `sentencepiece`). Both become one [`Tokenizer`]: an encoder, and a table of
//! the bytes that each id stands for. Decoding is concatenation of those bytes, so that a stream ([`TextStream`]) and a
//! whole text are decoded by the same rule, and every token has bytes of its own.

mod fast;
mod pieces;
mod sentencepiece;
mod stages;
mod stream;

use std::{
    collections::HashMap,
    fs,
    io::{ErrorKind, Read},
    path::Path,
};

use ernie_proto::failure::Reason;

pub use pieces::lossy;
pub use stream::{Stopped, TextStream};

use pieces::Pieces;

/// Largest tokenizer file that is read: ten times the largest published one.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Why a tokenizer is refused, or a text cannot be encoded. The text is a sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// No tokenizer file in the folder.
    #[error("{0}")]
    Missing(String),
    /// A kind of tokenizer that is not implemented.
    #[error("{0}")]
    Unsupported(String),
    /// A file that contradicts itself or the model's vocabulary.
    #[error("{0}")]
    Corrupt(String),
    /// The encoder failed on a text.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

impl TokenizerError {
    /// The reason with which a worker gives up.
    pub fn reason(&self) -> Reason {
        match self {
            TokenizerError::Missing(_) => Reason::ModelNotFound,
            TokenizerError::Unsupported(_) => Reason::UnsupportedModel,
            TokenizerError::Corrupt(_) => Reason::CorruptModel,
            TokenizerError::Encode(_) => Reason::Internal,
        }
    }
}

/// What the two file forms are read into.
struct Parts {
    encoder: tokenizers::Tokenizer,
    pieces: Pieces,
    specials: HashMap<String, u32>,
    /// Leading spaces that decoding a whole text removes.
    strip_start: usize,
}

/// A model's tokenizer. Cheap to share behind an `Arc`; encoding takes `&self`.
pub struct Tokenizer(Parts);

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("pieces", &self.0.pieces.len()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or `tokenizer.model` where that is absent, and checks that every id is below `vocab`,
    /// the number of rows of the model's embedding.
    ///
    /// # Errors
    /// [`TokenizerError`]; nothing large is allocated before the sizes are checked.
    pub fn load(folder: &Path, vocab: usize) -> Result<Self, TokenizerError> {
        if let Some(bytes) = read(&folder.join("tokenizer.json"))? {
            return Self::from_json(&bytes, vocab);
        }
        if let Some(bytes) = read(&folder.join("tokenizer.model"))? {
            let names = sentencepiece::added_names(folder)?;
            return Self::from_sentencepiece(&bytes, &names, vocab);
        }
        Err(TokenizerError::Missing(format!(
            "{} has neither tokenizer.json nor tokenizer.model: copy one of them from the model's hub page",
            folder.display()
        )))
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn from_json(bytes: &[u8], vocab: usize) -> Result<Self, TokenizerError> {
        fast::read(bytes, vocab).map(Self)
    }

    /// Reads the bytes of a `tokenizer.model`; `added` are tokens beside it, as in `added_tokens.json`.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn from_sentencepiece(bytes: &[u8], added: &[AddedName], vocab: usize) -> Result<Self, TokenizerError> {
        sentencepiece::read(bytes, added, vocab).map(Self)
    }

    /// Token ids of a text. Special tokens in the text are recognised; none is added.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] when a regular expression of the tokenizer gives up on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding =
            self.0.encoder.encode_fast(text, false).map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids. Ids without a piece are nothing; every byte that is no part of a UTF-8 character becomes
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.0.pieces.bytes(id, skip_special)).copied().collect();
        let mut text = String::new();
        lossy(&bytes, &mut text);
        let spaces = text.bytes().take(self.0.strip_start).take_while(|&byte| byte == b' ').count();
        text.drain(..spaces);
        text
    }

    /// The bytes that a token stands for, possibly a part of a character; empty for ids without a piece.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.0.pieces.bytes(id, false)
    }

    /// The same, but empty for special tokens: what a reader sees.
    pub fn visible_bytes(&self, id: u32) -> &[u8] {
        self.0.pieces.bytes(id, true)
    }

    /// Id of a special token such as `<|end_of_sentence|>`.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.0.specials.get(name).copied()
    }

    /// One more than the largest id that has a piece.
    pub fn len(&self) -> usize {
        self.0.pieces.len()
    }

    /// Whether there is no piece at all.
    pub fn is_empty(&self) -> bool {
        self.0.pieces.len() == 0
    }

    /// Bytes of the longest piece: a text of `n` bytes has at least `n / longest` tokens.
    pub fn longest_piece(&self) -> usize {
        self.0.pieces.longest()
    }
}

/// A token that stands beside a `tokenizer.model`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AddedName {
    /// Its text.
    pub name: String,
    /// Its id, when the file that names it gives one.
    pub id: Option<u32>,
    /// Whether decoding for readers leaves it out.
    pub special: bool,
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let describe =
        |error: std::io::Error| TokenizerError::Corrupt(format!("{} cannot be read: {error}", path.display()));
    match fs::metadata(path) {
        Ok(data) if data.is_file() => {}
        // opening a pipe would wait for somebody who writes
        Ok(_) => return Err(TokenizerError::Corrupt(format!("{} is not a regular file", path.display()))),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(describe(error)),
    }
    let file = fs::File::open(path).map_err(describe)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(describe)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(TokenizerError::Corrupt(format!(
            "{} is larger than {} MiB: it is no tokenizer",
            path.display(),
            MAX_FILE_BYTES >> 20
        )));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
