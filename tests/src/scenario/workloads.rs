//! What users do to models, and what others do to their children: the cases that every fault is tried on.

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::{NAMESPACE, World, defaults, model};
use crate::simulation::Behaviour;

type Run = for<'a> fn(&'a mut World) -> BoxFuture<'a, ()>;

/// One case.
#[derive(Clone, Copy)]
pub struct Workload {
    /// What happens, in a sentence.
    pub name: &'static str,
    /// Lets it happen, with everything settled at the end.
    pub run: Run,
}

macro_rules! workloads {
    ($($name:literal => $function:ident),* $(,)?) => {
        /// The cases.
        pub const WORKLOADS: &[Workload] =
            &[$(Workload { name: $name, run: |world| $function(world).boxed() }),*];
    };
}

workloads! {
    "a model is created" => create,
    "a model is scaled up and down" => scale,
    "an edit rolls the pods" => edit,
    "a field is set and removed again" => set_and_unset,
    "a model is suspended and resumed" => suspend,
    "a paused model is edited and let go on" => paused,
    "a model is deleted" => delete,
    "a model is created again under its name while old children are still there" => recreate,
    "a model is created again after its children were orphaned" => orphaned,
    "a foreign Deployment has the name and goes away" => foreign_deployment,
    "a foreign Service has the name and goes away" => foreign_service,
    "children are edited and deleted by hand" => hand_edits,
    "owner and labels are stripped from a child" => stripped,
    "the status is wiped" => status_wiped,
    "the operator is upgraded and the engine stays pinned" => upgrade,
    "a GPU is asked for and there is no image for it" => gpu,
    "a model that cannot fit is stopped and corrected" => cannot_fit,
    "pods are refused by a quota for a while" => quota,
    "two models and a malformed one share a namespace" => neighbours,
    "the namespace goes away" => namespace,
}

async fn create(world: &mut World) {
    world.apply(&model("m", &json!({"replicas": 2}))).await;
    world.converge().await;
}

async fn scale(world: &mut World) {
    create(world).await;
    for replicas in [3, 0, 1] {
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        world.models().patch_scale("m", &PatchParams::default(), &patch).await.expect("scales");
        world.converge().await;
    }
}

async fn edit(world: &mut World) {
    create(world).await;
    world.edit("m", &json!({"spec": {"engine": {"maxModelLen": 4096, "dtype": "float32"}}})).await;
    world.converge().await;
}

async fn set_and_unset(world: &mut World) {
    let bare = model("m", &json!({}));
    let full = model(
        "m",
        &json!({
            "nodeSelector": {"pool": "ernie"}, "priorityClassName": "high", "schedulerName": "other",
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "imagePullSecrets": [{"name": "registry"}],
            "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
            "resources": {"requests": {"cpu": "500m"}},
        }),
    );
    for wanted in [&bare, &full, &bare] {
        world.apply(wanted).await;
        world.converge().await;
    }
}

async fn suspend(world: &mut World) {
    create(world).await;
    for suspended in [true, false] {
        world.edit("m", &json!({"spec": {"suspend": suspended}})).await;
        world.converge().await;
    }
}

async fn paused(world: &mut World) {
    create(world).await;
    for patch in
        [json!({"paused": true}), json!({"engine": {"maxNumSeqs": 8}, "replicas": 3}), json!({"paused": false})]
    {
        world.edit("m", &json!({"spec": patch})).await;
        world.converge().await;
    }
}

async fn delete(world: &mut World) {
    create(world).await;
    world.delete("m").await;
    world.converge().await;
}

async fn recreate(world: &mut World) {
    create(world).await;
    world.server.set_garbage_collection(false);
    world.delete("m").await;
    world.apply(&model("m", &json!({"replicas": 1, "model": {"name": "second"}}))).await;
    world.converge().await;
    world.server.set_garbage_collection(true);
    world.converge().await;
}

async fn orphaned(world: &mut World) {
    create(world).await;
    world.orphan("m").await;
    world.apply(&model("m", &json!({"replicas": 1}))).await;
    world.converge().await;
    for (kind, name) in [("Deployment", "m"), ("Service", "m"), ("Service", "m-workers")] {
        world.server.delete(&world.child(kind, name).expect("left behind"));
    }
    for kind in ["PodDisruptionBudget", "NetworkPolicy"] {
        world.server.delete(&world.child(kind, "m").expect("left behind"));
    }
    world.converge().await;
}

/// A Deployment that somebody else made.
fn foreign() -> Value {
    let labels = json!({"app": "other"});
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "m", "namespace": NAMESPACE},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
            "spec": {"containers": [{"name": "other", "image": "other:1"}]}}}})
}

async fn foreign_deployment(world: &mut World) {
    let foreign = world.server.create(&foreign()).expect("accepted");
    create(world).await;
    world.server.delete(&foreign);
    world.converge().await;
}

async fn foreign_service(world: &mut World) {
    let foreign = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "m-workers", "namespace": NAMESPACE},
        "spec": {"selector": {"app": "other"}, "ports": [{"port": 80}]}});
    let foreign = world.server.create(&foreign).expect("accepted");
    create(world).await;
    world.server.delete(&foreign);
    world.converge().await;
}

async fn hand_edits(world: &mut World) {
    create(world).await;
    let user = PatchParams::default();
    let deployments = Api::<Deployment>::namespaced(world.user(), NAMESPACE);
    let patch = json!({"metadata": {"labels": {"app.kubernetes.io/name": "mine"}}, "spec": {"replicas": 5, "template":
        {"spec": {"containers": [{"name": "worker", "image": "mine:1"}], "nodeSelector": {"my": "node"}}}}});
    deployments.patch("m", &user, &Patch::Strategic(&patch)).await.expect("accepted");
    let services = Api::<Service>::namespaced(world.user(), NAMESPACE);
    let patch = json!({"spec": {"selector": {"mine": "yes"}, "publishNotReadyAddresses": true}});
    services.patch("m", &user, &Patch::Merge(&patch)).await.expect("accepted");
    services.delete("m-workers", &DeleteParams::default()).await.expect("there");
    let budgets = Api::<PodDisruptionBudget>::namespaced(world.user(), NAMESPACE);
    budgets.delete("m", &DeleteParams::default()).await.expect("there");
    let policies = Api::<NetworkPolicy>::namespaced(world.user(), NAMESPACE);
    policies.patch("m", &user, &Patch::Merge(json!({"spec": {"ingress": null}}))).await.expect("accepted");
    world.converge().await;
}

async fn stripped(world: &mut World) {
    create(world).await;
    let user = PatchParams::default();
    let services = Api::<Service>::namespaced(world.user(), NAMESPACE);
    let patch = json!({"metadata": {"labels": null}});
    services.patch("m", &user, &Patch::Merge(&patch)).await.expect("accepted");
    let budgets = Api::<PodDisruptionBudget>::namespaced(world.user(), NAMESPACE);
    let patch = json!({"metadata": {"ownerReferences": null}});
    budgets.patch("m", &user, &Patch::Merge(&patch)).await.expect("accepted");
    world.converge().await;
}

async fn status_wiped(world: &mut World) {
    create(world).await;
    let wiped = Patch::Merge(json!({"status": null}));
    world.models().patch_status("m", &PatchParams::default(), &wiped).await.expect("accepted");
    world.converge().await;
}

async fn upgrade(world: &mut World) {
    create(world).await;
    world.defaults = defaults("2.0.0");
    world.restart_operators();
    world.converge().await;
    let wiped = Patch::Merge(json!({"status": null}));
    world.models().patch_status("m", &PatchParams::default(), &wiped).await.expect("accepted");
    world.apply(&model("n", &json!({}))).await;
    world.converge().await;
}

async fn gpu(world: &mut World) {
    world.apply(&model("m", &json!({"resources": {"limits": {"nvidia.com/gpu": 1}}}))).await;
    world.converge().await;
    world.apply(&model("m", &json!({}))).await;
    world.converge().await;
}

async fn cannot_fit(world: &mut World) {
    let message = json!({"reason": "InsufficientMemory", "message": "needs 3.1 GiB of memory, limit is 2 GiB"});
    let crash =
        Behaviour::Crashing { exit_code: 13, reason: "Error".into(), message: message.to_string(), restarts: 1 };
    world.cluster.behave("m-", crash);
    create(world).await;
    world.cluster.behave("m-", Behaviour::Ready);
    world.edit("m", &json!({"spec": {"resources": {"limits": {"memory": "4Gi"}}}})).await;
    world.converge().await;
}

async fn quota(world: &mut World) {
    let sentence = "pods \"m-1\" is forbidden: exceeded quota: small, requested: limits.memory=2Gi, used: limits.memory=0, \
        limited: limits.memory=1Gi";
    world.cluster.refuse_pods(Some(sentence));
    create(world).await;
    world.cluster.refuse_pods(None);
    world.converge().await;
}

async fn neighbours(world: &mut World) {
    let mut malformed = model("broken", &json!({}));
    malformed["metadata"]["namespace"] = Value::from(NAMESPACE);
    malformed["spec"]["replicas"] = Value::from("many");
    world.server.insert(malformed);
    world.apply(&model("m", &json!({"replicas": 2}))).await;
    world.apply(&model("n", &json!({"model": {"name": "other"}}))).await;
    world.converge().await;
    world.delete("n").await;
    world.converge().await;
}

async fn namespace(world: &mut World) {
    create(world).await;
    world.server.set_garbage_collection(false);
    let at = world.server.object("v1", "Namespace", "", NAMESPACE).expect("there");
    world.server.delete(&at);
    let services = Api::<Service>::namespaced(world.user(), NAMESPACE);
    services.delete("m", &DeleteParams::default()).await.expect("there");
    world.converge().await;
    world.server.set_garbage_collection(true);
    world.converge().await;
}
