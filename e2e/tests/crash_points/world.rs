//! A namespace with one model in it, an operator that is driven look by look, the cluster's own controllers, and a stand-in
//! for the kubelet: the pods ask for a scheduler that is not there, so they cost nothing and are ready when this says so.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ernie_e2e::wait;
use ernie_operator::api::ErnieModel;
use ernie_operator::desired::APPLIED_ANNOTATION;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DeserializeGuard};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::operator::{Look, Operator, Point, Sent};

/// Name of the model.
pub const NAME: &str = "m";
/// Its label on whatever belongs to it.
const MODEL_LABEL: &str = "serving.ernie.io/model";
/// Longest time until everything has settled, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A namespace, its model and its operator.
pub struct World {
    /// A client that never fails: the user's, and the test's own.
    client: Client,
    namespace: String,
    operator: Operator,
    /// What the operator believes of a model that may be gone.
    last_seen: Option<DeserializeGuard<ErnieModel>>,
}

impl World {
    /// A world in an empty namespace.
    pub fn new(client: &Client, namespace: &str) -> Self {
        Self {
            client: client.clone(),
            namespace: namespace.to_owned(),
            operator: Operator::start(client.clone()),
            last_seen: None,
        }
    }

    /// From now on the operator's requests are counted, and one of them goes wrong.
    pub fn arm(&mut self, point: Option<Point>) {
        self.operator.arm(point);
    }

    /// The operator.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// Objects of one kind, for the user.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies the model as `kubectl apply --server-side` does; `spec` is laid over a small default.
    pub async fn apply(&self, spec: Value) -> Result<()> {
        let mut model = json!({
            "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": NAME},
            "spec": {
                "model": {"uri": "oci://registry.test/ernie-4.5-0.3b:1"},
                "resources": {"limits": {"memory": "2Gi"}},
                "schedulerName": "nobody",
            },
        });
        let (Value::Object(into), Value::Object(spec)) = (&mut model["spec"], spec) else { unreachable!("objects") };
        into.extend(spec);
        let parameters = PatchParams::apply("kubectl").force();
        self.api::<ErnieModel>().patch(NAME, &parameters, &Patch::Apply(&model)).await.context("applying the model")?;
        Ok(())
    }

    /// Changes an object with a merge patch.
    pub async fn merge<K>(&self, name: &str, patch: Value) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let patched = self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        patched.map(drop).with_context(|| format!("changing {} {name}", K::kind(&())))
    }

    /// Deletes an object.
    pub async fn delete<K>(&self, name: &str) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
    {
        let deleted = self.api::<K>().delete(name, &DeleteParams::background()).await;
        deleted.map(drop).with_context(|| format!("deleting {} {name}", K::kind(&())))
    }

    /// Creates an object.
    pub async fn create<K>(&self, object: Value) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K: serde::Serialize,
    {
        let object = serde_json::from_value(object).context("an object of the test")?;
        self.api::<K>().create(&PostParams::default(), &object).await.with_context(|| K::kind(&()).into_owned())?;
        Ok(())
    }

    /// Kind and name of each child there is, and whether it is on its way out.
    pub async fn children(&self) -> Result<Vec<(String, bool)>> {
        let mut found = Vec::new();
        for (kind, name) in children() {
            if let Some(object) = self.object(&kind, name).await? {
                found.push((format!("{}/{name}", kind.kind), object.metadata.deletion_timestamp.is_some()));
            }
        }
        Ok(found)
    }

    async fn object(&self, kind: &ApiResource, name: &str) -> Result<Option<DynamicObject>> {
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, kind);
        api.get_opt(name).await.with_context(|| format!("reading {} {name}", kind.kind))
    }

    /// Puts a finalizer on every child, or takes it away again: until then a deleted child stays.
    pub async fn hold_children(&self, hold: bool) -> Result<()> {
        let finalizers = if hold { json!(["e2e.serving.ernie.io/hold"]) } else { Value::Null };
        let patch = Patch::Merge(json!({"metadata": {"finalizers": finalizers}}));
        for (kind, name) in children() {
            let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &kind);
            api.patch(name, &PatchParams::default(), &patch).await.with_context(|| format!("holding {}", kind.kind))?;
        }
        Ok(())
    }

    /// Waits until the children are as told.
    pub async fn wait_for_children(&self, what: &str, holds: impl Fn(&[(String, bool)]) -> bool) -> Result<()> {
        wait::until(what, DEADLINE, async || Ok(holds(&self.children().await?).then_some(()))).await
    }

    /// Lets the operator look until nothing is left to do, the cluster's controllers having done theirs before each look.
    /// After a look that failed it looks again at once, while they still act.
    pub async fn converge(&mut self) -> Result<()> {
        let mut looks = Vec::new();
        let converged = wait::until("the operator to have nothing left to do", DEADLINE, async || {
            let at_once = matches!(looks.last(), Some(Look::Failed(_) | Look::Crashed));
            if !at_once {
                self.settle().await?;
            }
            let look = self.look().await?;
            // What is quiet in the middle of a rollout has more to say at its end.
            let is_over = look == Look::Quiet && !at_once;
            looks.push(look);
            Ok(is_over.then_some(()))
        })
        .await;
        converged.with_context(|| {
            let sent = self.operator.sent();
            let requests = sent.iter().rev().take(20).rev().map(|sent| format!("\n  {sent}")).collect::<String>();
            format!("looks: {looks:?}; requests at last:{requests}")
        })
    }

    /// The operator looks at the model, or at what it remembers of it when it is gone.
    async fn look(&mut self) -> Result<Look> {
        let api = Api::<DeserializeGuard<ErnieModel>>::namespaced(self.client.clone(), &self.namespace);
        if let Some(model) = api.get_opt(NAME).await.context("reading the model")? {
            self.last_seen = Some(model);
        }
        match self.last_seen.clone() {
            Some(model) => Ok(self.operator.look(model).await),
            None => Ok(Look::Quiet),
        }
    }

    /// Another operator looks at what is there: the requests by which it would change something.
    pub async fn writes_at_rest(&mut self) -> Result<Vec<String>> {
        self.operator.arm(None);
        self.operator.restart();
        self.look().await?;
        let sent = self.operator.sent();
        ensure!(!sent.is_empty(), "the operator has not even looked");
        let writes = sent.iter().filter(|sent| sent.is_mutating());
        Ok(writes.map(Sent::to_string).collect())
    }

    /// Waits until the Deployment controller has done what the Deployment asks for, making its pods ready.
    async fn settle(&self) -> Result<()> {
        let mut last = Value::Null;
        let settled = wait::until("the Deployment controller to come to an end", DEADLINE, async || {
            let deployment = self.api::<Deployment>().get_opt(NAME).await.context("reading the Deployment")?;
            // One that a finalizer holds is not worked on any more.
            if deployment.as_ref().is_some_and(|deployment| deployment.metadata.deletion_timestamp.is_some()) {
                return Ok(Some(()));
            }
            let of_model = ListParams::default().labels(&format!("{MODEL_LABEL}={NAME}"));
            let pods = self.api::<Pod>().list(&of_model).await.context("listing pods")?.items;
            for pod in &pods {
                self.make_ready(pod).await?;
            }
            last = json!({"pods": pods.len(), "deployment": deployment});
            let done = match &deployment {
                None => pods.is_empty(),
                Some(deployment) => is_rolled_out(deployment, pods.len()),
            };
            Ok(done.then_some(()))
        })
        .await;
        settled.with_context(|| format!("{last:#}"))
    }

    /// Says of a pod what a kubelet says of one whose container is ready.
    async fn make_ready(&self, pod: &Pod) -> Result<()> {
        if ernie_e2e::is_ready(pod) || pod.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let (name, spec) = (pod.metadata.name.as_deref().unwrap_or_default(), pod.spec.as_ref());
        let container = spec.and_then(|spec| spec.containers.first()).context("a pod without containers")?;
        let now = Timestamp::now();
        let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
            .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": now}));
        let status = json!({"status": {"phase": "Running", "conditions": conditions, "containerStatuses": [{
            "name": container.name, "image": container.image, "imageID": "", "ready": true, "started": true,
            "restartCount": 0, "state": {"running": {"startedAt": now}}, "lastState": {},
        }]}});
        match self.api::<Pod>().patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await {
            Ok(_) => Ok(()),
            // The Deployment controller removes pods meanwhile.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).context("making a pod ready"),
        }
    }

    /// The model and its children as the operator decided them, without what identifies them, what others say of them, and
    /// when it happened.
    pub async fn outcome(&self) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        let model = ApiResource::erase::<ErnieModel>(&());
        for (kind, name) in std::iter::once((model, NAME)).chain(children()) {
            if let Some(object) = self.object(&kind, name).await? {
                objects.push(decided(serde_json::to_value(object)?, &self.namespace));
            }
        }
        Ok(objects)
    }

    /// Removes the model and waits until nothing is left of it.
    pub async fn clear(&self) -> Result<()> {
        match self.api::<ErnieModel>().delete(NAME, &DeleteParams::background()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context("deleting the model"),
        }
        // What was made to be nobody's.
        for (kind, name) in children() {
            if let Some(object) = self.object(&kind, name).await?
                && object.metadata.owner_references.is_none_or(|owners| owners.is_empty())
            {
                let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &kind);
                api.delete(name, &DeleteParams::background()).await.with_context(|| format!("deleting {name}"))?;
            }
        }
        self.wait_for_children("the children to be gone", |children| children.is_empty()).await?;
        let pods = self.api::<Pod>();
        wait::until("the pods to be gone", DEADLINE, async || {
            Ok(pods.list(&ListParams::default()).await.context("listing pods")?.items.is_empty().then_some(()))
        })
        .await
    }
}

/// Kinds and names of the children that a model has.
fn children() -> [(ApiResource, &'static str); 5] {
    [
        (ApiResource::erase::<NetworkPolicy>(&()), NAME),
        (ApiResource::erase::<Service>(&()), NAME),
        (ApiResource::erase::<Service>(&()), "m-workers"),
        (ApiResource::erase::<PodDisruptionBudget>(&()), NAME),
        (ApiResource::erase::<Deployment>(&()), NAME),
    ]
}

fn is_rolled_out(deployment: &Deployment, pods: usize) -> bool {
    let (Some(spec), Some(status)) = (&deployment.spec, &deployment.status) else { return false };
    let wanted = spec.replicas.unwrap_or(1);
    // Of a Deployment that is not the model's, no pods are listed.
    let labels = spec.selector.match_labels.as_ref();
    let is_ours = labels.is_some_and(|labels| labels.get(MODEL_LABEL).is_some_and(|model| model == NAME));
    let counts = [status.replicas, status.updated_replicas, status.ready_replicas, status.available_replicas];
    status.observed_generation == deployment.metadata.generation
        && counts.iter().all(|count| count.unwrap_or(0) == wanted)
        && usize::try_from(if is_ours { wanted } else { 0 }).is_ok_and(|wanted| wanted == pods)
}

/// An object without identity, times, and the words of controllers that are not ours.
fn decided(mut object: Value, namespace: &str) -> Value {
    let is_model = object["kind"] == "ErnieModel";
    if let Some(object) = object.as_object_mut().filter(|_| !is_model) {
        object.shift_remove("status");
    }
    if let Some(metadata) = object["metadata"].as_object_mut() {
        // A Deployment's generation counts how often it was written; a model's is the user's doing.
        for field in ["uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"] {
            metadata.shift_remove(field);
        }
        for owner in metadata.get_mut("ownerReferences").and_then(Value::as_array_mut).into_iter().flatten() {
            owner["uid"].take();
        }
        if let Some(Value::Object(annotations)) = metadata.get_mut("annotations") {
            // A seal over all of the child, its owner's uid included, and the Deployment controller's own count.
            annotations.shift_remove(APPLIED_ANNOTATION);
            annotations.shift_remove("deployment.kubernetes.io/revision");
        }
    }
    if let Some(Value::Object(spec)) = object.get_mut("spec")
        && spec.get("clusterIP").is_some_and(|address| address != "None")
    {
        spec.shift_remove("clusterIP");
        spec.shift_remove("clusterIPs");
    }
    for condition in object["status"]["conditions"].as_array_mut().into_iter().flatten() {
        condition["lastTransitionTime"].take();
    }
    let text = object.to_string().replace(namespace, "NAMESPACE");
    serde_json::from_str(&text).unwrap()
}
