//! PURE: GPUs that all models share, and what each may take of them.

use std::collections::BTreeMap;

use crate::api::{ErnieModel, parse_quantity};
use crate::scale::{Claim, allocate};

/// GPUs that the workers of all models may have together, and who wants how many.
#[derive(Debug)]
pub(super) struct Budget {
    gpus: u64,
    claims: BTreeMap<String, Claim>,
    fixed: u64,
}

impl Budget {
    pub(super) fn new(gpus: u64) -> Self {
        Self { gpus, claims: BTreeMap::new(), fixed: 0 }
    }

    /// Enters what a model wants. One without GPUs takes no part.
    pub(super) fn claim(&mut self, uid: &str, model: &ErnieModel, min: u32, desired: u32) {
        let cost = gpus(model);
        if cost == 0 {
            self.claims.remove(uid);
        } else {
            let claim = Claim { min, desired: desired.max(min), cost, weight: 1.0 };
            self.claims.insert(uid.to_owned(), claim);
        }
    }

    /// Forgets a model: it runs nothing.
    pub(super) fn forget(&mut self, uid: &str) {
        self.claims.remove(uid);
    }

    /// Looks at all models: those without autoscaling have what they ask for or still run, those that are gone or suspended
    /// want nothing, and those that nobody has claimed for yet want what was recorded.
    pub(super) fn survey(&mut self, models: &[&ErnieModel]) {
        let running = || models.iter().filter(|model| !model.spec.suspend);
        let others = running().filter(|model| model.spec.autoscaling.is_none());
        self.fixed = others.map(|model| u64::from(gpus(model)) * u64::from(fixed(model))).sum();
        let autoscaled = running().filter_map(|model| Some((model.metadata.uid.as_deref()?, *model)));
        let autoscaled = autoscaled.filter(|(_, model)| model.spec.autoscaling.is_some()).collect::<BTreeMap<_, _>>();
        self.claims.retain(|uid, _| autoscaled.contains_key(uid.as_str()));
        for (uid, model) in autoscaled {
            if !self.claims.contains_key(uid) {
                let recorded = recorded(model);
                self.claim(uid, model, recorded, recorded);
            }
        }
    }

    /// Replicas that each model may have. It keeps what is `asked` for it at present; what is free is shared.
    pub(super) fn quotas(&self, asked: impl Fn(&str) -> Option<u32>) -> BTreeMap<String, u32> {
        let claims = self.claims.iter().map(|(uid, claim)| {
            let min = claim.min.max(asked(uid).unwrap_or(0));
            Claim { min, desired: claim.desired.max(min), ..*claim }
        });
        let granted = allocate(&claims.collect::<Vec<_>>(), self.gpus.saturating_sub(self.fixed));
        self.claims.keys().cloned().zip(granted).collect()
    }
}

/// Workers of a model without autoscaling: a number that autoscaling left behind counts while its pods are there.
fn fixed(model: &ErnieModel) -> u32 {
    let existing = model.status.as_ref().and_then(|status| status.replicas).unwrap_or(0);
    model.spec.replicas.max(existing).unsigned_abs()
}

/// Workers that the status says were decided on; before the first decision, those of the spec.
fn recorded(model: &ErnieModel) -> u32 {
    let status = model.status.as_ref().and_then(|status| status.autoscaling.as_ref());
    status.map_or(model.spec.replicas, |status| status.desired_replicas).unsigned_abs()
}

/// GPUs that each worker of a model has.
fn gpus(model: &ErnieModel) -> u32 {
    let limit = model.spec.resources.limits.as_ref().and_then(|limits| limits.get("nvidia.com/gpu"));
    let nano = limit.and_then(|limit| parse_quantity(&limit.0)).unwrap_or(0);
    u32::try_from(nano / 1_000_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A model with its uid, GPUs per worker, fields of its spec, and status.
    fn model(uid: &str, gpus: u32, fields: &Value, status: &Value) -> ErnieModel {
        let mut spec = json!({"model": {"uri": "pvc://m"}, "resources": {"limits": {"nvidia.com/gpu": gpus}}});
        for (name, field) in fields.as_object().into_iter().flatten() {
            spec[name] = field.clone();
        }
        serde_json::from_value(json!({
            "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": "m", "uid": uid},
            "spec": spec, "status": status,
        }))
        .expect("an ErnieModel")
    }

    fn scaled(uid: &str, gpus: u32) -> ErnieModel {
        model(uid, gpus, &json!({"autoscaling": {"maxReplicas": 9}}), &json!({}))
    }

    fn nothing(_: &str) -> Option<u32> {
        None
    }

    #[test]
    fn gpus_are_shared_between_those_who_want_more_than_there_are() {
        let other = model("c", 1, &json!({"replicas": 2}), &json!({}));
        let (small, large) = (scaled("a", 1), scaled("b", 2));
        let mut budget = Budget::new(12);
        budget.claim("a", &small, 1, 9);
        budget.claim("b", &large, 1, 9);
        budget.survey(&[&small, &large, &other]);
        let quotas = budget.quotas(nothing);
        let spent = quotas["a"] + 2 * quotas["b"];
        assert!((9..=10).contains(&spent) && quotas["a"] > quotas["b"], "{quotas:?}");
        budget.claim("b", &large, 1, 1);
        assert_eq!(budget.quotas(nothing)["a"], 8);
    }

    #[test]
    fn models_without_gpus_or_that_are_gone_take_none() {
        let one = scaled("a", 1);
        let mut budget = Budget::new(4);
        budget.claim("a", &one, 1, 9);
        budget.claim("b", &scaled("b", 0), 1, 9);
        budget.claim("c", &scaled("c", 1), 1, 9);
        assert_eq!(budget.quotas(nothing).keys().collect::<Vec<_>>(), ["a", "c"]);
        budget.survey(&[&one]);
        assert_eq!(budget.quotas(nothing), BTreeMap::from([("a".to_owned(), 4)]));
    }

    #[test]
    fn what_runs_is_kept_and_only_what_is_free_is_shared() {
        let mut budget = Budget::new(8);
        budget.claim("a", &scaled("a", 1), 1, 6);
        budget.claim("b", &scaled("b", 1), 1, 9);
        let asked = |uid: &str| Some(if uid == "a" { 6 } else { 1 });
        assert_eq!(budget.quotas(asked), BTreeMap::from([("a".to_owned(), 6), ("b".to_owned(), 2)]));
    }

    #[test]
    fn a_successor_knows_from_the_status_what_others_have_and_suspended_models_have_nothing() {
        let status = json!({"autoscaling": {"desiredReplicas": 5}});
        let spec = json!({"autoscaling": {"maxReplicas": 9}});
        let busy = model("a", 1, &spec, &status);
        let left = model("c", 1, &json!({"replicas": 1}), &json!({"replicas": 2}));
        let mut budget = Budget::new(10);
        budget.claim("b", &scaled("b", 1), 1, 9);
        budget.survey(&[&busy, &scaled("b", 1), &left]);
        assert_eq!(budget.quotas(nothing), BTreeMap::from([("a".to_owned(), 5), ("b".to_owned(), 3)]));
        let suspended = model("a", 1, &json!({"autoscaling": {"maxReplicas": 9}, "suspend": true}), &status);
        budget.survey(&[&suspended, &scaled("b", 1), &left]);
        assert_eq!(budget.quotas(nothing), BTreeMap::from([("b".to_owned(), 8)]));
    }
}
