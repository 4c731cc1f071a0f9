//! `ernie-worker ask`: one question to a running server, its answer streamed to the terminal.

use std::{
    error::Error,
    io::{self, IsTerminal, Read, Write},
    time::Duration,
};

use ernie_proto::{
    contract::GRPC_PORT,
    ernie::v1::{
        ChatRequest, CompleteRequest, Constraint, ContentPart, Done, FinishReason, GenerateResponse, Message, Role,
        SamplingParams, Started, ToolCall, complete_request::Prompt, constraint::Kind, content_part::Part,
        done::MatchedStop, generate_response::Event, inference_client::InferenceClient,
    },
};
use tonic::{Code, Request, Status, Streaming, transport::Channel, transport::Endpoint};

use crate::cli::AskArgs;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest question read from standard input, in bytes.
const MAX_QUESTION: u64 = 1 << 20;

/// Why there is no answer. The text is for the terminal.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The question or the address makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The server cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// The server refused or failed.
    #[error("{}: {}", code_name(.0.code()), .0.message())]
    Status(Box<Status>),
    /// The reader of our output is gone.
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

impl From<Status> for AskError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// The whole answer, for `--json` and for the closing line.
#[derive(Debug, Default)]
struct Answer {
    started: Started,
    reasoning_content: String,
    text: String,
    tool_calls: Vec<ToolCall>,
    token_ids: Vec<u32>,
    done: Done,
}

/// Asks, and writes the answer to standard output; usage and timings go to standard error.
///
/// # Errors
/// [`AskError`]; what was received until then has been written.
pub async fn run(args: AskArgs) -> Result<(), AskError> {
    let question = question(&args.text)?;
    let channel = connect(&args.server).await?;
    let mut client = InferenceClient::new(channel);
    let sampling = SamplingParams {
        temperature: args.temperature,
        seed: args.seed,
        max_tokens: args.max_tokens,
        constraint: constraint(&args)?,
        ..Default::default()
    };
    let model = args.model.clone().unwrap_or_default();
    let stream = if args.raw {
        let prompt = Some(Prompt::Text(question));
        let request = CompleteRequest { model, prompt, sampling: Some(sampling), ..Default::default() };
        client.complete(timed(request, args.timeout)).await?
    } else {
        let system = args.system.as_deref().map(|text| message(Role::System, text));
        let messages = system.into_iter().chain([message(Role::User, &question)]).collect();
        let request = ChatRequest { model, messages, sampling: Some(sampling), ..Default::default() };
        client.chat(timed(request, args.timeout)).await?
    };
    let mut output = Output::new(args.json);
    let answer = receive(stream.into_inner(), &mut output).await;
    output.end()?;
    let answer = answer?;
    if args.json {
        writeln!(io::stdout(), "{:#}", answer.to_json())?;
    } else {
        eprintln!("{}", answer.summary());
    }
    Ok(())
}

/// What the answer must be.
fn constraint(args: &AskArgs) -> Result<Option<Constraint>, AskError> {
    let kind = match (&args.json_schema, &args.regex) {
        (Some(path), _) => Some(Kind::JsonSchema(std::fs::read_to_string(path).map_err(|error| {
            AskError::Usage(format!("--json-schema {}: cannot be read as text: {error}", path.display()))
        })?)),
        (None, regex) => regex.clone().map(Kind::Regex),
    };
    Ok(kind.map(|kind| Constraint { kind: Some(kind) }))
}

/// The question itself, or what standard input holds.
fn question(text: &str) -> Result<String, AskError> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut question = String::new();
    let read = io::stdin().take(MAX_QUESTION + 1).read_to_string(&mut question);
    read.map_err(|error| AskError::Usage(format!("standard input cannot be read as text: {error}")))?;
    if question.len() as u64 > MAX_QUESTION {
        return Err(AskError::Usage(format!("standard input holds more than {} MiB", MAX_QUESTION >> 20)));
    }
    Ok(question)
}

pub(crate) async fn connect(server: &str) -> Result<Channel, AskError> {
    let address = authority(server)?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| AskError::Usage(format!("{server:?} is no address: {error}; give HOST:PORT")))?;
    endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.map_err(|error| {
        AskError::Unreachable(format!(
            "cannot reach {address}: {}; is the server running, and is this its gRPC port?",
            innermost(&error)
        ))
    })
}

/// `HOST:PORT` of what was given; the port may be left out.
fn authority(server: &str) -> Result<String, AskError> {
    let server = server.strip_prefix("http://").unwrap_or(server).trim_end_matches('/');
    if server.contains("://") {
        return Err(AskError::Usage(format!("--server {server:?}: only plain HOST:PORT is spoken here, no TLS")));
    }
    let bare_v6 = server.matches(':').count() > 1 && !server.starts_with('[');
    Ok(match server.rsplit_once(':') {
        _ if bare_v6 => format!("[{server}]:{GRPC_PORT}"),
        Some((_, port)) if !port.ends_with(']') => server.to_owned(),
        _ => format!("{server}:{GRPC_PORT}"),
    })
}

/// The last cause of an error, which says most.
fn innermost(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn message(role: Role, text: &str) -> Message {
    Message {
        role: role.into(),
        content: vec![ContentPart { part: Some(Part::Text(text.to_owned())) }],
        ..Default::default()
    }
}

async fn receive(mut stream: Streaming<GenerateResponse>, output: &mut Output) -> Result<Answer, AskError> {
    let mut answer = Answer::default();
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Started(started)) => answer.started = started,
            Some(Event::Delta(delta)) => {
                output.think(&delta.reasoning_content)?;
                output.write(&delta.text)?;
                for call in &delta.tool_calls {
                    output.line(&call_json(call).to_string())?;
                }
                answer.reasoning_content.push_str(&delta.reasoning_content);
                answer.text.push_str(&delta.text);
                answer.tool_calls.extend(delta.tool_calls);
                answer.token_ids.extend(delta.token_ids);
            }
            Some(Event::Done(done)) => {
                answer.done = done;
                return Ok(answer);
            }
            // Not asked for.
            Some(Event::PromptLogprobs(_)) | None => {}
        }
    }
    Err(Status::internal("the server ended the stream before the answer was complete").into())
}

impl Answer {
    fn finish_reason(&self) -> &'static str {
        match self.done.finish_reason() {
            FinishReason::Unspecified => "unknown",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let (usage, timings) = (self.done.usage.unwrap_or_default(), self.done.timings.unwrap_or_default());
        serde_json::json!({
            "reasoning_content": self.reasoning_content,
            "text": self.text,
            "tool_calls": self.tool_calls.iter().map(call_json).collect::<Vec<_>>(),
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason(),
            "matched_stop": match &self.done.matched_stop {
                Some(MatchedStop::Stop(text)) => serde_json::json!(text),
                Some(MatchedStop::StopTokenId(id)) => serde_json::json!(id),
                None => serde_json::Value::Null,
            },
            "model": self.started.model,
            "request_id": self.started.request_id,
            "seed": self.started.seed,
            "numerics": self.started.numerics,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
            },
            "timings": {
                "queue_seconds": timings.queue_seconds,
                "prefill_seconds": timings.prefill_seconds,
                "decode_seconds": timings.decode_seconds,
                "time_to_first_token_seconds": timings.time_to_first_token_seconds,
            },
        })
    }

    fn summary(&self) -> String {
        let (usage, timings) = (self.done.usage.unwrap_or_default(), self.done.timings.unwrap_or_default());
        let mut summary = format!(
            "[{}: {} prompt and {} answer tokens ({}), first token after {:.3} s",
            printable(&self.started.model),
            usage.prompt_tokens,
            usage.completion_tokens,
            self.finish_reason(),
            timings.time_to_first_token_seconds,
        );
        if usage.completion_tokens > 1 && timings.decode_seconds > 0.0 {
            let rate = f64::from(usage.completion_tokens - 1) / timings.decode_seconds;
            summary.push_str(&format!(", then {rate:.1} tokens/s"));
        }
        summary.push_str(&format!(", seed {}]", self.started.seed));
        summary
    }
}

/// A tool call as one line of JSON; its arguments stay text, as the model wrote them.
fn call_json(call: &ToolCall) -> serde_json::Value {
    serde_json::json!({"id": call.id, "name": call.name, "arguments": call.arguments})
}

/// Standard output, as the answer is written to it, and standard error for what the model thinks.
struct Output {
    silent: bool,
    terminal: bool,
    open_line: bool,
    open_thought: bool,
}

impl Output {
    fn new(silent: bool) -> Self {
        Self { silent, terminal: io::stdout().is_terminal(), open_line: false, open_thought: false }
    }

    /// Writes a piece at once. A terminal gets no control characters: a model must not steer it.
    fn write(&mut self, text: &str) -> io::Result<()> {
        if self.silent || text.is_empty() {
            return Ok(());
        }
        self.end_thought()?;
        self.open_line = !text.ends_with('\n');
        let mut stdout = io::stdout().lock();
        match self.terminal {
            true => stdout.write_all(printable(text).as_bytes())?,
            false => stdout.write_all(text.as_bytes())?,
        }
        stdout.flush()
    }

    /// Writes what the model thinks to standard error, so that the answer alone can be piped on.
    fn think(&mut self, text: &str) -> io::Result<()> {
        if self.silent || text.is_empty() {
            return Ok(());
        }
        self.open_thought = !text.ends_with('\n');
        io::stderr().write_all(printable(text).as_bytes())
    }

    fn end_thought(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open_thought) { writeln!(io::stderr()) } else { Ok(()) }
    }

    /// Writes a line of its own.
    fn line(&mut self, text: &str) -> io::Result<()> {
        self.end()?;
        self.write(&format!("{text}\n"))
    }

    fn end(&mut self) -> io::Result<()> {
        self.end_thought()?;
        if !self.silent && std::mem::take(&mut self.open_line) { writeln!(io::stdout()) } else { Ok(()) }
    }
}

/// Text without control characters, except for line breaks and tabs.
pub fn printable(text: &str) -> String {
    let replace = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
    text.chars().map(|character| if replace(character) { char::REPLACEMENT_CHARACTER } else { character }).collect()
}

/// The specification's spelling of a status code.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_may_be_left_out_and_ipv6_is_understood() {
        for (given, expected) in [
            ("worker", "worker:8033"),
            ("worker:9", "worker:9"),
            ("http://worker.chat.svc:8033/", "worker.chat.svc:8033"),
            ("[::1]", "[::1]:8033"),
            ("[::1]:9", "[::1]:9"),
            ("::1", "[::1]:8033"),
        ] {
            assert_eq!(authority(given).expect(given), expected);
        }
        assert!(authority("https://worker").is_err());
    }

    #[test]
    fn a_model_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\tc\u{9b}"), "a\u{FFFD}[2Jb\u{FFFD}\n\tc\u{FFFD}");
    }

    #[test]
    fn a_status_is_shown_with_its_code_and_sentence() {
        let error = AskError::from(Status::resource_exhausted("the server is full"));
        assert_eq!(error.to_string(), "RESOURCE_EXHAUSTED: the server is full");
    }
}
