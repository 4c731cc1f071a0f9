//! SHELL: one event for each transition, never one for each reconcile.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client, Resource, ResourceExt};
use tracing::{info, warn};

use crate::api::ErnieModel;
use crate::desired::digest;
use crate::observe::within;
use crate::observed::FIELD_MANAGER;
use crate::status::Transition;

/// Longest note that the API server takes, in bytes.
const NOTE_LIMIT: usize = 1000;

/// Tells a transition of an object. The name of the event follows from what it says and when, so that telling it twice is
/// telling it once. An event that cannot be written is logged and given up: conditions are the record.
pub async fn tell<K>(client: &Client, object: &K, transition: &Transition, now: Timestamp)
where
    K: Resource<DynamicType = ()>,
{
    let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
    let Transition { is_warning, reason, message } = transition;
    info!(model = %name, %namespace, %reason, %message, warning = is_warning, "transition");
    let api = Api::<Event>::namespaced(client.clone(), &namespace);
    let event = event(object, transition, now);
    if let Err(error) = within("create event", api.create(&PostParams::default(), &event)).await {
        let told_already = crate::apply::status(&error).is_some_and(kube::core::Status::is_already_exists);
        if !told_already {
            warn!(model = %name, %namespace, %reason, %error, "the event was not written");
        }
    }
}

/// Tells what has no condition to remember it: looks first whether it is told already, so that a look writes nothing.
pub async fn tell_once<K>(client: &Client, object: &K, transition: &Transition, since: Timestamp)
where
    K: Resource<DynamicType = ()>,
{
    let api = Api::<Event>::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    let told = within("get event", api.get_metadata_opt(&event(object, transition, since).name_any())).await;
    if !matches!(told, Ok(Some(_))) {
        tell(client, object, transition, since).await;
    }
}

fn event<K>(object: &K, transition: &Transition, now: Timestamp) -> Event
where
    K: Resource<DynamicType = ()>,
{
    let Transition { is_warning, reason, message } = transition;
    let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
    let about = ObjectReference {
        api_version: Some(ErnieModel::api_version(&()).into_owned()),
        kind: Some(ErnieModel::kind(&()).into_owned()),
        name: Some(name.clone()),
        namespace: Some(namespace.clone()),
        uid: object.uid(),
        ..ObjectReference::default()
    };
    let mut note = message.clone();
    note.truncate(note.floor_char_boundary(NOTE_LIMIT));
    let mark = digest(format!("{:?} {reason} {note} {now}", object.uid()).as_bytes());
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{mark}")),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        action: Some("Reconcile".to_owned()),
        reason: Some(reason.clone()),
        note: Some(note),
        type_: Some(if *is_warning { "Warning" } else { "Normal" }.to_owned()),
        regarding: Some(about),
        reporting_controller: Some("serving.ernie.io/ernie-operator".to_owned()),
        reporting_instance: Some(FIELD_MANAGER.to_owned()),
        ..Event::default()
    }
}
