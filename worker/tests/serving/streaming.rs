//! Answers.

use ernie_proto::ernie::v1::{
    self, Conversation, DetokenizeRequest, FinishReason, GetModelRequest, Role, SamplingParams, TokenizeRequest,
    done::MatchedStop, tokenize_request::Input,
};

use super::running::{Running, chat, complete, complete_ids, endless, golden, greedy, message, read};

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_equal_the_golden_ones() {
    let worker = Running::start(&["--dtype", "float32"]).await;
    let mut client = worker.client().await;
    let golden = golden();
    let prompts = golden["prompts"].as_array().expect("prompts");
    assert!(
        prompts.iter().any(|prompt| prompt["kind"] == "chat") && prompts.iter().any(|prompt| prompt["kind"] == "raw")
    );
    for prompt in prompts {
        let sampling = greedy(48);
        let stream = match prompt["kind"].as_str() {
            Some("raw") => client.complete(complete(prompt["text"].as_str().expect("text"), sampling)).await,
            Some("chat") => {
                let messages = prompt["messages"].as_array().expect("messages").iter().map(|turn| {
                    let role = match turn["role"].as_str() {
                        Some("system") => Role::System,
                        Some("user") => Role::User,
                        Some("assistant") => Role::Assistant,
                        other => panic!("{other:?}"),
                    };
                    message(role, turn["content"].as_str().expect("text"))
                });
                let messages = messages.collect();
                client.chat(v1::ChatRequest { messages, sampling: Some(sampling), ..Default::default() }).await
            }
            other => panic!("{other:?}"),
        };
        let answer = read(stream.expect("accepted").into_inner()).await.expect("an answer");
        assert_eq!(answer.ids(), ids(&prompt["greedy_ids"]), "{}", prompt["text"]);
        assert_eq!(answer.text(), prompt["greedy_text"].as_str().expect("text"));
        let reason = if prompt["finish"] == "length" { FinishReason::Length } else { FinishReason::Stop };
        assert_eq!(answer.done.finish_reason(), reason);
        let usage = answer.done.usage.expect("usage");
        assert_eq!(usage.prompt_tokens as usize, ids(&prompt["ids"]).len());
        assert_eq!(usage.completion_tokens as usize, answer.ids().len());
        assert_eq!(answer.started.prompt_tokens, usage.prompt_tokens);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_gives_the_same_answer_again_and_is_returned_when_drawn() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let sampling = SamplingParams { temperature: Some(1.0), max_tokens: Some(40), ..endless() };
    let first = read(client.chat(chat("A ball", sampling.clone())).await.expect("accepted").into_inner()).await;
    let first = first.expect("an answer");
    let again = SamplingParams { seed: Some(first.started.seed), ..sampling.clone() };
    let again =
        read(client.chat(chat("A ball", again)).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!(again.ids(), first.ids());
    assert_eq!(again.started.numerics, first.started.numerics);
    let other = SamplingParams { seed: Some(first.started.seed ^ 1), ..sampling };
    let other =
        read(client.chat(chat("A ball", other)).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_ne!(other.ids(), first.ids(), "forty tokens at temperature 1 do not repeat by chance");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_before_it_and_is_named() {
    let worker = Running::start(&["--dtype", "float32"]).await;
    let mut client = worker.client().await;
    let prompt = "It is a truth universally acknowledged, that";
    let whole = read(client.complete(complete(prompt, greedy(48))).await.expect("accepted").into_inner()).await;
    let whole = whole.expect("an answer");
    let stops = vec!["never there".to_owned(), "used to".to_owned()];
    let sampling = SamplingParams { stop: stops, ..greedy(48) };
    let cut = read(client.complete(complete(prompt, sampling)).await.expect("accepted").into_inner()).await;
    let cut = cut.expect("an answer");
    let (before, _) = whole.text().split_once("used to").map(|(a, b)| (a.to_owned(), b.to_owned())).expect("is in it");
    assert_eq!(cut.text(), before);
    assert_eq!(cut.done.finish_reason(), FinishReason::Stop);
    assert_eq!(cut.done.matched_stop, Some(MatchedStop::Stop("used to".into())));
    assert!(whole.ids().starts_with(&cut.ids()) && cut.ids().len() < whole.ids().len());
    assert_eq!(cut.done.usage.expect("usage").completion_tokens as usize, cut.ids().len());

    let token = whole.ids()[5];
    let first = whole.ids().iter().position(|&id| id == token).expect("is in it");
    let sampling = SamplingParams { stop_token_ids: vec![token], ..greedy(48) };
    let cut = read(client.complete(complete(prompt, sampling)).await.expect("accepted").into_inner()).await;
    let cut = cut.expect("an answer");
    assert_eq!(cut.ids(), whole.ids()[..=first]);
    assert_eq!(cut.done.matched_stop, Some(MatchedStop::StopTokenId(token)));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_token_has_its_logprobs_and_bytes() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let sampling = SamplingParams { logprobs: Some(3), ..greedy(20) };
    let answer =
        read(client.chat(chat("Emma", sampling)).await.expect("accepted").into_inner()).await.expect("an answer");
    let logprobs: Vec<_> = answer.deltas.iter().flat_map(|delta| &delta.logprobs).collect();
    assert_eq!(logprobs.len(), answer.ids().len());
    let mut text = Vec::new();
    for (logprobs, id) in logprobs.iter().zip(answer.ids()) {
        let chosen = logprobs.chosen.as_ref().expect("chosen");
        assert_eq!((chosen.id, logprobs.top.len()), (id, 3));
        assert!(chosen.logprob <= 0.0);
        assert_eq!(logprobs.top[0].id, id, "greedy takes the most probable token");
        assert!(logprobs.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        text.extend(&chosen.bytes);
    }
    assert!(String::from_utf8(text).expect("text").starts_with(&answer.text()));
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_repeats_the_prompt_first() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let plain = read(client.complete(complete("Mr. Darcy", greedy(8))).await.expect("accepted").into_inner()).await;
    let request = v1::CompleteRequest { echo: true, ..complete("Mr. Darcy", greedy(8)) };
    let echoed = read(client.complete(request).await.expect("accepted").into_inner()).await.expect("an answer");
    assert_eq!(echoed.text(), format!("Mr. Darcy{}", plain.expect("an answer").text()));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_answers_at_once_equal_single_ones() {
    let worker = Running::start(&["--dtype", "float32"]).await;
    let client = worker.client().await;
    let prompts = ["Emma", "Mr. Darcy was", "It was a", "She had never", "London", "My dear", "The ball", "A letter"];
    let mut alone = Vec::new();
    for prompt in prompts {
        let stream = client.clone().complete(complete(prompt, greedy(64))).await.expect("accepted").into_inner();
        alone.push(read(stream).await.expect("an answer").ids());
    }
    let together = prompts.map(|prompt| {
        let mut client = client.clone();
        tokio::spawn(async move {
            let stream = client.complete(complete(prompt, greedy(64))).await.expect("accepted").into_inner();
            read(stream).await.expect("an answer").ids()
        })
    });
    for (task, alone) in together.into_iter().zip(alone) {
        assert_eq!(task.await.expect("ends"), alone);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_and_ids_convert_both_ways() {
    let worker = Running::start(&[]).await;
    let mut client = worker.client().await;
    let prompt = &golden()["prompts"][0];
    let input = Some(Input::Text(prompt["text"].as_str().expect("text").to_owned()));
    let tokens = client.tokenize(TokenizeRequest { input, ..Default::default() }).await.expect("tokens").into_inner();
    assert_eq!(tokens.ids, ids(&prompt["ids"]));
    assert_eq!(tokens.max_model_len, 2048);
    let request = DetokenizeRequest { ids: tokens.ids.clone(), ..Default::default() };
    assert_eq!(
        client.detokenize(request).await.expect("text").into_inner().text,
        prompt["text"].as_str().expect("text")
    );

    let conversation = Conversation {
        messages: vec![message(Role::User, "Hello")],
        add_generation_prompt: Some(false),
        ..Default::default()
    };
    let request = TokenizeRequest { input: Some(Input::Conversation(conversation)), ..Default::default() };
    let tokens = client.tokenize(request).await.expect("tokens").into_inner();
    assert_eq!(tokens.text, "<|begin_of_sentence|>User: Hello\n");
    let request = DetokenizeRequest { ids: tokens.ids, skip_special_tokens: true, ..Default::default() };
    assert_eq!(client.detokenize(request).await.expect("text").into_inner().text, "User: Hello\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_describes_itself() {
    let worker =
        Running::start(&["--served-model-name", "austen", "--max-num-seqs", "3", "--max-model-len", "512"]).await;
    let mut client = worker.client().await;
    let model = client.get_model(GetModelRequest { model: "austen".into() }).await.expect("a model").into_inner();
    assert_eq!(
        (model.name.as_str(), model.architecture.as_str(), model.dtype.as_str()),
        ("austen", "ernie4_5", "bfloat16")
    );
    assert_eq!((model.vocab_size, model.max_model_len, model.max_num_seqs), (1024, 512, 3));
    assert_eq!(model.eos_token_ids, [2]);
    assert_eq!(model.version, env!("CARGO_PKG_VERSION"));
    let answer = client.complete(complete_ids(&[972], greedy(1))).await.expect("accepted").into_inner();
    assert_eq!(read(answer).await.expect("an answer").started.numerics, model.numerics);
}
