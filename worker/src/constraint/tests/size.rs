//! Constraints that would take all memory are refused before they are compiled.

use super::*;

fn doubling(levels: usize, first: &str, next: impl Fn(String) -> String) -> Constraint {
    let mut definitions = vec![format!(r#""a0":{first}"#)];
    for level in 1..=levels {
        let before = format!(r##"{{"$ref":"#/$defs/a{}"}}"##, level - 1);
        definitions.push(format!(r#""a{level}":{}"#, next(before)));
    }
    Constraint::JsonSchema(format!(r##"{{"$ref":"#/$defs/a{levels}","$defs":{{{}}}}}"##, definitions.join(",")))
}

fn refused_as_too_large(constraint: Constraint) {
    let what = format!("{constraint:?}");
    let said = refused(constraint);
    assert!(
        said.starts_with("is too large: ") && said.contains("50000 parts when written out; "),
        "{said}: {what:.200}"
    );
}

#[test]
fn schemas_whose_parts_double_are_refused() {
    let text = r#"{"type":"string","pattern":"x"}"#;
    let twice = |keyword: &'static str| move |part: String| format!(r#"{{"{keyword}":[{part},{part}]}}"#);
    refused_as_too_large(doubling(30, text, twice("allOf")));
    refused_as_too_large(doubling(30, text, |part| format!(r#"{{"allOf":[{{"items":{part}}},{{"items":{part}}}]}}"#)));
    refused_as_too_large(doubling(30, text, |part| {
        format!(r#"{{"allOf":[{{"properties":{{"a":{part}}}}},{{"properties":{{"a":{part}}}}}]}}"#)
    }));
    for keyword in ["anyOf", "oneOf"] {
        let all = |part: String| format!(r#"{{"type":"string","{keyword}":[{part},{part}]}}"#);
        refused_as_too_large(doubling(30, text, all));
    }
    let keys: Vec<String> = (0..100).map(|key| format!(r#""p{key}":{{}}"#)).collect();
    let inline = (0..6).fold(text.to_owned(), |part, _| {
        format!(r#"{{"properties":{{{}}},"allOf":[{{"additionalProperties":{part}}}]}}"#, keys.join(","))
    });
    refused_as_too_large(Constraint::JsonSchema(inline));
    let anchors: Vec<String> = (1..31)
        .map(|level| {
            format!(r##"{{"$anchor":"a{level}","allOf":[{{"$ref":"#a{0}"}},{{"$ref":"#a{0}"}}]}}"##, level - 1)
        })
        .collect();
    let anchored = format!(
        r##"{{"$ref":"#a30","$defs":{{"a":{{"$anchor":"a0","type":"string","pattern":"x"}},{}}}}}"##,
        anchors.iter().enumerate().map(|(at, part)| format!(r#""{at}":{part}"#)).collect::<Vec<_>>().join(",")
    );
    refused_as_too_large(Constraint::JsonSchema(anchored.clone()));
    refused_as_too_large(Constraint::Grammar(format!("start: %json {anchored}")));
}

#[test]
fn terminals_whose_parts_double_are_refused() {
    let chain = |next: &dyn Fn(usize) -> String, levels: usize| {
        (1..=levels).map(|level| format!("A{level}: {}\n", next(level - 1))).collect::<String>()
    };
    let twice = |level: usize| format!("A{level} A{level}");
    let flat = format!("start: B\nA0: /[ab]/\n{}B: {}\n", chain(&twice, 16), "A16 ".repeat(10_000));
    refused_as_too_large(Constraint::Grammar(flat));
    let named = |level: usize| format!("\"x\" -> name\n | A{level} A{level}");
    for next in [&twice as &dyn Fn(usize) -> String, &named, &|level| format!("(A{level} & /b/) (A{level} | \"a\")")] {
        refused_as_too_large(Constraint::Grammar(format!("start: A30\nA0: /[ab]/\n{}", chain(next, 30))));
    }
    let priorities = chain(&twice, 30).replace(": ", ".-1 : ");
    refused_as_too_large(Constraint::Grammar(format!("start: A30 // A0:\nA0: \"a\" # A0: A0\n{priorities}")));
    refused_as_too_large(Constraint::Grammar(format!(
        "start: %lark {{\nstart: A30\nA0: \"//\"\n{}}}",
        chain(&twice, 30)
    )));
    refused_as_too_large(Constraint::Grammar(format!("start: /{}/", r"\w".repeat(20_000))));
}

#[test]
fn ordinary_references_and_large_repetitions_are_followed() {
    let person = r##"{"type":"object","properties":{"name":{"type":"string"},"friends":{"type":"array","items":{"$ref":"#/$defs/person"}}},
        "required":["name"]}"##;
    let optional: Vec<String> =
        (0..20).map(|at| format!(r#""o{at}":{{"anyOf":[{{"type":"string"}},{{"type":"null"}}]}}"#)).collect();
    let states: Vec<String> = (0..50).map(|at| format!(r#""state {at}""#)).collect();
    let schema = format!(
        r##"{{"$id":"https://example.com/a","allOf":[{{"$ref":"#/$defs/person"}},{{"type":"object","properties":{{{}}}}},
            {{"type":"object","properties":{{"state":{{"type":"string","enum":[{}]}}}}}}],"$defs":{{"person":{person}}}}}"##,
        optional.join(","),
        states.join(",")
    );
    for constraint in [
        Constraint::JsonSchema(schema),
        Constraint::JsonSchema(format!(r##"{{"$ref":"#/$defs/person","$defs":{{"person":{person}}}}}"##)),
        Constraint::Regex("((a{1000}){1000}){1000}".to_owned()),
        Constraint::Grammar("start: A\nA: B{1,100000} B{100000}\nB: /[ab]/{1000} C\nC: \"c\"{1000}".to_owned()),
        Constraint::Grammar(
            "start: NUMBER (\",\" NUMBER)*\nNUMBER: INT FRACTION?\nINT: /[0-9]+/\nFRACTION: \".\" INT\n".to_owned(),
        ),
    ] {
        shared().compile(&constraint).map(drop).expect("compiles");
    }
}
