//! Requests without sense: each gets the right status and a sentence that names the field, and the worker lives on.

use bytes::Bytes;
use ernie_proto::ernie::v1::{
    self, ChatRequest, CompleteRequest, ContentPart, DetokenizeRequest, GetModelRequest, Message, Role, SamplingParams,
    TokenizeRequest, inference_client::InferenceClient,
};
use prost::Message as _;
use tonic::{Code, Request, Status, transport::Channel};
use tonic_types::StatusExt;

use super::running::{Running, call_with_bytes, channel, chat, complete, complete_ids, greedy, message, read, within};

const CHAT: &str = "/ernie.v1.Inference/Chat";

async fn chat_error(client: &mut InferenceClient<Channel>, request: ChatRequest) -> Status {
    match within(client.chat(request)).await {
        Err(status) => status,
        Ok(stream) => read(stream.into_inner()).await.expect_err("refused"),
    }
}

async fn complete_error(client: &mut InferenceClient<Channel>, request: CompleteRequest) -> Status {
    match within(client.complete(request)).await {
        Err(status) => status,
        Ok(stream) => read(stream.into_inner()).await.expect_err("refused"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_without_sense_are_refused_by_field_value_and_remedy() {
    let worker = Running::start(&["--max-model-len", "256"]).await;
    let mut client = worker.client().await;
    let with = |sampling| chat("hi", sampling);
    let none = SamplingParams::default;
    let long = "It is a truth universally acknowledged. ".repeat(200);
    let cases: Vec<(ChatRequest, Code, &[&str])> = vec![
        (ChatRequest::default(), Code::InvalidArgument, &["messages: is empty"]),
        (
            ChatRequest { messages: vec![Message { role: 99, ..message(Role::User, "x") }], ..Default::default() },
            Code::InvalidArgument,
            &["messages[0].role: is 99"],
        ),
        (
            ChatRequest { messages: vec![message(Role::Tool, "x")], ..Default::default() },
            Code::InvalidArgument,
            &["messages[0].role: is tool", "use system, user, assistant"],
        ),
        (
            ChatRequest {
                messages: vec![Message { role: 2, content: vec![ContentPart::default()], ..Default::default() }],
                ..Default::default()
            },
            Code::InvalidArgument,
            &["messages[0].content[0]", "send text"],
        ),
        (ChatRequest { model: "gpt-5".into(), ..with(none()) }, Code::NotFound, &["\"gpt-5\"", "\"austen-2.6m\""]),
        (
            with(SamplingParams { temperature: Some(f32::NAN), ..none() }),
            Code::InvalidArgument,
            &["sampling.temperature: is NaN", "choose from 0 to 2"],
        ),
        (
            with(SamplingParams { temperature: Some(-1.0), ..none() }),
            Code::InvalidArgument,
            &["sampling.temperature: is -1"],
        ),
        (with(SamplingParams { top_p: Some(0.0), ..none() }), Code::InvalidArgument, &["sampling.top_p: is 0"]),
        (with(greedy(0)), Code::InvalidArgument, &["sampling.max_tokens: is 0", "at least 1"]),
        (with(greedy(100_000)), Code::InvalidArgument, &["max_tokens", "100000", "256"]),
        (
            with(SamplingParams { stop: vec!["x".into(); 10_000], ..none() }),
            Code::InvalidArgument,
            &["sampling.stop: has 10000 strings", "at most 16"],
        ),
        (
            with(SamplingParams { stop: vec!["x".repeat(10_000)], ..none() }),
            Code::InvalidArgument,
            &["sampling.stop[0]: has 10000 bytes"],
        ),
        (
            with(SamplingParams { stop_token_ids: vec![1024], ..none() }),
            Code::InvalidArgument,
            &["sampling.stop_token_ids[0]: is 1024", "0 to 1023"],
        ),
        (with(SamplingParams { logprobs: Some(21), ..none() }), Code::InvalidArgument, &["sampling.logprobs: is 21"]),
        (
            ChatRequest { request_id: "a\nb".into(), ..with(none()) },
            Code::InvalidArgument,
            &["request_id: is \"a\\nb\""],
        ),
        (chat(&long, greedy(4)), Code::InvalidArgument, &["tokens", "256"]),
    ];
    for (request, code, words) in cases {
        let status = chat_error(&mut client, request).await;
        assert_eq!(status.code(), code, "{status}");
        for word in words {
            assert!(status.message().contains(word), "{word:?} in {:?}", status.message());
        }
    }

    let cases: Vec<(CompleteRequest, &str)> = vec![
        (CompleteRequest::default(), "prompt: is missing"),
        (complete("", greedy(1)), "prompt.text: is empty"),
        (complete_ids(&[], greedy(1)), "prompt.tokens.ids: is empty"),
        (complete_ids(&[5, 1024], greedy(1)), "prompt.tokens.ids[1]: is 1024"),
        (complete_ids(&[5; 256], greedy(1)), "256"),
        (complete_ids(&[5; 10_000], greedy(1)), "10000"),
    ];
    for (request, words) in cases {
        let status = complete_error(&mut client, request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(words), "{words:?} in {:?}", status.message());
    }

    let status = client.tokenize(TokenizeRequest::default()).await.expect_err("refused");
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "input: is missing; set text or conversation")
    );
    let request = DetokenizeRequest { ids: vec![0, 5000], ..Default::default() };
    let status = client.detokenize(request).await.expect_err("refused");
    assert!(status.message().contains("ids[1]: is 5000"), "{status}");
    let status = client.get_model(GetModelRequest { model: "x".into() }).await.expect_err("refused");
    assert_eq!(status.code(), Code::NotFound);

    // One token less than the context is a prompt that leaves room for exactly one.
    let stream = client.complete(complete_ids(&[5; 255], SamplingParams::default())).await.expect("accepted");
    let answer = read(stream.into_inner()).await.expect("an answer");
    assert_eq!(answer.ids().len(), 1);
    assert_eq!(worker.figure("ernie:panics_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_field_is_in_the_details_for_programs() {
    let worker = Running::start(&[]).await;
    let status = chat_error(&mut worker.client().await, chat("hi", greedy(0))).await;
    let details = status.get_details_bad_request().expect("details");
    assert_eq!(details.field_violations[0].field, "sampling.max_tokens");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_fifty_megabytes_is_refused_and_the_connection_lives() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    for size in [50 << 20, 1 << 20] {
        let status = chat_error(&mut client, chat(&"x".repeat(size), greedy(1))).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert_eq!(status.message(), "the request is larger than 1 MiB; send less text");
        assert_eq!(status.metadata().get("grpc-retry-pushback-ms").expect("a trailer"), "-1");
    }
    let stream = client.chat(chat("still there?", greedy(2))).await.expect("accepted");
    read(stream.into_inner()).await.expect("an answer");
    let text = "x".repeat((1 << 20) - 100);
    let status = chat_error(&mut client, chat(&text, greedy(1))).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().starts_with("messages: has at least"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_for_more_text_than_a_message_holds_are_refused_before_they_are_decoded() {
    const MOST: usize = 3 << 20;
    const PIECE: &str = "<|begin_of_sentence|>";
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let request =
        TokenizeRequest { input: Some(v1::tokenize_request::Input::Text(PIECE.to_owned())), ..Default::default() };
    let ids = within(client.tokenize(request)).await.expect("tokenizes").into_inner().ids;
    let (id, length) = (*ids.last().expect("an id"), PIECE.len());
    assert_eq!(ids.len(), 1);
    let ids = |count| DetokenizeRequest { ids: vec![id; count], ..Default::default() };
    let text = client.detokenize(ids(MOST / length)).await.expect("fits").into_inner().text;
    assert_eq!(text, PIECE.repeat(MOST / length));
    let status = client.detokenize(ids(MOST / length + 1)).await.expect_err("too much");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("send ids for at most 3145728"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_beyond_what_the_memory_plan_has_room_for_is_refused() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let text = |bytes| TokenizeRequest {
        input: Some(v1::tokenize_request::Input::Text("x".repeat(bytes))),
        ..Default::default()
    };
    // A context of 2048 tokens.
    let tokens = within(client.tokenize(text(64 << 10))).await.expect("fits").into_inner().ids;
    assert!(tokens.len() > 2048);
    let status = within(client.tokenize(text((64 << 10) + 1))).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().starts_with("text: has 65537 bytes of text;"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_message_are_the_clients_fault() {
    let worker = Running::start(&[]).await;
    let channel = channel(worker.grpc).await;
    let mut wrong_text = Vec::new();
    // Field 1 (model), two bytes that are no UTF-8.
    wrong_text.extend([0x0A, 0x02, 0xC3, 0x28]);
    for bytes in [wrong_text, vec![0xFF; 40], vec![0x12, 0x7F]] {
        let status = call_with_bytes(channel.clone(), CHAT, Bytes::from(bytes)).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with("the request is not the message that was expected: "), "{status}");
    }
    let request = chat("hi", greedy(1)).encode_to_vec();
    let first = call_with_bytes(channel, CHAT, Bytes::from(request)).await.expect("a message");
    let first = v1::GenerateResponse::decode(first).expect("decodes");
    assert!(matches!(first.event, Some(v1::generate_response::Event::Started(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_that_does_not_exist_is_unimplemented() {
    let worker = Running::start(&[]).await;
    let channel = channel(worker.grpc).await;
    for path in ["/ernie.v1.Inference/Fly", "/no.Service/Method"] {
        let status = call_with_bytes(channel.clone(), path, Bytes::new()).await.expect_err("refused");
        assert_eq!(status.code(), Code::Unimplemented);
        assert!(status.message().contains("no such method"), "{status}");
    }
    assert!(worker.page("/metrics").await.1.contains("grpc_method=\"unknown\",grpc_service=\"unknown\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_timeout_is_refused() {
    let worker = Running::start(&[]).await;
    let mut request = Request::new(chat("hi", greedy(1)));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().expect("metadata"));
    let status = worker.client().await.chat(request).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("grpc-timeout: \"soon\""), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_must_be_named_where_a_front_sets_it() {
    let worker = Running::start(&["--tenant-header", "x-tenant"]).await;
    let mut client = worker.client().await;
    let status = chat_error(&mut client, chat("hi", greedy(1))).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("x-tenant: is missing"), "{status}");
    let mut request = Request::new(chat("hi", greedy(1)));
    request.metadata_mut().insert("x-tenant", "blue".parse().expect("metadata"));
    read(client.chat(request).await.expect("accepted").into_inner()).await.expect("an answer");
}
