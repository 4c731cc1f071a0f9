//! The bytes that each token id stands for.

use super::TokenizerError;

/// One id's entry.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    start: u32,
    len: u32,
    present: bool,
    special: bool,
}

/// Bytes by id, in one allocation.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    entries: Vec<Entry>,
    bytes: Vec<u8>,
    longest: usize,
}

impl Pieces {
    /// Enters a token.
    ///
    /// # Errors
    /// [`TokenizerError::Corrupt`] when the id is not below `vocab` or is taken.
    pub(super) fn insert(
        &mut self,
        id: u32,
        name: &str,
        bytes: &[u8],
        special: bool,
        vocab: usize,
    ) -> Result<(), TokenizerError> {
        let index = id as usize;
        if index >= vocab {
            return Err(TokenizerError::Corrupt(format!(
                "the tokenizer gives {name:?} the id {id}, but the model's vocab_size is {vocab}: \
                 tokenizer and config.json belong to different models"
            )));
        }
        if index >= self.entries.len() {
            self.entries.resize(index + 1, Entry::default());
        }
        if self.entries[index].present {
            return Err(TokenizerError::Corrupt(format!(
                "the tokenizer gives the id {id} to {name:?} and to another token"
            )));
        }
        let too_large = |_| TokenizerError::Corrupt("the tokenizer's tokens are longer than 4 GiB together".into());
        self.entries[index] = Entry {
            start: u32::try_from(self.bytes.len()).map_err(too_large)?,
            len: u32::try_from(bytes.len()).map_err(too_large)?,
            present: true,
            special,
        };
        self.longest = self.longest.max(bytes.len());
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The bytes of an id; empty when it has no piece, or is special and those are skipped.
    pub(super) fn bytes(&self, id: u32, skip_special: bool) -> &[u8] {
        match self.entries.get(id as usize) {
            Some(entry) if entry.present && !(skip_special && entry.special) => {
                &self.bytes[entry.start as usize..(entry.start + entry.len) as usize]
            }
            _ => &[],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn longest(&self) -> usize {
        self.longest
    }
}

/// The byte that a byte-fallback piece such as `<0x0A>` stands for.
pub(super) fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Appends bytes as text; every byte that is no part of a UTF-8 character becomes U+FFFD, as SentencePiece does it.
pub fn lossy(bytes: &[u8], text: &mut String) {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
}
