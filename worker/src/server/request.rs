//! A client's request, checked and turned into what the engine takes.
//!
//! Nothing here waits or allocates by a number that a client gives. Each refusal names the field, the value and the
//! remedy.

use ernie_proto::ernie::v1::complete_request::Prompt;
use tonic::Status;

use super::status::{invalid, quoted};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Longest request id, in bytes.
const MAX_ID_BYTES: usize = 128;

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

/// Token ids of a text that came in `field`.
///
/// # Errors
/// `INVALID_ARGUMENT` when the tokenizer gives up on the text.
pub fn encode(tokenizer: &Tokenizer, text: &str, field: &str) -> Result<Vec<u32>, Status> {
    tokenizer.encode(text).map_err(|error| match error {
        TokenizerError::Encode(_) => invalid(field, error.to_string()),
        _ => Status::internal(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::{super::status::refused, *};
    use ernie_proto::ernie::v1;

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
