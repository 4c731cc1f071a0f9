//! The controllers and the kubelet of a cluster, simulated over the in-memory API server.
//!
//! Deployments get replica sets, replica sets get pods, and pods do what a [`Behaviour`] says. Nothing runs by itself:
//! [`Cluster::step`] lets every controller look once, [`Cluster::settle`] until nothing changes any more.

mod deployment;
mod disruption;
mod kubelet;
mod replicaset;
mod workers;

use serde_json::Value;

use crate::apiserver::{ApiServer, object};

pub use workers::{PageFault, Workers};

/// Most steps until a cluster must have settled.
const STEPS: usize = 500;

/// What becomes of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Behaviour {
    /// It runs and is ready.
    Ready,
    /// It runs and is not ready.
    Starting,
    /// No node takes it; the scheduler's sentence.
    Unschedulable(String),
    /// Its container waits: reason and message of the kubelet, such as `ImagePullBackOff`.
    Waiting(String, String),
    /// It waits for its container without saying why; a warning event tells: reason and message.
    Warned(String, String),
    /// Its container ends again and again.
    Crashing {
        /// Exit code.
        exit_code: i32,
        /// The kubelet's word: `Error` or `OOMKilled`.
        reason: String,
        /// Termination message.
        message: String,
        /// How often it was started again.
        restarts: i32,
    },
    /// The pod as a whole failed: reason and message, such as an eviction.
    Failed(String, String),
}

/// A rule: pods whose image or name contains the text behave so.
#[derive(Clone, Debug)]
struct Rule {
    pattern: String,
    behaviour: Behaviour,
}

/// A simulated cluster.
#[derive(Debug)]
pub struct Cluster {
    server: ApiServer,
    rules: Vec<Rule>,
    refusal: Option<String>,
    pods: u64,
}

impl Cluster {
    /// A cluster over a server, in which every pod becomes ready.
    pub fn new(server: &ApiServer) -> Self {
        Self { server: server.clone(), rules: Vec::new(), refusal: None, pods: 0 }
    }

    /// From now on, pods whose name begins with the text behave so; later rules go before earlier ones.
    pub fn behave(&mut self, name_prefix: &str, behaviour: Behaviour) {
        self.rules.insert(0, Rule { pattern: name_prefix.to_owned(), behaviour });
    }

    /// Creations of pods are refused with the sentence, as by a quota, or are accepted again.
    pub fn refuse_pods(&mut self, why: Option<&str>) {
        self.refusal = why.map(str::to_owned);
    }

    /// Lets every controller look once: whether anything changed.
    pub fn step(&mut self) -> bool {
        let mut changed = false;
        for deployment in self.server.objects("apps/v1", "Deployment", "") {
            changed |= self.sync_deployment(&deployment);
        }
        for set in self.server.objects("apps/v1", "ReplicaSet", "") {
            changed |= self.sync_replica_set(&set);
        }
        for pod in self.server.objects("v1", "Pod", "") {
            changed |= self.sync_pod(&pod);
        }
        for budget in self.server.objects("policy/v1", "PodDisruptionBudget", "") {
            changed |= self.sync_budget(&budget);
        }
        changed
    }

    /// Lets the controllers work until nothing changes any more.
    ///
    /// # Panics
    /// When the cluster does not settle.
    pub fn settle(&mut self) {
        for _ in 0..STEPS {
            if !self.step() {
                return;
            }
        }
        panic!("the simulated cluster still changes after {STEPS} steps");
    }

    fn behaviour_of(&self, pod: &Value) -> Behaviour {
        let name = object::name(pod);
        let rule = self.rules.iter().find(|rule| name.starts_with(&rule.pattern));
        rule.map_or(Behaviour::Ready, |rule| rule.behaviour.clone())
    }

    /// The objects of a kind that an owner controls.
    fn controlled(&self, api_version: &str, kind: &str, owner: &Value) -> Vec<Value> {
        let objects = self.server.objects(api_version, kind, object::namespace(owner));
        let uid = object::uid(owner);
        objects.into_iter().filter(|o| object::controller(o).is_some_and(|owner| owner["uid"] == uid)).collect()
    }
}

/// A condition in a status list, with a transition time that changes only with the status.
fn set_condition(status: &mut Value, kind: &str, truth: bool, reason: &str, message: &str, now: &str) {
    let state = if truth { "True" } else { "False" };
    let mut condition = serde_json::json!({"type": kind, "status": state, "lastTransitionTime": now});
    if !reason.is_empty() {
        condition["reason"] = Value::from(reason);
    }
    if !message.is_empty() {
        condition["message"] = Value::from(message);
    }
    let list = object::fields_mut(status).entry("conditions").or_insert_with(|| Value::Array(Vec::new()));
    let Value::Array(list) = list else { return };
    match list.iter_mut().find(|existing| existing["type"] == kind) {
        Some(existing) => {
            if existing["status"] == state {
                condition["lastTransitionTime"] = existing["lastTransitionTime"].clone();
            }
            *existing = condition;
        }
        None => list.push(condition),
    }
}
