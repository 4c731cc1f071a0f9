//! Answers that must be something: each kind of constraint, beside everything else that a client may ask for.

use ernie_proto::ernie::v1::{
    Choices, Constraint, FinishReason, SamplingParams, TokenizeRequest, constraint::Kind, done::MatchedStop,
    generate_response::Event, tokenize_request::Input,
};
use serde_json::Value;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::running::{Answer, Running, chat, complete, greedy, read, within};
use super::thinking;

const PROMPT: &str = "It is a truth universally acknowledged, that";
const CARD: &str = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12},
    "age": {"type": "integer", "minimum": 0, "maximum": 120}, "single": {"type": "boolean"}},
    "required": ["name", "age", "single"], "additionalProperties": false}"#;

fn with(kind: Kind, sampling: SamplingParams) -> SamplingParams {
    SamplingParams { constraint: Some(Constraint { kind: Some(kind) }), ..sampling }
}

fn one_of(options: &[&str]) -> Kind {
    Kind::Choice(Choices { options: options.iter().map(|&option| option.to_owned()).collect() })
}

fn seeded(seed: u64, max_tokens: u32) -> SamplingParams {
    let (temperature, seed, max_tokens) = (Some(1.0), Some(seed), Some(max_tokens));
    SamplingParams { temperature, seed, max_tokens, ..Default::default() }
}

async fn ask(worker: &Running, sampling: SamplingParams) -> Answer {
    attempt(worker, sampling).await.expect("an answer")
}

async fn attempt(worker: &Running, sampling: SamplingParams) -> Result<Answer, Status> {
    let mut client = worker.client().await;
    read(within(client.complete(complete(PROMPT, sampling))).await.expect("accepted").into_inner()).await
}

/// The status of an answer for which its own request leaves nothing.
fn assert_unanswerable(status: &Status, sentence: &str) {
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, sentence));
    let details = status.get_details_bad_request().expect("details");
    assert_eq!(details.field_violations[0].field, "sampling.constraint");
}

fn is_card(text: &str) -> bool {
    let Ok(Value::Object(card)) = serde_json::from_str(text) else { return false };
    card.len() == 3 && card["name"].is_string() && card["age"].is_u64() && card["single"].is_boolean()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_constraint_holds_greedy_and_sampled() {
    let worker = Running::start(&[]).await;
    let list = "start: \"[\" item (\",\" item){2,4} \"]\"\nitem: /[a-z]{1,6}/";
    let is_list = |text: &str| {
        let items: Vec<&str> = text.trim_matches(['[', ']']).split(',').collect();
        (3..=5).contains(&items.len()) && items.iter().all(|item| (1..=6).contains(&item.len()))
    };
    let number = regex::Regex::new(r"^\+49 [0-9]{3,4}/[0-9]{5}$").expect("an expression");
    let cases: [(Kind, &dyn Fn(&str) -> bool); 5] = [
        (Kind::JsonSchema(CARD.to_owned()), &is_card),
        (Kind::JsonObject(true), &|text| matches!(serde_json::from_str(text), Ok(Value::Object(_)))),
        (Kind::Regex(number.as_str().to_owned()), &|text| number.is_match(text)),
        (Kind::Grammar(list.to_owned()), &is_list),
        (one_of(&["pride", "prejudice", "pride and prejudice"]), &|text| text.starts_with("pr")),
    ];
    for (kind, holds) in cases {
        let mut stopped = 0;
        for sampling in std::iter::once(greedy(200)).chain((0..6).map(|seed| seeded(seed, 200))) {
            let answer = ask(&worker, with(kind.clone(), sampling)).await;
            if answer.done.finish_reason() == FinishReason::Stop {
                stopped += 1;
                assert!(holds(&answer.text()), "{kind:?}: {:?}", answer.text());
                assert_eq!(answer.done.matched_stop, None);
            }
            assert!(kind != Kind::JsonObject(true) || answer.text().starts_with('{'), "{:?}", answer.text());
        }
        // An object of any form may go on for longer than that.
        assert!(stopped > 0 || kind == Kind::JsonObject(true), "{kind:?}");
    }
    assert!(worker.figure("ernie:constraint_mask_seconds_count").await > 100.0);
    assert_eq!(worker.figure("ernie:constraint_compile_seconds_count").await, 5.0, "each is compiled once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_reasoning_is_what_was_asked_for_word_for_word() {
    let folder = thinking::model();
    let worker = thinking::start(&folder).await;
    let mut client = worker.client().await;
    let looks_like_a_call = "<tool_call>{\"name\": \"weather\"}</tool_call>";
    let schema = serde_json::json!({"const": looks_like_a_call}).to_string();
    let cases = [
        (one_of(&[looks_like_a_call]), looks_like_a_call.to_owned()),
        (one_of(&["\n\nso it is\n"]), "\n\nso it is\n".to_owned()),
        (Kind::JsonSchema(schema), Value::from(looks_like_a_call).to_string()),
    ];
    for (kind, expected) in cases {
        let mut request = chat("hello", with(kind, greedy(100)));
        request.tools = vec![thinking::weather()];
        let answer = read(within(client.chat(request)).await.expect("accepted").into_inner()).await.expect("an answer");
        assert_eq!((thinking::reasoning(&answer).as_str(), answer.text()), ("I look it up.", expected));
        assert_eq!((thinking::calls(&answer), answer.done.finish_reason()), (vec![], FinishReason::Stop));
    }
    let cut = read(
        within(client.chat(chat("hello", with(one_of(&["yes"]), greedy(2))))).await.expect("accepted").into_inner(),
    );
    let cut = cut.await.expect("an answer");
    assert_eq!((thinking::reasoning(&cut).as_str(), cut.text().as_str()), ("I look it up.\n", ""));
    assert_eq!(cut.done.finish_reason(), FinishReason::Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_can_only_end_does_whatever_else_was_asked_for() {
    let worker = Running::start(&[]).await;
    let kind = || one_of(&["abc"]);
    let plain = ask(&worker, with(kind(), greedy(50))).await;
    let end = *plain.ids().last().expect("tokens");
    let variants = [
        SamplingParams { ignore_eos: true, ..greedy(50) },
        SamplingParams { min_tokens: 40, ..greedy(50) },
        SamplingParams { min_tokens: 40, ignore_eos: true, ..greedy(50) },
        SamplingParams { logit_bias: [(end, -100.0)].into(), ..greedy(50) },
        SamplingParams { logprobs: Some(2), ..seeded(1, 50) },
    ];
    for sampling in variants {
        let answer = ask(&worker, with(kind(), sampling.clone())).await;
        assert_eq!((answer.text().as_str(), answer.done.finish_reason()), ("abc", FinishReason::Stop), "{sampling:?}");
        assert_eq!(answer.ids().last(), Some(&end));
        let told: usize = answer.deltas.iter().map(|delta| delta.logprobs.len()).sum();
        assert_eq!(told, if sampling.logprobs.is_some() { answer.ids().len() } else { 0 });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_may_end_goes_on_while_ends_are_ignored_or_too_early() {
    let worker = Running::start(&[]).await;
    let kind = || Kind::Regex("(ab){1,20}".to_owned());
    let whole = "ab".repeat(20);
    let ignoring = ask(&worker, with(kind(), SamplingParams { ignore_eos: true, ..seeded(2, 100) })).await;
    assert_eq!((ignoring.text(), ignoring.done.finish_reason()), (whole, FinishReason::Stop));
    let early = ask(&worker, with(kind(), SamplingParams { min_tokens: 9, ..seeded(2, 100) })).await;
    assert!(early.ids().len() >= 10, "nine tokens and an end: {:?}", early.text());
    assert_eq!(early.done.finish_reason(), FinishReason::Stop);
}

#[tokio::test(flavor = "multi_thread")]
async fn stops_words_and_biases_count_within_a_constraint() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let stop = SamplingParams { stop: vec!["-c".to_owned()], ..greedy(50) };
    let stopped = ask(&worker, with(one_of(&["a-b-c-d"]), stop)).await;
    assert_eq!(stopped.text(), "a-b");
    assert_eq!(stopped.done.matched_stop, Some(MatchedStop::Stop("-c".to_owned())));
    let tokens = TokenizeRequest { input: Some(Input::Text("x-".to_owned())), ..Default::default() };
    let ids = within(client.tokenize(tokens)).await.expect("tokenized").into_inner().ids;
    let dash = *ids.last().expect("tokens");
    let token = SamplingParams { stop_token_ids: vec![dash], ..greedy(50) };
    let stopped = ask(&worker, with(one_of(&["a-b"]), token)).await;
    assert_eq!(stopped.done.matched_stop, Some(MatchedStop::StopTokenId(dash)));
    let words = SamplingParams { bad_words: vec!["yes".to_owned()], ..greedy(50) };
    let free = ask(&worker, with(Kind::Regex("[ab-]{8}".to_owned()), greedy(50))).await;
    assert_eq!(free.text().len(), 8);
    let biased = SamplingParams { logit_bias: [(dash, 100.0)].into(), ..words };
    let biased = ask(&worker, with(Kind::Regex("[ab-]{8}".to_owned()), biased)).await;
    assert_eq!(biased.text(), "-".repeat(8));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_constraint_that_allows_only_what_the_request_forbids_is_refused_there_by_both_names() {
    let worker = Running::start(&[]).await;
    let bias = |ids: &[u32]| ids.iter().map(|&id| (id, -100.0)).collect();
    // Every token that spells it is forbidden, one after the other.
    let mut dashes = Vec::new();
    let biased = loop {
        assert!(dashes.len() < 4, "{dashes:?}");
        let forbidding = SamplingParams { logit_bias: bias(&dashes), ..greedy(50) };
        match attempt(&worker, with(Kind::Regex("-".to_owned()), forbidding)).await {
            Ok(answer) => dashes.push(answer.ids()[0]),
            Err(status) => break status,
        }
    };
    let says = |place: &str, names: &str| {
        format!(
            "sampling.constraint allows the answer {place} only tokens that {names}; allow one of them, or change the \
             constraint"
        )
    };
    assert_unanswerable(&biased, &says("at its beginning", "logit_bias forbids"));
    let ending = [
        (SamplingParams { min_tokens: 9, ..greedy(50) }, "logit_bias and min_tokens forbid"),
        (SamplingParams { ignore_eos: true, ..greedy(50) }, "logit_bias and ignore_eos forbid"),
    ];
    for (sampling, names) in ending {
        let sampling = SamplingParams { logit_bias: bias(&dashes), ..sampling };
        let status = attempt(&worker, with(Kind::Regex("-?".to_owned()), sampling)).await.expect_err("nothing is left");
        assert_unanswerable(&status, &says("at its beginning", names));
    }
    let later = SamplingParams { logit_bias: bias(&dashes), ..greedy(50) };
    let status = attempt(&worker, with(Kind::Regex("a-".to_owned()), later)).await.expect_err("nothing is left");
    assert_unanswerable(&status, &says("after 1 token", "logit_bias forbids"));
    assert_eq!(ask(&worker, with(one_of(&["abc"]), greedy(9))).await.text(), "abc", "the worker lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_choices_follows_the_constraint_by_itself() {
    let worker = Running::start(&[]).await;
    let sampling = with(Kind::JsonSchema(CARD.to_owned()), SamplingParams { n: Some(4), ..seeded(7, 200) });
    let mut client = worker.client().await;
    let mut stream = within(client.complete(complete(PROMPT, sampling.clone()))).await.expect("accepted").into_inner();
    let (mut texts, mut done) = (vec![String::new(); 4], 0);
    while let Some(message) = within(stream.message()).await.expect("goes on") {
        match message.event.expect("an event") {
            Event::Delta(delta) => texts[delta.index as usize].push_str(&delta.text),
            Event::Done(end) => {
                done += 1;
                let text = &texts[end.index as usize];
                assert!(end.finish_reason() == FinishReason::Length || is_card(text), "{text:?}");
            }
            Event::Started(_) | Event::PromptLogprobs(_) => {}
        }
    }
    assert_eq!(done, 4);
    assert!(texts[0] != texts[1] && texts[1] != texts[2], "choices differ: {texts:?}");
    let alone = ask(&worker, SamplingParams { n: None, ..sampling }).await;
    assert_eq!(alone.text(), texts[0], "the first choice is the answer of a request for one");
}

#[tokio::test(flavor = "multi_thread")]
async fn constrained_answers_equal_solo_ones_whatever_runs_beside_them_and_is_preempted() {
    let kinds = [
        Kind::JsonSchema(CARD.to_owned()),
        Kind::Regex("[a-z]{200,400}".to_owned()),
        one_of(&["pride", "prejudice", "sense", "sensibility"]),
    ];
    let sampling = |index: u64| with(kinds[index as usize % 3].clone(), seeded(index, 300));
    let alone = Running::start(&["--max-num-seqs", "1"]).await;
    let mut expected = Vec::new();
    for index in 0..9 {
        expected.push(ask(&alone, sampling(index)).await.ids());
    }
    let crowded =
        Running::start(&["--max-model-len", "512", "--kv-cache-memory", "1Mi", "--max-num-batched-tokens", "64"]).await;
    let mixed = futures::future::join_all((0..18u64).map(|index| {
        let free = seeded(index, 300);
        ask(&crowded, if index < 9 { sampling(index) } else { free })
    }));
    for (index, answer) in mixed.await.into_iter().take(9).enumerate() {
        assert_eq!(answer.ids(), expected[index], "{index}");
    }
    assert!(crowded.figure("vllm:num_preemptions_total").await > 0.0, "some were preempted");
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_without_sense_are_refused_by_field_value_and_remedy() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let cases = [
        (Kind::JsonSchema("{".into()), "json_schema", "is no JSON: EOF"),
        (Kind::JsonSchema("false".into()), "json_schema", "is false, which no answer fits; send"),
        (
            Kind::JsonSchema(r#"{"minimum": 3, "maximum": 2, "type": "integer"}"#.into()),
            "json_schema",
            "cannot be followed",
        ),
        (Kind::JsonSchema(" ".repeat(70_000)), "json_schema", "is empty"),
        (Kind::JsonSchema(format!("\"{}\"", "x".repeat(70_000))), "json_schema", "has 70002 bytes; send at most 65536"),
        (Kind::JsonObject(false), "json_object", "is false; set it to true"),
        (Kind::Regex("a(".into()), "regex", "unclosed group; send a regular expression"),
        (Kind::Regex("a".repeat(9000)), "regex", "has 9000 bytes; send at most 8192"),
        (Kind::Grammar("start: other".into()), "grammar", "other"),
        (Kind::Grammar("start: start \"a\"".into()), "grammar", "no token of this model may come next; send a grammar"),
        (one_of(&[]), "choice.options", "has 0 options; give 1 to 1024"),
        (one_of(&["a", ""]), "choice.options[1]", "is empty; leave it out"),
    ];
    for (kind, field, words) in cases {
        let status =
            within(client.complete(complete(PROMPT, with(kind, greedy(4))))).await.expect_err("refused at once");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let begin = format!("sampling.constraint.{field}: ");
        assert!(status.message().starts_with(&begin) && status.message().contains(words), "{words:?}: {status}");
        let details = status.get_details_bad_request().expect("details");
        assert_eq!(details.field_violations[0].field, format!("sampling.constraint.{field}"));
    }
    let nothing = SamplingParams { constraint: Some(Constraint::default()), ..greedy(4) };
    let status = within(client.complete(complete(PROMPT, nothing))).await.expect_err("refused");
    assert!(status.message().starts_with("sampling.constraint: says nothing; set"), "{status}");
    assert_eq!(ask(&worker, greedy(4)).await.ids().len(), 4, "the worker lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_that_comes_to_nothing_fails_its_request_alone() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let nowhere = Kind::Grammar("start: \"a\" b\nb: b \"c\"".to_owned());
    let stream = within(client.complete(complete(PROMPT, with(nowhere, greedy(9))))).await.expect("accepted");
    let status = read(stream.into_inner()).await.expect_err("it comes to nothing");
    assert_unanswerable(
        &status,
        "sampling.constraint cannot be followed any further: no token of this model may come next; send one that leads on \
         from everywhere",
    );
    assert_eq!(ask(&worker, with(one_of(&["abc"]), greedy(9))).await.text(), "abc", "the worker lives on");
}
