//! The operator's own reconcile over a connection that counts its requests and breaks at one of them.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::sync::{Arc, Mutex};

use ernie_operator::api::ErnieModel;
use ernie_operator::apply;
use ernie_operator::context::Context;
use ernie_operator::desired::{Defaults, Release};
use ernie_operator::reconcile::{Error, reconcile};
use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use kube::core::DeserializeGuard;
use serde_json::Value;
use tokio::sync::Notify;
use tower::BoxError;

/// What goes wrong with a request.
///
/// A process that dies before a request left what one leaves that dies after the request before, so one moment of dying
/// is enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails before it is sent.
    Unsent,
    /// It takes effect, and the answer is lost.
    Unanswered,
    /// It takes effect, and the operator dies before it hears of that.
    Crash,
}

/// A fault at the n-th request, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Which request.
    pub request: usize,
    /// What goes wrong with it.
    pub fault: Fault,
}

/// One request and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its method.
    pub method: Method,
    /// Path without query.
    pub path: String,
    /// Status of the answer; none when it was not sent, or the answer never came.
    pub status: Option<u16>,
    /// Slash and name of the object in the body of a create.
    created: Option<String>,
}

impl Sent {
    /// Whether it asks for a change.
    pub fn is_mutating(&self) -> bool {
        self.method != Method::GET
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status.map_or("no answer".to_owned(), |status| status.to_string());
        write!(f, "{} {}{} -> {status}", self.method, self.path, self.created.as_deref().unwrap_or_default())
    }
}

/// What the operator's requests go through.
struct Wire {
    client: Client,
    sent: Mutex<Vec<Sent>>,
    point: Mutex<Option<Point>>,
    struck: Mutex<Option<Sent>>,
    died: Notify,
}

impl Wire {
    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await?;
        let name = |body: &[u8]| {
            let object: Value = serde_json::from_slice(body).ok()?;
            Some(format!("/{}", object["metadata"]["name"].as_str()?))
        };
        let created = if parts.method == Method::POST { name(&body) } else { None };
        let mut sent = Sent { method: parts.method.clone(), path: parts.uri.path().to_owned(), status: None, created };
        let at = {
            let mut log = self.sent.lock().unwrap();
            log.push(sent.clone());
            log.len() - 1
        };
        let fault = self.point.lock().unwrap().filter(|point| point.request == at).map(|point| point.fault);
        if fault.is_some() {
            *self.struck.lock().unwrap() = Some(sent.clone());
        }
        if fault == Some(Fault::Unsent) {
            return Err("the request was not sent".into());
        }
        let response = self.client.send(Request::from_parts(parts, Body::from(body))).await?;
        sent.status = Some(response.status().as_u16());
        self.sent.lock().unwrap()[at] = sent;
        match fault {
            Some(Fault::Unanswered) => Err("the answer was lost".into()),
            Some(Fault::Crash) => {
                self.died.notify_one();
                pending().await
            }
            Some(Fault::Unsent) | None => Ok(response),
        }
    }
}

/// How a look of the operator at a model ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing was left to do.
    Quiet,
    /// Something was written.
    Wrote,
    /// It is to be tried again.
    Failed(String),
    /// The process died; another has begun.
    Crashed,
}

/// An operator process, and after a crash its successor.
pub struct Operator {
    wire: Arc<Wire>,
    context: Arc<Context>,
}

impl Operator {
    /// An operator that reaches the API server through `client`.
    pub fn start(client: Client) -> Self {
        let wire = Arc::new(Wire {
            client,
            sent: Mutex::default(),
            point: Mutex::default(),
            struck: Mutex::default(),
            died: Notify::new(),
        });
        Self { context: process(&wire), wire }
    }

    /// Begins to count requests anew, and breaks at this one.
    pub fn arm(&mut self, point: Option<Point>) {
        self.wire.sent.lock().unwrap().clear();
        *self.wire.point.lock().unwrap() = point;
    }

    /// The process ends, and a new one begins.
    pub fn restart(&mut self) {
        self.context = process(&self.wire);
    }

    /// Looks at a model once.
    pub async fn look(&mut self, model: DeserializeGuard<ErnieModel>) -> Look {
        let before = self.sent().len();
        let context = self.context.clone();
        let result = tokio::select! {
            biased;
            () = self.wire.died.notified() => None,
            result = reconcile(Arc::new(model), context) => Some(result),
        };
        let wrote = self.sent()[before..].iter().any(Sent::is_mutating);
        match result {
            None => {
                self.restart();
                Look::Crashed
            }
            // Given up until something changes.
            Some(Ok(_) | Err(Error::Apply(apply::Error::Gone | apply::Error::Terminating))) if !wrote => Look::Quiet,
            Some(Ok(_)) => Look::Wrote,
            Some(Err(error)) => Look::Failed(error.to_string()),
        }
    }

    /// Its requests since they were counted last.
    pub fn sent(&self) -> Vec<Sent> {
        self.wire.sent.lock().unwrap().clone()
    }

    /// The request that the fault struck.
    pub fn struck(&self) -> Option<Sent> {
        self.wire.struck.lock().unwrap().clone()
    }

    /// How often it made each child: path of the kind and name, to the number of times that the API server did so.
    pub fn created(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for sent in self.sent().iter().filter(|sent| sent.status == Some(201) && !sent.path.contains("/events")) {
            let name = sent.created.as_deref().unwrap_or_default();
            *counts.entry(format!("{}{name}", sent.path)).or_default() += 1;
        }
        counts
    }
}

fn process(wire: &Arc<Wire>) -> Arc<Context> {
    let (namespace, wire) = (wire.client.default_namespace().to_owned(), wire.clone());
    let send = move |request| {
        let wire = wire.clone();
        async move { wire.send(request).await }
    };
    let release =
        Release { version: "1.0.0".to_owned(), image: "registry.test/worker:1.0.0".to_owned(), image_cuda: None };
    Arc::new(Context::new(Client::new(tower::service_fn(send), namespace), Defaults { release }))
}
