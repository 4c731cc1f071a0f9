//! The replica set controller.

use serde_json::{Value, json};

use super::{Cluster, set_condition};
use crate::apiserver::object;

impl Cluster {
    pub(super) fn sync_replica_set(&mut self, set: &Value) -> bool {
        if object::is_deleting(set) {
            return false;
        }
        let mut pods = self.controlled("v1", "Pod", set);
        pods.retain(|pod| {
            !object::is_deleting(pod) && !matches!(pod["status"]["phase"].as_str(), Some("Failed" | "Succeeded"))
        });
        let wanted = usize::try_from(set["spec"]["replicas"].as_i64().unwrap_or(1)).unwrap_or(0);
        let mut changed = false;
        let mut refused = None;
        for _ in pods.len()..wanted {
            match self.refusal.clone() {
                Some(why) => refused = Some(why),
                None => changed |= self.create_pod(set),
            }
        }
        pods.sort_by_key(|pod| (is_ready(pod), deletion_cost(pod), std::cmp::Reverse(object::name(pod).to_owned())));
        let surplus = pods.len().saturating_sub(wanted);
        for pod in &pods[..surplus] {
            self.server.delete(pod);
            changed = true;
        }
        changed | self.report_set(set, refused.as_deref())
    }

    fn create_pod(&mut self, set: &Value) -> bool {
        self.pods += 1;
        let template = &set["spec"]["template"];
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("{}-{:05x}", object::name(set), self.pods), "namespace": object::namespace(set),
                "labels": object::labels(template), "annotations": template["metadata"]["annotations"],
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": object::name(set),
                    "uid": object::uid(set), "controller": true, "blockOwnerDeletion": true}]},
            "spec": template["spec"],
        });
        match self.server.create(&pod) {
            Ok(_) => true,
            Err(failure) => panic!("the template of {} makes no pod: {failure}", object::name(set)),
        }
    }

    fn report_set(&self, set: &Value, refused: Option<&str>) -> bool {
        let pods = self.controlled("v1", "Pod", set);
        let live: Vec<&Value> = pods
            .iter()
            .filter(|pod| {
                !object::is_deleting(pod) && !matches!(pod["status"]["phase"].as_str(), Some("Failed" | "Succeeded"))
            })
            .collect();
        let ready = live.iter().filter(|pod| is_ready(pod)).count();
        let now = self.server.clock().text();
        self.server.modify(set, |set| {
            let generation = object::generation(set);
            let status = object::fields_mut(set).entry("status").or_insert_with(|| json!({}));
            status["observedGeneration"] = Value::from(generation);
            status["replicas"] = Value::from(live.len());
            status["fullyLabeledReplicas"] = Value::from(live.len());
            status["readyReplicas"] = Value::from(ready);
            status["availableReplicas"] = Value::from(ready);
            match refused {
                Some(why) => set_condition(status, "ReplicaFailure", true, "FailedCreate", why, &now),
                None => {
                    object::fields_mut(status).shift_remove("conditions");
                }
            }
        })
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn deletion_cost(pod: &Value) -> i64 {
    let cost = &pod["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"];
    cost.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}
