//! What narrows the tokens of an answer from one to the next: the engine's view of a grammar.

use std::time::Instant;

use crate::sampling::Mask;

/// Follows one answer and says what may come next. The engine tells it of each token as soon as it is chosen, and asks
/// when the next is to be chosen, a forward pass later. An answer whose guide is not ready then is held back while others go on.
pub trait Guide: Send {
    /// Waits until it is known what may come next, or that this will never be known, but not beyond a moment; one that is over
    /// already asks for no waiting. Whether [`next`](Self::next) answers at once.
    fn wait(&mut self, until: Instant) -> bool;

    /// What may come next. Waits until that is known, however long that takes.
    ///
    /// # Errors
    /// [`GuideError`]; it knows nothing more from then on.
    fn next(&mut self) -> Result<Next<'_>, GuideError>;

    /// Hears which token was chosen. Does not wait.
    fn advance(&mut self, token: u32);
}

/// See [`Guide::next`].
#[derive(Clone, Copy, Debug)]
pub enum Next<'a> {
    /// Any token but these, and no end of sequence.
    Free(&'a [u32]),
    /// These. The end of sequence is one of them where the answer may end.
    Within(&'a Mask),
    /// The answer is complete: only an end of sequence may come, and these are they.
    Over(&'a Mask),
}

/// Why a guide does not know what may come next. A sentence for the caller.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum GuideError {
    /// What the caller asked for lets nothing come next.
    #[error("{0}")]
    Nothing(String),
    /// It could not find out.
    #[error("{0}")]
    Failed(String),
}
