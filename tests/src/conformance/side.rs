//! One of the two servers.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures::StreamExt;
use http::Request as HttpRequest;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::PATIENCE;
use super::answer::{Answer, normalise};
use super::request::{GADGET, KINDS, Kind, OLD_VERSION, Request, STORED, UID, VERSION};
use crate::apiserver::object;

/// Name of the object whose creation ends a watch.
const LAST: &str = "last";

/// A server and what is known of it.
pub(super) struct Side {
    client: Client,
    namespace: String,
    /// Names for uids.
    uids: HashMap<String, String>,
    /// How many uids each object has had, and since when that is counted.
    counts: BTreeMap<String, (usize, usize)>,
    /// The resource version that each object had before the last change.
    older: BTreeMap<(Kind, &'static str), String>,
    watches: Vec<(Kind, JoinHandle<Result<Vec<Value>>>)>,
}

impl Side {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            uids: HashMap::new(),
            counts: BTreeMap::new(),
            older: BTreeMap::new(),
            watches: Vec::new(),
        }
    }

    async fn call(&self, method: &str, path: &str, content_type: &str, body: &Value) -> Result<(u16, Value)> {
        let bytes = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let mut request = HttpRequest::builder().method(method).uri(path).header("accept", "application/json");
        if !content_type.is_empty() {
            request = request.header("content-type", content_type);
        }
        let response =
            self.client.send(request.body(Body::from(bytes))?).await.with_context(|| format!("{method} {path}"))?;
        let code = response.status().as_u16();
        let bytes = response.into_body().collect_bytes().await?;
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| json!({"text": String::from_utf8_lossy(&bytes)}));
        Ok((code, body))
    }

    /// Creates the definition and the namespace.
    pub(super) async fn prepare(&mut self, definition: &Value) -> Result<()> {
        let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        self.must(self.call("POST", definitions, "application/json", definition).await?, &[201, 409])?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}});
        let deadline = Instant::now() + PATIENCE;
        // One of the name may still be on its way out.
        while self.call("POST", "/api/v1/namespaces", "application/json", &namespace).await?.0 == 409 {
            self.before(deadline, "the namespace of an earlier run to go")?;
            self.call("DELETE", &format!("/api/v1/namespaces/{}", self.namespace), "application/json", &json!({}))
                .await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for kind in KINDS {
            while self.call("GET", &kind.path(&self.namespace), "", &Value::Null).await?.0 != 200 {
                self.before(deadline, "all resources to be served")?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    fn before(&self, deadline: Instant, what: &str) -> Result<()> {
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", PATIENCE.as_secs());
        }
        Ok(())
    }

    fn must(&self, (code, body): (u16, Value), allowed: &[u16]) -> Result<Value> {
        if allowed.contains(&code) { Ok(body) } else { Err(anyhow!("answered {code}: {body}")) }
    }

    /// Removes the namespace and everything in it.
    pub(super) async fn clean_up(&mut self) -> Result<()> {
        for (_, watch) in self.watches.drain(..) {
            watch.abort();
        }
        for kind in KINDS {
            let (_, list) = self.call("GET", &kind.path(&self.namespace), "", &Value::Null).await?;
            for item in list["items"].as_array().into_iter().flatten() {
                if !object::finalizers(item).is_empty() {
                    self.release(*kind, object::name(item)).await?;
                }
            }
        }
        let path = format!("/api/v1/namespaces/{}", self.namespace);
        self.must(self.call("DELETE", &path, "application/json", &json!({})).await?, &[200, 202, 404])?;
        Ok(())
    }

    async fn release(&self, kind: Kind, name: &str) -> Result<()> {
        let path = format!("{}/{name}", kind.path(&self.namespace));
        let patch = json!({"metadata": {"finalizers": null}});
        self.call("PATCH", &path, "application/merge-patch+json", &patch).await?;
        Ok(())
    }

    /// Sends a request, with its placeholders filled in for this server.
    pub(super) async fn send(&mut self, request: &Request) -> Result<Answer> {
        let collection = request.kind.path(&self.namespace);
        let target = match request.method {
            "POST" => request.body["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
            _ => request.name.to_owned(),
        };
        let before = self.stored(request.kind, &target).await?;
        let body = self.fill(request, &before).await?;
        let mut path = collection;
        for part in [request.name, request.subresource] {
            if !part.is_empty() {
                path = format!("{path}/{part}");
            }
        }
        if !request.query.is_empty() {
            path = format!("{path}?{}", request.query);
        }
        let (code, body) = self.call(request.method, &path, request.content_type, &body).await?;
        let version = |value: &Value| object::resource_version(value).to_owned();
        let (old, new) = (version(&before), version(&body));
        let is_object = code < 400 && request.method != "GET" && body["kind"] != "Status";
        let changed = (is_object && !old.is_empty() && !new.is_empty()).then(|| old != new);
        if changed == Some(true) && !request.name.is_empty() {
            self.older.insert((request.kind, request.name), old);
        }
        let comparable = normalise(request.kind, &body, &mut |uid, plural, name| self.name_of(uid, plural, name));
        Ok(Answer { code, body: if code < 400 { comparable } else { body }, changed })
    }

    /// The object as it is stored, once the cluster's controllers are done with it; null when it is not there.
    async fn stored(&self, kind: Kind, name: &str) -> Result<Value> {
        if name.is_empty() {
            return Ok(Value::Null);
        }
        let path = format!("{}/{name}", kind.path(&self.namespace));
        let deadline = Instant::now() + PATIENCE;
        let mut last = Value::Null;
        loop {
            let (code, body) = self.call("GET", &path, "", &Value::Null).await?;
            if code != 200 {
                return Ok(Value::Null);
            }
            let observed = body["status"]["observedGeneration"].as_i64() == Some(object::generation(&body));
            let still = object::resource_version(&body) == object::resource_version(&last);
            let ours = !kind.has_controller() || !self.has_controllers(&body);
            if ours || (observed && still) || object::is_deleting(&body) {
                return Ok(body);
            }
            self.before(deadline, "the controllers of the cluster")?;
            last = body;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    }

    /// Whether the server has a controller manager: the in-memory one counts its uids.
    fn has_controllers(&self, object: &Value) -> bool {
        !object::uid(object).starts_with("00000000-0000-4000-8000-")
    }

    async fn fill(&self, request: &Request, before: &Value) -> Result<Value> {
        let mut body = request.body.clone();
        if let Some(over) = request.body.get(STORED) {
            let mut whole = if before.is_null() {
                json!({"apiVersion": request.kind.api_version(), "kind": request.kind.kind, "metadata": {"name": request.name}})
            } else {
                before.clone()
            };
            for field in ["spec", "data"] {
                if !over[field].is_null() {
                    whole[field] = over[field].clone();
                }
            }
            if !over["metadata"]["labels"].is_null() {
                whole["metadata"]["labels"] = over["metadata"]["labels"].clone();
            }
            // Addresses are the server's own.
            if request.kind.kind == "Service" && !before.is_null() && whole["spec"].get("clusterIP").is_none() {
                for field in ["clusterIP", "clusterIPs"] {
                    whole["spec"][field] = before["spec"][field].clone();
                }
            }
            for field in ["resourceVersion", "uid"] {
                if let Some(value) = request.body.get(field) {
                    object::set_metadata(&mut whole, field, value.clone());
                }
            }
            body = whole;
        }
        let mut gadgets = BTreeMap::new();
        if body.to_string().contains(GADGET) {
            for name in ["a", "b", "c"] {
                let gadget = self.stored(KINDS[7], name).await?;
                let uid = object::uid(&gadget).to_owned();
                gadgets.insert(format!("{GADGET}{name}"), uid);
            }
        }
        let old = self.older.get(&(request.kind, request.name)).cloned().unwrap_or_else(|| "1".to_owned());
        let known = |value: &str, absent: &str| if value.is_empty() { absent.to_owned() } else { value.to_owned() };
        let fillers: BTreeMap<String, String> = [
            (UID.to_owned(), known(object::uid(before), super::request::WRONG_UID)),
            (VERSION.to_owned(), known(object::resource_version(before), "1")),
            (OLD_VERSION.to_owned(), old),
        ]
        .into_iter()
        .chain(gadgets.into_iter().map(|(name, uid)| (name, known(&uid, super::request::WRONG_UID))))
        .collect();
        replace(&mut body, &fillers);
        Ok(body)
    }

    /// A name for a uid that both servers agree on: the how-manieth it is of the object.
    fn name_of(&mut self, uid: &str, plural: &str, name: &str) -> String {
        if uid.is_empty() || uid == super::request::WRONG_UID {
            return uid.to_owned();
        }
        if let Some(known) = self.uids.get(uid) {
            return known.clone();
        }
        let object = format!("{plural}/{name}");
        let (since, count) = self.counts.entry(object.clone()).or_default();
        *count += 1;
        let label = format!("uid {count} of {object} since {since}");
        self.uids.insert(uid.to_owned(), label.clone());
        label
    }

    /// Removes the object of a request, whatever holds it, and waits until it is gone.
    pub(super) async fn purge(&mut self, request: &Request, index: usize) -> Result<()> {
        let name = if request.name.is_empty() {
            request.body["metadata"]["name"].as_str().unwrap_or("")
        } else {
            request.name
        };
        if name.is_empty() {
            return Ok(());
        }
        let path = format!("{}/{name}", request.kind.path(&self.namespace));
        let deadline = Instant::now() + PATIENCE;
        let now = json!({"gracePeriodSeconds": 0, "propagationPolicy": "Background"});
        while self.call("DELETE", &path, "application/json", &now).await?.0 != 404 {
            self.before(deadline, "an object to go")?;
            self.release(request.kind, name).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.counts.insert(format!("{}/{name}", request.kind.plural), (index, 0));
        Ok(())
    }

    /// Names of the objects of a resource that the comparison made.
    pub(super) async fn names(&self, plural: &str) -> Result<Vec<String>> {
        let kind = KINDS.iter().find(|kind| kind.plural == plural).context("an unknown resource")?;
        let path = format!("{}?labelSelector=conformance%3Dyes", kind.path(&self.namespace));
        let list = self.must(self.call("GET", &path, "", &Value::Null).await?, &[200])?;
        Ok(list["items"].as_array().into_iter().flatten().map(|item| object::name(item).to_owned()).collect())
    }

    /// Begins to watch every resource that no controller of the cluster writes.
    pub(super) async fn watch_all(&mut self) -> Result<()> {
        for kind in KINDS.iter().filter(|kind| !kind.has_controller()) {
            let collection = kind.path(&self.namespace);
            let list = self.must(self.call("GET", &collection, "", &Value::Null).await?, &[200])?;
            let from = object::resource_version(&list).to_owned();
            let path =
                format!("{collection}?watch=true&resourceVersion={from}&allowWatchBookmarks=true&timeoutSeconds=3600");
            let client = self.client.clone();
            self.watches.push((*kind, tokio::spawn(collect(client, path))));
        }
        Ok(())
    }

    /// Ends the watches: the events of each object, in order.
    pub(super) async fn watched(&mut self) -> Result<BTreeMap<String, Vec<Value>>> {
        let mut all = BTreeMap::new();
        for (kind, watch) in std::mem::take(&mut self.watches) {
            let last = last_of(kind);
            self.must(self.call("POST", &kind.path(&self.namespace), "application/json", &last).await?, &[201])?;
            let events =
                tokio::time::timeout(PATIENCE, watch).await.context("a watch does not see the last object")???;
            for event in events {
                let object = &event["object"];
                if object::labels(object)["conformance"] != "yes" && object::name(object).len() > 1 {
                    continue;
                }
                let name = format!("{}/{}", kind.plural, object::name(object));
                let normal = normalise(kind, object, &mut |uid, plural, name| self.name_of(uid, plural, name));
                all.entry(name).or_insert_with(Vec::new).push(json!({"type": event["type"], "object": normal}));
            }
        }
        Ok(all)
    }
}

/// An object whose creation ends a watch.
fn last_of(kind: Kind) -> Value {
    let spec = match kind.kind {
        "Service" => json!({"clusterIP": "None", "selector": {"app": LAST}}),
        "Pod" => json!({"containers": [{"name": "c", "image": "i:1"}], "schedulerName": "nobody"}),
        "NetworkPolicy" => json!({"podSelector": {}}),
        "ConfigMap" => Value::Null,
        _ => json!({}),
    };
    let mut object = json!({"apiVersion": kind.api_version(), "kind": kind.kind, "metadata": {"name": LAST}});
    if !spec.is_null() {
        object["spec"] = spec;
    }
    object
}

/// Reads a watch until the last object appears.
async fn collect(client: Client, path: String) -> Result<Vec<Value>> {
    let request = HttpRequest::get(path).body(Body::empty())?;
    let response = client.send(request).await?;
    let mut frames = http_body_util::BodyDataStream::new(response.into_body());
    let (mut buffer, mut events) = (Vec::new(), Vec::new());
    while let Some(frame) = frames.next().await {
        buffer.extend_from_slice(&frame?);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let event: Value = serde_json::from_slice(&line)?;
            match event["type"].as_str() {
                Some("BOOKMARK") => {}
                Some("ERROR") => bail!("the watch ended with {event}"),
                _ if object::name(&event["object"]) == LAST => return Ok(events),
                _ => events.push(event),
            }
        }
    }
    bail!("the watch ended before the last object")
}

/// Replaces placeholders by what they stand for.
fn replace(value: &mut Value, fillers: &BTreeMap<String, String>) {
    match value {
        Value::String(text) => {
            if let Some(filler) = fillers.get(text.as_str()) {
                text.clone_from(filler);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, fillers)),
        Value::Object(fields) => fields.values_mut().for_each(|inner| replace(inner, fillers)),
        _ => {}
    }
}
