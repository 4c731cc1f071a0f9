//! The model's chat template: a conversation to the text that the model continues.
//!
//! Templates come from the checkpoint (`chat_template.jinja`, or the key of that name in `tokenizer_config.json`) and are
//! written for Jinja2 in the environment of transformers. They are untrusted: no loader, no access to the machine, a
//! budget for work and memory, and a bounded output. Clients cannot send one.

pub mod output;
mod python;

use std::{fmt, fs, io, path::Path};

use ernie_proto::failure::Reason;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, syntax::SyntaxConfig};

/// Work and memory of one rendering: about one unit an instruction, and one for 64 bytes made.
const FUEL: u64 = 1_000_000;
/// Longest prompt text in bytes.
const MAX_OUTPUT: usize = 4 << 20;
/// Largest template file.
const MAX_TEMPLATE: usize = 256 << 10;
/// Depth of nested blocks and macros.
const MAX_DEPTH: usize = 64;
/// The one template's name, as error messages show it.
const NAME: &str = "chat_template.jinja";

/// Who speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    const ALL: [Role; 4] = [Role::System, Role::User, Role::Assistant, Role::Tool];

    /// The word that templates use.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
}

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
        environment.add_template_owned(NAME, source).map_err(|error| ChatError::Template(sentence(&error)))?;
        let tokens = config.as_object().into_iter().flatten();
        let tokens = tokens.filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_"));
        let tokens = tokens.filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), Value::from(text)))
        });
        let mut template = Self { tokens: tokens.collect(), environment, roles: Vec::new() };
        template.roles = template.find_roles()?;
        Ok(template)
    }

    /// The roles whose messages the template shows.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends with the opening of the assistant's turn.
    ///
    /// # Errors
    /// [`ChatError::Conversation`] with the template's own words, or when the conversation is too long.
    pub fn render(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String, ChatError> {
        let messages: Value = turns
            .iter()
            .map(|turn| Value::from_pairs([("role", turn.role.as_str()), ("content", turn.content.as_str())]))
            .collect();
        self.render_values(messages, add_generation_prompt, Vec::new())
    }

    fn render_values(
        &self,
        messages: Value,
        add_generation_prompt: bool,
        more: Vec<(String, Value)>,
    ) -> Result<String, ChatError> {
        let own = [
            ("messages".to_owned(), messages),
            ("add_generation_prompt".to_owned(), Value::from(add_generation_prompt)),
        ];
        let context = Value::from_pairs(self.tokens.iter().cloned().chain(own).chain(more));
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
        const PROBE: &str = "ernieprobe";
        let turn = |role, content: &str| Turn { role, content: content.to_owned() };
        let shows = |turns: &[Turn]| self.render(turns, true).map(|text| text.contains(PROBE));
        if !shows(&[turn(Role::User, PROBE)]).map_err(|error| ChatError::Template(error.to_string()))? {
            return Err(ChatError::Template(format!("{NAME} renders a user's message without its content")));
        }
        let (hi, answer) = (turn(Role::User, "hi"), turn(Role::Assistant, "well"));
        let known = |role| match role {
            Role::User => true,
            Role::System => shows(&[turn(role, PROBE), hi.clone()]).unwrap_or(false),
            Role::Assistant => shows(&[hi.clone(), turn(role, PROBE), hi.clone()]).unwrap_or(false),
            Role::Tool => shows(&[hi.clone(), answer.clone(), turn(role, PROBE)]).unwrap_or(false),
        };
        Ok(Role::ALL.into_iter().filter(|&role| known(role)).collect())
    }
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
        Ok(data) if data.len() > (MAX_TEMPLATE as u64) * 16 => {
            return Err(ChatError::Template(format!("{name} is larger than {} MiB", (MAX_TEMPLATE * 16) >> 20)));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ChatError::Template(format!("{name} cannot be read: {error}"))),
    }
    fs::read_to_string(path).map(Some).map_err(|error| ChatError::Template(format!("{name} cannot be read: {error}")))
}

#[cfg(test)]
mod tests;
