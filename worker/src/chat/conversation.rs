//! What is said so far, as a chat template sees it.
//!
//! The shapes are those of transformers' `apply_chat_template`, so that templates find what they were written for: a tool
//! is `{"type": "function", "function": {…}}`, a call's arguments are an object, and reasoning is there under the two
//! names that ERNIE's templates and their successors read it by.

use minijinja::Value;
use serde_json::Map;

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
    pub(super) const ALL: [Role; 4] = [Role::System, Role::User, Role::Assistant, Role::Tool];

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
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What they say.
    pub content: String,
    /// What the assistant thought before; empty when nothing is known of it.
    pub reasoning_content: String,
    /// The functions that the assistant asked for.
    pub tool_calls: Vec<ToolCall>,
    /// The call that this is the result of, if it is one.
    pub tool_call_id: String,
    /// The name of whoever speaks, if given.
    pub name: String,
}

/// A function that the model asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Tells calls apart.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// Its arguments.
    pub arguments: Map<String, serde_json::Value>,
}

/// A function that the model may ask for.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does; may be empty.
    pub description: String,
    /// A JSON Schema of its arguments, if it takes any.
    pub parameters: Option<serde_json::Value>,
}

/// A conversation, and what else a template is given.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The messages, oldest first.
    pub turns: Vec<Turn>,
    /// The functions that the model may ask for.
    pub tools: Vec<Tool>,
    /// Variables of the client's own; they never replace the conversation's.
    pub variables: Map<String, serde_json::Value>,
    /// Whether the prompt ends with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
}

impl Conversation {
    /// The names of the variables that are the conversation's own.
    pub const VARIABLES: [&'static str; 3] = ["messages", "tools", "add_generation_prompt"];

    /// A conversation without tools, which the assistant is to go on with.
    pub fn new(turns: Vec<Turn>) -> Self {
        Self { turns, tools: Vec::new(), variables: Map::new(), add_generation_prompt: true }
    }

    /// The variables of a template.
    pub(super) fn context(&self) -> Vec<(String, Value)> {
        let messages: Value = self.turns.iter().map(Turn::value).collect();
        let mut context: Vec<_> = self.variables.iter().map(|(name, json)| (name.clone(), value(json))).collect();
        context.push(("messages".to_owned(), messages));
        context.push(("add_generation_prompt".to_owned(), Value::from(self.add_generation_prompt)));
        if !self.tools.is_empty() {
            context.push(("tools".to_owned(), self.tools.iter().map(Tool::value).collect()));
        }
        context
    }
}

impl Turn {
    /// A message that is text only.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            reasoning_content: String::new(),
            tool_calls: Vec::new(),
            tool_call_id: String::new(),
            name: String::new(),
        }
    }

    fn value(&self) -> Value {
        let mut pairs =
            vec![("role", Value::from(self.role.as_str())), ("content", Value::from(self.content.as_str()))];
        if !self.reasoning_content.is_empty() {
            pairs.extend(
                ["reasoning_content", "thoughts"].map(|key| (key, Value::from(self.reasoning_content.as_str()))),
            );
        }
        if !self.tool_calls.is_empty() {
            pairs.push(("tool_calls", self.tool_calls.iter().map(ToolCall::value).collect()));
        }
        let named = [("tool_call_id", &self.tool_call_id), ("name", &self.name)];
        let named = named.into_iter().filter(|(_, text)| !text.is_empty());
        pairs.extend(named.map(|(key, text)| (key, Value::from(text.as_str()))));
        Value::from_pairs(pairs)
    }
}

impl ToolCall {
    fn value(&self) -> Value {
        let arguments = Value::from_pairs(self.arguments.iter().map(|(key, json)| (key.as_str(), value(json))));
        let function = Value::from_pairs([("name", Value::from(self.name.as_str())), ("arguments", arguments)]);
        Value::from_pairs([
            ("id", Value::from(self.id.as_str())),
            ("type", Value::from("function")),
            ("function", function),
        ])
    }
}

impl Tool {
    fn value(&self) -> Value {
        let mut function = vec![("name", Value::from(self.name.as_str()))];
        if !self.description.is_empty() {
            function.push(("description", Value::from(self.description.as_str())));
        }
        if let Some(parameters) = &self.parameters {
            function.push(("parameters", value(parameters)));
        }
        Value::from_pairs([("type", Value::from("function")), ("function", Value::from_pairs(function))])
    }
}

/// JSON as a template sees it: the order of keys is kept, whole numbers stay whole.
pub(super) fn value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(truth) => Value::from(*truth),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => Value::from(whole),
            (None, Some(whole)) => Value::from(whole),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value).collect(),
        serde_json::Value::Object(map) => Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), value(item)))),
    }
}
