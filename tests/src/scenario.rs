//! A cluster in memory with an operator in it, to be driven step by step.
//!
//! [`World`] has the API server, the simulated controllers, a user, and operators that a test lets work until nothing is
//! left to do. An operator works on every model in turn, as the real loop does, but without watches and without time;
//! a fault may kill it at any request, and then a new one begins.

mod audit;
mod workloads;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ernie_operator::api::{ErnieModel, crd};
use ernie_operator::apply;
use ernie_operator::autoscale::Autoscaler;
use ernie_operator::context::Context;
use ernie_operator::desired::{APPLIED_ANNOTATION, Defaults, Release};
use ernie_operator::reconcile::{Error, reconcile};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::DeserializeGuard;
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::apiserver::{ApiServer, Entry, transcript};
use crate::simulation::{Cluster, Workers};

pub use audit::{children_touched, violations};
pub use workloads::{WORKLOADS, Workload};

/// Namespace of the models.
pub const NAMESPACE: &str = "chat";
/// Name under which the log shows the first operator.
pub const OPERATOR: &str = "operator";
/// Most rounds until everything must have settled.
const ROUNDS: usize = 60;

/// What operators are told about workers at first.
pub fn defaults(version: &str) -> Defaults {
    Defaults {
        release: Release {
            version: version.to_owned(),
            image: format!("registry.test/worker:{version}"),
            image_cuda: None,
        },
    }
}

/// A model as a user writes it; `spec` is laid over a small default.
pub fn model(name: &str, spec: &Value) -> Value {
    let mut value = json!({
        "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": name},
        "spec": {"model": {"uri": "oci://registry.test/ernie-4.5-0.3b:1"}, "resources": {"limits": {"memory": "2Gi"}}},
    });
    json_patch::merge(&mut value["spec"], spec);
    value
}

/// An operator process: what it is told, and what it remembers until it dies.
struct Process {
    client_name: String,
    defaults: Defaults,
    context: Arc<Context>,
    autoscaler: Autoscaler,
}

/// How a round of an operator ended.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Round {
    Done,
    Failed(String),
    Crashed,
}

/// A cluster in memory with operators in it.
pub struct World {
    /// The API server.
    pub server: ApiServer,
    /// The controllers and the kubelet.
    pub cluster: Cluster,
    /// What the pods of models serve and say of it.
    pub workers: Workers,
    /// What operators that start from now on are told.
    pub defaults: Defaults,
    operators: Vec<Process>,
    user: Client,
}

impl World {
    /// A cluster with the definition installed and one operator.
    pub fn new() -> Self {
        Self::with_operators(1)
    }

    /// A cluster with several operators, all of which believe that they lead.
    pub fn with_operators(count: usize) -> Self {
        let server = ApiServer::new();
        server.install(&crd());
        server.add_namespace(NAMESPACE);
        let mut world = Self {
            cluster: Cluster::new(&server),
            workers: Workers::default(),
            user: server.client("user"),
            server,
            defaults: defaults("1.0.0"),
            operators: Vec::new(),
        };
        for index in 0..count {
            let client_name = if index == 0 { OPERATOR.to_owned() } else { format!("{OPERATOR}-{}", index + 1) };
            let (context, autoscaler) = world.start(&client_name);
            let defaults = world.defaults.clone();
            world.operators.push(Process { client_name, defaults, context, autoscaler });
        }
        world
    }

    fn start(&self, client_name: &str) -> (Arc<Context>, Autoscaler) {
        let clock = self.server.clock();
        let context = Context::new(self.server.client(client_name), self.defaults.clone());
        let context = Arc::new(context.with_clock(move || clock.now()));
        (context.clone(), Autoscaler::new(context, self.workers.fetch(), None))
    }

    /// Starts the operators anew, with what they are to be told now.
    pub fn restart_operators(&mut self) {
        for index in 0..self.operators.len() {
            let started = self.start(&self.operators[index].client_name);
            let process = &mut self.operators[index];
            (process.context, process.autoscaler) = started;
            process.defaults = self.defaults.clone();
        }
    }

    /// A client of a person with every right.
    pub fn user(&self) -> Client {
        self.user.clone()
    }

    /// The models of [`NAMESPACE`], for the user.
    pub fn models(&self) -> Api<ErnieModel> {
        Api::namespaced(self.user(), NAMESPACE)
    }

    /// Applies a model as `kubectl apply --server-side` does.
    pub async fn apply(&self, model: &Value) {
        let name = model["metadata"]["name"].as_str().expect("a named model");
        let parameters = PatchParams::apply("kubectl").force();
        self.models().patch(name, &parameters, &Patch::Apply(model)).await.expect("the model is accepted");
    }

    /// Changes a model with a merge patch.
    pub async fn edit(&self, name: &str, patch: &Value) {
        let parameters = PatchParams::default();
        self.models().patch(name, &parameters, &Patch::Merge(patch)).await.expect("the change is accepted");
    }

    /// Deletes a model.
    pub async fn delete(&self, name: &str) {
        self.models().delete(name, &DeleteParams::default()).await.expect("the model is there");
    }

    /// Deletes a model and leaves its children behind.
    pub async fn orphan(&self, name: &str) {
        self.models().delete(name, &DeleteParams::orphan()).await.expect("the model is there");
    }

    /// Deletes a model only if it still is the one with the uid.
    pub async fn delete_exactly(&self, name: &str, uid: &str) {
        let only = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let parameters = DeleteParams::default().preconditions(only);
        self.models().delete(name, &parameters).await.expect("the model is there");
    }

    /// The model as it is stored.
    pub fn model(&self, name: &str) -> Option<Value> {
        self.server.object("serving.ernie.io/v1alpha1", "ErnieModel", NAMESPACE, name)
    }

    /// A child as it is stored.
    pub fn child(&self, kind: &str, name: &str) -> Option<Value> {
        let api_version = match kind {
            "Deployment" | "ReplicaSet" => "apps/v1",
            "PodDisruptionBudget" => "policy/v1",
            "NetworkPolicy" => "networking.k8s.io/v1",
            _ => "v1",
        };
        self.server.object(api_version, kind, NAMESPACE, name)
    }

    /// A condition of a model.
    pub fn condition(&self, name: &str, kind: &str) -> Option<Value> {
        let model = self.model(name)?;
        let conditions = model["status"]["conditions"].as_array()?;
        conditions.iter().find(|condition| condition["type"] == kind).cloned()
    }

    /// Status and reason of a condition, such as `False/NameConflict`.
    pub fn state(&self, name: &str, kind: &str) -> String {
        let condition = self.condition(name, kind).unwrap_or_default();
        let text = |field: &str| condition[field].as_str().unwrap_or("?").to_owned();
        format!("{}/{}", text("status"), text("reason"))
    }

    /// Message of a condition.
    pub fn message(&self, name: &str, kind: &str) -> String {
        let condition = self.condition(name, kind).unwrap_or_default();
        condition["message"].as_str().unwrap_or_default().to_owned()
    }

    /// Changes of children that the operators asked for and the server made.
    pub fn operator_log(&self) -> Vec<Entry> {
        let log = self.server.log();
        log.into_iter().filter(|entry| entry.call.client.starts_with(OPERATOR)).collect()
    }

    /// What two runs of the same workload have in common: no events, which a crash may lose, nothing that the Deployment
    /// controller makes, and nothing that follows from the order of requests: addresses, the seals that cover the owner's
    /// uid, and how many revisions a Deployment went through.
    pub fn outcome(&self) -> Vec<Value> {
        let mut objects = self.server.outcome();
        objects.retain(|object| !matches!(object["kind"].as_str(), Some("Event" | "Pod" | "ReplicaSet")));
        for object in &mut objects {
            if let Some(Value::Object(annotations)) = object.pointer_mut("/metadata/annotations") {
                annotations.shift_remove(APPLIED_ANNOTATION);
                annotations.shift_remove("deployment.kubernetes.io/revision");
            }
            if object["kind"] == "Deployment" {
                object["status"]["observedGeneration"].take();
            }
            if let Some(Value::Object(spec)) = object.get_mut("spec")
                && spec.get("clusterIP").is_some_and(|address| address != "None")
            {
                spec.shift_remove("clusterIP");
                spec.shift_remove("clusterIPs");
            }
        }
        objects
    }

    /// Lets operators and controllers work until nobody has anything left to do.
    ///
    /// # Panics
    /// When they do not come to an end.
    pub async fn converge(&mut self) {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let before = (self.server.revision(), self.server.log().len());
            rounds = self.round().await;
            self.cluster.settle();
            let log = self.server.log();
            // What is forbidden stays so until something changes, and then the revision does.
            let is_write = |entry: &&Entry| entry.is_mutating() && entry.code != Some(403);
            let wrote = log[before.1..].iter().filter(is_write).any(|entry| entry.call.client.starts_with(OPERATOR));
            let quiet = self.server.revision() == before.0 && !wrote;
            if quiet && rounds.iter().all(|round| *round == Round::Done) {
                return;
            }
        }
        let log = self.operator_log();
        let tail = &log[log.len().saturating_sub(40)..];
        panic!("nothing settles after {ROUNDS} rounds, the last was {rounds:?} after\n{}", transcript(tail));
    }

    /// Every operator looks at every model once, all at the same time.
    async fn round(&mut self) -> Vec<Round> {
        let work = self.operators.iter().map(|process| look_at_all(&self.server, process));
        let rounds = futures::future::join_all(work).await;
        for (index, round) in rounds.iter().enumerate() {
            if *round == Round::Crashed {
                let old = &self.operators[index];
                let client_name = old.client_name.clone();
                let defaults = std::mem::replace(&mut self.defaults, old.defaults.clone());
                let started = self.start(&client_name);
                self.defaults = defaults;
                let process = &mut self.operators[index];
                (process.context, process.autoscaler) = started;
            }
        }
        rounds
    }

    /// A new operator looks at everything: what it asks the server to change.
    pub async fn writes_at_rest(&mut self) -> Vec<Entry> {
        self.restart_operators();
        self.server.clear_log();
        self.round().await;
        self.operator_log().into_iter().filter(Entry::is_mutating).collect()
    }

    /// Lets 5 s pass in which the workers serve so many requests per second, then one tick of every autoscaler, and what
    /// follows from it.
    pub async fn tick(&mut self, rate: f64) {
        self.workers.serve(&self.addresses(), rate, 5.0);
        self.wait(5);
        // Deadlines go by the runtime's clock, which a test pauses.
        tokio::time::sleep(Duration::from_secs(5)).await;
        for process in &self.operators {
            let models = Api::<ErnieModel>::all(process.context.client.clone()).list(&ListParams::default()).await;
            let models = models.expect("the models can be listed").items;
            process.autoscaler.tick(&models.iter().collect::<Vec<_>>()).await;
        }
        self.converge().await;
    }

    /// Addresses of the pods that are ready.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let pods = self.server.objects("v1", "Pod", NAMESPACE);
        let ready = pods.iter().filter(|pod| {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            conditions.into_iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        });
        ready.filter_map(|pod| pod["status"]["podIP"].as_str()?.parse().ok()).collect()
    }

    /// Lets time pass.
    pub fn wait(&self, seconds: u64) {
        self.server.advance_clock(Duration::from_secs(seconds));
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

async fn look_at_all(server: &ApiServer, process: &Process) -> Round {
    let api = Api::<DeserializeGuard<ErnieModel>>::all(process.context.client.clone());
    let all = async {
        let models = match api.list(&ListParams::default()).await {
            Ok(models) => models,
            Err(error) => return Round::Failed(error.to_string()),
        };
        let mut round = Round::Done;
        for model in models {
            match reconcile(Arc::new(model), process.context.clone()).await {
                Ok(_) => {}
                // Given up until something changes.
                Err(Error::Apply(apply::Error::Gone | apply::Error::Terminating)) => {}
                Err(error) => round = Round::Failed(error.to_string()),
            }
        }
        round
    };
    tokio::select! {
        biased;
        () = server.crashed(&process.client_name) => Round::Crashed,
        round = all => round,
    }
}
