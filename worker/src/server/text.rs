//! The text of one answer: tokens to what a message of the stream says.

use ernie_proto::ernie::v1;

use crate::{
    chat::output::{MARKS, Opening, OutputParser, Part},
    tokenizer::{Stopped, TextStream, Tokenizer},
};

/// Tokens become text that is final, and that is taken apart where the model marks reasoning and tool calls.
pub(super) struct AnswerText {
    text: TextStream,
    parser: Option<OutputParser>,
    request_id: String,
    calls: usize,
}

impl AnswerText {
    /// The text of an answer. With `parts` it is taken apart, and its calls are named after `request_id`.
    pub(super) fn new(text: TextStream, parts: Option<Opening>, request_id: String) -> Self {
        Self { text, parser: parts.map(OutputParser::new), request_id, calls: 0 }
    }

    /// The text of a constrained answer: word for word, after the reasoning that its prompt may have opened.
    pub(super) fn constrained(text: TextStream, parts: Option<Opening>) -> Self {
        let parser = (parts == Some(Opening::Reasoning)).then(OutputParser::word_for_word);
        Self { text, parser, request_id: String::new(), calls: 0 }
    }

    /// Adds to a message what is final with the next token. Returns the stop string that ended the text.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, id: u32, delta: &mut v1::Delta) -> Option<Stopped> {
        let Some(parser) = &mut self.parser else {
            return self.text.push(tokenizer, id, &mut delta.text);
        };
        // Marks may be special tokens, which a reader never sees.
        let bytes = tokenizer.bytes(id);
        let marks = MARKS.iter().any(|mark| mark.as_bytes() == bytes);
        let mut text = String::new();
        let stopped = self.text.push_bytes(if marks { bytes } else { tokenizer.visible_bytes(id) }, &mut text);
        let mut parts = Vec::new();
        parser.push(&text, &mut parts);
        self.say(parts, delta);
        if stopped.is_some() {
            self.finish(delta);
        }
        stopped
    }

    /// The end of the tokens: adds what was held back.
    pub(super) fn finish(&mut self, delta: &mut v1::Delta) {
        match self.parser.take() {
            None => self.text.finish(&mut delta.text),
            Some(mut parser) => {
                let (mut text, mut parts) = (String::new(), Vec::new());
                self.text.finish(&mut text);
                parser.push(&text, &mut parts);
                parser.finish(&mut parts);
                self.say(parts, delta);
            }
        }
    }

    /// Whether the answer asks for functions.
    pub(super) fn asks_for_tools(&self) -> bool {
        self.calls > 0
    }

    fn say(&mut self, parts: Vec<Part>, delta: &mut v1::Delta) {
        for part in parts {
            match part {
                Part::Reasoning(text) => delta.reasoning_content.push_str(&text),
                Part::Content(text) => delta.text.push_str(&text),
                Part::ToolCall { name, arguments } => {
                    let id = format!("call-{}-{}", self.request_id, self.calls);
                    self.calls += 1;
                    delta.tool_calls.push(v1::ToolCall { id, name, arguments });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRANSCRIPT: [&str; 9] = [
        "look it",
        " up\n",
        "</think>",
        "<response>",
        "Wait a\n",
        "</response>",
        "<tool_call>",
        "{\"name\": \"f\", \"arguments\": {\"n\": 1}}",
        "</tool_call>",
    ];

    /// A tokenizer whose ids are the pieces of the transcript; the tags are special tokens.
    fn tokenizer() -> Tokenizer {
        let added = TRANSCRIPT.iter().enumerate().map(|(index, piece)| {
            serde_json::json!({"id": index + 1, "content": piece, "special": MARKS.contains(piece), "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        });
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null, "added_tokens": added.collect::<Vec<_>>(),
            "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}
        });
        Tokenizer::from_json(json.to_string().as_bytes(), 64).expect("a tokenizer")
    }

    fn answer(stops: &[&str], parts: Option<Opening>) -> (v1::Delta, Option<usize>, bool) {
        let (tokenizer, mut delta) = (tokenizer(), v1::Delta::default());
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut text = AnswerText::new(TextStream::new(stops), parts, "r".to_owned());
        for id in 1..=TRANSCRIPT.len() as u32 {
            if let Some(stopped) = text.push(&tokenizer, id, &mut delta) {
                return (delta, Some(stopped.index), text.asks_for_tools());
            }
        }
        text.finish(&mut delta);
        (delta, None, text.asks_for_tools())
    }

    #[test]
    fn marked_text_becomes_reasoning_content_and_tool_calls() {
        let (delta, stopped, asks) = answer(&[], Some(Opening::Reasoning));
        assert_eq!((delta.reasoning_content.as_str(), delta.text.as_str(), stopped), ("look it up", "Wait a", None));
        let call = v1::ToolCall { id: "call-r-0".into(), name: "f".into(), arguments: "{\"n\": 1}".into() };
        assert_eq!((delta.tool_calls, asks), (vec![call], true));
    }

    #[test]
    fn without_parts_a_reader_sees_the_text_alone() {
        let (delta, ..) = answer(&[], None);
        assert_eq!(delta.text, "look it up\nWait a\n{\"name\": \"f\", \"arguments\": {\"n\": 1}}");
        assert_eq!((delta.reasoning_content, delta.tool_calls), (String::new(), Vec::new()));
    }

    #[test]
    fn a_stop_string_ends_reasoning_content_and_calls_alike() {
        for (stop, reasoning, text) in
            [("it", "look ", ""), ("a\n", "look it up", "Wait "), ("</think>", "look it up\n", "")]
        {
            let (delta, stopped, asks) = answer(&[stop], Some(Opening::Reasoning));
            assert_eq!((delta.reasoning_content.as_str(), delta.text.as_str()), (reasoning, text), "{stop:?}");
            assert_eq!((stopped, asks), (Some(0), false), "{stop:?}");
        }
        let (delta, stopped, asks) = answer(&["\"n\""], Some(Opening::Reasoning));
        assert_eq!(delta.text, "Wait a<tool_call>{\"name\": \"f\", \"arguments\": {", "a call cut short is text");
        assert_eq!((stopped, asks), (Some(0), false));
    }
}
