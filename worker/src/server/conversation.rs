//! A client's conversation, checked and turned into what the chat template takes.

use ernie_proto::ernie::v1::{self, content_part::Part};
use serde_json::{Map, Value};
use tonic::Status;

use super::status::{invalid, quoted};
use crate::chat::{ChatTemplate, Conversation, Role, Tool, ToolCall, Turn};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;
/// Most functions that a model may choose from.
const MAX_TOOLS: usize = 128;
/// Most functions that one message asks for.
const MAX_TOOL_CALLS: usize = 128;
/// Longest name of a function, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// Checks a conversation against what `template` shows; `prefix` stands before the names of its fields.
///
/// # Errors
/// `INVALID_ARGUMENT`.
pub fn conversation(asked: v1::Conversation, prefix: &str, template: &ChatTemplate) -> Result<Conversation, Status> {
    let v1::Conversation { messages, add_generation_prompt, tools, chat_template_kwargs } = asked;
    let field = |name: &str| format!("{prefix}{name}");
    let turns = turns(messages, &field("messages"), template)?;
    if tools.len() > MAX_TOOLS {
        let sentence = format!("has {} functions; give at most {MAX_TOOLS}", tools.len());
        return Err(invalid(&field("tools"), sentence));
    }
    if !tools.is_empty() && !template.shows_tools() {
        let sentence = "are given, but this model's chat template does not show them; leave them out, or use a model \
                        that was trained for tools";
        return Err(invalid(&field("tools"), sentence));
    }
    let tools = tools.into_iter().enumerate();
    let tools = tools.map(|(index, one)| tool(one, &format!("{prefix}tools[{index}]"))).collect::<Result<_, _>>()?;
    let variables = variables(&chat_template_kwargs, &field("chat_template_kwargs"))?;
    Ok(Conversation { turns, tools, variables, add_generation_prompt: add_generation_prompt.unwrap_or(true) })
}

fn variables(text: &str, field: &str) -> Result<Map<String, Value>, Status> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    let variables = object(text, field)?;
    match Conversation::VARIABLES.into_iter().find(|&name| variables.contains_key(name)) {
        Some(name) => Err(invalid(field, format!("sets {name}; use the request's field of that name"))),
        None => Ok(variables),
    }
}

/// The messages of a request.
fn turns(messages: Vec<v1::Message>, field: &str, template: &ChatTemplate) -> Result<Vec<Turn>, Status> {
    if messages.is_empty() {
        return Err(invalid(field, "is empty; send at least one message"));
    }
    if messages.len() > MAX_MESSAGES {
        return Err(invalid(field, format!("has {} messages; send at most {MAX_MESSAGES}", messages.len())));
    }
    let messages = messages.into_iter().enumerate();
    messages.map(|(index, message)| turn(message, &format!("{field}[{index}]"), template)).collect()
}

fn turn(message: v1::Message, field: &str, template: &ChatTemplate) -> Result<Turn, Status> {
    let v1::Message { role: number, content, reasoning_content, tool_calls, tool_call_id, name } = message;
    let role = role(number, &format!("{field}.role"), template.roles())?;
    let asks = !tool_calls.is_empty();
    let misplaced = [
        ("reasoning_content", !reasoning_content.is_empty(), Role::Assistant),
        ("tool_calls", asks, Role::Assistant),
        ("tool_call_id", !tool_call_id.is_empty(), Role::Tool),
        ("name", !name.is_empty(), Role::Tool),
    ];
    if let Some((wrong, _, of)) = misplaced.into_iter().find(|&(_, given, of)| given && role != of) {
        let sentence = format!("belongs to messages of the role {}, not {}; leave it out", of.as_str(), role.as_str());
        return Err(invalid(&format!("{field}.{wrong}"), sentence));
    }
    if asks && !template.shows_tool_calls() {
        let sentence = "are given, but this model's chat template does not show them; leave them out";
        return Err(invalid(&format!("{field}.tool_calls"), sentence));
    }
    if tool_calls.len() > MAX_TOOL_CALLS {
        let sentence = format!("has {} calls; give at most {MAX_TOOL_CALLS}", tool_calls.len());
        return Err(invalid(&format!("{field}.tool_calls"), sentence));
    }
    if content.is_empty() && !asks {
        return Err(invalid(&format!("{field}.content"), "is empty; add a text part"));
    }
    let calls = tool_calls.into_iter().enumerate();
    let tool_calls =
        calls.map(|(index, one)| tool_call(one, &format!("{field}.tool_calls[{index}]"))).collect::<Result<_, _>>()?;
    Ok(Turn { role, content: text(content, field)?, reasoning_content, tool_calls, tool_call_id, name })
}

fn role(number: i32, field: &str, known: &[Role]) -> Result<Role, Status> {
    let role = match v1::Role::try_from(number) {
        Ok(v1::Role::System) => Role::System,
        Ok(v1::Role::User) => Role::User,
        Ok(v1::Role::Assistant) => Role::Assistant,
        Ok(v1::Role::Tool) => Role::Tool,
        Ok(v1::Role::Unspecified) => {
            return Err(invalid(field, format!("is missing; use {}", words(known))));
        }
        Err(_) => {
            let sentence = format!("is {number}, which is no role of this API; set one of Role's values");
            return Err(invalid(field, sentence));
        }
    };
    if known.contains(&role) {
        return Ok(role);
    }
    let sentence =
        format!("is {}, which this model's chat template does not show; use {}", role.as_str(), words(known));
    Err(invalid(field, sentence))
}

fn words(roles: &[Role]) -> String {
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ")
}

/// The parts of a message, joined as they are.
fn text(parts: Vec<v1::ContentPart>, field: &str) -> Result<String, Status> {
    let mut content = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        match part.part {
            Some(Part::Text(text)) if content.is_empty() => content = text,
            Some(Part::Text(text)) => content.push_str(&text),
            None => {
                let sentence = "is of a kind that this server does not know; send text";
                return Err(invalid(&format!("{field}.content[{index}]"), sentence));
            }
        }
    }
    Ok(content)
}

fn tool(tool: v1::Tool, field: &str) -> Result<Tool, Status> {
    let v1::Tool { name, description, parameters } = tool;
    check_name(&name, &format!("{field}.name"))?;
    let parameters = match parameters.as_str() {
        "" => None,
        text => Some(Value::Object(object(text, &format!("{field}.parameters"))?)),
    };
    Ok(Tool { name, description, parameters })
}

fn tool_call(call: v1::ToolCall, field: &str) -> Result<ToolCall, Status> {
    let v1::ToolCall { id, name, arguments } = call;
    check_name(&name, &format!("{field}.name"))?;
    let arguments = match arguments.as_str() {
        "" => Map::new(),
        text => object(text, &format!("{field}.arguments"))?,
    };
    Ok(ToolCall { id, name, arguments })
}

fn check_name(name: &str, field: &str) -> Result<(), Status> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    let sentence = format!("is {}; give 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' or '.'", quoted(name));
    Err(invalid(field, sentence))
}

/// A JSON object from its text. Whole numbers beyond 64 bits are refused: a template would show them rounded.
fn object(text: &str, field: &str) -> Result<Map<String, Value>, Status> {
    if let Some(number) = long_number(text) {
        let sentence = format!("has the number {}, of more than 64 bits; send it as a string", quoted(number));
        return Err(invalid(field, sentence));
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => {
            let kind = match other {
                Value::Null => "null",
                Value::Bool(_) => "true or false",
                Value::Number(_) => "a number",
                Value::String(_) => "a string",
                Value::Array(_) | Value::Object(_) => "an array",
            };
            Err(invalid(field, format!("is {kind}; send the text of a JSON object")))
        }
        Err(error) => Err(invalid(field, format!("is no JSON: {error}; send the text of a JSON object"))),
    }
}

/// The first whole number in a JSON text that 64 bits do not hold.
fn long_number(text: &str) -> Option<&str> {
    let mut rest = text;
    while let Some(at) = rest.find(|character: char| character == '"' || character.is_ascii_digit()) {
        rest = &rest[at..];
        if let Some(inside) = rest.strip_prefix('"') {
            let mut escaped = false;
            let end = inside.find(|character| {
                let ends = character == '"' && !escaped;
                escaped = character == '\\' && !escaped;
                ends
            })?;
            rest = &inside[end + 1..];
        } else {
            let of_number =
                |character: char| character.is_ascii_digit() || matches!(character, '.' | 'e' | 'E' | '+' | '-');
            let (number, after) = rest.split_at(rest.find(|character| !of_number(character)).unwrap_or(rest.len()));
            let whole = number.bytes().all(|byte| byte.is_ascii_digit());
            // A sign in front makes the range one wider at most, which u64 covers all the same.
            if whole && number.parse::<u64>().is_err() {
                return Some(number);
            }
            rest = after;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{super::status, *};

    /// Shows messages, and the rest only when `knows_tools`.
    fn template(knows_tools: bool) -> ChatTemplate {
        let tools = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}\
                     {% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}";
        let messages = if knows_tools {
            "{% for m in messages %}{{ m.content }}{% endfor %}"
        } else {
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
        };
        let source = format!("{messages}{}", if knows_tools { tools } else { "" });
        ChatTemplate::new(source, &Value::Null).expect("compiles")
    }

    fn message(role: v1::Role, texts: &[&str]) -> v1::Message {
        let part = |text: &&str| v1::ContentPart { part: Some(Part::Text((*text).to_owned())) };
        v1::Message { role: role.into(), content: texts.iter().map(part).collect(), ..Default::default() }
    }

    fn asking(messages: Vec<v1::Message>) -> v1::Conversation {
        v1::Conversation { messages, ..Default::default() }
    }

    fn hello() -> v1::Conversation {
        asking(vec![message(v1::Role::User, &["hello"])])
    }

    fn refused(asked: v1::Conversation, knows_tools: bool) -> String {
        status::refused(conversation(asked, "", &template(knows_tools)))
    }

    #[test]
    fn the_parts_of_a_message_are_joined_as_they_are() {
        let asked = asking(vec![message(v1::Role::User, &["a ", "b"])]);
        let checked = conversation(asked, "", &template(false)).expect("valid");
        assert_eq!(checked, Conversation::new(vec![Turn::new(Role::User, "a b")]));
    }

    #[test]
    fn tools_and_calls_reach_the_template() {
        let call = v1::ToolCall { id: "1".into(), name: "f".into(), arguments: "{\"b\": 1, \"a\": 2}".into() };
        let asks =
            v1::Message { tool_calls: vec![call], reasoning_content: "so".into(), ..message(v1::Role::Assistant, &[]) };
        let answers = v1::Message { tool_call_id: "1".into(), ..message(v1::Role::Tool, &["3"]) };
        let tools = vec![
            v1::Tool { name: "f".into(), parameters: "{\"type\": \"object\"}".into(), ..Default::default() },
            v1::Tool { name: "g".into(), ..Default::default() },
        ];
        let asked = v1::Conversation {
            tools,
            chat_template_kwargs: "{\"enable_thinking\": false}".into(),
            ..asking(vec![message(v1::Role::User, &["hello"]), asks, answers])
        };
        let checked = conversation(asked, "", &template(true)).expect("valid");
        assert_eq!(checked.variables["enable_thinking"], Value::Bool(false));
        assert_eq!(checked.tools[0].parameters, Some(serde_json::json!({"type": "object"})));
        assert_eq!(checked.tools[1].parameters, None);
        let [_, asks, answers] = checked.turns.as_slice() else { panic!("{:?}", checked.turns) };
        assert_eq!((asks.reasoning_content.as_str(), asks.tool_calls[0].name.as_str()), ("so", "f"));
        assert_eq!(asks.tool_calls[0].arguments.keys().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(answers.tool_call_id, "1");
    }

    #[test]
    fn a_conversation_without_sense_is_refused_by_field() {
        let of = |messages| refused(asking(messages), false);
        let user = || message(v1::Role::User, &["x"]);
        assert_eq!(of(vec![]), "messages: is empty; send at least one message");
        let nobody = message(v1::Role::Unspecified, &["x"]);
        assert!(of(vec![user(), nobody]).starts_with("messages[1].role: is missing"));
        assert!(of(vec![v1::Message { role: 77, ..user() }]).starts_with("messages[0].role: is 77"));
        assert_eq!(
            of(vec![message(v1::Role::Tool, &["x"])]),
            "messages[0].role: is tool, which this model's chat template does not show; use system, user, assistant"
        );
        assert_eq!(of(vec![message(v1::Role::User, &[])]), "messages[0].content: is empty; add a text part");
        let image = v1::Message { content: vec![v1::ContentPart { part: None }], ..user() };
        assert!(of(vec![image]).starts_with("messages[0].content[0]: is of a kind"));
        assert!(of(vec![user(); 5000]).starts_with("messages: has 5000 messages"));
        let thinks = v1::Message { reasoning_content: "hm".into(), ..user() };
        assert_eq!(
            of(vec![thinks]),
            "messages[0].reasoning_content: belongs to messages of the role assistant, not user; leave it out"
        );
    }

    #[test]
    fn tools_without_sense_are_refused_by_field() {
        let tool = |name: &str, parameters: &str| v1::Tool {
            name: name.to_owned(),
            parameters: parameters.to_owned(),
            ..Default::default()
        };
        let with = |tools| v1::Conversation { tools, ..hello() };
        assert!(
            refused(with(vec![tool("f", "")]), false).starts_with("tools: are given, but this model's chat template")
        );
        assert!(refused(with(vec![tool("f", ""); 129]), true).starts_with("tools: has 129 functions"));
        assert!(refused(with(vec![tool("f", ""), tool("a b", "")]), true).starts_with("tools[1].name: is \"a b\""));
        assert_eq!(
            refused(with(vec![tool("f", "[1]")]), true),
            "tools[0].parameters: is an array; send the text of a JSON object"
        );
        assert!(refused(with(vec![tool("f", "{")]), true).starts_with("tools[0].parameters: is no JSON: "));
        let call = v1::ToolCall { name: "f".into(), arguments: "3".into(), ..Default::default() };
        let asks = v1::Message { tool_calls: vec![call], ..message(v1::Role::Assistant, &["x"]) };
        assert!(refused(asking(vec![asks.clone()]), false).starts_with("messages[0].tool_calls: are given, but"));
        assert!(refused(asking(vec![asks]), true).starts_with("messages[0].tool_calls[0].arguments: is a number"));
    }

    #[test]
    fn numbers_that_would_be_rounded_are_refused() {
        assert_eq!(long_number(r#"{"a": 18446744073709551615, "b": "99999999999999999999", "c\\\"": 1e30}"#), None);
        assert_eq!(
            long_number(r#"{"a": [1, -123456789012345678901234567890]}"#),
            Some("123456789012345678901234567890")
        );
        let parameters = r#"{"maximum": 99999999999999999999}"#.to_owned();
        let tools = vec![v1::Tool { name: "f".into(), parameters, ..Default::default() }];
        let sentence = refused(v1::Conversation { tools, ..hello() }, true);
        assert!(sentence.starts_with("tools[0].parameters: has the number \"99999999999999999999\""), "{sentence}");
    }

    #[test]
    fn template_variables_must_be_an_object_of_other_names() {
        let with = |text: &str| v1::Conversation { chat_template_kwargs: text.to_owned(), ..hello() };
        assert!(refused(with("1"), false).starts_with("chat_template_kwargs: is a number"));
        assert_eq!(
            refused(with("{\"tools\": []}"), false),
            "chat_template_kwargs: sets tools; use the request's field of that name"
        );
        let deep = "{\"a\": ".repeat(200) + "1" + &"}".repeat(200);
        assert!(refused(with(&deep), false).contains("is no JSON"));
    }
}
