//! Health, reflection, and the pages.

use std::collections::{BTreeMap, BTreeSet};

use ernie_proto::ernie::v1::SamplingParams;
use ernie_worker::{serve::Worker, server::connection::ConnectionLimits, shutdown::Stop};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use tonic_types::StatusExt;

use super::running::{Running, args, channel, chat, greedy, model, page, read, within};

async fn check(channel: &Channel, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = within(HealthClient::new(channel.clone()).check(request)).await;
    answer.map(|answer| answer.into_inner().status()).map_err(|status| status.code())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ports_answer_before_the_model_is_read() {
    let worker = Worker::bind(args(&model(), &[]), ConnectionLimits::default()).await.expect("binds");
    let (grpc, http) = (worker.grpc_address(), worker.http_address());
    let channel = channel(grpc).await;
    for service in ["", "ernie.v1.Inference"] {
        assert_eq!(check(&channel, service).await, Ok(ServingStatus::NotServing));
    }
    assert_eq!(check(&channel, "no.Service").await, Err(Code::NotFound));
    assert_eq!(page(http, "/livez").await, (200, "ok\n".to_owned()));
    let (status, body) = page(http, "/readyz").await;
    let progress: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((status, &progress["status"], &progress["phase"]), (503, &"loading".into(), &"metadata".into()));
    assert_eq!(page(http, "/plan").await.0, 503);

    let mut client = ernie_proto::ernie::v1::inference_client::InferenceClient::new(channel.clone());
    let status = client.chat(chat("hi", greedy(1))).await.expect_err("not yet");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("the worker is starting"), "{status}");
    assert!(status.get_details_retry_info().is_some());

    let mut watch =
        HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await.expect("watches").into_inner();
    let mut statuses = Vec::new();
    let running = Running::run(worker);
    for _ in 0..2 {
        statuses.push(within(watch.message()).await.expect("a status").expect("goes on").status());
    }
    assert_eq!(statuses, [ServingStatus::NotServing, ServingStatus::Serving]);
    assert_eq!(check(&channel, "ernie.v1.Inference").await, Ok(ServingStatus::Serving));
    assert_eq!(running.page("/readyz").await.0, 200);
    read(client.chat(chat("hi", greedy(1))).await.expect("accepted").into_inner()).await.expect("an answer");

    running.stop(Stop::Interrupt).await;
    let flipped = within(watch.message()).await.expect("a status").expect("goes on").status();
    assert_eq!(flipped, ServingStatus::NotServing);
    running.end().await.expect("a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_tell_version_and_plan() {
    let worker = Running::start(&[]).await;
    let version: serde_json::Value = serde_json::from_str(&worker.page("/version").await.1).expect("JSON");
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let plan: serde_json::Value = serde_json::from_str(&worker.page("/plan").await.1).expect("JSON");
    assert_eq!((&plan["dtype"], &plan["maxModelLen"]), (&"bfloat16".into(), &2048.into()));
    assert!(plan["weightBytes"].as_u64().expect("a number") > 4_000_000);
    let cost = plan["stepCostSeconds"].as_object().expect("measured before the worker was ready");
    let page = worker.page("/metrics").await.1;
    for term in ["base", "token", "sequence", "context"] {
        let line = format!("term=\"{term}\"}} {}", cost[term].as_f64().expect("a number"));
        assert!(
            page.lines().any(|shown| shown.starts_with("ernie:step_cost_seconds{") && shown.ends_with(&line)),
            "{line}"
        );
    }
    assert!(cost.values().map(|term| term.as_f64().expect("a number")).sum::<f64>() > 1e-6, "{cost:?}");
    let (status, text) = worker.page("/nothing").await;
    assert!(status == 404 && text.contains("/metrics"), "{text}");
}

async fn services(channel: Channel) -> Result<BTreeSet<String>, Code> {
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(futures::stream::iter([request])).await;
    let mut answers = answers.map_err(|status| status.code())?.into_inner();
    let answer = within(answers.message()).await.map_err(|status| status.code())?.expect("an answer");
    match answer.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services_unless_it_is_off() {
    let worker = Running::start(&[]).await;
    let services_on = services(channel(worker.grpc).await).await.expect("a list");
    for name in ["ernie.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"] {
        assert!(services_on.contains(name), "{name} in {services_on:?}");
    }
    let worker = Running::start(&["--reflection=false"]).await;
    assert_eq!(services(channel(worker.grpc).await).await, Err(Code::Unimplemented));
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_follow_a_request() {
    let worker = Running::start(&[]).await;
    assert_eq!(worker.figure("vllm:generation_tokens_total").await, 0.0, "the trial request does not count");
    assert_eq!(worker.figure("ernie:ready").await, 1.0);
    let mut client = worker.client().await;
    let answer =
        read(client.chat(chat("Emma", greedy(7))).await.expect("accepted").into_inner()).await.expect("an answer");
    let usage = answer.done.usage.expect("usage");
    worker.figure_becomes("vllm:time_to_first_token_seconds_count", 1.0).await;
    worker.figure_becomes("vllm:e2e_request_latency_seconds_count", 1.0).await;
    assert_eq!(worker.figure("vllm:generation_tokens_total").await, f64::from(usage.completion_tokens));
    assert_eq!(worker.figure("vllm:prompt_tokens_total").await, f64::from(usage.prompt_tokens));
    assert_eq!(worker.figure("vllm:inter_token_latency_seconds_count").await, f64::from(usage.completion_tokens - 1));
    for phase in ["metadata", "tokenizer", "weights", "engine", "warm_up"] {
        let name = format!("ernie:startup_phase_seconds{{engine=\"0\",model_name=\"austen-2.6m\",phase=\"{phase}\"}}");
        assert!(worker.figure(&name).await > 0.0, "{phase}");
    }
    let several = SamplingParams { n: Some(3), ..greedy(2) };
    read(client.chat(chat("Emma", several)).await.expect("accepted").into_inner()).await.expect("answers");
    let asked = async |part: &str| worker.figure(&format!("vllm:request_params_n_{part}{{")).await;
    assert_eq!((asked("count").await, asked("sum").await), (2.0, 4.0), "once for each call");
    let handled = "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Chat\",grpc_service=\"ernie.v1.Inference\"";
    worker.figure_becomes(handled, 2.0).await;
}

/// Families of a page of Prometheus, with their types.
fn families(page: &str) -> BTreeMap<String, String> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_metrics_are_those_that_a_worker_shows() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
    let document = std::fs::read_to_string(document).expect("docs/metrics.md");
    let rows = document.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().trim_end_matches('`').to_owned();
        Some((name, cells.next()?.trim().to_owned()))
    });
    let documented: BTreeMap<String, String> = rows.collect();
    let worker = Running::start(&[]).await;
    assert_eq!(families(&worker.page("/metrics").await.1), documented);
}
