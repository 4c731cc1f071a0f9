//! What is known of one model at one moment. Every part may be missing.

use super::moment::Moment;

/// Identity of a pod: its UID as a number, so that a pod that takes over a name or an address is another one.
pub type ReplicaId = u128;

/// Everything that a decision may depend on, besides policy, history and time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observation {
    /// The replicas that are asked for at present, as in the Deployment's spec.
    pub current: u32,
    /// The pods, in any order.
    pub replicas: Vec<Replica>,
    /// What the gateway counts; `None` without a gateway, or when it did not answer.
    pub front_door: Option<FrontDoor>,
    /// Replicas that quota or the cluster's free capacity allow; `None` when unknown.
    pub quota: Option<u32>,
}

/// A worker pod.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Replica {
    /// Which pod it is.
    pub id: ReplicaId,
    /// How far it has come.
    pub state: State,
    /// When the pod was created.
    pub created: Moment,
    /// When it became ready for the first time.
    pub ready: Option<Moment>,
    /// What it said last; `None` when it has not answered.
    pub sample: Option<Sample>,
}

/// How far a pod has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// No node takes it, or it is past its progress deadline: it will not help.
    Unschedulable,
    /// It is on its way: scheduled, pulling, loading, warming up.
    Starting,
    /// It takes requests.
    Ready,
    /// It has been told to stop.
    Draining,
    /// It ended, or it keeps crashing.
    Failed,
}

/// What a worker's metrics page says. Totals count since the start of its process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// When it was read.
    pub at: Moment,
    /// Requests accepted, in total: those that ended, run and wait.
    pub accepted: f64,
    /// Requests refused because the queue was full, in total.
    pub rejected: f64,
    /// Requests that ended, in total.
    pub finished: f64,
    /// Prompt tokens that were computed (not found in the prefix cache) for the requests that ended, in total.
    pub prompt_tokens: f64,
    /// Tokens generated for the requests that ended, in total.
    pub output_tokens: f64,
    /// Forward passes, in total.
    pub steps: f64,
    /// Seconds in forward passes, in total.
    pub step_seconds: f64,
    /// Prompt tokens in steps, in total.
    pub prefill_tokens: f64,
    /// Tokens generated in steps, in total: sequences, summed over steps.
    pub decode_tokens: f64,
    /// Tokens resident in the key-value cache, summed over steps, in total.
    pub kv_token_steps: f64,
    /// Requests that ended and could be judged against the objective, in total.
    pub judged: f64,
    /// Those that met it, in total.
    pub good: f64,
    /// Requests that run now.
    pub running: f64,
    /// Requests that wait now.
    pub waiting: f64,
    /// Tokens resident in the key-value cache now.
    pub kv_used: f64,
    /// Tokens that fit the key-value cache; 0 when unknown.
    pub kv_capacity: f64,
    /// The most sequences that run at once; 0 when unknown.
    pub max_num_seqs: f64,
}

/// What the gateway counts for the model. Totals count since the start of its process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FrontDoor {
    /// When it was read.
    pub at: Moment,
    /// Requests that arrived, in total, whatever became of them.
    pub requests: f64,
    /// Their prompt tokens, in total.
    pub prompt_tokens: f64,
    /// Requests that are held now because no replica had room.
    pub held: f64,
    /// Their prompt tokens.
    pub held_prompt_tokens: f64,
}
