//! The model's chat template: a conversation to the text that the model continues.
//!
//! Templates come from the checkpoint (`chat_template.jinja`, or the key of that name in `tokenizer_config.json`) and are
//! written for Jinja2 in the environment of transformers. They are untrusted: no loader, no access to the machine, a
//! budget for work and memory, and a bounded output. Clients cannot send one.

mod conversation;
pub mod output;
mod python;

use std::{fmt, fs, io, path::Path};

pub use conversation::{Conversation, Role, Tool, ToolCall, Turn};
use ernie_proto::failure::Reason;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, syntax::SyntaxConfig};

/// Work and memory of one rendering: about one unit an instruction, and one for 64 bytes made.
const FUEL: u64 = 1_000_000;
/// Longest prompt text in bytes.
const MAX_OUTPUT: usize = 4 << 20;
/// Longest template in bytes.
const MAX_TEMPLATE: usize = 256 << 10;
/// Largest file that is read; a tokenizer_config.json may describe thousands of tokens.
const MAX_FILE: u64 = 4 << 20;
/// Depth of nested blocks and macros.
const MAX_DEPTH: usize = 64;
/// The one template's name, as error messages show it.
const NAME: &str = "chat_template.jinja";

/// Why a template is refused, or a conversation cannot be rendered. The text is a sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is no template, or fails on the simplest conversation.
    #[error("{0}")]
    Template(String),
    /// The template refuses this conversation.
    #[error("{0}")]
    Conversation(String),
}

impl ChatError {
    /// The reason with which a worker gives up.
    pub fn reason(&self) -> Reason {
        Reason::CorruptModel
    }
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like, as `tokenizer_config.json` names them.
    tokens: Vec<(String, Value)>,
    roles: Vec<Role>,
    shows_tools: bool,
    shows_tool_calls: bool,
    marks_parts: bool,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("roles", &self.roles).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Reads the template of a model folder; `None` when it has none.
    ///
    /// # Errors
    /// [`ChatError::Template`] when it does not parse, or does not show a user's message.
    pub fn load(folder: &Path) -> Result<Option<Self>, ChatError> {
        let config = match read(&folder.join("tokenizer_config.json"))? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|error| ChatError::Template(format!("tokenizer_config.json: {error}")))?,
            None => serde_json::Value::Null,
        };
        let source = match read(&folder.join(NAME))? {
            Some(source) => Some(source),
            None => template_of(&config),
        };
        source.map(|source| Self::new(source, &config)).transpose()
    }

    /// Compiles a template. `config` is the content of `tokenizer_config.json`, for the special tokens.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn new(source: String, config: &serde_json::Value) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE {
            return Err(ChatError::Template(format!(
                "the chat template has {} bytes; more than {} KiB are not read",
                source.len(),
                MAX_TEMPLATE >> 10
            )));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ChatError::Template(sentence(&error)))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::to_json);
        environment.add_function("raise_exception", raise);
        let marks_parts = output::MARKS.iter().any(|mark| source.contains(mark));
        environment.add_template_owned(NAME, source).map_err(|error| ChatError::Template(sentence(&error)))?;
        let tokens = config.as_object().into_iter().flatten();
        let tokens = tokens.filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_"));
        let tokens = tokens.filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), Value::from(text)))
        });
        let mut template = Self {
            tokens: tokens.collect(),
            environment,
            roles: Vec::new(),
            shows_tools: false,
            shows_tool_calls: false,
            marks_parts,
        };
        template.roles = template.find_roles()?;
        template.shows_tools = template.shows(&with_a_tool());
        template.shows_tool_calls = template.shows(&with_a_tool_call());
        Ok(template)
    }

    /// The roles whose messages the template shows.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// Whether the template shows the functions that the model may ask for.
    pub fn shows_tools(&self) -> bool {
        self.shows_tools
    }

    /// Whether the template shows the functions that the model asked for.
    pub fn shows_tool_calls(&self) -> bool {
        self.shows_tool_calls
    }

    /// Whether the model marks the parts of its answers: the template knows one of [`output::MARKS`].
    pub fn marks_parts(&self) -> bool {
        self.marks_parts
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// [`ChatError::Conversation`] with the template's own words, or when the conversation is too long.
    pub fn render(&self, conversation: &Conversation) -> Result<String, ChatError> {
        let context = Value::from_pairs(self.tokens.iter().cloned().chain(conversation.context()));
        let refused = |error: Error| ChatError::Conversation(sentence(&error));
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let mut output = Bounded(Vec::new());
        let rendered = template.render_captured_to(context, &mut output);
        if output.0.len() > MAX_OUTPUT {
            return Err(ChatError::Conversation(format!(
                "the conversation becomes a prompt of more than {} MiB",
                MAX_OUTPUT >> 20
            )));
        }
        rendered.map_err(refused)?;
        String::from_utf8(output.0)
            .map_err(|_| ChatError::Conversation("the chat template renders text that is not UTF-8".into()))
    }

    /// Tries each role with a word that no template contains. A role is known when the word comes out; a template that
    /// ignores what it does not know would otherwise swallow a message in silence.
    fn find_roles(&self) -> Result<Vec<Role>, ChatError> {
        let probe = |role| Turn::new(role, PROBE);
        let (hi, answer) = (Turn::new(Role::User, "hi"), Turn::new(Role::Assistant, "well"));
        let user = self.render(&Conversation::new(vec![probe(Role::User)]));
        if !user.map_err(|error| ChatError::Template(error.to_string()))?.contains(PROBE) {
            return Err(ChatError::Template(format!("{NAME} renders a user's message without its content")));
        }
        let known = |role| match role {
            Role::User => true,
            Role::System => self.shows(&Conversation::new(vec![probe(role), hi.clone()])),
            Role::Assistant => self.shows(&Conversation::new(vec![hi.clone(), probe(role), hi.clone()])),
            Role::Tool => self.shows(&Conversation::new(vec![hi.clone(), answer.clone(), probe(role)])),
        };
        Ok(Role::ALL.into_iter().filter(|&role| known(role)).collect())
    }

    fn shows(&self, conversation: &Conversation) -> bool {
        self.render(conversation).is_ok_and(|text| text.contains(PROBE))
    }
}

/// A word that no template contains.
const PROBE: &str = "ernieprobe";

fn with_a_tool() -> Conversation {
    let tool = Tool {
        name: PROBE.to_owned(),
        description: "does nothing".to_owned(),
        parameters: Some(serde_json::json!({"type": "object", "properties": {}})),
    };
    Conversation { tools: vec![tool], ..Conversation::new(vec![Turn::new(Role::User, "hi")]) }
}

fn with_a_tool_call() -> Conversation {
    let call = ToolCall { id: "1".to_owned(), name: PROBE.to_owned(), arguments: serde_json::Map::new() };
    let turn = Turn { tool_calls: vec![call], ..Turn::new(Role::Assistant, "") };
    Conversation::new(vec![Turn::new(Role::User, "hi"), turn])
}

/// Stops the rendering one byte past the limit.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = (MAX_OUTPUT + 1).saturating_sub(self.0.len());
        if room == 0 {
            return Err(io::Error::other("the prompt is too long"));
        }
        let taken = bytes.len().min(room);
        self.0.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `raise_exception` of transformers: the template's own refusal.
fn raise(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
}

/// Marks errors that a template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

fn sentence(error: &Error) -> String {
    let detail = error.detail().unwrap_or_default();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if inner.is::<Raised>() {
            return format!("the chat template refuses the conversation: {detail}");
        }
        source = inner.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "the conversation is too long for the chat template: its work limit is reached".to_owned();
    }
    let place = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    let detail = if detail.is_empty() { String::new() } else { format!(": {detail}") };
    format!("{NAME}{place}: {}{detail}", error.kind())
}

fn template_of(config: &serde_json::Value) -> Option<String> {
    match config.get("chat_template")? {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(named) => {
            let default =
                named.iter().find(|entry| entry.get("name").and_then(|name| name.as_str()) == Some("default"));
            Some(default?.get("template")?.as_str()?.to_owned())
        }
        _ => None,
    }
}

fn read(path: &Path) -> Result<Option<String>, ChatError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match fs::metadata(path) {
        Ok(data) if data.len() > MAX_FILE => {
            return Err(ChatError::Template(format!("{name} is larger than {} MiB", MAX_FILE >> 20)));
        }
        Ok(data) if data.is_file() => {}
        // opening a pipe would wait for somebody who writes
        Ok(_) => return Err(ChatError::Template(format!("{name} is not a regular file"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ChatError::Template(format!("{name} cannot be read: {error}"))),
    }
    fs::read_to_string(path).map(Some).map_err(|error| ChatError::Template(format!("{name} cannot be read: {error}")))
}

#[cfg(test)]
mod tests;
