//! A hundred JSON Schemas, and answers to each at temperature 1: every answer that ends by itself fits its schema, as a
//! validator says that knows nothing of grammars.
//!
//! `ERNIE_CONSTRAINT_SAMPLES` says how many answers to each, 20 with `make soak`.

use std::time::Instant;

use ernie_proto::ernie::v1::{
    Constraint, FinishReason, SamplingParams, constraint::Kind, generate_response::Event,
    inference_client::InferenceClient,
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tonic::transport::Channel;

use super::running::{PATIENCE, Running, complete};
use super::validator::validate;

/// Answers that are asked for at once, to different schemas.
const AT_ONCE: usize = 8;
/// Tokens of an answer, at most.
const TOKENS: u32 = 160;

fn samples() -> u32 {
    std::env::var("ERNIE_CONSTRAINT_SAMPLES").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// Schemas of single values.
fn values() -> Vec<Value> {
    vec![
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"type": "integer"}),
        json!({"type": "integer", "minimum": 0, "maximum": 120}),
        json!({"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5}),
        json!({"type": "number", "minimum": -1, "maximum": 1}),
        json!({"type": "number", "exclusiveMinimum": 0}),
        json!({"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 95}),
        json!({"type": "string", "maxLength": 12}),
        json!({"type": "string", "minLength": 3, "maxLength": 8}),
        json!({"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}),
        json!({"type": "string", "pattern": "^\\d{3}-\\d{4}$"}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "string", "format": "uuid"}),
        json!({"type": "string", "format": "ipv4"}),
        json!({"type": "string", "format": "ipv6"}),
        json!({"type": "string", "enum": ["red", "green", "blue"]}),
        json!({"enum": [1, "one", null, true, {"a": [1]}]}),
        json!({"const": {"kind": "ball", "guests": 40}}),
        json!({"const": "naïve “quotes” \\ / \n 好"}),
        json!({"type": ["string", "integer"], "maxLength": 10}),
        json!({"anyOf": [{"type": "integer", "minimum": 1000}, {"type": "string", "maxLength": 4}]}),
        json!({"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 6}]}),
        json!({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]}),
    ]
}

/// Schemas of lists and objects.
fn structures() -> Vec<Value> {
    vec![
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 6}),
        json!({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}),
        json!({"type": "array", "prefixItems": [{"type": "integer", "maximum": 99}, {"type": "boolean"}], "items": false,
            "minItems": 2}),
        json!({"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "maxItems": 3}),
        json!({"type": "object", "maxProperties": 0}),
        json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false}),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "required": ["b"],
            "additionalProperties": false}),
        json!({"type": "object", "properties": {"x": {"type": "number", "minimum": 0, "maximum": 1}},
            "required": ["x"], "additionalProperties": {"type": "boolean"}}),
        json!({"type": "object", "properties": {"user": {"type": "object", "properties": {
            "name": {"type": "string", "maxLength": 10}, "mail": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.org$"}},
            "required": ["name", "mail"], "additionalProperties": false}}, "required": ["user"],
            "additionalProperties": false}),
        json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"], "additionalProperties": false}}}),
        json!({"type": "object", "properties": {"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1}},
            "required": ["kind", "radius"], "additionalProperties": false}),
        json!({"anyOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind", "n"],
                "additionalProperties": false},
            {"type": "object", "properties": {"kind": {"const": "b"}, "s": {"type": "string", "maxLength": 5}},
                "required": ["kind", "s"], "additionalProperties": false}]}),
        json!({"type": "object", "properties": {"name": {"const": "weather"}, "arguments": {"type": "object", "properties": {
            "city": {"enum": ["Bath", "London"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city"], "additionalProperties": false}}, "required": ["name", "arguments"],
            "additionalProperties": false}),
        json!({"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "additionalProperties": false,
            "maxProperties": 3}),
    ]
}

/// A hundred of them: those, and each value in an object and in a list.
fn schemas() -> Vec<Value> {
    let mut all = values();
    all.extend(structures());
    for value in values() {
        all.push(json!({"type": "object", "properties": {"value": value, "note": {"type": "string", "maxLength": 6}},
            "required": ["value"], "additionalProperties": false}));
    }
    for value in values() {
        all.push(json!({"type": "array", "items": value, "minItems": 1, "maxItems": 3}));
    }
    for structure in structures() {
        let properties = json!({"first": {"type": "boolean"}, "second": structure["properties"]});
        let nested = if structure.get("$defs").is_some() || properties["second"].is_null() {
            json!({"type": "array", "items": {"type": "integer", "minimum": all.len(), "maximum": 2 * all.len()}, "maxItems": 2})
        } else {
            json!({"type": "array", "items": structure, "minItems": 1, "maxItems": 2})
        };
        all.push(nested);
    }
    assert_eq!(all.len(), 100);
    all
}

/// What came of one schema's answers.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    stopped: usize,
    cut: usize,
    tokens: usize,
}

/// Asks for so many answers, and checks each that ended by itself.
async fn check(mut client: InferenceClient<Channel>, index: usize, schema: Value, samples: u32) -> Count {
    let constraint = Some(Constraint { kind: Some(Kind::JsonSchema(schema.to_string())) });
    let sampling = SamplingParams {
        temperature: Some(1.0),
        seed: Some(index as u64),
        n: Some(samples),
        max_tokens: Some(TOKENS),
        constraint,
        ..Default::default()
    };
    let request = complete("The gentleman's card, as JSON:", sampling);
    let mut stream = client.complete(request).await.unwrap_or_else(|status| panic!("{schema}: {status}")).into_inner();
    let (mut texts, mut count) = (vec![String::new(); samples as usize], Count::default());
    while let Some(message) = stream.message().await.unwrap_or_else(|status| panic!("{schema}: {status}")) {
        match message.event.expect("an event") {
            Event::Delta(delta) => {
                texts[delta.index as usize].push_str(&delta.text);
                count.tokens += delta.token_ids.len();
            }
            Event::Done(done) if done.finish_reason() == FinishReason::Stop => {
                count.stopped += 1;
                let text = &texts[done.index as usize];
                let answer = serde_json::from_str(text).unwrap_or_else(|error| panic!("{schema}: {text:?}: {error}"));
                if let Err(keyword) = validate(&schema, &schema, &answer) {
                    panic!("{schema}: {text}: breaks {keyword}");
                }
            }
            Event::Done(_) => count.cut += 1,
            Event::Started(_) | Event::PromptLogprobs(_) => {}
        }
    }
    assert_eq!(count.stopped + count.cut, samples as usize);
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_a_hundred_schemas_fit_them() {
    let worker = Running::start(&["--max-model-len", "512"]).await;
    let client = worker.client().await;
    let (samples, begun) = (samples(), Instant::now());
    let counts = stream::iter(schemas().into_iter().enumerate())
        .map(|(index, schema)| check(client.clone(), index, schema, samples))
        .buffer_unordered(AT_ONCE)
        .collect::<Vec<_>>();
    let counts = tokio::time::timeout(PATIENCE * samples, counts).await.expect("takes too long");
    let sum = |part: fn(&Count) -> usize| counts.iter().map(part).sum::<usize>();
    let (stopped, cut, tokens) = (sum(|count| count.stopped), sum(|count| count.cut), sum(|count| count.tokens));
    println!(
        "{} schemas, {samples} answers each: {stopped} ended by themselves, all valid; {cut} were cut at {TOKENS} tokens; \
         {tokens} tokens in {:.1} s",
        counts.len(),
        begun.elapsed().as_secs_f64()
    );
    assert!(2 * stopped > cut, "many answers end by themselves: {stopped} of {}", stopped + cut);
}
