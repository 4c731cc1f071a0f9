//! The guide of one answer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::matcher::{Matcher, Place, Stuck};
use super::pool::{Done, Origin};
use super::thinking::Reasoning;
use super::{ConstraintError, Grammar};
use crate::engine::{Guide, GuideError, Next};

/// Tokens of a resumed answer between two looks at what may come next. The work between two looks is limited.
const PIECE: usize = 16;

/// Follows one answer.
pub(super) struct Answer {
    grammar: Arc<Grammar>,
    /// While it thinks.
    reasoning: Option<Reasoning>,
    state: State,
}

enum State {
    /// It said nothing under its grammar yet, and has no matcher of its own: whoever waits in the queue takes no memory.
    Fresh,
    /// It is known what may come next.
    At(Matcher, Place),
    /// That is being worked out, and has been waited for for so long.
    Moving(Receiver<Done>, Duration),
    /// That cannot be worked out.
    Lost(GuideError),
}

impl Answer {
    /// Of an answer that goes on after `emitted`.
    pub(super) fn new(grammar: Arc<Grammar>, thinks: bool, emitted: &[u32]) -> Result<Self, ConstraintError> {
        let mut reasoning = thinks.then(Reasoning::default);
        let mut thought = 0;
        while let Some(thinking) = &mut reasoning
            && let Some(&id) = emitted.get(thought)
        {
            thought += 1;
            if thinking.ends(&grammar.vocabulary.tokenizer, id) {
                reasoning = None;
            }
        }
        let state = match &emitted[thought..] {
            [] => State::Fresh,
            said => {
                let (matcher, place) = go_on(&grammar, thought, said)?;
                State::At(matcher, place)
            }
        };
        Ok(Self { grammar, reasoning, state })
    }

    /// Waits for what is being worked out, until some moment if one is given. Whether that is over.
    fn settle(&mut self, until: Option<Instant>) -> bool {
        let State::Moving(done, waited) = &mut self.state else { return true };
        let begun = Instant::now();
        let done = match until {
            None => done.recv().map_err(|_gone| RecvTimeoutError::Disconnected),
            Some(until) => done.recv_timeout(until.saturating_duration_since(begun)),
        };
        *waited += begun.elapsed();
        if matches!(done, Err(RecvTimeoutError::Timeout)) {
            return false;
        }
        let observer = &self.grammar.observer;
        observer.waited(*waited);
        self.state = match done {
            Ok(Done { matcher, place: Ok(place), took }) => {
                observer.masked(took);
                State::At(matcher, place)
            }
            Ok(Done { place: Err(error), .. }) => State::lost(&error),
            Err(_gone) => State::lost(&interpreter_failed()),
        };
        true
    }
}

/// The place behind tokens that an answer said after it `thought` so many.
fn go_on(grammar: &Grammar, thought: usize, said: &[u32]) -> Result<(Matcher, Place), ConstraintError> {
    if let Some(there) = hurry(grammar, said) {
        return Ok(there);
    }
    // Token by token, as it was written, it takes no more work at a step than then.
    let (mut matcher, mut place) = (grammar.matcher.fork(), grammar.first.clone());
    for (at, &token) in said.iter().enumerate() {
        if !place.allows(token) {
            let at = thought + at;
            let sentence = format!("has at {at} the token {token}, which the constraint does not allow");
            return Err(ConstraintError::Refused(sentence));
        }
        let moved = matcher.advance(&[token]).and_then(|()| matcher.look(&grammar.vocabulary));
        place = moved.map_err(|error| ConstraintError::Refused(format!("cannot be gone on with: {error}")))?;
    }
    Ok((matcher, place))
}

/// The same in long steps; `None` when one goes wrong, for whatever reason.
fn hurry(grammar: &Grammar, said: &[u32]) -> Option<(Matcher, Place)> {
    let (mut matcher, mut place) = (grammar.matcher.fork(), grammar.first.clone());
    for piece in said.chunks(PIECE) {
        if !matcher.allows(piece) {
            return None;
        }
        matcher.advance(piece).ok()?;
        place = matcher.look(&grammar.vocabulary).ok()?;
    }
    Some((matcher, place))
}

impl State {
    fn lost(stuck: &Stuck) -> Self {
        let begin = "sampling.constraint cannot be followed any further";
        Self::Lost(match stuck {
            Stuck::Nothing => GuideError::Nothing(format!("{begin}: {stuck}; send one that leads on from everywhere")),
            Stuck::Failed(_) => GuideError::Failed(format!("{begin}: {stuck}")),
        })
    }
}

fn interpreter_failed() -> Stuck {
    Stuck::Failed("the grammar's interpreter failed".to_owned())
}

impl Guide for Answer {
    fn wait(&mut self, until: Instant) -> bool {
        self.reasoning.is_some() || self.settle(Some(until))
    }

    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        if let Some(reasoning) = self.reasoning {
            return Ok(Next::Free(self.grammar.vocabulary.crossings.after(reasoning)));
        }
        self.settle(None);
        let place = match &self.state {
            State::Fresh => &self.grammar.first,
            State::At(_, place) => place,
            State::Lost(error) => return Err(error.clone()),
            State::Moving(..) => return Err(GuideError::Failed(interpreter_failed().to_string())),
        };
        Ok(match place {
            Place::Within(mask) => Next::Within(mask),
            Place::Over => Next::Over(&self.grammar.vocabulary.ends),
        })
    }

    fn advance(&mut self, token: u32) {
        if let Some(reasoning) = &mut self.reasoning {
            if reasoning.ends(&self.grammar.vocabulary.tokenizer, token) {
                self.reasoning = None;
            }
            return;
        }
        self.settle(None);
        let state = std::mem::replace(
            &mut self.state,
            State::lost(&Stuck::Failed("the engine went on behind its end".to_owned())),
        );
        let from = match state {
            State::Fresh => Origin::Beginning(Arc::clone(&self.grammar)),
            State::At(matcher, Place::Within(_)) => Origin::Place(matcher),
            _ => return,
        };
        let vocabulary = Arc::clone(&self.grammar.vocabulary);
        self.state = State::Moving(self.grammar.pool.advance(from, token, vocabulary), Duration::ZERO);
    }
}
