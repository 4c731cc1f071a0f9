//! PURE: GPUs that all models share, and what each may take of them.

use std::collections::{BTreeMap, HashSet};

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

    /// Looks at all models: those without autoscaling have what they ask for, and those that are gone want nothing.
    pub(super) fn survey(&mut self, models: &[&ErnieModel], autoscaled: &HashSet<String>) {
        let others = models.iter().filter(|model| model.spec.autoscaling.is_none() && !model.spec.suspend);
        self.fixed = others.map(|model| u64::from(gpus(model)) * u64::from(model.spec.replicas.unsigned_abs())).sum();
        self.claims.retain(|uid, _| autoscaled.contains(uid));
    }

    /// Replicas that each model may have.
    pub(super) fn quotas(&self) -> BTreeMap<String, u32> {
        let claims = self.claims.values().copied().collect::<Vec<_>>();
        let granted = allocate(&claims, self.gpus.saturating_sub(self.fixed));
        self.claims.keys().cloned().zip(granted).collect()
    }
}

/// GPUs that each worker of a model has.
fn gpus(model: &ErnieModel) -> u32 {
    let limit = model.spec.resources.limits.as_ref().and_then(|limits| limits.get("nvidia.com/gpu"));
    let nano = limit.and_then(|limit| parse_quantity(&limit.0)).unwrap_or(0);
    u32::try_from(nano / 1_000_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model(gpus: u32, fields: &serde_json::Value) -> ErnieModel {
        let mut spec = json!({"model": {"uri": "pvc://m"}, "resources": {"limits": {"nvidia.com/gpu": gpus}}});
        for (name, field) in fields.as_object().into_iter().flatten() {
            spec[name] = field.clone();
        }
        serde_json::from_value(json!({
            "apiVersion": "serving.ernie.io/v1alpha1", "kind": "ErnieModel", "metadata": {"name": "m"}, "spec": spec,
        }))
        .expect("an ErnieModel")
    }

    #[test]
    fn gpus_are_shared_between_those_who_want_more_than_there_are() {
        let (scaled, fixed) = (json!({"autoscaling": {"maxReplicas": 9}}), json!({"replicas": 2}));
        let (small, large, other) = (model(1, &scaled), model(2, &scaled), model(1, &fixed));
        let mut budget = Budget::new(12);
        budget.claim("a", &small, 1, 9);
        budget.claim("b", &large, 1, 9);
        budget.survey(&[&small, &large, &other], &HashSet::from(["a".to_owned(), "b".to_owned()]));
        let quotas = budget.quotas();
        let spent = quotas["a"] + 2 * quotas["b"];
        assert!((9..=10).contains(&spent) && quotas["a"] > quotas["b"], "{quotas:?}");
        budget.claim("b", &large, 1, 1);
        assert_eq!(budget.quotas()["a"], 8);
    }

    #[test]
    fn models_without_gpus_or_that_are_gone_take_none() {
        let scaled = json!({"autoscaling": {"maxReplicas": 9}});
        let mut budget = Budget::new(4);
        budget.claim("a", &model(1, &scaled), 1, 9);
        budget.claim("b", &model(0, &scaled), 1, 9);
        budget.claim("c", &model(1, &scaled), 1, 9);
        assert_eq!(budget.quotas().keys().collect::<Vec<_>>(), ["a", "c"]);
        budget.survey(&[], &HashSet::from(["a".to_owned()]));
        assert_eq!(budget.quotas(), BTreeMap::from([("a".to_owned(), 4)]));
    }
}
