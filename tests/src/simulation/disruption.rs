//! The disruption controller.

use serde_json::{Value, json};

use super::Cluster;
use crate::apiserver::{LabelSelector, object};

impl Cluster {
    pub(super) fn sync_budget(&self, budget: &Value) -> bool {
        let selector = LabelSelector::from_object(&budget["spec"]["selector"]);
        let pods = self.server.objects("v1", "Pod", object::namespace(budget));
        let pods: Vec<&Value> = pods.iter().filter(|pod| selector.matches(object::labels(pod))).collect();
        let healthy = pods.iter().filter(|pod| {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            conditions.into_iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        });
        let healthy = i64::try_from(healthy.count()).unwrap_or(i64::MAX);
        let expected = i64::try_from(pods.len()).unwrap_or(i64::MAX);
        let spec = &budget["spec"];
        let desired = match (spec["minAvailable"].as_i64(), spec["maxUnavailable"].as_i64()) {
            (Some(least), _) => least,
            (None, Some(most)) => (expected - most).max(0),
            (None, None) => expected,
        };
        self.server.modify(budget, |budget| {
            let generation = object::generation(budget);
            let status = object::fields_mut(budget).entry("status").or_insert_with(|| json!({}));
            status["observedGeneration"] = Value::from(generation);
            status["expectedPods"] = Value::from(expected);
            status["currentHealthy"] = Value::from(healthy);
            status["desiredHealthy"] = Value::from(desired);
            status["disruptionsAllowed"] = Value::from((healthy - desired).max(0));
        })
    }
}
