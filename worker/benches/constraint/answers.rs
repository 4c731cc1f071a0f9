//! Constraints as programs send them, and answers to them.

use ernie_worker::constraint::Constraint;
use serde_json::{Value, json};

const NAMES: [&str; 6] =
    ["Elizabeth Bennet", "Fitzwilliam Darcy", "Jane", "玛丽·班纳特", "Charlotte Lucas", "O'Hara \"Kit\""];

/// Names, constraints, and answers.
pub fn all() -> Vec<(&'static str, Constraint, Vec<String>)> {
    let schema = |schema: Value| Constraint::JsonSchema(schema.to_string());
    vec![
        ("a person", schema(person()), NAMES.iter().enumerate().map(|(at, name)| of(&a_person(at, name))).collect()),
        ("a call of a tool", schema(call()), (0..6).map(|at| of(&a_call(at))).collect()),
        ("an invoice", schema(invoice()), (0..4).map(|at| indented(&an_invoice(at))).collect()),
        ("a summary", schema(summary()), (0..4).map(|at| of(&a_summary(at))).collect()),
        ("a tree", schema(tree()), (0..3).map(|depth| of(&a_tree(depth + 3))).collect()),
        ("any JSON object", Constraint::JsonObject, (0..4).map(|at| indented(&an_invoice(at))).collect()),
        ("an expression", Constraint::Regex(EXPRESSION.to_owned()), vec![LINES.to_owned()]),
        ("a grammar", Constraint::Grammar(GRAMMAR.to_owned()), vec![QUERY.to_owned()]),
        ("a choice", choice(), vec!["category number 17".to_owned(), "category number 399".to_owned()]),
    ]
}

const EXPRESSION: &str = r"(\d{4}-\d{2}-\d{2} [A-Z]+ [a-z_]+(\.[a-z_]+)*: [^\n]{1,200}\n){1,20}";
const LINES: &str = "2026-11-28 INFO worker.engine.turn: the batch has 12 sequences of 4096 tokens\n\
                     2026-11-28 WARN worker.server: a client left – “Netherfield” – after 3 s\n";
const GRAMMAR: &str = r#"
start: "SELECT " column ("," " " column)* " FROM " NAME (" WHERE " condition)? (" LIMIT " NUMBER)?
column: NAME | NAME "(" NAME ")"
condition: comparison ((" AND " | " OR ") comparison)*
comparison: NAME OPERATOR value
value: NUMBER | /'[^'\n]*'/
OPERATOR: " = " | " < " | " > "
NAME: /[a-z_]{1,20}/
NUMBER: /[0-9]{1,9}/
"#;
const QUERY: &str = "SELECT name, count(guests), year FROM balls WHERE year > 1810 AND place = 'Netherfield Park' OR host = \
                     'Mr Bingley' LIMIT 20";

fn choice() -> Constraint {
    Constraint::Choice((0..400).map(|index| format!("category number {index}")).collect())
}

fn of(value: &Value) -> String {
    value.to_string()
}

fn indented(value: &Value) -> String {
    format!("{value:#}")
}

fn person() -> Value {
    json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"type": "string", "format": "email"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "age"], "additionalProperties": false})
}

fn a_person(at: usize, name: &str) -> Value {
    json!({"name": name, "age": 20 + at, "mail": format!("someone{at}@example.org"), "tags": ["reader", "walks a lot", "好"]})
}

fn call() -> Value {
    json!({"type": "object", "properties": {"name": {"enum": ["weather", "search", "calculator"]},
        "arguments": {"type": "object"}}, "required": ["name", "arguments"], "additionalProperties": false})
}

fn a_call(at: usize) -> Value {
    let name = ["weather", "search", "calculator"][at % 3];
    json!({"name": name, "arguments": {"query": "the nearest town to Longbourn, please", "limit": at, "exact": at > 2,
        "where": {"lat": 51.75 + at as f64 / 10.0, "lon": -0.34}}})
}

fn invoice() -> Value {
    json!({"type": "object", "properties": {"number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
        "date": {"type": "string", "format": "date"}, "currency": {"enum": ["EUR", "GBP", "CNY"]},
        "lines": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/line"}}, "total": {"type": "number", "minimum": 0},
        "paid": {"type": "boolean"}, "note": {"type": ["string", "null"]}},
        "required": ["number", "date", "currency", "lines", "total", "paid"],
        "$defs": {"line": {"type": "object", "properties": {"text": {"type": "string", "minLength": 1, "maxLength": 80},
            "count": {"type": "integer", "minimum": 1}, "price": {"type": "number", "exclusiveMinimum": 0}},
            "required": ["text", "count", "price"], "additionalProperties": false}}, "additionalProperties": false})
}

fn an_invoice(at: usize) -> Value {
    let line = |index: usize| json!({"text": format!("{} yards of muslin, white", index + 2), "count": index + 1, "price": 3.25});
    json!({"number": format!("INV-{:06}", 4711 + at), "date": "2026-11-28", "currency": (["EUR", "GBP", "CNY"][at % 3]),
        "lines": (0..4).map(line).collect::<Vec<_>>(), "total": 32.5, "paid": (at.is_multiple_of(2)), "note": null})
}

fn summary() -> Value {
    json!({"type": "object", "properties": {"title": {"type": "string", "maxLength": 100}, "summary": {"type": "string"},
        "sentiment": {"enum": ["positive", "neutral", "negative"]}, "score": {"type": "number", "minimum": 0, "maximum": 1},
        "topics": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 8}},
        "required": ["title", "summary", "sentiment", "score"], "additionalProperties": false})
}

fn a_summary(at: usize) -> Value {
    json!({"title": "What was said at the ball", "summary": "A single man in possession of a good fortune came to the \
        neighbourhood. “How so?” she asked.\n他说:“好。” Everybody had something to say about it; nobody was asked.".repeat(2),
        "sentiment": (["positive", "neutral", "negative"][at % 3]), "score": 0.25, "topics": ["balls", "fortune", "婚姻"]})
}

fn tree() -> Value {
    json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"label": {"type": "string"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["label", "children"],
        "additionalProperties": false}}})
}

fn a_tree(depth: usize) -> Value {
    let children = if depth == 0 { vec![] } else { vec![a_tree(depth - 1), a_tree(depth - 1)] };
    json!({"label": format!("node at depth {depth}"), "children": children})
}
