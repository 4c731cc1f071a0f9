//! Answers that follow a grammar: a JSON Schema, a regular expression, a Lark grammar, or a list of choices.
//!
//! llguidance says for each place of an answer which tokens may stand there. [`Grammars`] compiles what clients ask for and
//! remembers the last few; a [`Grammar`] starts a [`Guide`] for each answer. The work on masks is done on threads of its
//! own, from the moment a token is chosen, beside the next forward pass; the engine waits for it a little when it samples, and
//! then goes on with the other answers.
//!
//! - `vocabulary`: the tokenizer's pieces as llguidance's trie; `compile`: text to grammar, within limits; `size`: the limits
//!   that llguidance checks too late; `turns`: how much is compiled at once;
//! - `matcher`: one place in one answer; `pool`: the threads; `answer`: the guide of one answer;
//! - `thinking`: where the reasoning of a thinking model ends, which no grammar narrows.

mod answer;
mod compile;
mod matcher;
mod pool;
mod size;
mod thinking;
mod turns;
mod vocabulary;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::Guide;
use crate::tokenizer::Tokenizer;
use answer::Answer;
use compile::compile;
use matcher::{Matcher, Place};
use pool::Pool;
use turns::Turns;
use vocabulary::Vocabulary;

/// The longest JSON Schema or grammar, and all choices together, in bytes.
pub const MAX_BYTES: usize = 64 << 10;
/// The longest regular expression, in bytes.
pub const MAX_REGEX_BYTES: usize = 8 << 10;
/// The most choices.
pub const MAX_CHOICES: usize = 1024;
/// Compiled grammars that are remembered.
const REMEMBERED: usize = 16;

/// What an answer must be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Constraint {
    /// JSON that fits this JSON Schema, which is JSON text itself.
    JsonSchema(String),
    /// A JSON object.
    JsonObject,
    /// Text that matches this regular expression as a whole.
    Regex(String),
    /// A sentence of this grammar, in llguidance's variant of Lark.
    Grammar(String),
    /// One of these.
    Choice(Vec<String>),
}

impl Constraint {
    /// The field in which clients send it.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "json_schema",
            Self::JsonObject => "json_object",
            Self::Regex(_) => "regex",
            Self::Grammar(_) => "grammar",
            Self::Choice(_) => "choice",
        }
    }
}

/// Why a constraint is not followed. A sentence for the caller.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConstraintError {
    /// It makes no sense, is too large, or allows no answer. The sentence stands behind the name of the field.
    #[error("{0}")]
    Refused(String),
    /// The server could not, whatever was asked for.
    #[error("{0}")]
    Failed(String),
    /// Too many others are being compiled.
    #[error("the server is compiling as many constraints as it can; retry")]
    Busy,
}

/// Hears how long the work took. Called on the threads that do it, so it must not block.
pub trait Observer: Send + Sync + 'static {
    /// A grammar was compiled.
    fn compiled(&self, took: Duration);
    /// What may come next was worked out, for one token of one answer.
    fn masked(&self, took: Duration);
    /// The engine waited so long for that, mostly not at all.
    fn waited(&self, waited: Duration);
}

/// Counts nothing.
impl Observer for () {
    fn compiled(&self, _: Duration) {}
    fn masked(&self, _: Duration) {}
    fn waited(&self, _: Duration) {}
}

/// The grammars of one model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    /// Columns of a row of logits.
    vocab: usize,
    eos: Arc<[u32]>,
    /// Built for the first grammar: most servers never see one.
    vocabulary: Mutex<Option<Arc<Vocabulary>>>,
    pool: Mutex<Option<Arc<Pool>>>,
    observer: Arc<dyn Observer>,
    turns: Turns,
    /// The latest last.
    remembered: Mutex<VecDeque<(blake3::Hash, Arc<Grammar>)>>,
}

impl Grammars {
    /// For a model with so many logits, whose answers end with the tokens `eos`.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab: usize, eos: Arc<[u32]>, observer: Arc<dyn Observer>) -> Self {
        let (vocabulary, pool, remembered) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { tokenizer, vocab, eos, vocabulary, pool, observer, turns: Turns::default(), remembered }
    }

    /// Compiles a constraint, or remembers it. Takes milliseconds and up to a second, the first time longer, and waits while
    /// others are compiled.
    ///
    /// # Errors
    /// [`ConstraintError`] when it makes no sense, is too large, allows no answer, or too many others wait.
    pub fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, ConstraintError> {
        if self.eos.is_empty() {
            let sentence = "this model names no end-of-sequence token with which a constrained answer could end";
            return Err(ConstraintError::Refused(sentence.to_owned()));
        }
        let key = key(constraint);
        if let Some(grammar) = self.recall(key) {
            return Ok(grammar);
        }
        let _turn = self.turns.take().ok_or(ConstraintError::Busy)?;
        // Another request may have asked for the same meanwhile.
        if let Some(grammar) = self.recall(key) {
            return Ok(grammar);
        }
        let begun = Instant::now();
        let grammar = Arc::new(self.compile_afresh(constraint)?);
        self.observer.compiled(begun.elapsed());
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        while remembered.len() >= REMEMBERED {
            remembered.pop_front();
        }
        remembered.push_back((key, Arc::clone(&grammar)));
        Ok(grammar)
    }

    fn recall(&self, key: blake3::Hash) -> Option<Arc<Grammar>> {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let at = remembered.iter().position(|(known, _)| *known == key)?;
        let found = remembered.remove(at)?;
        let grammar = Arc::clone(&found.1);
        remembered.push_back(found);
        Some(grammar)
    }

    fn compile_afresh(&self, constraint: &Constraint) -> Result<Grammar, ConstraintError> {
        // What clients send decides how deep the work recurses.
        on_a_large_stack(|| {
            size::check(constraint)?;
            let pool = built(&self.pool, Pool::start)?;
            let vocabulary = built(&self.vocabulary, || Vocabulary::new(&self.tokenizer, self.vocab, &self.eos))?;
            let (matcher, first) = compile(&vocabulary, constraint)?;
            Ok(Grammar { matcher, first, vocabulary, pool, observer: Arc::clone(&self.observer) })
        })
    }
}

/// What is made once, and again only when that failed.
fn built<T>(
    place: &Mutex<Option<Arc<T>>>,
    make: impl FnOnce() -> Result<T, ConstraintError>,
) -> Result<Arc<T>, ConstraintError> {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(there) = &*place {
        return Ok(Arc::clone(there));
    }
    let made = Arc::new(make()?);
    *place = Some(Arc::clone(&made));
    Ok(made)
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("vocab", &self.vocab).finish_non_exhaustive()
    }
}

/// A compiled constraint. Starts guides.
pub struct Grammar {
    /// At the beginning; never moved on.
    matcher: Matcher,
    /// What may come there.
    first: Place,
    vocabulary: Arc<Vocabulary>,
    pool: Arc<Pool>,
    observer: Arc<dyn Observer>,
}

impl Grammar {
    /// The guide of an answer that goes on after `emitted`. An answer that `thinks` is free until its reasoning ends.
    ///
    /// # Errors
    /// [`ConstraintError`] when those tokens are not what the constraint allows.
    pub fn start(self: &Arc<Self>, thinks: bool, emitted: &[u32]) -> Result<Box<dyn Guide>, ConstraintError> {
        let start = || Answer::new(Arc::clone(self), thinks, emitted);
        // Going through what was emitted recurses as deep as answering does, for which the caller's stack may be too small.
        let answer = if emitted.is_empty() { start()? } else { on_a_large_stack(start)? };
        Ok(Box::new(answer))
    }
}

/// Runs work that may recurse deeply on a thread of its own. A panic in it becomes an error.
fn on_a_large_stack<T: Send>(work: impl FnOnce() -> Result<T, ConstraintError> + Send) -> Result<T, ConstraintError> {
    const STACK: usize = 256 << 20;
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("ernie-grammar".to_owned()).stack_size(STACK);
        let thread = builder.spawn_scoped(scope, work);
        let thread = thread.map_err(|error| unexpected(&format!("the system gave no thread: {error}")))?;
        thread.join().unwrap_or_else(|_panic| Err(unexpected("the interpreter of grammars failed on it")))
    })
}

fn unexpected(what: &str) -> ConstraintError {
    ConstraintError::Failed(format!("the constraint cannot be followed: {what}"))
}

fn key(constraint: &Constraint) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(constraint.field());
    match constraint {
        Constraint::JsonObject => {}
        Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Grammar(text) => add(text),
        Constraint::Choice(choices) => choices.iter().for_each(|choice| add(choice)),
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests;
