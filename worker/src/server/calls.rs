//! What every call on the gRPC port passes through, whichever service it is for: counting, a bound on calls that are
//! still arriving, and statuses instead of panics or of the library's own words.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use prometheus::IntCounter;
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;

use super::{
    arrival::{ARRIVING_BYTES, Arrivals, Received},
    connection::LiveCall,
    status,
};
use crate::metrics::Metrics;

/// Largest request message, in bytes.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// How long a call may take to arrive and be answered with a first status or message, or be taken by the engine.
const ARRIVAL: Duration = Duration::from_secs(30);
/// The service whose calls are bounded while they arrive.
const INFERENCE: &str = "ernie.v1.Inference";
/// Begins the message of tonic's status for bytes that are no protobuf message.
const DECODE_FAILED: &str = "failed to decode Protobuf message";

/// Told by a method that the engine has its request: from there on the request's own deadline counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken(Arc<AtomicBool>);

impl Taken {
    /// Says so.
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The services of the port behind what they share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Calls {
    routes: Routes,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    metrics: Arc<Metrics>,
    /// Methods by path: metric labels are bounded by what exists.
    methods: BTreeMap<String, Method>,
    /// Calls that are being received or are about to be admitted.
    arrivals: Arrivals,
    /// How long they may take to arrive.
    patience: Duration,
}

/// A method's labels in metrics.
#[derive(Clone, Debug)]
struct Method {
    kind: &'static str,
    service: String,
    name: String,
}

impl Method {
    fn labels(&self) -> [&str; 3] {
        [self.kind, &self.service, &self.name]
    }

    fn count_started(&self, metrics: &Metrics) -> IntCounter {
        metrics.grpc.started.with_label_values(&self.labels())
    }

    fn count_handled(&self, metrics: &Metrics, code: Code) -> IntCounter {
        let [kind, service, name] = self.labels();
        metrics.grpc.handled.with_label_values(&[kind, service, name, code_name(code)])
    }
}

impl Calls {
    /// `descriptors` are the encoded descriptor sets of all services; at most `arriving` calls are received at once.
    pub fn new(routes: Routes, descriptors: &[&[u8]], arriving: usize, metrics: Arc<Metrics>) -> Self {
        let methods = methods(descriptors);
        for method in methods.values() {
            method.count_started(&metrics);
            method.count_handled(&metrics, Code::Ok);
        }
        let shared = Shared { metrics, methods, arrivals: Arrivals::new(arriving, ARRIVING_BYTES), patience: ARRIVAL };
        Self { routes: routes.prepare(), shared: Arc::new(shared) }
    }

    /// Answers one call.
    pub async fn call<B>(mut self, request: Request<B>, live: LiveCall) -> Result<Response<Counted>, Infallible>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let shared = Arc::clone(&self.shared);
        let unknown = || Method { kind: "unary", service: "unknown".into(), name: "unknown".into() };
        let method = shared.methods.get(request.uri().path()).cloned().unwrap_or_else(unknown);
        method.count_started(&shared.metrics).inc();
        let bounded = method.service == INFERENCE;
        // From here on: a client may leave before there is an answer.
        let counted = Counted::new(Counter { method, shared: Arc::clone(&shared) });

        let arrival = match bounded.then(|| shared.arrivals.admit()).transpose() {
            Ok(arrival) => arrival,
            Err(status) => return Ok(counted.with(status.into_http())),
        };
        let mut request = request.map(|body| Received::new(body, arrival.clone()));
        request.extensions_mut().insert(live.clone());
        let taken = Taken::default();
        request.extensions_mut().insert(taken.clone());
        if let Some(arrival) = arrival {
            // Goes along with the work on the request, which may outlive this call.
            request.extensions_mut().insert(arrival);
        }
        let answer = AssertUnwindSafe(async move { self.routes.call(request).await }).catch_unwind();
        let mut answer = std::pin::pin!(answer);
        let answered = match tokio::time::timeout(shared.patience, &mut answer).await {
            Err(_elapsed) if taken.is_set() => Ok(answer.await),
            answered => answered,
        };
        let response = match answered {
            Ok(Ok(Ok(response))) => response,
            Ok(Err(_panic)) => {
                shared.metrics.grpc.panics.inc();
                Status::internal("the server failed on this request; its log says more").into_http()
            }
            Err(_elapsed) => {
                let sentence = format!("the request did not arrive within {:?}", shared.patience);
                Status::deadline_exceeded(sentence).into_http()
            }
        };
        Ok(counted.with(in_our_words(response, bounded)))
    }
}

/// Paths of all methods.
fn methods(descriptors: &[&[u8]]) -> BTreeMap<String, Method> {
    let sets = descriptors.iter().filter_map(|bytes| FileDescriptorSet::decode(*bytes).ok());
    let mut methods = BTreeMap::new();
    for file in sets.flat_map(|set| set.file) {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            for method in &service.method {
                let kind = match (method.client_streaming(), method.server_streaming()) {
                    (false, false) => "unary",
                    (false, true) => "server_stream",
                    (true, false) => "client_stream",
                    (true, true) => "bidi_stream",
                };
                let path = format!("/{name}/{}", method.name());
                methods.insert(path, Method { kind, service: name.clone(), name: method.name().to_owned() });
            }
        }
    }
    methods
}

/// tonic answers a message that is too large with OUT_OF_RANGE, and one that is no protobuf with INTERNAL. gRPC's own
/// libraries say RESOURCE_EXHAUSTED to the first; the second is the client's fault.
fn in_our_words(response: Response<Body>, is_inference: bool) -> Response<Body> {
    let Some(found) = Status::from_header_map(response.headers()) else { return response };
    let status = match found.code() {
        Code::OutOfRange if is_inference => status::too_large(MAX_REQUEST_BYTES),
        Code::OutOfRange => status::never_retry(Code::ResourceExhausted, "the request is too large for this method"),
        Code::Internal if found.message().starts_with(DECODE_FAILED) => {
            let what = found.message().strip_prefix(DECODE_FAILED).unwrap_or_default().trim_start_matches([':', ' ']);
            status::never_retry(
                Code::InvalidArgument,
                format!("the request is not the message that was expected: {what}"),
            )
        }
        Code::Unimplemented if found.message().is_empty() => {
            Status::unimplemented("there is no such method here; server reflection lists what there is")
        }
        _ => return response,
    };
    status.into_http()
}

/// Counts the end of one call.
#[derive(Debug)]
struct Counter {
    method: Method,
    shared: Arc<Shared>,
}

/// A response body that counts the status in its trailers; one that is dropped before, or never came to be, was cancelled
/// by the client.
#[derive(Debug)]
pub struct Counted {
    inner: Body,
    counter: Option<Counter>,
}

impl Counted {
    fn new(counter: Counter) -> Self {
        Self { inner: Body::empty(), counter: Some(counter) }
    }

    /// The response, whose end is counted.
    fn with(mut self, response: Response<Body>) -> Response<Self> {
        if let Some(code) = code(response.headers()) {
            self.count(code);
        }
        response.map(|inner| {
            self.inner = inner;
            self
        })
    }

    fn count(&mut self, code: Code) {
        if let Some(Counter { method, shared }) = self.counter.take() {
            method.count_handled(&shared.metrics, code).inc();
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count(Code::Cancelled);
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(code) = frame.trailers_ref().and_then(code) {
                    self.count(code);
                }
            }
            Some(Err(status)) => {
                let code = status.code();
                self.count(code);
            }
            None => self.count(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// The spelling that gRPC's Prometheus exporters use.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, routing::post};
    use http_body_util::{BodyExt, Empty, Full};

    use super::*;

    const PATH: &str = "/ernie.v1.Inference/Chat";

    fn calls(routes: impl Into<Routes>, arriving: usize) -> (Calls, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new("m").expect("metrics"));
        let descriptors: [&[u8]; 1] = [ernie_proto::FILE_DESCRIPTOR_SET];
        (Calls::new(routes.into(), &descriptors, arriving, Arc::clone(&metrics)), metrics)
    }

    async fn status(calls: &Calls, path: &str) -> Status {
        let request = Request::post(path).body(Empty::<Bytes>::new()).expect("a request");
        let response = calls.clone().call(request, LiveCall::default()).await.expect("infallible");
        Status::from_header_map(response.headers()).expect("a status")
    }

    fn handled(metrics: &Metrics, code: &str) -> u64 {
        let labels = ["server_stream", "ernie.v1.Inference", "Chat", code];
        metrics.grpc.handled.with_label_values(&labels).get()
    }

    #[tokio::test]
    async fn a_panic_becomes_internal_and_is_counted() {
        async fn panics() -> &'static str {
            panic!("a defect")
        }
        let (calls, metrics) = calls(Router::new().route(PATH, post(panics)), 8);
        let found = status(&calls, PATH).await;
        assert_eq!(found.code(), Code::Internal);
        assert!(!found.message().contains("defect"), "{found}");
        assert_eq!((metrics.grpc.panics.get(), handled(&metrics, "Internal")), (1, 1));
    }

    #[tokio::test]
    async fn calls_beyond_those_that_may_arrive_are_refused_with_a_hint() {
        let (calls, _) = calls(Routes::default(), 0);
        let found = status(&calls, PATH).await;
        assert_eq!(found.code(), Code::ResourceExhausted);
        assert!(found.metadata().contains_key(status::PUSHBACK));
        let other = status(&calls, "/grpc.health.v1.Health/Check").await;
        assert_ne!(other.code(), Code::ResourceExhausted, "only inference is bounded");
    }

    #[tokio::test]
    async fn a_client_that_leaves_before_there_is_an_answer_is_counted() {
        let (calls, metrics) = calls(Router::new().route(PATH, post(std::future::pending::<&str>)), 8);
        let request = Request::post(PATH).body(Empty::<Bytes>::new()).expect("a request");
        let mut call = Box::pin(calls.call(request, LiveCall::default()));
        assert!(call.as_mut().now_or_never().is_none());
        assert_eq!(handled(&metrics, "Canceled"), 0);
        drop(call);
        assert_eq!(handled(&metrics, "Canceled"), 1);
    }

    #[tokio::test]
    async fn a_request_that_the_engine_has_may_take_its_time_and_another_may_not() {
        const PATIENCE: Duration = Duration::from_millis(50);
        async fn takes(request: Request<axum::body::Body>) -> &'static str {
            request.extensions().get::<Taken>().expect("every request can be taken").set();
            tokio::time::sleep(4 * PATIENCE).await;
            "at last"
        }
        let score = "/ernie.v1.Inference/Score";
        let routes = Router::new().route(PATH, post(std::future::pending::<&str>)).route(score, post(takes));
        let (mut calls, metrics) = calls(routes, 8);
        Arc::get_mut(&mut calls.shared).expect("nobody else has it").patience = PATIENCE;
        let late = status(&calls, PATH).await;
        assert_eq!((late.code(), late.message()), (Code::DeadlineExceeded, "the request did not arrive within 50ms"));
        assert_eq!(handled(&metrics, "DeadlineExceeded"), 1);
        let request = Request::post(score).body(Empty::<Bytes>::new()).expect("a request");
        let response = calls.clone().call(request, LiveCall::default()).await.expect("infallible");
        assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "at last");
    }

    #[tokio::test]
    async fn the_status_in_the_trailers_is_counted_and_a_dropped_body_is_a_cancel() {
        async fn answers() -> Response<axum::body::Body> {
            let trailers =
                HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), "4".parse().expect("a value"))]);
            let body = Full::new(Bytes::from_static(b"x")).with_trailers(async { Some(Ok(trailers)) });
            Response::new(axum::body::Body::new(body))
        }
        let (calls, metrics) = calls(Router::new().route(PATH, post(answers)), 8);
        let call = async || {
            let request = Request::post(PATH).body(Empty::<Bytes>::new()).expect("a request");
            calls.clone().call(request, LiveCall::default()).await.expect("infallible")
        };
        call().await.into_body().collect().await.expect("a body");
        drop(call().await);
        assert_eq!((handled(&metrics, "DeadlineExceeded"), handled(&metrics, "Canceled")), (1, 1));
    }
}
