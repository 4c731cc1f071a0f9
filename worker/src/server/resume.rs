//! Answers that go on after they were cut off: what a client says of them, checked, and replayed.

use ernie_proto::ernie::v1;
use tonic::Status;

use super::{
    request::check_ids,
    status::{invalid, quoted},
    text::AnswerText,
};
use crate::{engine::FinishReason, tokenizer::Tokenizer};

/// The largest index of a choice.
const LAST_CHOICE: u32 = 63;

/// An answer that was cut off.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Resume {
    /// Its tokens that have arrived.
    pub(super) emitted: Vec<u32>,
    /// Its index among the choices.
    pub(super) choice: u32,
    /// What else has arrived.
    pub(super) delivered: Delivered,
}

/// How much of each field of an answer has arrived.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Delivered {
    /// Bytes of text.
    pub(super) text: u64,
    /// Bytes of reasoning.
    pub(super) reasoning: u64,
    /// Tool calls.
    pub(super) tool_calls: u32,
}

/// What an answer says up to where it was cut off.
pub(super) struct Replayed {
    /// Ready for the next token.
    pub(super) text: AnswerText,
    /// Of its fields, what has not arrived.
    pub(super) delta: v1::Delta,
    /// How its tokens ended it, if they did.
    pub(super) end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// With the stop string of this index.
    StopString(usize),
    /// As the engine would say.
    Finished(FinishReason),
}

/// Tokens that end an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends<'a> {
    /// End of sequence; empty when ignored.
    pub(super) eos: &'a [u32],
    /// The request's own.
    pub(super) stop: &'a [u32],
}

/// Checks what a client says of an answer that was cut off, against this worker's `numerics` and the sampling parameters,
/// which get its seed.
///
/// # Errors
/// `INVALID_ARGUMENT`; `FAILED_PRECONDITION` when other numerics would go on.
pub(super) fn resume(
    asked: v1::Resume,
    sampling: &mut v1::SamplingParams,
    numerics: &str,
    vocab: usize,
) -> Result<Resume, Status> {
    let v1::Resume {
        emitted_token_ids: emitted,
        choice,
        text_bytes,
        reasoning_bytes,
        tool_calls,
        seed,
        numerics: before,
        accept_other_numerics,
    } = asked;
    if let Some(n) = sampling.n.filter(|&n| n != 1) {
        let sentence = format!("is {n}, but a resume goes on with one choice; leave it out, and set resume.choice");
        return Err(invalid("sampling.n", sentence));
    }
    if choice > LAST_CHOICE {
        return Err(invalid("resume.choice", format!("is {choice}; choose from 0 to {LAST_CHOICE}")));
    }
    check_ids(&emitted, "resume.emitted_token_ids", vocab)?;
    match (sampling.seed, seed) {
        (Some(given), Some(seed)) if given != seed => {
            return Err(invalid("resume.seed", format!("is {seed}, but sampling.seed is {given}; leave one out")));
        }
        (None, None) => return Err(invalid("resume.seed", "is missing; send the seed of Started")),
        (given, seed) => sampling.seed = seed.or(given),
    }
    if !accept_other_numerics {
        if before.is_empty() {
            return Err(invalid("resume.numerics", "is missing; send that of Started, or set accept_other_numerics"));
        }
        if before != numerics {
            return Err(Status::failed_precondition(format!(
                "resume.numerics: is {}, and this worker computes {}: it may go on with other tokens than would have followed; \
                 ask a worker of the same, or set accept_other_numerics",
                quoted(&before),
                quoted(numerics)
            )));
        }
    }
    let delivered = Delivered { text: text_bytes, reasoning: reasoning_bytes, tool_calls };
    Ok(Resume { emitted, choice, delivered })
}

/// Takes `text`, which has seen no token, through the tokens that have arrived, of which there may be `most`. What has
/// arrived of the answer's fields is left out, first of all of `echo`, which stands before its text.
///
/// # Errors
/// `INVALID_ARGUMENT` when more has arrived than those tokens say, or they go on after an end.
pub(super) fn replay(
    resume: &Resume,
    mut text: AnswerText,
    ends: Ends<'_>,
    most: usize,
    tokenizer: &Tokenizer,
    echo: &mut String,
) -> Result<Replayed, Status> {
    let mut delta = v1::Delta { index: resume.choice, ..Default::default() };
    let mut end = None;
    for (index, &id) in resume.emitted.iter().enumerate() {
        if end.is_some() {
            let sentence =
                format!("has {} tokens, but the answer ended with its token {}", resume.emitted.len(), index - 1);
            return Err(invalid("resume.emitted_token_ids", sentence));
        }
        let stopped = text.push(tokenizer, id, &mut delta);
        end = match stopped {
            Some(stopped) => Some(End::StopString(stopped.index)),
            None if ends.eos.contains(&id) => Some(End::Finished(FinishReason::EndOfSequence(id))),
            None if ends.stop.contains(&id) => Some(End::Finished(FinishReason::StopToken(id))),
            None => None,
        };
    }
    if end.is_none() && resume.emitted.len() >= most {
        end = Some(End::Finished(FinishReason::Length));
    }
    if let Some(End::Finished(_)) = end {
        text.finish(&mut delta);
    }
    let mut replayed = Replayed { text, delta, end };
    replayed.leave_out(resume.delivered, echo)?;
    Ok(replayed)
}

impl Replayed {
    fn leave_out(&mut self, delivered: Delivered, echo: &mut String) -> Result<(), Status> {
        let v1::Delta { text, reasoning_content, tool_calls, .. } = &mut self.delta;
        let echoed = u64::try_from(echo.len()).unwrap_or(u64::MAX).min(delivered.text);
        cut(echo, echoed, "resume.text_bytes")?;
        cut(text, delivered.text - echoed, "resume.text_bytes")?;
        cut(reasoning_content, delivered.reasoning, "resume.reasoning_bytes")?;
        let arrived = delivered.tool_calls as usize;
        if arrived > tool_calls.len() {
            let sentence = format!("is {arrived}, but those tokens ask for {}", tool_calls.len());
            return Err(invalid("resume.tool_calls", sentence));
        }
        tool_calls.drain(..arrived);
        Ok(())
    }
}

/// Takes so many bytes from the beginning of a text.
fn cut(text: &mut String, bytes: u64, field: &str) -> Result<(), Status> {
    match usize::try_from(bytes).ok().filter(|&bytes| text.is_char_boundary(bytes)) {
        Some(bytes) => {
            text.drain(..bytes);
            Ok(())
        }
        None if bytes > u64::try_from(text.len()).unwrap_or(u64::MAX) => {
            let most = text.len();
            Err(invalid(field, format!("is more than those tokens say: {bytes} bytes where {most} are left")))
        }
        None => Err(invalid(field, "ends inside of a character; send the bytes of whole deltas")),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};
    use tonic::Code;

    fn asked() -> v1::Resume {
        v1::Resume { seed: Some(7), numerics: "a".into(), emitted_token_ids: vec![1, 2], ..Default::default() }
    }

    fn check(asked: v1::Resume, mut sampling: v1::SamplingParams) -> Result<(Resume, Option<u64>), Status> {
        resume(asked, &mut sampling, "a", 10).map(|resume| (resume, sampling.seed))
    }

    #[test]
    fn the_seed_comes_from_either_place_and_must_be_one() {
        let none = v1::SamplingParams::default;
        assert_eq!(check(asked(), none()).expect("valid").1, Some(7));
        let given = v1::SamplingParams { seed: Some(7), ..none() };
        assert_eq!(check(v1::Resume { seed: None, ..asked() }, given.clone()).expect("valid").1, Some(7));
        let other = refused(check(v1::Resume { seed: Some(8), ..asked() }, given));
        assert_eq!(other, "resume.seed: is 8, but sampling.seed is 7; leave one out");
        let missing = refused(check(v1::Resume { seed: None, ..asked() }, none()));
        assert_eq!(missing, "resume.seed: is missing; send the seed of Started");
    }

    #[test]
    fn other_numerics_are_refused_with_both_unless_accepted() {
        let other = v1::Resume { numerics: "b".into(), ..asked() };
        let status = check(other.clone(), v1::SamplingParams::default()).expect_err("refused");
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().starts_with("resume.numerics: is \"b\", and this worker computes \"a\""), "{status}");
        let accepted = v1::Resume { accept_other_numerics: true, ..other };
        assert!(check(accepted, v1::SamplingParams::default()).is_ok());
        let missing = refused(check(v1::Resume { numerics: "".into(), ..asked() }, v1::SamplingParams::default()));
        assert!(missing.starts_with("resume.numerics: is missing"), "{missing}");
    }

    #[test]
    fn several_choices_unknown_ids_and_choices_beyond_the_last_are_refused() {
        let none = v1::SamplingParams::default;
        let several = refused(check(asked(), v1::SamplingParams { n: Some(2), ..none() }));
        assert!(several.starts_with("sampling.n: is 2, but a resume goes on with one choice"), "{several}");
        assert!(check(asked(), v1::SamplingParams { n: Some(1), ..none() }).is_ok());
        let foreign = refused(check(v1::Resume { emitted_token_ids: vec![1, 10], ..asked() }, none()));
        assert_eq!(foreign, "resume.emitted_token_ids[1]: is 10; this model's ids are 0 to 9");
        let beyond = refused(check(v1::Resume { choice: 64, ..asked() }, none()));
        assert_eq!(beyond, "resume.choice: is 64; choose from 0 to 63");
    }

    #[test]
    fn what_has_arrived_is_cut_at_whole_characters() {
        let mut text = "aé".to_owned();
        assert!(refused(cut(&mut text, 2, "f")).starts_with("f: ends inside of a character"));
        assert!(refused(cut(&mut text, 4, "f")).starts_with("f: is more than those tokens say: 4 bytes where 3"));
        cut(&mut text, 1, "f").expect("a boundary");
        cut(&mut text, 2, "f").expect("the end");
        assert_eq!(text, "");
    }
}
