//! SHELL: observe → desired → apply → status, for one model; and what to do when that fails.

mod memory;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use thiserror::Error;
use tracing::{debug, warn};

use crate::api::{ErnieModel, ErnieModelStatus};
use crate::context::Context;
use crate::desired::{Children, ENGINE_ANNOTATION, Engine, Prepared, Remembered, Workload, desired};
use crate::observe::{self, within};
use crate::observed::{Applied, ContainerState, FIELD_MANAGER, Replica};
use crate::status::{Facts, Transition, changed, rescaled, status};
use crate::{apply, events};

/// Longest time that one reconcile may take.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(30);
/// Everybody is looked at again after this time, give or take a tenth.
const RESYNC: Duration = Duration::from_secs(300);
/// What no watch tells of is asked again after this time.
const SOON: Duration = Duration::from_secs(4);
/// First wait after a failure; it doubles with each further one in a row.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest wait after a failure.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Longest wait after a refusal that may pass, such as that of a quota.
const LONGEST_REFUSAL: Duration = Duration::from_secs(30);

/// Why a reconcile did not come to its end.
#[derive(Debug, Error)]
pub enum Error {
    /// A read failed.
    #[error("observe: {0}")]
    Observe(#[from] observe::Error),
    /// A child could not be written.
    #[error("apply: {0}")]
    Apply(#[from] apply::Error),
    /// The status could not be written.
    #[error("status: {0}")]
    Status(#[source] observe::Error),
    /// It took too long.
    #[error("not done within {} s", RECONCILE_TIMEOUT.as_secs())]
    Timeout,
    /// A defect of the operator.
    #[error("panicked: {0}")]
    Panicked(String),
}

impl Error {
    /// A word from a closed set, for metrics.
    pub fn category(&self) -> &'static str {
        match self {
            Error::Observe(_) => "observe",
            Error::Apply(apply::Error::Call(_)) => "apply",
            Error::Apply(apply::Error::Gone | apply::Error::Terminating) => "gone",
            Error::Apply(apply::Error::Stale | apply::Error::Conflict(_)) => "conflict",
            Error::Apply(apply::Error::NotLeading) => "not_leading",
            Error::Status(_) => "status",
            Error::Timeout => "timeout",
            Error::Panicked(_) => "panic",
        }
    }
}

/// Brings the children and the status of one model to where they should be. Safe to repeat, to abandon anywhere, and to
/// run twice at once.
///
/// # Errors
/// When it has to be tried again; [`on_error`] says when.
pub async fn reconcile(model: Arc<DeserializeGuard<ErnieModel>>, context: Arc<Context>) -> Result<Action, Error> {
    let started = Instant::now();
    let key = key(model.as_ref());
    let work = AssertUnwindSafe(one(model, &context)).catch_unwind();
    let result = match tokio::time::timeout(RECONCILE_TIMEOUT, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Error::Panicked(panic_text(panic.as_ref()))),
        Err(_) => Err(Error::Timeout),
    };
    let word = result.as_ref().map_or_else(Error::category, |_| "ok");
    context.metrics.reconciles.with_label_values(&[word]).inc();
    context.metrics.reconcile_seconds.with_label_values::<&str>(&[]).observe(started.elapsed().as_secs_f64());
    match result {
        Ok(Next::Settled(wait)) => {
            context.forget_failures(&key);
            Ok(Action::requeue(wait))
        }
        Ok(Next::Refused { longest }) => Ok(Action::requeue(backoff(context.count_failure(&key), longest))),
        Ok(Next::Change) => {
            context.forget_failures(&key);
            Ok(Action::await_change())
        }
        Err(error) => Err(error),
    }
}

/// When a reconcile that came to its end is due again.
enum Next {
    /// After this time.
    Settled(Duration),
    /// Later and later, because what was refused would most likely be refused again.
    Refused { longest: Duration },
    /// When something changes.
    Change,
}

/// When to try again: never for a model that is gone (a change brings it back), soon after a conflict, later and later
/// after everything else.
pub fn on_error(model: Arc<DeserializeGuard<ErnieModel>>, error: &Error, context: Arc<Context>) -> Action {
    let key = key(model.as_ref());
    match error {
        Error::Apply(apply::Error::Gone | apply::Error::Terminating | apply::Error::NotLeading) => {
            debug!(model = %key, %error, "given up");
            context.forget_failures(&key);
            return Action::await_change();
        }
        Error::Panicked(_) => tracing::error!(model = %key, %error, "a defect of the operator: please report it"),
        _ => {}
    }
    let failures = context.count_failure(&key);
    let wait = backoff(failures, LONGEST_WAIT);
    if failures < 2 {
        debug!(model = %key, %error, ?wait, "reconcile failed");
    } else {
        warn!(model = %key, %error, failures = failures + 1, ?wait, "reconcile fails");
    }
    Action::requeue(wait)
}

fn backoff(failures: u32, longest: Duration) -> Duration {
    FIRST_WAIT.saturating_mul(1 << failures.min(16)).min(longest)
}

async fn one(object: Arc<DeserializeGuard<ErnieModel>>, context: &Context) -> Result<Next, Error> {
    let model = match object.as_ref() {
        DeserializeGuard(Ok(model)) => model,
        DeserializeGuard(Err(invalid)) => {
            let told = Transition {
                is_warning: true,
                reason: "Malformed".to_owned(),
                message: format!(
                    "this ErnieModel cannot be read and is left alone: {}: correct it, or delete it",
                    invalid.error
                ),
            };
            // Always the same time: the event's name follows from it, so that it is told once.
            let since = object.meta().creation_timestamp.as_ref().map_or_else(|| context.now(), |time| time.0);
            events::tell_once(&context.client, object.as_ref(), &told, since).await;
            return Ok(Next::Change);
        }
    };
    if model.metadata.deletion_timestamp.is_some() {
        // Owner references do the rest, also while the operator is away.
        return Ok(Next::Change);
    }

    let found = context.reads.children(&context.client, model).await?;
    let mut facts = Facts { replicas: context.reads.replicas(&context.client, model).await?, ..Facts::default() };
    facts.warnings = warnings(context, model, &facts.replicas).await;

    let finding = memory::finding(context, model);
    let remembered = memory::remember(model, &found, &facts, finding.as_ref());
    facts.scaling = memory::scaling(context, model, &remembered, finding, &facts.replicas);
    persist(context, model, &facts).await?;
    let prepared = desired(model, &context.defaults, &remembered);
    facts.engine = engine(&prepared, &remembered).map(|engine| engine.status(&context.defaults));
    let applied = if model.spec.paused {
        apply::leave(model, found)
    } else {
        apply::apply(context, model, prepared, found).await?
    };

    publish(context, model, &applied, &facts).await?;
    Ok(due(model, &applied, &facts, context))
}

/// Writes down what was decided before anything is asked of the Deployment: whoever leads next goes on from there.
async fn persist(context: &Context, model: &ErnieModel, facts: &Facts) -> Result<(), Error> {
    let Some((decided, ..)) = &facts.scaling.told else { return Ok(()) };
    let recorded = |model: &ErnieModel| {
        let status = model.status.as_ref().and_then(|status| status.autoscaling.as_ref());
        status.map(|status| status.desired_replicas)
    };
    if recorded(model) == Some(decided.desired_replicas) || model.spec.paused {
        return Ok(());
    }
    let current = current(context, model).await?;
    let before = current.status.clone().unwrap_or_default();
    if recorded(&current) == Some(decided.desired_replicas) {
        return Ok(());
    }
    let next = ErnieModelStatus { autoscaling: Some(decided.clone()), ..before.clone() };
    write(context, &current, &next).await?;
    if let Some((transition, decided)) = rescaled(&before, &next) {
        events::tell(&context.client, &current, &transition, decided).await;
    }
    Ok(())
}

/// The engine that the model has, or will have once it can.
fn engine(prepared: &Children<Prepared>, remembered: &Remembered) -> Option<Engine> {
    match &prepared.workload {
        Workload::Deployment(deployment) => {
            let text = deployment.annotations().get(ENGINE_ANNOTATION)?;
            serde_json::from_str(text).ok()
        }
        Workload::Withheld(_) => remembered.engine.clone(),
    }
}

/// The newest warnings about pods that wait for their container without saying why: only events tell. Without them the
/// model is served all the same, with one explanation less.
async fn warnings(
    context: &Context,
    model: &ErnieModel,
    replicas: &[Arc<Replica>],
) -> HashMap<String, (String, String)> {
    /// A few pods stand for all of them.
    const ASKED: usize = 3;
    let mut warnings = HashMap::new();
    let namespace = model.namespace().unwrap_or_default();
    for replica in replicas.iter().rev().filter(|replica| waits_silently(replica, context)).take(ASKED) {
        let uid = replica.metadata.uid.clone().unwrap_or_default();
        match observe::warning(&context.client, &namespace, &uid).await {
            Ok(Some(warning)) => {
                warnings.insert(uid, warning);
            }
            Ok(None) => {}
            Err(error) => {
                debug!(pod = replica.name(), %error, "its events cannot be read");
                break;
            }
        }
    }
    warnings
}

fn waits_silently(replica: &Replica, context: &Context) -> bool {
    is_silent(replica) && age(replica, context) >= SOON.as_secs().cast_signed()
}

fn is_silent(replica: &Replica) -> bool {
    let is_silent = match &replica.state {
        ContainerState::Unknown => true,
        ContainerState::Waiting(waiting) => matches!(waiting.reason.as_str(), "ContainerCreating" | "PodInitializing"),
        ContainerState::Running | ContainerState::Terminated(_) => false,
    };
    is_silent && !replica.is_deleting() && replica.scheduling == crate::observed::Scheduling::Scheduled
}

/// When to look again although nothing is heard.
fn due(model: &ErnieModel, applied: &Children<Applied>, facts: &Facts, context: &Context) -> Next {
    let Children { network_policy, service, workers, disruption_budget, workload } = applied;
    let workload = match workload {
        Workload::Deployment(outcome) => outcome.obstacle(),
        // A change of the spec or of the operator's flags is needed.
        Workload::Withheld(_) => None,
    };
    let obstacles =
        [network_policy.obstacle(), service.obstacle(), workers.obstacle(), disruption_budget.obstacle(), workload];
    let obstacles = || obstacles.iter().flatten();
    if obstacles().any(|obstacle| !apply::is_occupied(obstacle)) {
        let permanent = obstacles().all(|obstacle| obstacle.permanent);
        return Next::Refused { longest: if permanent { RESYNC } else { LONGEST_REFUSAL } };
    }
    // Objects of others are not watched, and looking at one changes nothing.
    if obstacles().next().is_some() {
        return Next::Settled(SOON);
    }
    // A failed mount is told in an event only.
    let silent = facts.replicas.iter().filter(|replica| is_silent(replica));
    match silent.map(|replica| age(replica, context)).max() {
        Some(age) if age < 60 => Next::Settled(SOON),
        Some(_) => Next::Settled(SOON * 2),
        None => Next::Settled(jittered(model)),
    }
}

/// Seconds since a pod was created.
fn age(replica: &Replica, context: &Context) -> i64 {
    let created = replica.metadata.creation_timestamp.as_ref();
    created.map_or(0, |created| context.now().duration_since(created.0).as_secs())
}

/// Spreads the models over time, each always at its own place.
fn jittered(model: &ErnieModel) -> Duration {
    let uid = model.metadata.uid.as_deref().unwrap_or_default();
    let place = uid.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte))) % 200;
    RESYNC * u32::try_from(900 + place).unwrap_or(1000) / 1000
}

/// Writes the status when it says something new, and tells what has changed.
async fn publish(
    context: &Context,
    model: &ErnieModel,
    applied: &Children<Applied>,
    facts: &Facts,
) -> Result<(), Error> {
    let now = context.now();
    if model.status.as_ref() == Some(&status(model, applied, facts, now)) {
        return Ok(());
    }
    // Transitions are reckoned from the status as it is: ours in memory may be older.
    let current = current(context, model).await?;
    let next = status(&current, applied, facts, now);
    if current.status.as_ref() == Some(&next) {
        return Ok(());
    }
    write(context, &current, &next).await?;
    let before = current.status.clone().unwrap_or_default();
    let transitions = changed(&before.conditions, &next.conditions).into_iter().map(|transition| (transition, now));
    for (transition, at) in transitions.chain(rescaled(&before, &next)) {
        events::tell(&context.client, &current, &transition, at).await;
    }
    Ok(())
}

/// The model as the API server has it, if it is the one we work for and we may write.
async fn current(context: &Context, model: &ErnieModel) -> Result<ErnieModel, Error> {
    if !context.leadership.holds() {
        return Err(apply::Error::NotLeading.into());
    }
    let (namespace, name) = (model.namespace().unwrap_or_default(), model.name_any());
    let current = observe::model(&context.client, &namespace, &name).await.map_err(Error::Status)?;
    let Some(DeserializeGuard(Ok(current))) = current else { return Err(apply::Error::Gone.into()) };
    if current.uid() != model.uid() || current.metadata.deletion_timestamp.is_some() {
        return Err(apply::Error::Gone.into());
    }
    if current.metadata.generation != model.metadata.generation {
        return Err(apply::Error::Stale.into());
    }
    Ok(current)
}

async fn write(context: &Context, model: &ErnieModel, next: &ErnieModelStatus) -> Result<(), Error> {
    let api = Api::<ErnieModel>::namespaced(context.client.clone(), &model.namespace().unwrap_or_default());
    let patch = json!({
        "apiVersion": ErnieModel::api_version(&()),
        "kind": ErnieModel::kind(&()),
        "metadata": {"name": model.name_any(), "uid": model.uid()},
        "status": next,
    });
    context.metrics.writes.with_label_values(&["status", "ErnieModel"]).inc();
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    let (name, patch) = (model.name_any(), Patch::Apply(&patch));
    let written = within("patch status", api.patch_status(&name, &parameters, &patch)).await;
    written.map(drop).map_err(|error| {
        let is = |test: fn(&kube::core::Status) -> bool| apply::status(&error).is_some_and(test);
        if is(kube::core::Status::is_not_found) || is(kube::core::Status::is_conflict) {
            apply::Error::Gone.into()
        } else {
            Error::Status(error)
        }
    })
}

fn key(model: &DeserializeGuard<ErnieModel>) -> String {
    let metadata = model.meta();
    format!("{}/{}", metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a word".to_owned())
}
