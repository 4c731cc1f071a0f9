//! Prompts: conversations, texts and ids, and what the tokenizer makes of them. Slow, so none of it runs on the async
//! threads.

use ernie_proto::ernie::v1;
use tonic::Status;

use super::{conversation::conversation, request, served::Served, status::invalid};
use crate::chat::output::Opening;

/// Longest text that Detokenize returns, in bytes; clients take messages of 4 MiB unless told otherwise.
const MAX_TEXT_BYTES: usize = 3 << 20;

/// A prompt for the engine.
pub(super) struct Prepared {
    /// Its token ids.
    pub(super) ids: Vec<u32>,
    /// Its text, when the answer is to repeat it.
    pub(super) echo: String,
    /// Where the answer begins, when it is to be taken apart.
    pub(super) parts: Option<Opening>,
}

/// Token ids of a text that came in `field`, or the last of them. A text that cannot fit the context is refused before it
/// is tokenised, unless its beginning is not wanted.
pub(super) fn encode(served: &Served, text: &str, last: Option<usize>, field: &str) -> Result<Vec<u32>, Status> {
    let (context, least) = (served.engine.limits().context, text.len() / served.tokenizer.longest_piece().max(1));
    if last.is_none() && least > context {
        return Err(invalid(
            field,
            format!("has at least {least} tokens; prompt and answer together may have {context}"),
        ));
    }
    Ok(ending(tokens_of(served, text, field)?, last))
}

/// The last of these ids.
pub(super) fn ending(mut ids: Vec<u32>, last: Option<usize>) -> Vec<u32> {
    if let Some(last) = last {
        ids.drain(..ids.len().saturating_sub(last));
    }
    ids
}

/// Token ids of a text, of which there may be no more than the memory plan has room for.
pub(super) fn tokens_of(served: &Served, text: &str, field: &str) -> Result<Vec<u32>, Status> {
    let (bytes, most) = (text.len(), served.text.bytes());
    if bytes > most {
        let sentence = format!("has {bytes} bytes of text; with its context this model takes at most {most}");
        return Err(invalid(field, sentence));
    }
    request::encode(&served.tokenizer, text, field)
}

/// The last words of a message.
pub(super) fn said(message: &v1::Message) -> String {
    match message.content.last().and_then(|part| part.part.as_ref()) {
        Some(v1::content_part::Part::Text(text)) => text.clone(),
        None => String::new(),
    }
}

/// The prompt of a conversation; `prefix` stands before the names of its fields.
pub(super) fn render(served: &Served, asked: v1::Conversation, prefix: &str) -> Result<String, Status> {
    let template = served.template.as_ref().ok_or_else(|| {
        Status::failed_precondition(format!(
            "the model {:?} has no chat template; use Complete, or add chat_template.jinja to its folder",
            served.name
        ))
    })?;
    let conversation = conversation(asked, prefix, template)?;
    template.render(&conversation).map_err(|error| invalid(&format!("{prefix}messages"), error.to_string()))
}

/// The text of token ids that came in `field`.
pub(super) fn decode(served: &Served, ids: &[u32], skip_special: bool, field: &str) -> Result<String, Status> {
    let bytes: usize = ids.iter().map(|&id| served.tokenizer.bytes(id).len()).sum();
    if bytes > MAX_TEXT_BYTES {
        let sentence = format!("stands for {bytes} bytes of text; send ids for at most {MAX_TEXT_BYTES}");
        return Err(invalid(field, sentence));
    }
    Ok(served.tokenizer.decode(ids, skip_special))
}
