//! Who is served first, and who shares cached prompts.

use ernie_proto::ernie::v1::{ChatRequest, CompleteRequest, SamplingParams, generate_response::Event};
use tonic::Code;

use super::running::{Running, chat, complete, complete_ids, greedy, read, within};

const LONG: &str = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in \
                    want of a wife. However little known the feelings or views of such a man may be.";

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_priority_is_served_sooner() {
    let worker = Running::start(&["--max-num-seqs", "1", "--max-num-batched-tokens", "1"]).await;
    let client = worker.client().await;
    // Holds the only place until the others wait: a prompt that is read token by token.
    let first = within(client.clone().complete(complete_ids(&[5; 2000], greedy(1)))).await;
    let first = first.expect("accepted").into_inner();
    worker.figure_becomes("vllm:num_requests_running{", 1.0).await;
    let (sender, mut order) = tokio::sync::mpsc::unbounded_channel();
    for (waiting, priority) in [(1.0, 100), (2.0, 3), (3.0, -100), (4.0, -7)] {
        let (mut client, sender) = (client.clone(), sender.clone());
        tokio::spawn(async move {
            let sampling = SamplingParams { ignore_eos: true, ..greedy(200) };
            let request = CompleteRequest { priority, ..complete("Emma", sampling) };
            let mut stream = client.complete(request).await.expect("accepted").into_inner();
            let mut begun = false;
            while let Some(message) = stream.message().await.expect("goes on") {
                if matches!(message.event, Some(Event::Delta(_))) && !std::mem::replace(&mut begun, true) {
                    let _ = sender.send(priority);
                }
            }
        });
        worker.figure_becomes("vllm:num_requests_waiting{", waiting).await;
    }
    drop(first);
    let mut served = Vec::new();
    for _ in 0..4 {
        served.push(within(order.recv()).await.expect("served"));
    }
    assert_eq!(served, [-100, -7, 3, 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_prompts_are_shared_only_under_the_same_salt() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let mut cached = async |cache_salt: &str, conversation: bool| {
        let stream = if conversation {
            let request = ChatRequest { cache_salt: cache_salt.into(), ..chat(LONG, greedy(1)) };
            within(client.chat(request)).await
        } else {
            let request = CompleteRequest { cache_salt: cache_salt.into(), ..complete(LONG, greedy(1)) };
            within(client.complete(request)).await
        };
        let answer = read(stream.expect("accepted").into_inner()).await.expect("an answer");
        answer.done.usage.expect("usage").cached_tokens
    };
    for conversation in [false, true] {
        for salt in ["", "a", "b"] {
            assert_eq!(cached(salt, conversation).await, 0, "{salt:?} is new");
        }
        for salt in ["", "a", "b"] {
            assert!(cached(salt, conversation).await >= 32, "{salt:?} is known");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_and_salts_out_of_range_are_refused() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    for priority in [-101, 101, i32::MIN, i32::MAX] {
        let sentence = format!("priority: is {priority}; choose from -100 to 100, smaller is sooner");
        let request = CompleteRequest { priority, ..complete("x", greedy(1)) };
        let status = within(client.complete(request)).await.expect_err("refused");
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, sentence.as_str()));
        let status = within(client.chat(ChatRequest { priority, ..chat("x", greedy(1)) })).await.expect_err("refused");
        assert_eq!(status.message(), sentence);
    }
    let request = ChatRequest { cache_salt: "é".repeat(33), ..chat("x", greedy(1)) };
    let status = within(client.chat(request)).await.expect_err("refused");
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "cache_salt: has 66 bytes; give at most 64"));
    let request = CompleteRequest { cache_salt: "é".repeat(32), priority: 100, ..complete("x", greedy(1)) };
    read(within(client.complete(request)).await.expect("accepted").into_inner()).await.expect("an answer");
}
