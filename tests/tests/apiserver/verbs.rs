//! The in-memory API server through a kube client: what controllers rely on.

use std::time::Duration;

use ernie_tests::apiserver::{ApiServer, Effect, Fault, Verb};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event as CoreEvent, Pod, Service};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, WatchEvent, WatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

fn config_map(name: &str, data: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"app": "x"}}, "data": data})
}

fn typed<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("a valid object")
}

fn config_maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), "default")
}

fn code<T: std::fmt::Debug>(result: kube::Result<T>) -> (u16, String) {
    match result.expect_err("a refusal") {
        kube::Error::Api(status) => (status.code, status.reason.clone()),
        other => panic!("not an answer of the API: {other}"),
    }
}

fn deployment(replicas: u32) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": replicas,
        "selector": {"matchLabels": {"app": "d"}}, "template": {"metadata": {"labels": {"app": "d"}},
        "spec": {"containers": [{"name": "c", "image": "i:1"}]}}}})
}

#[tokio::test]
async fn writes_with_an_old_version_conflict_and_unchanged_writes_are_none() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let created =
        api.create(&PostParams::default(), &typed(config_map("a", &json!({"k": "1"})))).await.expect("created");
    assert_eq!(code(api.create(&PostParams::default(), &created).await).0, 500, "a version must not be given");
    let again = typed(config_map("a", &json!({})));
    assert_eq!(code(api.create(&PostParams::default(), &again).await), (409, "AlreadyExists".into()));
    let same = api.replace("a", &PostParams::default(), &created).await.expect("accepted");
    assert_eq!(same.resource_version(), created.resource_version());
    let mut newer = created.clone();
    newer.data.get_or_insert_default().insert("k".into(), "2".into());
    api.replace("a", &PostParams::default(), &newer).await.expect("accepted");
    assert_eq!(code(api.replace("a", &PostParams::default(), &newer).await), (409, "Conflict".into()));
    assert_eq!(code(api.get("b").await), (404, "NotFound".into()));
}

#[tokio::test]
async fn applies_own_fields_take_them_back_and_conflict() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let apply = |manager: &str, data: Value| {
        let (api, parameters) = (api.clone(), PatchParams::apply(manager));
        async move { api.patch("a", &parameters, &Patch::Apply(config_map("a", &data))).await }
    };
    apply("one", json!({"x": "1", "y": "1"})).await.expect("created");
    apply("two", json!({"y": "1", "z": "1"})).await.expect("the same value is shared");
    let (status, reason) = code(apply("two", json!({"x": "2"})).await);
    assert_eq!((status, reason.as_str()), (409, "Conflict"));
    let object = apply("one", json!({"x": "1"})).await.expect("gives y up");
    assert_eq!(object.data.expect("data").len(), 3, "y is still two's");
    let object = apply("two", json!({"z": "1"})).await.expect("gives y up");
    assert_eq!(object.data.expect("data").keys().collect::<Vec<_>>(), ["x", "z"], "y is nobody's");
}

#[tokio::test]
async fn fields_of_a_create_are_not_taken_back_by_a_later_apply_of_the_same_manager() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let create = PostParams { field_manager: Some("me".into()), ..PostParams::default() };
    api.create(&create, &typed(config_map("a", &json!({"x": "1", "y": "1"})))).await.expect("created");
    let patch = Patch::Apply(config_map("a", &json!({"x": "1"})));
    let object = api.patch("a", &PatchParams::apply("me").force(), &patch).await.expect("applied");
    assert_eq!(object.data.expect("data").len(), 2, "the Update entry still owns y");
    let operations: Vec<_> =
        object.metadata.managed_fields.expect("entries").into_iter().map(|e| e.operation).collect();
    assert_eq!(operations, [Some("Apply".to_owned()), Some("Update".to_owned())]);
}

#[tokio::test]
async fn an_apply_with_a_uid_neither_creates_nor_touches_a_successor() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let mut patch = config_map("a", &json!({"x": "1"}));
    patch["metadata"]["uid"] = json!("11111111-0000-0000-0000-000000000000");
    let parameters = PatchParams::apply("me").force();
    assert_eq!(code(api.patch("a", &parameters, &Patch::Apply(&patch)).await), (409, "Conflict".into()));
    api.create(&PostParams::default(), &typed(config_map("a", &json!({})))).await.expect("created");
    assert!(api.patch("a", &parameters, &Patch::Apply(&patch)).await.is_err());
    assert!(api.get("a").await.expect("there").data.is_none());
}

#[tokio::test]
async fn deletions_keep_to_their_preconditions() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let created = api.create(&PostParams::default(), &typed(config_map("a", &json!({})))).await.expect("created");
    let only = |uid: Option<String>, resource_version: Option<String>| {
        DeleteParams::default().preconditions(Preconditions { uid, resource_version })
    };
    assert_eq!(code(api.delete("a", &only(Some("x".into()), None)).await), (409, "Conflict".into()));
    assert_eq!(code(api.delete("a", &only(None, Some("1".into()))).await), (409, "Conflict".into()));
    api.delete("a", &only(created.uid(), created.resource_version())).await.expect("deleted");
    assert_eq!(code(api.delete("a", &DeleteParams::default()).await), (404, "NotFound".into()));
}

#[tokio::test]
async fn status_and_spec_are_written_apart_and_generations_follow_the_spec() {
    let server = ApiServer::new();
    let api = Api::<Deployment>::namespaced(server.client("t"), "default");
    let mut body = deployment(1);
    body["status"] = json!({"replicas": 7});
    let created = api.create(&PostParams::default(), &typed(body)).await.expect("created");
    assert_eq!(created.metadata.generation, Some(1));
    assert_eq!(created.status.expect("empty").replicas, None);
    let patch = Patch::Merge(json!({"spec": {"replicas": 9}, "status": {"replicas": 3}}));
    let with_status = api.patch_status("d", &PatchParams::default(), &patch).await.expect("patched");
    assert_eq!((with_status.metadata.generation, with_status.spec.expect("spec").replicas), (Some(1), Some(1)));
    let patched = api.patch("d", &PatchParams::default(), &patch).await.expect("patched");
    assert_eq!((patched.metadata.generation, patched.spec.expect("spec").replicas), (Some(2), Some(9)));
    assert_eq!(patched.status.expect("kept").replicas, Some(3));
    let scale = api.patch_scale("d", &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": 2}}))).await;
    assert_eq!(scale.expect("scaled").spec.expect("spec").replicas, Some(2));
    assert_eq!(api.get("d").await.expect("there").metadata.generation, Some(3));
}

#[tokio::test]
async fn defaults_are_filled_in_and_empty_values_left_out() {
    let server = ApiServer::new();
    let api = Api::<Deployment>::namespaced(server.client("t"), "default");
    api.create(&PostParams::default(), &typed(deployment(1))).await.expect("created");
    let stored = server.object("apps/v1", "Deployment", "default", "d").expect("stored");
    assert_eq!(stored["spec"]["strategy"]["rollingUpdate"]["maxSurge"], "25%");
    assert_eq!(stored["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"], "IfNotPresent");
    let services = Api::<Service>::namespaced(server.client("t"), "default");
    let service =
        json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], "publishNotReadyAddresses": false}});
    services.create(&PostParams::default(), &typed(service)).await.expect("created");
    let stored = server.object("v1", "Service", "default", "s").expect("stored");
    assert_eq!(stored["spec"]["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
    assert!(stored["spec"]["clusterIP"].is_string() && stored["spec"].get("publishNotReadyAddresses").is_none());
}

#[tokio::test]
async fn a_dry_run_answers_and_stores_nothing() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let parameters = PatchParams::apply("me").dry_run();
    let object =
        api.patch("a", &parameters, &Patch::Apply(config_map("a", &json!({"x": "1"})))).await.expect("answered");
    assert!(object.uid().is_some() && object.resource_version().is_none());
    assert_eq!(code(api.get("a").await).0, 404);
    let log = server.log_of("t");
    assert!(!log[0].is_mutating() && !log[0].changed);
}

#[tokio::test]
async fn dependents_follow_their_owner_in_every_propagation_mode() {
    for (parameters, survives) in
        [(DeleteParams::background(), false), (DeleteParams::foreground(), false), (DeleteParams::orphan(), true)]
    {
        let server = ApiServer::new();
        let api = config_maps(&server.client("t"));
        let owner = api.create(&PostParams::default(), &typed(config_map("owner", &json!({})))).await.expect("created");
        let mut child = config_map("child", &json!({}));
        child["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner",
            "uid": owner.uid(), "controller": true, "blockOwnerDeletion": true}]);
        api.create(&PostParams::default(), &typed(child)).await.expect("created");
        api.delete("owner", &parameters).await.expect("deleted");
        assert!(api.get_opt("owner").await.expect("answers").is_none());
        let left = api.get_opt("child").await.expect("answers");
        assert_eq!(left.is_some(), survives, "{parameters:?}");
        assert!(left.is_none_or(|child| child.owner_references().is_empty()));
    }
}

#[tokio::test]
async fn a_finalizer_holds_an_object_until_it_is_removed() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let mut body = config_map("a", &json!({}));
    body["metadata"]["finalizers"] = json!(["test/held"]);
    api.create(&PostParams::default(), &typed(body)).await.expect("created");
    let deleted = api.delete("a", &DeleteParams::default()).await.expect("accepted");
    assert!(deleted.left().is_some_and(|object| object.metadata.deletion_timestamp.is_some()));
    assert!(api.get("a").await.is_ok());
    let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    api.patch("a", &PatchParams::default(), &patch).await.expect("accepted");
    assert_eq!(code(api.get("a").await).0, 404);
}

#[tokio::test]
async fn lists_come_in_pages_of_one_version() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    for name in ["a", "b", "c"] {
        api.create(&PostParams::default(), &typed(config_map(name, &json!({})))).await.expect("created");
    }
    let first = api.list(&ListParams::default().limit(2)).await.expect("listed");
    let token = first.metadata.continue_.clone().expect("more");
    assert_eq!((first.items.len(), first.metadata.remaining_item_count), (2, Some(1)));
    api.delete("c", &DeleteParams::default()).await.expect("deleted");
    let rest = api.list(&ListParams::default().limit(2).continue_token(&token)).await.expect("listed");
    assert_eq!(rest.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>(), ["c"], "as it was then");
    server.compact();
    api.create(&PostParams::default(), &typed(config_map("d", &json!({})))).await.expect("created");
    assert_eq!(code(api.list(&ListParams::default().continue_token(&token)).await).0, 410);
}

#[tokio::test]
async fn a_watch_sees_objects_enter_and_leave_a_selector() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let from = server.revision().to_string();
    let parameters = WatchParams::default().labels("tier=gold").timeout(5);
    let mut events = api.watch(&parameters, &from).await.expect("begins").boxed();
    api.create(&PostParams::default(), &typed(config_map("a", &json!({})))).await.expect("created");
    for tier in [json!("gold"), json!("gold"), json!("silver")] {
        let patch = Patch::Merge(
            json!({"metadata": {"labels": {"tier": tier}}, "data": {"at": server.revision().to_string()}}),
        );
        api.patch("a", &PatchParams::default(), &patch).await.expect("patched");
    }
    let mut kinds = Vec::new();
    while kinds.len() < 3 {
        kinds.push(match events.try_next().await.expect("goes on").expect("goes on") {
            WatchEvent::Added(_) => "ADDED",
            WatchEvent::Modified(_) => "MODIFIED",
            WatchEvent::Deleted(_) => "DELETED",
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(kinds, ["ADDED", "MODIFIED", "DELETED"]);
}

#[tokio::test(start_paused = true)]
async fn kubes_watcher_survives_cuts_compaction_and_lag() {
    let server = ApiServer::new();
    let client = server.client("t");
    let api = config_maps(&client);
    let user = config_maps(&server.client("user"));
    let mut events = watcher(api, watcher::Config::default()).boxed();
    let mut seen = Vec::new();
    for round in 0..6 {
        match round {
            1 => server.cut_watches(),
            2 => {
                server.hold_watches();
            }
            3 => {
                // Behind a compaction: the watch ends with 410, and the watcher lists again.
                server.compact();
                server.release_watches();
            }
            4 => server.inject(Fault::new(Effect::Status(500), |call| call.verb == Verb::Watch).times(2)),
            _ => {}
        }
        let name = format!("c{round}");
        user.create(&PostParams::default(), &typed(config_map(&name, &json!({})))).await.expect("created");
        if round == 2 {
            continue;
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while !seen.contains(&name) {
            let event =
                tokio::time::timeout_at(deadline, events.next()).await.unwrap_or_else(|_| panic!("{name} is seen"));
            if let Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) = event.expect("endless") {
                seen.push(object.name_any());
            }
        }
    }
    assert!(seen.contains(&"c2".to_owned()), "what was held back comes with the next list: {seen:?}");
}

#[tokio::test]
async fn a_fault_strikes_the_request_it_is_meant_for_before_or_after() {
    let server = ApiServer::new();
    let api = config_maps(&server.client("t"));
    let create = |name: &str| {
        let (api, body) = (api.clone(), typed(config_map(name, &json!({}))));
        async move { api.create(&PostParams::default(), &body).await }
    };
    server.inject(Fault::new(Effect::Status(503), |call| call.verb == Verb::Create).nth(2));
    create("a").await.expect("created");
    assert_eq!(code(create("b").await).0, 503);
    create("b").await.expect("created at the second try");
    server.clear_faults();
    server.inject(Fault::new(Effect::Reset, |call| call.verb == Verb::Create).after());
    assert!(matches!(create("c").await, Err(kube::Error::Service(_))));
    assert!(api.get("c").await.is_ok(), "it took effect");
    assert!(server.faults_are_spent());
    let log = server.log_of("t");
    let fates: Vec<_> = log.iter().filter(|e| e.call.verb == Verb::Create).map(|e| (e.code, e.changed)).collect();
    assert_eq!(fates, [(Some(201), true), (None, false), (Some(201), true), (Some(201), true)]);
}

#[tokio::test]
async fn events_are_read_in_both_versions() {
    let server = ApiServer::new();
    let client = server.client("t");
    let event = json!({"metadata": {"name": "e"}, "note": "n", "reason": "R", "type": "Warning", "action": "A",
        "regarding": {"kind": "Pod", "name": "p", "uid": "u", "namespace": "default"}, "reportingController": "c",
        "reportingInstance": "i", "eventTime": "2026-01-01T00:00:00.000000Z"});
    let new = Api::<Event>::namespaced(client.clone(), "default");
    new.create(&PostParams::default(), &typed(event)).await.expect("created");
    let about = ListParams::default().fields("involvedObject.uid=u,type=Warning");
    let core = Api::<CoreEvent>::namespaced(client, "default").list(&about).await.expect("listed");
    assert_eq!(core.items[0].message.as_deref(), Some("n"));
    assert_eq!(core.items[0].involved_object.name.as_deref(), Some("p"));
    assert_eq!(new.get("e").await.expect("there").note.as_deref(), Some("n"));
}

#[tokio::test]
async fn metadata_alone_can_be_asked_for() {
    let server = ApiServer::new();
    let client = server.client("t");
    config_maps(&client)
        .create(&PostParams::default(), &typed(config_map("a", &json!({"x": "1"}))))
        .await
        .expect("created");
    let api = Api::<PartialObjectMeta<ConfigMap>>::namespaced(client, "default");
    assert_eq!(api.get_metadata("a").await.expect("there").metadata.labels.expect("labels")["app"], "x");
    assert_eq!(api.list_metadata(&ListParams::default()).await.expect("listed").items.len(), 1);
}

#[tokio::test]
async fn a_lease_is_updated_with_its_version_only() {
    let server = ApiServer::new();
    let api = Api::<Lease>::namespaced(server.client("t"), "default");
    let lease = json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}});
    let created: Lease = api.create(&PostParams::default(), &typed(lease.clone())).await.expect("created");
    assert_eq!(code(api.replace("l", &PostParams::default(), &typed(lease)).await), (422, "Invalid".into()));
    api.replace("l", &PostParams::default(), &created).await.expect("accepted");
}

#[tokio::test]
async fn a_pod_on_a_node_gets_its_grace_period() {
    let server = ApiServer::new();
    let api = Api::<Pod>::namespaced(server.client("t"), "default");
    let pod = |name: &str| json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}});
    for name in ["waits", "goes"] {
        api.create(&PostParams::default(), &typed(pod(name))).await.expect("created");
    }
    let at = server.object("v1", "Pod", "default", "waits").expect("stored");
    server.modify(&at, |pod| pod["spec"]["nodeName"] = json!("n"));
    for name in ["waits", "goes"] {
        api.delete(name, &DeleteParams::default()).await.expect("accepted");
    }
    let waiting = api.get("waits").await.expect("still there");
    assert_eq!(waiting.metadata.deletion_grace_period_seconds, Some(30));
    assert_eq!(code(api.get("goes").await).0, 404);
}

#[tokio::test]
async fn an_unserved_kind_a_missing_namespace_and_a_wrong_type_are_refused() {
    let server = ApiServer::new();
    let client = server.client("t");
    let nowhere = Api::<ConfigMap>::namespaced(client.clone(), "nowhere");
    assert_eq!(code(nowhere.create(&PostParams::default(), &typed(config_map("a", &json!({})))).await).0, 404);
    let secrets = Api::<k8s_openapi::api::core::v1::Secret>::namespaced(client.clone(), "default");
    assert_eq!(code(secrets.list(&ListParams::default()).await).0, 404);
    let api = Api::<Deployment>::namespaced(client, "default");
    let patch = Patch::Merge(json!({"spec": {"replicas": "two"}}));
    api.create(&PostParams::default(), &typed(deployment(1))).await.expect("created");
    assert_eq!(code(api.patch("d", &PatchParams::default(), &patch).await), (400, "BadRequest".into()));
    let patch = Patch::Merge(json!({"spec": {"selector": {"matchLabels": {"app": "other"}}}}));
    assert_eq!(code(api.patch("d", &PatchParams::default(), &patch).await), (422, "Invalid".into()));
}
