//! The deployment controller.

use serde_json::{Value, json};

use super::{Cluster, set_condition};
use crate::apiserver::object;

/// Label by which the pods of a replica set are told from those of its siblings.
const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

/// Counts of a deployment and its replica sets.
struct Counts {
    wanted: i64,
    surge: i64,
    unavailable: i64,
}

impl Cluster {
    pub(super) fn sync_deployment(&mut self, deployment: &Value) -> bool {
        if object::is_deleting(deployment) {
            return false;
        }
        let hash = template_hash(&deployment["spec"]["template"]);
        let sets = self.controlled("apps/v1", "ReplicaSet", deployment);
        let (new, old): (Vec<Value>, Vec<Value>) =
            sets.into_iter().partition(|set| object::labels(set)[HASH_LABEL] == hash.as_str());
        let changed = match (new.first(), deployment["spec"]["paused"] == true) {
            (None, true) => false,
            (None, false) => self.create_set(deployment, &old, &hash),
            (Some(new), _) => self.roll(deployment, new, &old) || self.clean_up(deployment, &old),
        };
        changed | self.report(deployment, new.first(), &old)
    }

    fn create_set(&self, deployment: &Value, old: &[Value], hash: &str) -> bool {
        let recreate = deployment["spec"]["strategy"]["type"] == "Recreate";
        if recreate && (scale_down_all(self, old) || old.iter().any(|set| running(set) > 0)) {
            return true;
        }
        let revision = old.iter().map(revision).max().unwrap_or(0) + 1;
        let mut template = deployment["spec"]["template"].clone();
        let labels = with_hash(object::labels(&template), hash);
        object::set_at(&mut template, "metadata.labels", labels);
        let mut selector = deployment["spec"]["selector"].clone();
        selector["matchLabels"] = with_hash(&selector["matchLabels"], hash);
        let counts = counts(deployment);
        let others: i64 = old.iter().map(wanted).sum();
        let room =
            if recreate { counts.wanted } else { (counts.wanted + counts.surge - others).clamp(0, counts.wanted) };
        let set = json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": {"name": format!("{}-{hash}", object::name(deployment)), "namespace": object::namespace(deployment),
                "labels": object::labels(&template), "annotations": {REVISION: revision.to_string()},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": object::name(deployment),
                    "uid": object::uid(deployment), "controller": true, "blockOwnerDeletion": true}]},
            "spec": {"replicas": room, "selector": selector, "template": template},
        });
        self.server.create(&set).is_ok()
    }

    /// One step of a rollout: whether anything was scaled.
    fn roll(&self, deployment: &Value, new: &Value, old: &[Value]) -> bool {
        let counts = counts(deployment);
        if deployment["spec"]["strategy"]["type"] == "Recreate" {
            if old.iter().any(|set| wanted(set) > 0 || running(set) > 0) {
                return scale_down_all(self, old);
            }
            return self.scale(new, counts.wanted);
        }
        let others: i64 = old.iter().map(wanted).sum();
        if deployment["spec"]["paused"] == true && others > 0 {
            return false;
        }
        if wanted(new) > counts.wanted {
            return self.scale(new, counts.wanted);
        }
        let room = counts.wanted + counts.surge - others - wanted(new);
        let grown = (wanted(new) + room.max(0)).min(counts.wanted);
        if self.scale(new, grown) {
            return true;
        }
        let least = counts.wanted - counts.unavailable;
        let new_unavailable = wanted(new) - available(new);
        let mut spare = others + wanted(new) - least - new_unavailable;
        let mut changed = false;
        for set in old.iter().filter(|set| wanted(set) > 0) {
            let unhealthy = (wanted(set) - available(set)).clamp(0, spare.max(0));
            changed |= unhealthy > 0 && self.scale(set, wanted(set) - unhealthy);
            spare -= unhealthy;
        }
        if changed {
            return true;
        }
        let mut surplus = old.iter().map(available).sum::<i64>() + available(new) - least;
        for set in old.iter().filter(|set| wanted(set) > 0) {
            let fewer = wanted(set).min(surplus.max(0));
            changed |= fewer > 0 && self.scale(set, wanted(set) - fewer);
            surplus -= fewer;
        }
        changed
    }

    fn scale(&self, set: &Value, replicas: i64) -> bool {
        wanted(set) != replicas
            && self.server.modify(set, |set| {
                set["spec"]["replicas"] = Value::from(replicas);
                let generation = object::generation(set) + 1;
                object::set_metadata(set, "generation", Value::from(generation));
            })
    }

    /// Removes replica sets beyond the revision history, once the rollout is over.
    fn clean_up(&self, deployment: &Value, old: &[Value]) -> bool {
        let limit =
            deployment["spec"]["revisionHistoryLimit"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(10);
        let mut idle: Vec<&Value> = old.iter().filter(|set| wanted(set) == 0 && running(set) == 0).collect();
        idle.sort_by_key(|set| std::cmp::Reverse(revision(set)));
        let surplus: Vec<&Value> = idle.into_iter().skip(limit).collect();
        surplus.iter().for_each(|set| self.server.delete(set));
        !surplus.is_empty()
    }

    fn report(&self, deployment: &Value, new: Option<&Value>, old: &[Value]) -> bool {
        let now = self.server.clock().text();
        let fresh = |set: &Value| {
            let (api, kind) = ("apps/v1", "ReplicaSet");
            self.server.object(api, kind, object::namespace(set), object::name(set)).unwrap_or_else(|| set.clone())
        };
        let new = new.map(fresh);
        let all: Vec<Value> = old.iter().map(fresh).chain(new.clone()).collect();
        let sum = |count: fn(&Value) -> i64| all.iter().map(count).sum::<i64>();
        let counts = counts(deployment);
        let updated = new.as_ref().map_or(0, running);
        let complete = updated == counts.wanted && sum(running) == counts.wanted && sum(available) == counts.wanted;
        let refusal = all.iter().find_map(|set| {
            let conditions = set["status"]["conditions"].as_array().into_iter().flatten();
            conditions
                .into_iter()
                .find(|c| c["type"] == "ReplicaFailure")
                .and_then(|c| c["message"].as_str().map(str::to_owned))
        });
        let late = self.is_late(deployment, complete);
        let revision = new.as_ref().map_or(0, revision);
        self.server.modify(deployment, |deployment| {
            if revision > 0 {
                let revision = Value::from(revision.to_string());
                let metadata = object::metadata_mut(deployment);
                object::fields_mut(metadata.entry("annotations").or_insert_with(|| json!({})))
                    .insert(REVISION.into(), revision);
            }
            let generation = object::generation(deployment);
            let status = &mut deployment["status"];
            let progressed = status["updatedReplicas"].as_i64().unwrap_or(0) != updated
                || status["replicas"].as_i64().unwrap_or(0) != sum(running)
                || status["availableReplicas"].as_i64().unwrap_or(0) != sum(available);
            let mut put = |field: &str, count: i64| {
                if count == 0 {
                    object::fields_mut(status).shift_remove(field);
                } else {
                    status[field] = Value::from(count);
                }
            };
            put("observedGeneration", generation);
            put("replicas", sum(running));
            put("updatedReplicas", updated);
            put("readyReplicas", sum(ready));
            put("availableReplicas", sum(available));
            put("unavailableReplicas", (counts.wanted.max(sum(running)) - sum(available)).max(0));
            let enough = sum(available) >= counts.wanted - counts.unavailable;
            let (reason, message) = if enough {
                ("MinimumReplicasAvailable", "Deployment has minimum availability.")
            } else {
                ("MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
            };
            set_condition(status, "Available", enough, reason, message, &now);
            let name = new.as_ref().map(|set| object::name(set).to_owned()).unwrap_or_default();
            let (going, reason, message) = if complete {
                (true, "NewReplicaSetAvailable", format!("ReplicaSet \"{name}\" has successfully progressed."))
            } else if late {
                (false, "ProgressDeadlineExceeded", format!("ReplicaSet \"{name}\" has timed out progressing."))
            } else {
                (true, "ReplicaSetUpdated", format!("ReplicaSet \"{name}\" is progressing."))
            };
            set_condition(status, "Progressing", going, reason, &message, &now);
            if progressed || status["conditions"][1].get("lastUpdateTime").is_none() {
                let conditions = status["conditions"].as_array_mut().into_iter().flatten();
                conditions.for_each(|condition| condition["lastUpdateTime"] = Value::from(now.as_str()));
            }
            match &refusal {
                Some(message) => set_condition(status, "ReplicaFailure", true, "FailedCreate", message, &now),
                None => {
                    let list = status["conditions"].as_array_mut();
                    list.into_iter().for_each(|list| list.retain(|c| c["type"] != "ReplicaFailure"));
                }
            }
        })
    }

    /// Whether a rollout made no progress for longer than its deadline.
    fn is_late(&self, deployment: &Value, complete: bool) -> bool {
        let status = &deployment["status"];
        if complete || status["observedGeneration"].as_i64() != Some(object::generation(deployment)) {
            return false;
        }
        let conditions = status["conditions"].as_array().into_iter().flatten();
        let progressing = conditions.into_iter().find(|condition| condition["type"] == "Progressing");
        if progressing.is_some_and(|condition| condition["reason"] == "ProgressDeadlineExceeded") {
            return true;
        }
        let last =
            progressing.and_then(|condition| condition["lastUpdateTime"].as_str()?.parse::<jiff::Timestamp>().ok());
        let deadline = deployment["spec"]["progressDeadlineSeconds"].as_i64().unwrap_or(600);
        last.is_some_and(|last| self.server.clock().now().duration_since(last).as_secs() >= deadline)
    }
}

fn scale_down_all(cluster: &Cluster, sets: &[Value]) -> bool {
    sets.iter().fold(false, |changed, set| changed | cluster.scale(set, 0))
}

fn with_hash(labels: &Value, hash: &str) -> Value {
    let mut labels = labels.clone();
    object::fields_mut(&mut labels).insert(HASH_LABEL.to_owned(), Value::from(hash));
    labels
}

/// A short name for a pod template: FNV-1a over its JSON with sorted keys.
fn template_hash(template: &Value) -> String {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                let fields: std::collections::BTreeMap<_, _> =
                    fields.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
                fields.into_iter().collect()
            }
            Value::Array(items) => items.iter().map(sorted).collect(),
            scalar => scalar.clone(),
        }
    }
    let text = sorted(template).to_string();
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{:010x}", hash & 0xff_ffff_ffff)
}

fn counts(deployment: &Value) -> Counts {
    let wanted = deployment["spec"]["replicas"].as_i64().unwrap_or(1);
    let rolling = &deployment["spec"]["strategy"]["rollingUpdate"];
    let part = |value: &Value, round_up: bool| match value.as_str().and_then(|text| text.strip_suffix('%')) {
        Some(percent) => {
            let share = percent.parse::<i64>().unwrap_or(0) * wanted;
            if round_up { (share + 99) / 100 } else { share / 100 }
        }
        None => value.as_i64().unwrap_or(0),
    };
    let (surge, mut unavailable) = (part(&rolling["maxSurge"], true), part(&rolling["maxUnavailable"], false));
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    if deployment["spec"]["strategy"]["type"] == "Recreate" {
        unavailable = wanted;
    }
    Counts { wanted, surge, unavailable: unavailable.min(wanted) }
}

fn revision(set: &Value) -> i64 {
    let annotation = &set["metadata"]["annotations"][REVISION];
    annotation.as_str().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn wanted(set: &Value) -> i64 {
    set["spec"]["replicas"].as_i64().unwrap_or(1)
}

fn running(set: &Value) -> i64 {
    set["status"]["replicas"].as_i64().unwrap_or(0)
}

fn ready(set: &Value) -> i64 {
    set["status"]["readyReplicas"].as_i64().unwrap_or(0)
}

fn available(set: &Value) -> i64 {
    set["status"]["availableReplicas"].as_i64().unwrap_or(0)
}
