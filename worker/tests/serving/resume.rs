//! Answers that were cut off go on, byte for byte, as if they had not been.

use ernie_proto::ernie::v1::{
    ChatRequest, Choices, CompleteRequest, Constraint, Done, FinishReason, Resume, SamplingParams, ToolCall, Usage,
    constraint::Kind, inference_client::InferenceClient,
};
use tonic::{Code, Status, transport::Channel};

use super::{
    running::{Answer, Running, chat, complete, greedy, read, within},
    thinking,
};

const PROMPT: &str = "It is a truth universally acknowledged, that";

/// A request of either kind.
#[derive(Clone)]
enum Ask {
    Chat(ChatRequest),
    Complete(CompleteRequest),
}

impl Ask {
    fn sampling(&mut self) -> &mut SamplingParams {
        match self {
            Self::Chat(request) => request.sampling.get_or_insert_default(),
            Self::Complete(request) => request.sampling.get_or_insert_default(),
        }
    }

    fn with(mut self, resume: Option<Resume>, request_id: &str) -> Self {
        match &mut self {
            Self::Chat(request) => (request.resume, request.request_id) = (resume, request_id.to_owned()),
            Self::Complete(request) => (request.resume, request.request_id) = (resume, request_id.to_owned()),
        }
        self
    }

    async fn ask(self, client: &mut InferenceClient<Channel>) -> Result<Answer, Status> {
        let stream = match self {
            Self::Chat(request) => within(client.chat(request)).await?,
            Self::Complete(request) => within(client.complete(request)).await?,
        };
        read(stream.into_inner()).await
    }
}

/// What a client has of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
struct Received {
    ids: Vec<u32>,
    text: String,
    reasoning: String,
    calls: Vec<ToolCall>,
}

impl Received {
    /// Of the deltas that end before a token.
    fn before(answer: &Answer, token: usize) -> Self {
        let mut received = Self::default();
        for delta in &answer.deltas {
            if received.ids.len() + delta.token_ids.len() > token {
                break;
            }
            received.add(delta);
        }
        received.ids = answer.ids()[..token].to_vec();
        received
    }

    fn add(&mut self, delta: &ernie_proto::ernie::v1::Delta) {
        self.ids.extend(&delta.token_ids);
        self.text.push_str(&delta.text);
        self.reasoning.push_str(&delta.reasoning_content);
        self.calls.extend(delta.tool_calls.clone());
    }

    fn resume(&self, answer: &Answer) -> Resume {
        Resume {
            emitted_token_ids: self.ids.clone(),
            choice: answer.done.index,
            text_bytes: self.text.len() as u64,
            reasoning_bytes: self.reasoning.len() as u64,
            tool_calls: self.calls.len() as u32,
            seed: Some(answer.started.seed),
            numerics: answer.started.numerics.clone(),
            accept_other_numerics: false,
        }
    }
}

/// The end of an answer, without times and without what was in the cache.
fn end(done: &Done) -> Done {
    let usage = done.usage.map(|usage| Usage { cached_tokens: 0, ..usage });
    Done { usage, timings: None, ..done.clone() }
}

/// Asks, then resumes behind every token, and compares.
async fn equals_uncut_wherever_it_is_cut(what: &str, client: &mut InferenceClient<Channel>, ask: Ask) -> Answer {
    let whole = ask.clone().ask(client).await.expect("an answer");
    let count = whole.ids().len();
    let all = whole.deltas.iter().fold(Received::default(), |mut all, delta| {
        all.add(delta);
        all
    });
    assert!(count > 4, "{what}: {all:?}");
    for cut in 0..=count {
        // With the text that came in whole messages, and with none.
        let known = Received::before(&whole, cut);
        let nothing = Received { ids: known.ids.clone(), ..Received::default() };
        for before in [known, nothing] {
            let request = ask.clone().with(Some(before.resume(&whole)), &whole.started.request_id);
            let rest = request.ask(client).await.unwrap_or_else(|status| panic!("{what}, cut at {cut}: {status}"));
            assert_eq!(rest.started.resumed_tokens as usize, cut, "{what}");
            assert_eq!((rest.started.seed, &rest.started.numerics), (whole.started.seed, &whole.started.numerics));
            assert!(rest.deltas.iter().all(|delta| delta.index == whole.done.index), "{what}");
            let mut together = before;
            rest.deltas.iter().for_each(|delta| together.add(delta));
            assert_eq!(together, all, "{what}, cut at {cut}");
            assert_eq!(end(&rest.done), end(&whole.done), "{what}, cut at {cut}");
        }
    }
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_seeded_and_penalised_completions_equal_uncut_ones() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let seeded = SamplingParams {
        temperature: Some(1.0),
        top_p: Some(0.95),
        seed: Some(11),
        max_tokens: Some(30),
        ..Default::default()
    };
    let penalised = SamplingParams {
        repetition_penalty: Some(1.3),
        frequency_penalty: Some(0.5),
        presence_penalty: Some(-0.3),
        bad_words: vec!["the".into()],
        min_tokens: 8,
        ..seeded.clone()
    };
    for (what, sampling) in [("greedy", greedy(30)), ("seeded", seeded.clone()), ("penalised", penalised)] {
        equals_uncut_wherever_it_is_cut(what, &mut client, Ask::Complete(complete(PROMPT, sampling))).await;
    }
    let drawn = SamplingParams { seed: None, ..seeded.clone() };
    equals_uncut_wherever_it_is_cut("drawn", &mut client, Ask::Chat(chat("A ball", drawn))).await;
    let mut echo = complete(PROMPT, greedy(10));
    echo.echo = true;
    let whole = equals_uncut_wherever_it_is_cut("echo", &mut client, Ask::Complete(echo)).await;
    assert!(whole.text().starts_with(PROMPT));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_stop_equal_uncut_ones() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let ask = |sampling| Ask::Complete(complete(PROMPT, sampling));
    let free = ask(greedy(40)).ask(&mut client).await.expect("an answer");
    let text = free.text();
    // It ends inside of a word, so that a beginning of it is held back for some tokens.
    let middle = text.len() / 2;
    let stop = text[text.ceil_char_boundary(middle)..text.ceil_char_boundary(middle + 9)].to_owned();
    for include_stop_str_in_output in [false, true] {
        let sampling = SamplingParams { stop: vec![stop.clone()], include_stop_str_in_output, ..greedy(40) };
        let whole = equals_uncut_wherever_it_is_cut("a stop string", &mut client, ask(sampling)).await;
        assert_eq!(whole.done.finish_reason(), FinishReason::Stop);
    }
    let held = SamplingParams { stop: vec![format!("{stop}, but never this")], ..greedy(40) };
    let whole = equals_uncut_wherever_it_is_cut("text held back", &mut client, ask(held)).await;
    assert_eq!(whole.text(), text);
    let token = SamplingParams { stop_token_ids: vec![free.ids()[12]], ..greedy(40) };
    equals_uncut_wherever_it_is_cut("a stop token", &mut client, ask(token)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn characters_of_several_tokens_equal_uncut_ones() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let request = ernie_proto::ernie::v1::TokenizeRequest {
        input: Some(ernie_proto::ernie::v1::tokenize_request::Input::Text("x好".to_owned())),
        ..Default::default()
    };
    let ids = within(client.tokenize(request)).await.expect("tokenized").into_inner().ids;
    let bytes = &ids[ids.len() - 3..];
    let sampling = SamplingParams {
        temperature: Some(2.0),
        seed: Some(4),
        max_tokens: Some(60),
        logit_bias: bytes.iter().map(|&id| (id, 60.0)).collect(),
        ..Default::default()
    };
    let ask = Ask::Complete(complete(PROMPT, sampling));
    let whole = equals_uncut_wherever_it_is_cut("bytes", &mut client, ask).await;
    let text = whole.text();
    assert!(text.contains('好') && text.contains('\u{FFFD}'), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reasoning_and_tool_calls_equal_uncut_ones() {
    let folder = thinking::model();
    let worker = thinking::start(&folder).await;
    let mut client = worker.client().await;
    let mut request = chat("hello", greedy(64));
    request.tools = vec![thinking::weather()];
    let whole = equals_uncut_wherever_it_is_cut("tools", &mut client, Ask::Chat(request)).await;
    assert_eq!(whole.done.finish_reason(), FinishReason::ToolCalls);
    let whole =
        equals_uncut_wherever_it_is_cut("a call cut short", &mut client, Ask::Chat(chat("hello", greedy(9)))).await;
    assert_eq!(whole.done.finish_reason(), FinishReason::Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn constrained_answers_equal_uncut_ones() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let schema = r#"{"type": "object", "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"], "additionalProperties": false}"#;
    for (what, kind) in [
        ("a schema", Kind::JsonSchema(schema.to_owned())),
        ("an expression", Kind::Regex("[a-z]{3,12}( [a-z]{2,9}){2}".to_owned())),
    ] {
        let constraint = Some(Constraint { kind: Some(kind) });
        let seeded = SamplingParams {
            temperature: Some(1.0),
            seed: Some(3),
            max_tokens: Some(150),
            frequency_penalty: Some(0.3),
            constraint,
            ..Default::default()
        };
        let ignoring = SamplingParams { ignore_eos: true, ..seeded.clone() };
        for sampling in [seeded, ignoring] {
            let ask = Ask::Complete(complete(PROMPT, sampling));
            let whole = equals_uncut_wherever_it_is_cut(what, &mut client, ask).await;
            assert_eq!(whole.done.finish_reason(), FinishReason::Stop);
        }
    }
    let folder = thinking::model();
    let worker = thinking::start(&folder).await;
    let options = vec!["so it is".to_owned(), "<tool_call>no</tool_call>".to_owned()];
    let constraint = Some(Constraint { kind: Some(Kind::Choice(Choices { options })) });
    let request = chat("hello", SamplingParams { constraint, ..greedy(40) });
    let mut client = worker.client().await;
    let whole = equals_uncut_wherever_it_is_cut("behind reasoning", &mut client, Ask::Chat(request)).await;
    assert_eq!(whole.done.finish_reason(), FinishReason::Stop);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_a_constraint_does_not_allow_are_not_gone_on_with() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let free = Ask::Complete(complete(PROMPT, greedy(10))).ask(&mut client).await.expect("an answer");
    let resume = Received::before(&free, 5).resume(&free);
    let constraint = Some(Constraint { kind: Some(Kind::Regex("[0-9]+".to_owned())) });
    let sampling = SamplingParams { constraint, ..greedy(10) };
    let ask = Ask::Complete(complete(PROMPT, sampling)).with(Some(resume), "");
    let status = ask.ask(&mut client).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("resume.emitted_token_ids: has at 0 the token "), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_choice_of_several_is_resumed_by_itself_also_on_another_worker() {
    let (worker, other) = (Running::start(&[]).await, Running::start(&["--threads", "1"]).await);
    let sampling = SamplingParams { temperature: Some(1.0), max_tokens: Some(20), n: Some(3), ..Default::default() };
    let ask = complete(PROMPT, sampling);
    let mut stream = within(worker.client().await.complete(ask.clone())).await.expect("accepted").into_inner();
    let mut answers = vec![Answer::default(); 3];
    while let Some(message) = within(stream.message()).await.expect("goes on") {
        use ernie_proto::ernie::v1::generate_response::Event;
        match message.event.expect("an event") {
            Event::Started(started) => answers.iter_mut().for_each(|answer| answer.started = started.clone()),
            Event::Delta(delta) => answers[delta.index as usize].deltas.push(delta),
            Event::Done(done) => {
                let index = done.index as usize;
                answers[index].done = done;
            }
            Event::PromptLogprobs(_) => panic!("nobody asked"),
        }
    }
    let mut client = other.client().await;
    for whole in &answers {
        let before = Received::before(whole, 7);
        let mut ask = Ask::Complete(ask.clone()).with(Some(before.resume(whole)), &whole.started.request_id);
        let status = ask.clone().ask(&mut client).await.expect_err("several choices");
        assert!(status.message().starts_with("sampling.n: is 3, but a resume goes on with one choice"), "{status}");
        ask.sampling().n = None;
        let rest = ask.ask(&mut client).await.expect("an answer");
        assert_eq!([before.ids, rest.ids()].concat(), whole.ids());
        assert_eq!(end(&rest.done), end(&whole.done));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_without_sense_is_refused() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let whole = Ask::Complete(complete(PROMPT, greedy(10))).ask(&mut client).await.expect("an answer");
    let good = Received::before(&whole, 5).resume(&whole);
    let said = Received::before(&whole, 5).text.len() as u64;
    let cases = [
        (
            Resume { numerics: "other".into(), ..good.clone() },
            Code::FailedPrecondition,
            "resume.numerics: is \"other\"",
        ),
        (Resume { numerics: String::new(), ..good.clone() }, Code::InvalidArgument, "resume.numerics: is missing"),
        (Resume { seed: None, ..good.clone() }, Code::InvalidArgument, "resume.seed: is missing"),
        (Resume { choice: 64, ..good.clone() }, Code::InvalidArgument, "resume.choice: is 64"),
        (
            Resume { emitted_token_ids: vec![3, 70_000], ..good.clone() },
            Code::InvalidArgument,
            "resume.emitted_token_ids[1]: is 70000",
        ),
        (
            Resume { emitted_token_ids: vec![3; 11], text_bytes: 0, ..good.clone() },
            Code::InvalidArgument,
            "11 tokens were emitted already, and max_tokens is 10",
        ),
        (
            Resume { emitted_token_ids: vec![3; 50_000], text_bytes: 0, ..good.clone() },
            Code::InvalidArgument,
            "50000 tokens were emitted already",
        ),
        (
            Resume { emitted_token_ids: vec![3, 2, 3], text_bytes: 0, ..good.clone() },
            Code::InvalidArgument,
            "resume.emitted_token_ids: has 3 tokens, but the answer ended with its token 1",
        ),
        (
            Resume { text_bytes: said + 500, ..good.clone() },
            Code::InvalidArgument,
            "resume.text_bytes: is more than those tokens say",
        ),
        (
            Resume { reasoning_bytes: u64::MAX, ..good.clone() },
            Code::InvalidArgument,
            "resume.reasoning_bytes: is more than those tokens say",
        ),
        (Resume { tool_calls: 1, ..good.clone() }, Code::InvalidArgument, "resume.tool_calls: is 1, but those tokens"),
    ];
    for (resume, code, words) in cases {
        let ask = Ask::Complete(complete(PROMPT, greedy(10))).with(Some(resume), "");
        let status = ask.ask(&mut client).await.expect_err(words);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(words), "{words:?} in {:?}", status.message());
    }
    let other = Resume { numerics: "other".into(), accept_other_numerics: true, ..good };
    let rest = Ask::Complete(complete(PROMPT, greedy(10))).with(Some(other), "").ask(&mut client).await;
    assert_eq!(rest.expect("accepted").ids(), whole.ids()[5..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logprobs_of_a_prompt_are_not_told_again_behind_a_token() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let sampling = SamplingParams { prompt_logprobs: Some(1), logprobs: Some(1), ..greedy(10) };
    let ask = Ask::Complete(complete(PROMPT, sampling));
    let whole = ask.clone().ask(&mut client).await.expect("an answer");
    for (cut, told) in [(0, whole.prompt.clone()), (4, vec![])] {
        let before = Received::before(&whole, cut);
        let rest = ask.clone().with(Some(before.resume(&whole)), "").ask(&mut client).await.expect("an answer");
        assert_eq!(rest.prompt, told, "cut at {cut}");
        let logprobs =
            |answer: &Answer| answer.deltas.iter().flat_map(|delta| delta.logprobs.clone()).collect::<Vec<_>>();
        assert_eq!(logprobs(&rest), logprobs(&whole)[cut..]);
    }
}
