//! The scheduler and the kubelet.

use serde_json::{Value, json};

use super::{Behaviour, Cluster, set_condition};
use crate::apiserver::object;

/// The only node.
const NODE: &str = "node-1";

impl Cluster {
    pub(super) fn sync_pod(&mut self, pod: &Value) -> bool {
        if object::is_deleting(pod) {
            if object::finalizers(pod).is_empty() {
                self.server.purge(pod);
                return true;
            }
            return false;
        }
        let behaviour = self.behaviour_of(pod);
        let now = self.server.clock().text();
        let changed = self.server.modify(pod, |pod| {
            put_status(pod, &behaviour, &now);
            let number = object::uid(pod).bytes().fold(7, |hash: u32, byte| hash.wrapping_mul(31) ^ u32::from(byte));
            let [_, b, c, d] = number.to_be_bytes();
            pod["status"]["podIP"] = Value::from(format!("10.{b}.{c}.{d}"));
        });
        if let Behaviour::Warned(reason, message) = &behaviour {
            return self.warn(pod, reason, message) || changed;
        }
        changed
    }

    /// An event about a pod, once.
    fn warn(&self, pod: &Value, reason: &str, message: &str) -> bool {
        let now = self.server.clock().text();
        let name = format!("{}.{}", object::name(pod), reason.to_lowercase());
        let event = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": object::namespace(pod)},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": object::name(pod),
                "namespace": object::namespace(pod), "uid": object::uid(pod)},
            "reason": reason, "message": message, "type": "Warning", "source": {"component": "kubelet"},
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        });
        self.server.create(&event).is_ok()
    }
}

/// Gives a pod the status that a behaviour has.
fn put_status(pod: &mut Value, behaviour: &Behaviour, now: &str) {
    let container = pod["spec"]["containers"][0]["name"].clone();
    let image = pod["spec"]["containers"][0]["image"].clone();
    let mut status = pod["status"].take();
    status["phase"] = Value::from("Pending");
    if let Behaviour::Unschedulable(message) = behaviour {
        set_condition(&mut status, "PodScheduled", false, "Unschedulable", message, now);
        pod["status"] = status;
        return;
    }
    pod["spec"]["nodeName"] = Value::from(NODE);
    set_condition(&mut status, "PodScheduled", true, "", "", now);
    let (state, last, restarts) = match behaviour {
        Behaviour::Ready | Behaviour::Starting => {
            let started = status["containerStatuses"][0]["state"]["running"]["startedAt"].clone();
            let started = if started.is_null() { Value::from(now) } else { started };
            (json!({"running": {"startedAt": started}}), json!({}), 0)
        }
        Behaviour::Waiting(reason, message) => {
            (json!({"waiting": {"reason": reason, "message": message}}), json!({}), 0)
        }
        Behaviour::Crashing { exit_code, reason, message, restarts } => {
            let ended = json!({"terminated": {"exitCode": exit_code, "reason": reason, "message": message,
                "startedAt": object::at(pod, "metadata.creationTimestamp"),
                "finishedAt": object::at(pod, "metadata.creationTimestamp")}});
            if *restarts == 0 {
                (ended, json!({}), 0)
            } else {
                let waiting = json!({"waiting": {"reason": "CrashLoopBackOff",
                    "message": "back-off 10s restarting failed container"}});
                (waiting, ended, *restarts)
            }
        }
        Behaviour::Failed(reason, message) => {
            status["phase"] = Value::from("Failed");
            status["reason"] = Value::from(reason.as_str());
            status["message"] = Value::from(message.as_str());
            (json!({"terminated": {"exitCode": 137, "reason": "Error"}}), json!({}), 0)
        }
        Behaviour::Warned(..) | Behaviour::Unschedulable(_) => {
            (json!({"waiting": {"reason": "ContainerCreating"}}), json!({}), 0)
        }
    };
    let runs = matches!(behaviour, Behaviour::Ready | Behaviour::Starting | Behaviour::Crashing { .. });
    if runs {
        status["phase"] = Value::from("Running");
    }
    let ready = *behaviour == Behaviour::Ready;
    let reason = if ready { "" } else { "ContainersNotReady" };
    set_condition(&mut status, "Initialized", true, "", "", now);
    set_condition(&mut status, "ContainersReady", ready, reason, "", now);
    set_condition(&mut status, "Ready", ready, reason, "", now);
    status["containerStatuses"] = json!([{"name": container, "image": image, "imageID": "", "ready": ready,
        "started": ready, "restartCount": restarts, "state": state, "lastState": last}]);
    pod["status"] = status;
}
