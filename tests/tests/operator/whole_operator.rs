//! The operator as it runs (watches, caches, queue, backoff) against the in-memory API server, with time that jumps.

use std::time::Duration;

use ernie_operator::leader::Election;
use ernie_operator::observe::Scope;
use ernie_operator::run::{Config, run};
use ernie_tests::apiserver::{ApiServer, Effect, Entry, Fault, Verb, transcript};
use ernie_tests::scenario::{NAMESPACE, defaults, model, violations};
use ernie_tests::simulation::{Cluster, Workers};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A cluster in memory, its user, and running operators.
struct Live {
    server: ApiServer,
    cluster: Cluster,
    operators: Vec<(CancellationToken, JoinHandle<()>)>,
}

impl Live {
    fn new() -> Self {
        let server = ApiServer::new();
        server.install(&ernie_operator::api::crd());
        server.add_namespace(NAMESPACE);
        Self { cluster: Cluster::new(&server), server, operators: Vec::new() }
    }

    /// Starts an operator; without an election it writes from the start.
    fn start(&mut self, name: &str, elects: bool) {
        let election = elects.then(|| Election {
            namespace: "kube-system".to_owned(),
            name: "ernie-operator".to_owned(),
            identity: name.to_owned(),
        });
        let config = Config {
            defaults: defaults("1.0.0"),
            scope: Scope::Cluster,
            election,
            http: ([127, 0, 0, 1], 0).into(),
            concurrency: 4,
            fetch: Workers::default().fetch(),
            gpu_budget: None,
        };
        let (stop, client) = (CancellationToken::new(), self.server.client(name));
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { run(client, config, stop).await.expect("runs") }
        });
        self.operators.push((stop, task));
    }

    /// Ends the operators as SIGKILL does.
    fn kill(&mut self) {
        for (_, task) in self.operators.drain(..) {
            task.abort();
        }
    }

    /// Ends the operators as SIGTERM does.
    async fn stop(&mut self) {
        for (stop, task) in self.operators.drain(..) {
            stop.cancel();
            tokio::time::timeout(Duration::from_secs(30), task).await.expect("it ends").expect("without a panic");
        }
    }

    fn models(&self) -> Api<ernie_operator::api::ErnieModel> {
        Api::namespaced(self.server.client("user"), NAMESPACE)
    }

    async fn apply(&self, model: &Value) {
        let name = model["metadata"]["name"].as_str().expect("a name");
        self.models()
            .patch(name, &PatchParams::apply("kubectl").force(), &Patch::Apply(model))
            .await
            .expect("accepted");
    }

    fn ready(&self, name: &str) -> bool {
        let model = self.server.object("serving.ernie.io/v1alpha1", "ErnieModel", NAMESPACE, name).unwrap_or_default();
        let generation = &model["metadata"]["generation"];
        let conditions = model["status"]["conditions"].as_array().into_iter().flatten();
        conditions
            .into_iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True" && c["observedGeneration"] == *generation)
            && model["status"]["readyReplicas"] == model["spec"]["replicas"]
    }

    /// Lets the cluster work until the condition holds.
    async fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(600);
        loop {
            self.cluster.settle();
            if holds(self) {
                return;
            }
            if tokio::time::Instant::now() > deadline {
                let log = self.server.log();
                panic!("never: {what}; the last requests:\n{}", transcript(&log[log.len().saturating_sub(30)..]));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// What operators write during some time in which nobody else does anything, the Lease aside.
    async fn writes_during(&mut self, time: Duration) -> Vec<Entry> {
        self.server.clear_log();
        let end = tokio::time::Instant::now() + time;
        while tokio::time::Instant::now() < end {
            self.cluster.settle();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let log = self.server.log().into_iter();
        log.filter(|e| e.is_mutating() && e.call.client.starts_with("operator") && e.call.plural != "leases").collect()
    }
}

#[tokio::test(start_paused = true)]
async fn models_are_served_scaled_edited_and_deleted_and_then_nothing_is_written() {
    let mut live = Live::new();
    live.start("operator", false);
    live.apply(&model("m", &json!({"replicas": 2}))).await;
    live.apply(&model("n", &json!({}))).await;
    live.until("both are ready", |live| live.ready("m") && live.ready("n")).await;
    live.apply(&model("m", &json!({"replicas": 3, "engine": {"maxModelLen": 2048}}))).await;
    live.until("the edit is through", |live| live.ready("m")).await;
    live.models().delete("n", &DeleteParams::default()).await.expect("there");
    live.until("n is gone", |live| live.server.object("apps/v1", "Deployment", NAMESPACE, "n").is_none()).await;
    let writes = live.writes_during(Duration::from_secs(1200)).await;
    assert!(writes.is_empty(), "twenty quiet minutes:\n{}", transcript(&writes));
    live.stop().await;
    let broken = violations(&live.server.log_of("operator"));
    assert!(broken.is_empty(), "{broken:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_operator_that_starts_over_converged_models_writes_nothing() {
    let mut live = Live::new();
    live.start("operator", false);
    for index in 0..20 {
        live.apply(&model(&format!("m{index}"), &json!({}))).await;
    }
    live.until("all are ready", |live| (0..20).all(|index| live.ready(&format!("m{index}")))).await;
    live.writes_during(Duration::from_secs(60)).await;
    live.kill();
    live.start("operator-2", false);
    let writes = live.writes_during(Duration::from_secs(700)).await;
    assert!(writes.is_empty(), "{}", transcript(&writes));
    live.stop().await;
}

#[tokio::test(start_paused = true)]
async fn errors_of_every_kind_only_delay() {
    for (name, effect) in [
        ("errors", Effect::Status(500)),
        ("throttling", Effect::Status(429)),
        ("unavailability", Effect::Status(503)),
        ("broken connections", Effect::Reset),
        ("answers that never come", Effect::Hang),
        ("slow answers", Effect::Delay(Duration::from_secs(8))),
    ] {
        let mut live = Live::new();
        let mut count = 0_u64;
        let every_third = std::sync::Mutex::new(move || {
            count += 1;
            count.is_multiple_of(3)
        });
        let strikes = move |call: &ernie_tests::apiserver::Call| {
            call.client == "operator" && (every_third.lock().expect("unpoisoned"))()
        };
        let times = if effect == Effect::Hang { 20 } else { 60 };
        live.server.inject(Fault::new(effect, strikes).times(times));
        live.start("operator", false);
        live.apply(&model("m", &json!({"replicas": 2}))).await;
        live.until(name, |live| live.ready("m")).await;
        live.server.clear_faults();
        live.apply(&model("m", &json!({"replicas": 1}))).await;
        live.until(name, |live| live.ready("m")).await;
        live.stop().await;
        let broken = violations(&live.server.log_of("operator"));
        assert!(broken.is_empty(), "{name}: {broken:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn watches_that_end_lag_or_expire_lose_no_change() {
    let mut live = Live::new();
    live.start("operator", false);
    live.apply(&model("m", &json!({"replicas": 1}))).await;
    live.until("ready", |live| live.ready("m")).await;
    for replicas in 2..8 {
        match replicas {
            2 => live.server.cut_watches(),
            3 => live.server.compact(),
            4 => live.server.hold_watches(),
            5 => {
                // What was held back is compacted away: 410 in the stream.
                live.server.compact();
                live.server.release_watches();
            }
            6 => {
                live.server.cut_watches();
                live.server.inject(Fault::new(Effect::Status(410), |call| call.verb == Verb::Watch).times(12));
            }
            _ => {
                live.server.repeat_events(true);
                live.server.cut_watches();
                live.server.inject(Fault::new(Effect::Hang, |call| call.verb == Verb::Watch).times(6));
            }
        }
        live.apply(&model("m", &json!({"replicas": replicas}))).await;
        if replicas == 4 {
            // Nobody sees it until the watches go on.
            tokio::time::sleep(Duration::from_secs(2)).await;
            continue;
        }
        live.until(&format!("{replicas} replicas"), |live| live.ready("m")).await;
    }
    // A child that vanishes while nobody watches is noticed at the next list.
    live.server.hold_watches();
    let service = live.server.object("v1", "Service", NAMESPACE, "m").expect("there");
    live.server.delete(&service);
    live.server.compact();
    live.server.release_watches();
    live.until("the Service is back", |live| live.server.object("v1", "Service", NAMESPACE, "m").is_some()).await;
    live.stop().await;
}

#[tokio::test(start_paused = true)]
async fn writes_on_an_outdated_view_are_never_acted_on() {
    let mut live = Live::new();
    live.start("operator", false);
    live.apply(&model("m", &json!({"replicas": 2}))).await;
    live.until("ready", |live| live.ready("m")).await;
    // The operator sees nothing of this: the model is deleted and made anew, and its Deployment is somebody else's.
    live.server.hold_watches();
    live.models().delete("m", &DeleteParams::default()).await.expect("there");
    let foreign = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "m", "namespace": NAMESPACE},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [{"name": "c", "image": "other:1"}]}}}});
    let foreign = live.server.create(&foreign).expect("accepted");
    live.apply(&model("m", &json!({"replicas": 1, "model": {"name": "second"}}))).await;
    tokio::time::sleep(Duration::from_secs(400)).await;
    live.server.release_watches();
    tokio::time::sleep(Duration::from_secs(60)).await;
    live.cluster.settle();
    let deployment = live.server.object("apps/v1", "Deployment", NAMESPACE, "m").expect("there");
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], "other:1");
    assert_eq!(deployment["metadata"]["uid"], foreign["metadata"]["uid"]);
    let model = live.server.object("serving.ernie.io/v1alpha1", "ErnieModel", NAMESPACE, "m").expect("there");
    let conditions = model["status"]["conditions"].as_array().expect("conditions");
    assert!(conditions.iter().any(|c| c["type"] == "Ready" && c["reason"] == "NameConflict"), "{conditions:#?}");
    live.stop().await;
}

#[tokio::test(start_paused = true)]
async fn two_that_both_write_make_everything_once_and_rest() {
    let mut live = Live::new();
    live.start("operator", false);
    live.start("operator-2", false);
    for index in 0..5 {
        live.apply(&model(&format!("m{index}"), &json!({"replicas": 2}))).await;
    }
    live.until("all are ready", |live| (0..5).all(|index| live.ready(&format!("m{index}")))).await;
    let created = live
        .server
        .log()
        .into_iter()
        .filter(|e| e.call.verb == Verb::Create && e.changed && e.call.plural == "deployments");
    assert_eq!(created.count(), 5);
    let writes = live.writes_during(Duration::from_secs(700)).await;
    assert!(writes.is_empty(), "{}", transcript(&writes));
    live.stop().await;
}

/// A model served by `operator`, while `operator-2` waits for the Lease.
async fn one_leads_and_another_waits() -> Live {
    let mut live = Live::new();
    live.start("operator", true);
    live.apply(&model("m", &json!({}))).await;
    live.until("ready", |live| live.ready("m")).await;
    live.start("operator-2", true);
    tokio::time::sleep(Duration::from_secs(5)).await;
    live
}

#[tokio::test(start_paused = true)]
async fn one_of_two_leads_and_hands_the_lease_over_when_told_to_stop() {
    let mut live = one_leads_and_another_waits().await;
    assert!(live.server.log_of("operator-2").iter().all(|entry| !entry.is_mutating()), "the second waits");
    let second = live.operators.pop().expect("two run");
    let told = tokio::time::Instant::now();
    live.stop().await;
    live.operators.push(second);
    live.apply(&model("n", &json!({}))).await;
    live.until("the second serves", |live| live.ready("n")).await;
    println!("takeover after {:?}", told.elapsed());
    live.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_whose_lease_hangs_stops_writing_before_another_may_lead() {
    let mut live = one_leads_and_another_waits().await;
    // The Lease alone: everything else is answered, and nothing but the clock says that leading is over.
    live.server.inject(Fault::new(Effect::Hang, |call| call.client == "operator" && call.plural == "leases").always());
    tokio::time::sleep(Duration::from_secs(13)).await;
    live.server.clear_log();
    live.apply(&model("n", &json!({}))).await;
    live.until("the second serves", |live| live.ready("n")).await;
    let written = live.server.log_of("operator").into_iter().filter(|e| e.is_mutating() && e.call.plural != "leases");
    assert_eq!(written.count(), 0);
    live.server.clear_faults();
    live.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_its_definition_the_operator_waits_and_then_serves() {
    let mut live = Live::new();
    let definition = "erniemodels.serving.ernie.io";
    let at = live.server.object("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", definition).expect("there");
    live.server.purge(&at);
    live.start("operator", false);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(live.operators.iter().all(|(_, task)| !task.is_finished()), "it waits");
    live.server.install(&ernie_operator::api::crd());
    live.apply(&model("m", &json!({}))).await;
    live.until("ready", |live| live.ready("m")).await;
    live.stop().await;
}
