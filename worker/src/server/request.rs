//! A client's request, checked and turned into what the engine takes.
//!
//! Nothing here waits or allocates by a number that a client gives. Each refusal names the field, the value and the
//! remedy.

use ernie_proto::ernie::v1::{self, complete_request::Prompt, content_part::Part};
use tonic::Status;

use super::status::{invalid, quoted};
use crate::{
    chat::{Role, Turn},
    sampling::SamplingParams,
};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;
/// Most stop strings.
const MAX_STOPS: usize = 16;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 256;
/// Most stop tokens.
const MAX_STOP_TOKENS: usize = 64;
/// Longest request id, in bytes.
const MAX_ID_BYTES: usize = 128;

/// How an answer is generated, beside the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// How tokens are chosen; the seed is given or drawn.
    pub sampling: SamplingParams,
    /// Most output tokens.
    pub max_tokens: Option<u32>,
    /// No end before so many output tokens.
    pub min_tokens: u32,
    /// The text ends before the first of these.
    pub stops: Vec<String>,
    /// The answer ends with the first of these.
    pub stop_token_ids: Vec<u32>,
    /// End-of-sequence tokens are generated like any other.
    pub ignore_eos: bool,
}

/// The conversation of a request; `roles` are those that the model's template knows.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn turns(messages: Vec<v1::Message>, field: &str, roles: &[Role]) -> Result<Vec<Turn>, Status> {
    if messages.is_empty() {
        return Err(invalid(field, "is empty; send at least one message"));
    }
    if messages.len() > MAX_MESSAGES {
        return Err(invalid(field, format!("has {} messages; send at most {MAX_MESSAGES}", messages.len())));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| turn(message, &format!("{field}[{index}]"), roles))
        .collect()
}

fn turn(message: v1::Message, field: &str, roles: &[Role]) -> Result<Turn, Status> {
    let role_field = || format!("{field}.role");
    let role = match v1::Role::try_from(message.role) {
        Ok(v1::Role::System) => Role::System,
        Ok(v1::Role::User) => Role::User,
        Ok(v1::Role::Assistant) => Role::Assistant,
        Ok(v1::Role::Tool) => Role::Tool,
        Ok(v1::Role::Unspecified) => {
            return Err(invalid(&role_field(), "is missing; set ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT"));
        }
        Err(_) => {
            let sentence = format!("is {}, which is no role of this API; set one of Role's values", message.role);
            return Err(invalid(&role_field(), sentence));
        }
    };
    if !roles.contains(&role) {
        let known: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
        let sentence =
            format!("is {}, which this model's chat template does not show; use {}", role.as_str(), known.join(", "));
        return Err(invalid(&role_field(), sentence));
    }
    if message.content.is_empty() {
        return Err(invalid(&format!("{field}.content"), "is empty; add a text part"));
    }
    let mut content = String::new();
    for (index, part) in message.content.into_iter().enumerate() {
        match part.part {
            Some(Part::Text(text)) if content.is_empty() => content = text,
            Some(Part::Text(text)) => content.push_str(&text),
            None => {
                let sentence = "is of a kind that this server does not know; send text";
                return Err(invalid(&format!("{field}.content[{index}]"), sentence));
            }
        }
    }
    Ok(Turn { role, content })
}

/// The prompt of a completion.
///
/// # Errors
/// `INVALID_ARGUMENT` when there is none.
pub fn prompt(prompt: Option<Prompt>) -> Result<Prompt, Status> {
    match prompt {
        Some(Prompt::Text(text)) if text.is_empty() => Err(invalid("prompt.text", "is empty; send some text")),
        Some(Prompt::Tokens(tokens)) if tokens.ids.is_empty() => {
            Err(invalid("prompt.tokens.ids", "is empty; send at least one token id"))
        }
        Some(prompt) => Ok(prompt),
        None => Err(invalid("prompt", "is missing; set text or tokens")),
    }
}

/// Checks sampling parameters and fills what is absent from `defaults`; `draw` gives a seed.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn generation(
    params: Option<v1::SamplingParams>,
    defaults: &SamplingParams,
    vocab: usize,
    draw: impl FnOnce() -> u64,
) -> Result<Generation, Status> {
    let v1::SamplingParams {
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        max_tokens,
        stop,
        stop_token_ids,
        logprobs,
        ignore_eos,
        min_tokens,
    } = params.unwrap_or_default();
    let sampling = SamplingParams {
        temperature: temperature.unwrap_or(defaults.temperature),
        top_p: top_p.unwrap_or(defaults.top_p),
        top_k: top_k.unwrap_or(defaults.top_k),
        min_p: min_p.unwrap_or(defaults.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logprobs,
        seed: seed.unwrap_or_else(draw),
        ..defaults.clone()
    };
    sampling.validate(vocab).map_err(|wrong| {
        invalid(&format!("sampling.{}", wrong.name), format!("is {}; {}", wrong.value, wrong.remedy))
    })?;
    if max_tokens == Some(0) {
        return Err(invalid("sampling.max_tokens", "is 0; ask for at least 1, or leave it out"));
    }
    check_stops(&stop)?;
    if stop_token_ids.len() > MAX_STOP_TOKENS {
        let sentence = format!("has {} ids; give at most {MAX_STOP_TOKENS}", stop_token_ids.len());
        return Err(invalid("sampling.stop_token_ids", sentence));
    }
    check_ids(&stop_token_ids, "sampling.stop_token_ids", vocab)?;
    if let Some(most) = max_tokens.filter(|&most| min_tokens > most) {
        let sentence = format!("is {min_tokens}, more than max_tokens, which is {most}");
        return Err(invalid("sampling.min_tokens", sentence));
    }
    Ok(Generation { sampling, max_tokens, min_tokens, stops: stop, stop_token_ids, ignore_eos })
}

fn check_stops(stops: &[String]) -> Result<(), Status> {
    if stops.len() > MAX_STOPS {
        return Err(invalid("sampling.stop", format!("has {} strings; give at most {MAX_STOPS}", stops.len())));
    }
    for (index, stop) in stops.iter().enumerate() {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let sentence = format!("has {} bytes; give 1 to {MAX_STOP_BYTES}", stop.len());
            return Err(invalid(&format!("sampling.stop[{index}]"), sentence));
        }
    }
    Ok(())
}

/// Checks that every id is one of the model's.
///
/// # Errors
/// `INVALID_ARGUMENT` that names the first that is not.
pub fn check_ids(ids: &[u32], field: &str, vocab: usize) -> Result<(), Status> {
    match ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
        Some((index, id)) => {
            let sentence = format!("is {id}; this model's ids are 0 to {}", vocab.saturating_sub(1));
            Err(invalid(&format!("{field}[{index}]"), sentence))
        }
        None => Ok(()),
    }
}

/// The caller's id of a request, or a drawn one.
///
/// # Errors
/// `INVALID_ARGUMENT` for ids that would spoil a log line.
pub fn request_id(id: String, draw: impl FnOnce() -> u64) -> Result<String, Status> {
    if id.is_empty() {
        return Ok(format!("{:016x}", draw()));
    }
    if id.len() > MAX_ID_BYTES || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
        let sentence = format!("is {}; give at most {MAX_ID_BYTES} visible ASCII characters", quoted(&id));
        return Err(invalid("request_id", sentence));
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const ROLES: [Role; 3] = [Role::System, Role::User, Role::Assistant];

    fn message(role: i32, texts: &[&str]) -> v1::Message {
        let part = |text: &&str| v1::ContentPart { part: Some(Part::Text((*text).to_owned())) };
        v1::Message { role, content: texts.iter().map(part).collect() }
    }

    fn refused(result: Result<impl std::fmt::Debug, Status>) -> String {
        let status = result.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument);
        status.message().to_owned()
    }

    fn generate(params: v1::SamplingParams) -> Result<Generation, Status> {
        generation(Some(params), &SamplingParams::default(), 100, || 7)
    }

    #[test]
    fn the_parts_of_a_message_are_joined_as_they_are() {
        let turns = turns(vec![message(2, &["a ", "b"])], "messages", &ROLES).expect("valid");
        assert_eq!(turns, [Turn { role: Role::User, content: "a b".into() }]);
    }

    #[test]
    fn a_conversation_without_sense_is_refused_by_field() {
        let of = |messages| refused(turns(messages, "messages", &ROLES));
        assert_eq!(of(vec![]), "messages: is empty; send at least one message");
        assert!(of(vec![message(2, &["x"]), message(0, &["x"])]).starts_with("messages[1].role: is missing"));
        assert!(of(vec![message(77, &["x"])]).starts_with("messages[0].role: is 77"));
        assert_eq!(
            of(vec![message(4, &["x"])]),
            "messages[0].role: is tool, which this model's chat template does not show; use system, user, assistant"
        );
        assert_eq!(of(vec![message(2, &[])]), "messages[0].content: is empty; add a text part");
        let image = v1::Message { role: 2, content: vec![v1::ContentPart { part: None }] };
        assert!(of(vec![image]).starts_with("messages[0].content[0]: is of a kind"));
        assert!(of(vec![message(2, &["x"]); 5000]).starts_with("messages: has 5000 messages"));
    }

    #[test]
    fn absent_parameters_come_from_the_checkpoint_and_given_ones_win() {
        let defaults = SamplingParams { temperature: 0.8, top_p: 0.9, top_k: 5, ..SamplingParams::default() };
        let params = v1::SamplingParams { top_p: Some(0.5), max_tokens: Some(3), ..Default::default() };
        let generation = generation(Some(params), &defaults, 100, || 7).expect("valid");
        assert_eq!(generation.sampling, SamplingParams { top_p: 0.5, seed: 7, ..defaults });
        assert_eq!(generation.max_tokens, Some(3));
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_field_value_and_remedy() {
        let with = |params| refused(generate(params));
        let none = v1::SamplingParams::default;
        assert_eq!(
            with(v1::SamplingParams { temperature: Some(f32::NAN), ..none() }),
            "sampling.temperature: is NaN; choose from 0 to 2"
        );
        assert!(with(v1::SamplingParams { top_p: Some(f32::INFINITY), ..none() }).contains("sampling.top_p: is inf"));
        assert!(with(v1::SamplingParams { top_k: Some(-2), ..none() }).contains("sampling.top_k: is -2"));
        assert!(with(v1::SamplingParams { logprobs: Some(21), ..none() }).contains("choose from 0 to 20"));
        assert_eq!(
            with(v1::SamplingParams { max_tokens: Some(0), ..none() }),
            "sampling.max_tokens: is 0; ask for at least 1, or leave it out"
        );
        assert!(with(v1::SamplingParams { max_tokens: Some(2), min_tokens: 3, ..none() }).contains("min_tokens: is 3"));
        assert_eq!(
            with(v1::SamplingParams { stop_token_ids: vec![1, 100], ..none() }),
            "sampling.stop_token_ids[1]: is 100; this model's ids are 0 to 99"
        );
        assert!(with(v1::SamplingParams { stop_token_ids: vec![1; 65], ..none() }).contains("at most 64"));
    }

    #[test]
    fn absurd_stop_lists_are_refused() {
        let with = |stop| refused(generate(v1::SamplingParams { stop, ..Default::default() }));
        assert!(with(vec!["x".into(); 100_000]).starts_with("sampling.stop: has 100000 strings"));
        assert!(with(vec!["x".into(), String::new()]).starts_with("sampling.stop[1]: has 0 bytes"));
        assert!(with(vec!["x".repeat(257)]).contains("1 to 256"));
    }

    #[test]
    fn a_prompt_must_be_there_and_hold_something() {
        assert!(refused(prompt(None)).starts_with("prompt: is missing"));
        assert!(refused(prompt(Some(Prompt::Text(String::new())))).starts_with("prompt.text: is empty"));
        assert!(refused(prompt(Some(Prompt::Tokens(v1::TokenIds::default())))).starts_with("prompt.tokens.ids"));
    }

    #[test]
    fn request_ids_are_drawn_or_checked() {
        assert_eq!(request_id(String::new(), || 255).expect("drawn"), "00000000000000ff");
        assert_eq!(request_id("a-1".into(), || 0).expect("kept"), "a-1");
        for id in ["a\nb", "a b", "é", &"x".repeat(129)] {
            assert!(refused(request_id(id.to_owned(), || 0)).starts_with("request_id: is"));
        }
    }
}
