//! The server as a tower service, so that a `kube::Client` can talk to it.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::client::Body;
use serde_json::Value;

use super::call::Call;
use super::failure::Failure;
use super::fault::{Effect, Moment};
use super::log::Entry;
use super::{Answer, Shared, State, watch};

/// Largest accepted body.
const BODY_LIMIT: usize = 3 * 1024 * 1024;

type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;
type Error = Box<dyn std::error::Error + Send + Sync>;

/// The side of a server that one client talks to.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) client: String,
}

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<ResponseBody>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Self::Response, Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let connection = self.clone();
        Box::pin(async move { connection.answer(request).await })
    }
}

impl Connection {
    async fn answer(self, request: Request<Body>) -> Result<Response<ResponseBody>, Error> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        if body.len() > BODY_LIMIT {
            return respond(&Failure::too_large(BODY_LIMIT));
        }
        let call = match Call::read(&self.client, &head, &body) {
            Ok(call) => call,
            Err(failure) => return respond(&failure),
        };
        let fault = self.shared.lock().strike(&call);
        if let Some((effect, Moment::Before)) = fault {
            if !matches!(effect, Effect::Delay(_)) {
                let entry = Entry { call: call.clone(), code: None, changed: false, fault };
                self.shared.lock().log.push(entry);
            }
            if let Some(lost) = self.suffer(effect).await {
                return lost;
            }
        }
        let answer = self.serve(&call, fault);
        if let Some((effect, Moment::After)) = fault
            && let Some(lost) = self.suffer(effect).await
        {
            return lost;
        }
        match answer {
            Ok(Answer::Body(code, body)) => json_response(code, &body),
            Ok(Answer::Text(text)) => Ok(Response::new(Full::new(Bytes::from(text)).boxed_unsync())),
            Ok(Answer::Watch(start)) => {
                let frames =
                    futures::StreamExt::map(watch::stream(self.shared, start), |line| line.map(http_body::Frame::data));
                let response = Response::builder().header("content-type", "application/json");
                Ok(response.body(StreamBody::new(frames).boxed_unsync())?)
            }
            Err(failure) => respond(&failure),
        }
    }

    /// Serves and logs the call, and wakes the watches when it changed something.
    fn serve(&self, call: &Call, fault: Option<(Effect, Moment)>) -> Result<Answer, Failure> {
        let mut state = self.shared.lock();
        let before = state.store.revision();
        let answer = state.serve(call);
        let code = match &answer {
            Ok(Answer::Body(code, _)) => *code,
            Ok(Answer::Text(_) | Answer::Watch(_)) => 200,
            Err(failure) => failure.code,
        };
        let changed = state.store.revision() != before;
        state.log.push(Entry { call: call.clone(), code: Some(code), changed, fault });
        drop(state);
        if changed {
            self.shared.announce();
        }
        answer
    }

    /// Lets a fault happen: what the client gets instead of the answer, or nothing when it gets the answer after all.
    async fn suffer(&self, effect: Effect) -> Option<Result<Response<ResponseBody>, Error>> {
        match effect {
            Effect::Delay(time) => {
                tokio::time::sleep(time).await;
                None
            }
            Effect::Status(410) => {
                Some(respond(&Failure::expired("The resourceVersion for the provided watch is too old.")))
            }
            Effect::Status(code) => Some(respond(&Failure::of_server(code))),
            Effect::Reset => Some(Err("connection reset by peer".into())),
            Effect::Hang => std::future::pending().await,
            Effect::Crash => {
                self.shared.lock().crashed.insert(self.client.clone());
                self.shared.announce();
                std::future::pending().await
            }
        }
    }
}

impl State {
    /// The fault that strikes a call, every rule counting it.
    fn strike(&mut self, call: &Call) -> Option<(Effect, Moment)> {
        let mut struck = None;
        for fault in &mut self.faults {
            struck = struck.or(fault.strike(call));
        }
        struck
    }
}

fn respond(failure: &Failure) -> Result<Response<ResponseBody>, Error> {
    json_response(failure.code, &failure.to_status())
}

fn json_response(code: u16, body: &Value) -> Result<Response<ResponseBody>, Error> {
    let response = Response::builder().status(code).header("content-type", "application/json");
    Ok(response.body(Full::new(Bytes::from(body.to_string())).boxed_unsync())?)
}
