//! SHELL: tick → ask the workers → decide → hand the finding to the reconcile.
//!
//! Nothing is written here. A finding lies in memory until the reconcile of its model takes it: the status first, then the
//! Deployment. A model is decided about once its reconcile has said how many workers it has, so that what was recorded
//! before this process led is known.

mod budget;
mod findings;
mod observe;
mod scrape;
mod workers;

use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::join_all;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::mpsc;
use tracing::{debug, error, info};

use crate::api::{Autoscaling, ErnieModel};
use crate::context::Context;
use crate::observe::Trigger;
use crate::reconcile::panic_text;
use crate::scale::ledger::Pause;
use crate::scale::{Finding, Ledger, Moment, Observation};
use budget::Budget;
use workers::Workers;

pub use findings::{Findings, Print};
pub use scrape::{Absence, Fetch};

/// Seconds between two decisions about a model.
const INTERVAL: Duration = Duration::from_secs(5);

/// Decides about every model that asks for it.
pub struct Autoscaler {
    context: Arc<Context>,
    workers: Workers,
    ledgers: Mutex<HashMap<String, Ledger>>,
    budget: Option<Mutex<Budget>>,
}

/// One model as a tick sees it.
struct Look<'a> {
    model: &'a ErnieModel,
    spec: &'a Autoscaling,
    uid: String,
    replicas: i32,
    observation: Observation,
    silent: Vec<(String, String)>,
    now: Moment,
}

impl Look<'_> {
    fn pause(&self) -> Option<Pause> {
        match (self.model.spec.suspend, self.model.spec.paused) {
            (true, _) => Some(Pause::Suspended),
            (false, true) => Some(Pause::Paused),
            (false, false) => None,
        }
    }
}

impl Autoscaler {
    /// Knows nothing yet: whoever begins to lead begins with a new one. `gpus` is what all workers may have together; `None`
    /// for as many as there are.
    pub fn new(context: Arc<Context>, fetch: Fetch, gpus: Option<u64>) -> Self {
        let workers = Workers::new(fetch, context.clone());
        let budget = gpus.map(|gpus| Mutex::new(Budget::new(gpus)));
        Self { context, workers, ledgers: Mutex::default(), budget }
    }

    /// Decides at every tick, and at once about models that have changed, for ever. Each finding that differs from the last
    /// one sends a trigger.
    pub async fn run(&self, models: Store<DeserializeGuard<ErnieModel>>, triggers: &mpsc::Sender<Trigger>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = tokio::select! {
                _ = ticks.tick() => None,
                changed = self.context.findings.changed() => Some(changed),
            };
            let is_due = |model: &DeserializeGuard<ErnieModel>| {
                let uid = kube::Resource::meta(model).uid.as_ref();
                due.as_ref().is_none_or(|changed| uid.is_some_and(|uid| changed.contains(uid)))
            };
            let chosen = models.state().into_iter().filter(|model| is_due(model)).collect::<Vec<_>>();
            let chosen = chosen.iter().filter_map(|model| model.0.as_ref().ok()).collect::<Vec<_>>();
            if due.is_none() {
                self.forget_all_but(&chosen);
            }
            for trigger in self.tick(&chosen).await {
                if triggers.send(trigger).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Looks at models once, at all of them at the same time: those whose finding is new.
    pub async fn tick(&self, models: &[&ErnieModel]) -> Vec<Trigger> {
        let started = Instant::now();
        let looks = join_all(models.iter().map(|model| self.guarded_look(model))).await;
        let looks = looks.into_iter().flatten().collect::<Vec<_>>();
        let quotas = self.quotas(&looks);
        let mut triggers = Vec::new();
        for look in looks {
            let quota = quotas.get(&look.uid).copied();
            let (name, namespace) = (look.model.name_any(), look.model.namespace().unwrap_or_default());
            let model = look.model;
            if guarded(model, || self.decide(look, quota)).unwrap_or(false) {
                triggers.push(ObjectRef::new(&name).within(&namespace));
            }
        }
        self.context.metrics.autoscaler_tick_seconds.observe(started.elapsed().as_secs_f64());
        triggers
    }

    async fn guarded_look<'a>(&self, model: &'a ErnieModel) -> Option<Look<'a>> {
        let look = AssertUnwindSafe(self.look(model)).catch_unwind().await;
        look.unwrap_or_else(|panic| tell_panic(model, panic.as_ref()))
    }

    /// Asks the workers of one model that is to be decided about.
    async fn look<'a>(&self, model: &'a ErnieModel) -> Option<Look<'a>> {
        let uid = model.uid()?;
        let spec = model.spec.autoscaling.as_ref()?;
        let replicas = self.context.findings.replicas(&uid)?;
        let pods = match self.context.reads.replicas(&self.context.client, model).await {
            Ok(pods) => pods,
            Err(error) => {
                debug!(model = %model.name_any(), %error, "its pods cannot be read: nothing is decided");
                return None;
            }
        };
        if self.context.findings.get(&uid).is_none() {
            // Autoscaling is new here, or again: what an earlier one kept is not what the reconcile found.
            self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).remove(&uid);
        }
        let now = self.context.moment();
        let policy = self.with_ledger(&uid, model, replicas, |ledger| ledger.policy(spec, now).ok().cloned());
        if let Some(policy) = policy {
            self.workers.ask(model, &pods, policy.slo).await;
        }
        let now = self.context.moment();
        let (observation, silent) = observe::observation(model, &pods, &self.workers.told(&pods), now);
        Some(Look { model, spec, uid, replicas, observation, silent, now })
    }

    /// Replicas that each model may have, where GPUs are shared.
    fn quotas(&self, looks: &[Look<'_>]) -> BTreeMap<String, u32> {
        let Some(budget) = &self.budget else { return BTreeMap::new() };
        let mut budget = budget.lock().unwrap_or_else(PoisonError::into_inner);
        for look in looks {
            let wish = |ledger: &mut Ledger| ledger.wish(look.spec, &look.observation, look.now);
            let wish = match look.pause() {
                Some(Pause::Suspended) => {
                    budget.forget(&look.uid);
                    continue;
                }
                // What nobody acts on takes no GPU.
                Some(Pause::Paused) => None,
                None if look.spec.advisory => None,
                None => guarded(look.model, || self.with_ledger(&look.uid, look.model, look.replicas, wish)),
            };
            let current = look.replicas.unsigned_abs();
            budget.claim(&look.uid, look.model, look.spec.min_replicas.unsigned_abs(), wish.unwrap_or(current));
        }
        budget.quotas(|uid| self.context.findings.replicas(uid).map(i32::unsigned_abs))
    }

    /// Decides about one model: whether the finding is new.
    fn decide(&self, look: Look<'_>, quota: Option<u32>) -> bool {
        let pause = look.pause();
        let Look { model, spec, uid, replicas, mut observation, silent, now } = look;
        observation.quota = quota;
        let finding = self.with_ledger(&uid, model, replicas, |ledger| match pause {
            Some(pause) => ledger.pause(pause),
            None => ledger.decide(spec, observation, &silent, now),
        });
        self.tell(model, replicas, &finding);
        self.context.findings.put(&uid, finding)
    }

    fn with_ledger<T>(&self, uid: &str, model: &ErnieModel, replicas: i32, work: impl FnOnce(&mut Ledger) -> T) -> T {
        let mut ledgers = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        let status = model.status.as_ref().and_then(|status| status.autoscaling.as_ref());
        work(ledgers.entry(uid.to_owned()).or_insert_with(|| Ledger::open(status, replicas)))
    }

    fn tell(&self, model: &ErnieModel, before: i32, finding: &Finding) {
        let after = finding.status.desired_replicas;
        if after == before {
            return;
        }
        let Some(decision) = finding.status.decisions.last() else { return };
        let direction = if after > before { "up" } else { "down" };
        self.context.metrics.scale_decisions.with_label_values(&[direction, &decision.reason]).inc();
        info!(
            model = %model.name_any(), namespace = %model.namespace().unwrap_or_default(), from = before, to = after,
            reason = %decision.reason, message = %decision.message, "scales"
        );
    }

    /// Forgets models that are gone or do not ask any more.
    fn forget_all_but(&self, models: &[&ErnieModel]) {
        let asks = |model: &&&ErnieModel| model.spec.autoscaling.is_some();
        let uids = models.iter().filter(asks).filter_map(|model| model.uid()).collect::<HashSet<_>>();
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| uids.contains(uid));
        self.context.findings.retain(&uids);
        self.workers.forget_unseen();
        if let Some(budget) = &self.budget {
            budget.lock().unwrap_or_else(PoisonError::into_inner).survey(models);
        }
    }
}

/// Work for one model: `None` when it panics, so that the others are decided about all the same.
fn guarded<T>(model: &ErnieModel, work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).map_or_else(|panic| tell_panic(model, panic.as_ref()), Some)
}

fn tell_panic<T>(model: &ErnieModel, panic: &(dyn Any + Send)) -> Option<T> {
    let (name, namespace) = (model.name_any(), model.namespace().unwrap_or_default());
    error!(model = %name, %namespace, panic = panic_text(panic), "a defect of the operator: please report it");
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_panic_over_one_model_is_kept_from_the_others() {
        let model: ErnieModel = serde_json::from_value(json!({
            "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": "m"},
            "spec": {"model": {"uri": "pvc://m"}},
        }))
        .expect("an ErnieModel");
        assert_eq!(guarded(&model, || -> u8 { panic!("a defect") }), None);
        assert_eq!(guarded(&model, || 7), Some(7));
    }
}
