//! PURE: the typed parts of what a thinking model writes: reasoning, content, tool calls.
//!
//! The grammar is that of ERNIE-4.5-21B-A3B-Thinking and of the parsers that Baidu's server and vLLM have for it: text
//! before `</think>` is reasoning; then `<response>…</response>` is content, without the line breaks next to the tags,
//! and each `<tool_call>…</tool_call>` holds JSON with `name` and `arguments`. Text between that has no tag is content
//! too, and line breaks between pieces of content stay. A text without `</think>` is reasoning to its end.

use serde::de::IgnoredAny;

const THINK: &str = "<think>";
/// Ends the reasoning.
pub const END_OF_THINK: &str = "</think>";
const RESPONSE: &str = "<response>";
const END_OF_RESPONSE: &str = "</response>";
const TOOL_CALL: &str = "<tool_call>";
const END_OF_TOOL_CALL: &str = "</tool_call>";
/// The tags that tell the parts apart.
pub const MARKS: [&str; 6] = [THINK, END_OF_THINK, RESPONSE, END_OF_RESPONSE, TOOL_CALL, END_OF_TOOL_CALL];
/// Longest text of a tool call, in bytes; a longer one is content.
const MAX_TOOL_CALL: usize = 256 << 10;

/// A part of an answer. Reasoning and content come in pieces of any length, never empty.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Part {
    /// What the model thinks before it answers.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A function that the model asks for.
    ToolCall {
        /// Its name.
        name: String,
        /// A JSON object, as the model wrote it.
        arguments: String,
    },
}

/// Where an answer begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opening {
    /// Inside of reasoning.
    Reasoning,
    /// After it, or in a model without any.
    Answer,
}

impl Opening {
    /// Where the answer to a prompt begins: a prompt that ends with `<think>` has opened the reasoning, unless those are
    /// the words `last` that somebody said.
    pub fn of(prompt: &str, last: &str) -> Self {
        let opens = |text: &str| text.trim_end_matches('\n').ends_with(THINK);
        if opens(prompt) && !(opens(last) && prompt.ends_with(last)) { Self::Reasoning } else { Self::Answer }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// At the first character of reasoning, which may be a tag.
    ReasoningStart,
    /// After a `<think>` of the model's own.
    ReasoningTagged,
    Reasoning,
    /// Between parts, where line breaks mean nothing.
    Between,
    ResponseStart,
    Response,
    /// Content without a tag.
    Untagged,
    /// Content in which tags mean nothing.
    WordForWord,
    ToolCall,
}

/// The tags that begin a part, and what they begin.
const OPENINGS: [(&str, State); 3] =
    [(THINK, State::ReasoningTagged), (RESPONSE, State::ResponseStart), (TOOL_CALL, State::ToolCall)];

/// Takes an answer apart while it comes. The parts do not depend on how the text is cut into pieces. Text is held back
/// only where it may be the beginning of a tag, and in a tool call until its end.
#[derive(Clone, Debug)]
pub struct OutputParser {
    state: State,
    held: String,
    /// Line breaks that count if more content follows.
    breaks: String,
    /// Whether there was content.
    said: bool,
    /// What comes after reasoning.
    answer: State,
}

/// Whether there is more to do before the next piece of text.
enum Progress {
    Again,
    Wait,
}

impl OutputParser {
    /// A parser of one answer.
    pub fn new(opening: Opening) -> Self {
        let state = if opening == Opening::Reasoning { State::ReasoningStart } else { State::Between };
        Self { state, held: String::new(), breaks: String::new(), said: false, answer: State::Between }
    }

    /// A parser of an answer that begins inside of reasoning and has no tags after it, whatever it looks like.
    pub fn word_for_word() -> Self {
        Self { answer: State::WordForWord, ..Self::new(Opening::Reasoning) }
    }

    /// Takes the next piece of text; appends to `out` what is certain now.
    pub fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        self.held.push_str(text);
        while let Progress::Again = self.step(out) {}
    }

    /// The end of the answer: what was held back is text after all. A tool call without its end is content.
    pub fn finish(mut self, out: &mut Vec<Part>) {
        match self.state {
            State::ReasoningStart | State::ReasoningTagged | State::Reasoning => reasoning(&self.held, out),
            State::ToolCall => {
                let text = format!("{TOOL_CALL}{}", self.held);
                self.say(&text, out);
            }
            State::Between | State::ResponseStart | State::Response | State::Untagged | State::WordForWord => {
                let text = std::mem::take(&mut self.held);
                self.say(&text, out);
            }
        }
    }

    fn step(&mut self, out: &mut Vec<Part>) -> Progress {
        match self.state {
            State::ReasoningStart => self.skip(THINK, State::ReasoningTagged, State::Reasoning),
            State::ReasoningTagged => self.skip("\n", State::Reasoning, State::Reasoning),
            State::ResponseStart => self.skip("\n", State::Response, State::Response),
            State::Reasoning => self.until(END_OF_THINK, self.answer, |_, text, out| reasoning(text, out), out),
            State::Response => self.until(END_OF_RESPONSE, State::Between, Self::say, out),
            State::Between => self.between(),
            State::Untagged => self.untagged(out),
            State::ToolCall => self.tool_call(out),
            State::WordForWord => {
                content(&std::mem::take(&mut self.held), out);
                Progress::Wait
            }
        }
    }

    fn enter(&mut self, state: State) -> Progress {
        self.state = state;
        Progress::Again
    }

    /// Leaves out a word that the text may begin with.
    fn skip(&mut self, word: &str, found: State, otherwise: State) -> Progress {
        if self.held.starts_with(word) {
            self.held.drain(..word.len());
            self.enter(found)
        } else if word.starts_with(self.held.as_str()) {
            Progress::Wait
        } else {
            self.enter(otherwise)
        }
    }

    /// Hands out text up to a tag, without one line break before it.
    fn until(
        &mut self,
        tag: &str,
        next: State,
        part: fn(&mut Self, &str, &mut Vec<Part>),
        out: &mut Vec<Part>,
    ) -> Progress {
        if let Some(at) = self.held.find(tag) {
            let text = self.held[..at].to_owned();
            self.held.drain(..at + tag.len());
            part(self, text.strip_suffix('\n').unwrap_or(&text), out);
            return self.enter(next);
        }
        let keep = beginning(&self.held, tag);
        let ready = self.held.len() - keep;
        let ready = ready - usize::from(self.held[..ready].ends_with('\n'));
        let text: String = self.held.drain(..ready).collect();
        part(self, &text, out);
        Progress::Wait
    }

    /// Decides by its first characters what comes next.
    fn between(&mut self) -> Progress {
        let breaks = self.held.len() - self.held.trim_start_matches('\n').len();
        self.breaks.extend(self.held.drain(..breaks));
        for (tag, state) in OPENINGS {
            if self.held.starts_with(tag) {
                self.held.drain(..tag.len());
                return self.enter(state);
            }
        }
        if OPENINGS.into_iter().any(|(tag, _)| tag.starts_with(self.held.as_str())) {
            return Progress::Wait;
        }
        self.enter(State::Untagged)
    }

    /// Hands out text up to a tag, without the line breaks before it.
    fn untagged(&mut self, out: &mut Vec<Part>) -> Progress {
        let found = OPENINGS.into_iter().filter_map(|(tag, _)| self.held.find(tag)).min();
        let tag = OPENINGS.into_iter().map(|(tag, _)| beginning(&self.held, tag)).max().unwrap_or(0);
        let ready = self.held[..found.unwrap_or(self.held.len() - tag)].trim_end_matches('\n').len();
        let text: String = self.held.drain(..ready).collect();
        self.say(&text, out);
        if found.is_some() { self.enter(State::Between) } else { Progress::Wait }
    }

    /// Hands out content, with the line breaks between it and what was said before.
    fn say(&mut self, text: &str, out: &mut Vec<Part>) {
        if text.is_empty() {
            return;
        }
        let breaks = std::mem::take(&mut self.breaks);
        if self.said {
            content(&breaks, out);
        }
        self.said = true;
        content(text, out);
    }

    /// Waits for the end of a tool call. One that is too long, or is none, is content as it stands.
    fn tool_call(&mut self, out: &mut Vec<Part>) -> Progress {
        let end = self.held.find(END_OF_TOOL_CALL);
        match end.filter(|&end| end <= MAX_TOOL_CALL) {
            Some(end) => {
                match call(&self.held[..end]) {
                    Some(call) => out.push(call),
                    None => {
                        let text = format!("{TOOL_CALL}{}", &self.held[..end + END_OF_TOOL_CALL.len()]);
                        self.say(&text, out);
                    }
                }
                self.held.drain(..end + END_OF_TOOL_CALL.len());
                self.enter(State::Between)
            }
            None if end.is_some() || self.held.len() > MAX_TOOL_CALL + END_OF_TOOL_CALL.len() => {
                self.say(TOOL_CALL, out);
                self.enter(State::Untagged)
            }
            None => Progress::Wait,
        }
    }
}

/// Length of the longest end of `text` that begins a tag.
fn beginning(text: &str, tag: &str) -> usize {
    let (text, tag) = (text.as_bytes(), tag.as_bytes());
    (1..tag.len()).rev().find(|&length| text.ends_with(&tag[..length])).unwrap_or(0)
}

/// Adds to the last part if that is reasoning too.
fn reasoning(text: &str, out: &mut Vec<Part>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Reasoning(last)) => last.push_str(text),
        _ => out.push(Part::Reasoning(text.to_owned())),
    }
}

/// Adds to the last part if that is content too.
fn content(text: &str, out: &mut Vec<Part>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Content(last)) => last.push_str(text),
        _ => out.push(Part::Content(text.to_owned())),
    }
}

/// The call in the JSON of a tool call; `None` when it is none. Its arguments stay as they are written, so that no number
/// is rounded.
fn call(text: &str) -> Option<Part> {
    let mut rest = text.trim().strip_prefix('{')?.trim_start();
    let (mut name, mut arguments) = (None, None);
    while !rest.starts_with('}') {
        let (key, after) = value(rest)?;
        let (found, after) = value(after.trim_start().strip_prefix(':')?.trim_start())?;
        match serde_json::from_str::<String>(key).ok()?.as_str() {
            "name" if name.is_none() => name = Some(serde_json::from_str(found).ok()?),
            "arguments" if arguments.is_none() && found.starts_with('{') => arguments = Some(found.to_owned()),
            _ => return None,
        }
        rest = match after.trim_start().strip_prefix(',') {
            Some(next) => Some(next.trim_start()).filter(|next| !next.starts_with('}'))?,
            None => Some(after.trim_start()).filter(|next| next.starts_with('}'))?,
        };
    }
    let name = name.filter(|name: &String| !name.is_empty())?;
    (rest == "}").then(|| Part::ToolCall { name, arguments: arguments.unwrap_or_else(|| "{}".to_owned()) })
}

/// The JSON value at the beginning of a text, and what follows it.
fn value(text: &str) -> Option<(&str, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    Some(text.split_at(values.byte_offset()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(opening: Opening, pieces: &[&str]) -> Vec<Part> {
        let (mut parser, mut out) = (OutputParser::new(opening), Vec::new());
        pieces.iter().for_each(|piece| parser.push(piece, &mut out));
        parser.finish(&mut out);
        out
    }

    fn thought(text: &str) -> Part {
        Part::Reasoning(text.to_owned())
    }

    fn said(text: &str) -> Part {
        Part::Content(text.to_owned())
    }

    fn asked(name: &str, arguments: &str) -> Part {
        Part::ToolCall { name: name.to_owned(), arguments: arguments.to_owned() }
    }

    /// Transcripts of thinking and tools, and their parts.
    fn transcripts() -> Vec<(&'static str, Vec<Part>)> {
        vec![
            ("why\n</think>\n\n<response>\nHello 你好\n</response>\n", vec![thought("why"), said("Hello 你好")]),
            ("<think>\na\n\nb\n</think>\n\n<response>\nx\n\ny\n</response>", vec![thought("a\n\nb"), said("x\n\ny")]),
            (
                "look it up\n</think>\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"柏林\"}}\n\
                 </tool_call>\n\n<tool_call>\n{\"arguments\":{\"n\": 123456789012345678901234567890, \"x\": 1.0},\"name\":\"f\"}\n</tool_call>\n",
                vec![
                    thought("look it up"),
                    asked("weather", "{\"city\": \"柏林\"}"),
                    asked("f", "{\"n\": 123456789012345678901234567890, \"x\": 1.0}"),
                ],
            ),
            (
                "t</think><response>so</response><tool_call>{\"name\": \"now\"}</tool_call>",
                vec![thought("t"), said("so"), asked("now", "{}")],
            ),
            (
                "t\n\n</think>\n\nplain\n\n<tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>",
                vec![thought("t\n"), said("plain"), asked("g", "{}")],
            ),
            ("thought without an end <", vec![thought("thought without an end <")]),
            ("</think>\n\n<response>\n</response>", vec![]),
            (
                "a </thin> b\n</think>\n\n<response>1 < 2 </resp\n\n</response>",
                vec![thought("a </thin> b"), said("1 < 2 </resp\n")],
            ),
            ("t\n</think>\n\n<tool_call>{\"name\": \"f\"", vec![thought("t"), said("<tool_call>{\"name\": \"f\"")]),
            (
                "t\n</think>\n\n<tool_call>not JSON</tool_call>x",
                vec![thought("t"), said("<tool_call>not JSON</tool_call>x")],
            ),
            ("t\n</think>\n\n<respons", vec![thought("t"), said("<respons")]),
            ("t\n</think>\n\n<response>\ncut short\n", vec![thought("t"), said("cut short\n")]),
            ("t</think>\n<response>\nWait\n</response>\n\nMore\n", vec![thought("t"), said("Wait\n\nMore\n")]),
            (
                "t</think>plain\n\n<tool_call>{\"name\":\"g\"}</tool_call>\nrest",
                vec![thought("t"), said("plain"), asked("g", "{}"), said("\n\n\nrest")],
            ),
            (
                "t</think>a\n\n<tool_call>not JSON</tool_call>\n\nb",
                vec![thought("t"), said("a\n\n<tool_call>not JSON</tool_call>\n\nb")],
            ),
            ("t</think>Sure:\n<response>Hi</response>", vec![thought("t"), said("Sure:\nHi")]),
            (
                "t</think>so\n<think>\nmore\n</think>\nend",
                vec![thought("t"), said("so"), thought("more"), said("\n\nend")],
            ),
        ]
    }

    #[test]
    fn transcripts_become_reasoning_content_and_tool_calls() {
        for (text, parts) in transcripts() {
            assert_eq!(parse(Opening::Reasoning, &[text]), parts, "{text:?}");
        }
    }

    #[test]
    fn transcripts_cut_at_every_character_or_any_two_give_the_same_parts() {
        for (text, parts) in transcripts() {
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            assert_eq!(parse(Opening::Reasoning, &characters), parts, "{text:?}");
            let cuts: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
            for (index, &first) in cuts.iter().enumerate() {
                for &second in &cuts[index..] {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    assert_eq!(parse(Opening::Reasoning, &pieces), parts, "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn transcripts_cut_into_tokens_at_every_byte_give_the_same_parts() {
        use crate::tokenizer::TextStream;
        for (text, parts) in transcripts() {
            for cut in 0..=text.len() {
                let (mut stream, mut parser, mut out) =
                    (TextStream::new(Vec::new()), OutputParser::new(Opening::Reasoning), Vec::new());
                for bytes in [&text.as_bytes()[..cut], &text.as_bytes()[cut..]] {
                    let mut whole = String::new();
                    stream.push_bytes(bytes, &mut whole);
                    parser.push(&whole, &mut out);
                }
                let mut rest = String::new();
                stream.finish(&mut rest);
                parser.push(&rest, &mut out);
                parser.finish(&mut out);
                assert_eq!(out, parts, "{text:?} cut at byte {cut}");
            }
        }
    }

    #[test]
    fn the_prompt_says_where_an_answer_begins() {
        assert_eq!(Opening::of("<|im_start|>assistant\n<think>\n", "hello"), Opening::Reasoning);
        assert_eq!(Opening::of("Assistant: <think>", "what is <think>"), Opening::Reasoning);
        assert_eq!(Opening::of("<think>\n\n</think>\n\n", "hello"), Opening::Answer);
        assert_eq!(Opening::of("User: say <think>", "say <think>"), Opening::Answer);
        assert_eq!(parse(Opening::Answer, &["Hello\n", "you\n"]), [said("Hello\nyou\n")]);
        assert_eq!(parse(Opening::Answer, &["\n<thi", "nk>\nso\n</think>\n\nHello"]), [thought("so"), said("Hello")]);
    }

    #[test]
    fn word_for_word_tags_after_the_reasoning_mean_nothing() {
        let text = "why\n</think>\n{\"a\": \"<think>x</think><tool_call>{}</tool_call>\"}\n\n";
        let said_so = said("\n{\"a\": \"<think>x</think><tool_call>{}</tool_call>\"}\n\n");
        for cut in 0..=text.len() {
            let (mut parser, mut out) = (OutputParser::word_for_word(), Vec::new());
            parser.push(&text[..cut], &mut out);
            parser.push(&text[cut..], &mut out);
            parser.finish(&mut out);
            assert_eq!(out, [thought("why"), said_so.clone()], "{cut}");
        }
    }

    #[test]
    fn what_is_certain_comes_at_once() {
        let (mut parser, mut out) = (OutputParser::new(Opening::Reasoning), Vec::new());
        parser.push("I think\n", &mut out);
        assert_eq!(out, [thought("I think")]);
        parser.push("that</thi", &mut out);
        assert_eq!(out, [thought("I think\nthat")]);
        parser.push("nk><response>\nso", &mut out);
        assert_eq!(out, [thought("I think\nthat"), said("so")]);
    }

    #[test]
    fn calls_that_are_none_are_content() {
        for json in [
            "",
            "{}",
            "[]",
            "{\"name\": 1}",
            "{\"name\": \"\"}",
            "{\"name\": \"f\", \"arguments\": [1]}",
            "{\"name\": \"f\", \"arguments\": {\"a\": }}",
            "{\"name\": \"f\", \"name\": \"g\"}",
            "{\"name\": \"f\", \"more\": 1}",
            "{\"name\": \"f\",}",
            "{\"name\": \"f\"} x",
            "{\"name\" \"f\"}",
            "{\"name\": \"f\" \"arguments\": {}}",
        ] {
            let text = format!("<tool_call>{json}</tool_call>");
            assert_eq!(parse(Opening::Answer, &[&text]), [said(&text)], "{json}");
        }
        let deep = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {}</tool_call>", "{\"a\":".repeat(5000));
        assert_eq!(parse(Opening::Answer, &[&deep]), [said(&deep)]);
    }

    #[test]
    fn a_tool_call_without_an_end_is_bounded() {
        let long = format!("<tool_call>{}</tool_call> after", "x".repeat(MAX_TOOL_CALL + 1));
        assert_eq!(parse(Opening::Answer, &[&long]), [said(&long)]);
        let (mut parser, mut out) = (OutputParser::new(Opening::Answer), Vec::new());
        for piece in long.as_bytes().chunks(1000) {
            parser.push(std::str::from_utf8(piece).expect("ASCII"), &mut out);
            assert!(parser.held.len() <= MAX_TOOL_CALL + 1000 + END_OF_TOOL_CALL.len());
        }
        parser.finish(&mut out);
        assert_eq!(out, [said(&long)]);
    }

    proptest! {
        #[test]
        fn no_text_depends_on_its_cuts(
            words in prop::collection::vec(prop::sample::select(vec![
                "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "\n", "\n\n", "a", "<",
                "</", "é", "{\"name\": \"f\"}", "{", "</t", "<tool_", "<respon",
            ]), 0..24),
            lengths in prop::collection::vec(1usize..9, 1..60),
            thinking: bool,
        ) {
            let opening = if thinking { Opening::Reasoning } else { Opening::Answer };
            let text = words.concat();
            let whole = parse(opening, &[&text]);
            let (mut rest, mut pieces) = (text.as_str(), Vec::new());
            for length in lengths.into_iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, later) = rest.split_at(rest.ceil_char_boundary(length.min(rest.len())));
                pieces.push(piece);
                rest = later;
            }
            prop_assert_eq!(parse(opening, &pieces), whole);
        }
    }
}
