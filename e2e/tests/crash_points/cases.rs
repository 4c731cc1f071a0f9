//! What users do to a model, and what others do to its children.

use anyhow::Result;
use ernie_operator::api::ErnieModel;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::world::{NAME, World};

type Step = for<'a> fn(&'a mut World) -> LocalBoxFuture<'a, Result<()>>;

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// What happens, in a sentence.
    pub name: &'static str,
    /// What is there before faults begin.
    pub before: Step,
    /// What happens, to its end, with a fault somewhere.
    pub run: Step,
}

macro_rules! cases {
    ($($name:literal => $before:ident, $run:ident;)*) => {
        /// The cases.
        pub const CASES: &[Case] = &[$(Case {
            name: $name,
            before: |world| $before(world).boxed_local(),
            run: |world| $run(world).boxed_local(),
        }),*];
    };
}

cases! {
    "a model is created" => nothing, create;
    "an edit rolls the pods" => create, edit;
    "a model is scaled up and down" => create, scale;
    "fields are set and removed again" => create, set_and_unset;
    "a model is suspended and resumed" => create, suspend;
    "a model is deleted and the operator has not heard of it" => create, delete;
    "a model is created again under its name while old children are still there" => create, recreate;
    "children are edited and deleted by hand" => create, hand_edits;
    "owner and labels are stripped from children" => create, stripped;
    "the status is wiped" => create, wipe_status;
    "a foreign Deployment has the name and goes away" => nothing, foreign_deployment;
}

async fn nothing(_world: &mut World) -> Result<()> {
    Ok(())
}

async fn create(world: &mut World) -> Result<()> {
    world.apply(json!({"replicas": 2})).await?;
    world.converge().await
}

async fn edit(world: &mut World) -> Result<()> {
    world.merge::<ErnieModel>(NAME, json!({"spec": {"engine": {"maxModelLen": 4096, "dtype": "float32"}}})).await?;
    world.converge().await
}

async fn scale(world: &mut World) -> Result<()> {
    for replicas in [3, 1] {
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        world.api::<ErnieModel>().patch_scale(NAME, &PatchParams::default(), &patch).await?;
        world.converge().await?;
    }
    Ok(())
}

async fn set_and_unset(world: &mut World) -> Result<()> {
    let full = json!({
        "replicas": 2,
        "nodeSelector": {"pool": "ernie"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "imagePullSecrets": [{"name": "registry"}],
        "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
        "resources": {"limits": {"memory": "2Gi"}, "requests": {"cpu": "500m"}},
    });
    for wanted in [full, json!({"replicas": 2})] {
        world.apply(wanted).await?;
        world.converge().await?;
    }
    Ok(())
}

async fn suspend(world: &mut World) -> Result<()> {
    for suspended in [true, false] {
        world.merge::<ErnieModel>(NAME, json!({"spec": {"suspend": suspended}})).await?;
        world.converge().await?;
    }
    Ok(())
}

async fn delete(world: &mut World) -> Result<()> {
    world.delete::<ErnieModel>(NAME).await?;
    world.wait_for_children("the children to be collected", |children| children.is_empty()).await?;
    world.converge().await
}

async fn recreate(world: &mut World) -> Result<()> {
    world.hold_children(true).await?;
    world.delete::<ErnieModel>(NAME).await?;
    let doomed = |children: &[(String, bool)]| children.len() == 5 && children.iter().all(|(_, doomed)| *doomed);
    world.wait_for_children("the children to be doomed", doomed).await?;
    let spec = json!({"replicas": 1, "model": {"uri": "oci://registry.test/ernie-4.5-0.3b:2", "name": "second"}});
    world.apply(spec).await?;
    world.converge().await?;
    world.hold_children(false).await?;
    world.converge().await
}

async fn hand_edits(world: &mut World) -> Result<()> {
    let patch = json!({"metadata": {"labels": {"app.kubernetes.io/name": "mine"}}, "spec": {"replicas": 3, "template":
        {"spec": {"containers": [{"name": "worker", "image": "mine:1"}], "nodeSelector": {"my": "node"}}}}});
    world.api::<Deployment>().patch(NAME, &PatchParams::default(), &Patch::Strategic(&patch)).await?;
    let patch = json!({"spec": {"selector": {"mine": "yes"}, "publishNotReadyAddresses": true}});
    world.merge::<Service>(NAME, patch).await?;
    world.delete::<Service>("m-workers").await?;
    world.delete::<PodDisruptionBudget>(NAME).await?;
    world.merge::<NetworkPolicy>(NAME, json!({"spec": {"ingress": null}})).await?;
    world.converge().await
}

async fn stripped(world: &mut World) -> Result<()> {
    world.merge::<Service>(NAME, json!({"metadata": {"labels": null}})).await?;
    world.merge::<PodDisruptionBudget>(NAME, json!({"metadata": {"ownerReferences": null}})).await?;
    world.converge().await
}

async fn wipe_status(world: &mut World) -> Result<()> {
    let wiped = Patch::Merge(json!({"status": null}));
    world.api::<ErnieModel>().patch_status(NAME, &PatchParams::default(), &wiped).await?;
    world.converge().await
}

async fn foreign_deployment(world: &mut World) -> Result<()> {
    let labels = json!({"app": "other"});
    let foreign = json!({"metadata": {"name": NAME}, "spec": {"replicas": 0, "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "other", "image": "other:1"}]}}}});
    world.create::<Deployment>(foreign).await?;
    create(world).await?;
    world.delete::<Deployment>(NAME).await?;
    world.converge().await
}
