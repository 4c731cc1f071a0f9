//! Connections of the gRPC port: how many there may be, what each may do, and how each ends.
//!
//! A connection is asked to go away (GOAWAY: what runs finishes, nothing new begins) when it is old, when no request
//! came after connecting, or when the worker drains. Old ones go so that existing clients find new replicas.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::calls::{Calls, Counted};
use crate::metrics::GrpcFigures;

/// What connections may do.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Connections of the process.
    pub per_process: usize,
    /// Connections of one client address.
    pub per_peer: usize,
    /// Streams open at once on one connection.
    pub streams: u32,
    /// Bytes of one request's headers.
    pub header_list: u32,
    /// Bytes that one stream may have waiting to be sent.
    pub send_buffer: usize,
    /// Streams that a client has reset before they were accepted (rapid reset).
    pub pending_resets: usize,
    /// Streams that the server has reset because of a client's mistakes.
    pub error_resets: usize,
    /// How long a connection may be quiet before it is asked for a sign of life.
    pub keepalive: Duration,
    /// How long that sign may take.
    pub keepalive_timeout: Duration,
    /// When the first request must have come.
    pub first_request: Duration,
    /// Mean age at which a connection is asked to go away; each draws its own within 10 %.
    pub age: Duration,
    /// How long an old connection stays after the last inference on it, for streams such as health watches.
    pub linger: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            per_process: 1024,
            per_peer: 64,
            streams: 128,
            header_list: 8 << 10,
            send_buffer: 64 << 10,
            pending_resets: 20,
            error_resets: 128,
            keepalive: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            first_request: Duration::from_secs(10),
            age: Duration::from_secs(ernie_proto::contract::CONNECTION_AGE_SECONDS),
            linger: Duration::from_secs(5),
        }
    }
}

/// How accepting and connections are told to end.
#[derive(Clone, Debug, Default)]
pub struct Closing {
    /// Accept nothing more, and ask every connection to go away.
    pub goaway: CancellationToken,
    /// Close every connection now.
    pub abort: CancellationToken,
}

/// An inference that runs on a connection. Clones count as one; the last one to go ends it.
#[derive(Clone, Debug, Default)]
pub struct LiveCall(#[expect(dead_code, reason = "counts by being dropped")] Arc<Live>);

#[derive(Debug, Default)]
struct Live(Arc<Activity>);

impl LiveCall {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.calls.fetch_add(1, Ordering::AcqRel);
        activity.used.store(true, Ordering::Release);
        Self(Arc::new(Live(Arc::clone(activity))))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // One that was not made by `new` belongs to no connection.
        let _ = self.0.calls.fetch_update(Ordering::AcqRel, Ordering::Acquire, |calls| calls.checked_sub(1));
    }
}

/// What happens on one connection.
#[derive(Debug, Default)]
struct Activity {
    calls: AtomicUsize,
    used: AtomicBool,
}

/// Who is connected.
#[derive(Debug, Default)]
struct Peers(Mutex<HashMap<IpAddr, usize>>);

/// A connection's place among those of its peer and process.
struct Place {
    peers: Arc<Peers>,
    address: IpAddr,
}

impl Peers {
    /// A place, or the bound that is reached.
    fn admit(self: &Arc<Self>, address: IpAddr, limits: &ConnectionLimits) -> Result<Place, &'static str> {
        let address = address.to_canonical();
        let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.values().sum::<usize>() >= limits.per_process {
            return Err("process");
        }
        let count = peers.entry(address).or_default();
        if *count >= limits.per_peer {
            return Err("peer");
        }
        *count += 1;
        Ok(Place { peers: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut peers = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = peers.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.address);
            }
        }
    }
}

/// Accepts connections until told to stop. Each runs as a task of `connections`.
pub async fn accept(
    listener: TcpListener,
    calls: Calls,
    limits: ConnectionLimits,
    figures: GrpcFigures,
    closing: Closing,
    connections: TaskTracker,
) {
    let peers = Arc::new(Peers::default());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = closing.goaway.cancelled() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                after_failure(&error).await;
                continue;
            }
        };
        let place = match peers.admit(address.ip(), &limits) {
            Ok(place) => place,
            Err(reason) => {
                figures.refused.with_label_values(&[reason]).inc();
                continue;
            }
        };
        figures.accepted.inc();
        figures.connections.inc();
        let (calls, limits, figures, closing) = (calls.clone(), limits.clone(), figures.clone(), closing.clone());
        connections.spawn(async move {
            run(stream, calls, &limits, &figures, &closing).await;
            figures.connections.dec();
            drop(place);
        });
    }
}

/// Waits a moment where accepting fails for want of descriptors or memory; a client that has gone costs nothing.
pub(crate) async fn after_failure(error: &io::Error) {
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        tracing::warn!("a connection cannot be accepted: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn run(stream: TcpStream, calls: Calls, limits: &ConnectionLimits, figures: &GrpcFigures, closing: &Closing) {
    // Fails only on a socket that is gone, which the connection finds out too.
    let _ = stream.set_nodelay(true);
    let activity = Arc::new(Activity::default());
    let service = ConnectionService { calls, activity: Arc::clone(&activity) };
    let connection = builder(limits).serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let begun = Instant::now();
    let old = begun + vary(limits.age);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = closing.abort.cancelled() => return,
        () = closing.goaway.cancelled() => {}
        () = unused(&activity, begun + limits.first_request) => {}
        () = tokio::time::sleep_until(old) => figures.aged.inc(),
    }
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        // An error here is the client's way of leaving.
        _ = connection.as_mut() => {}
        () = closing.abort.cancelled() => {}
        () = quiet(&activity, limits.linger) => {}
    }
}

/// Resolves when no request has come by then.
async fn unused(activity: &Activity, when: Instant) {
    tokio::time::sleep_until(when).await;
    if activity.used.load(Ordering::Acquire) {
        std::future::pending::<()>().await;
    }
}

/// Resolves when no inference has run for so long.
async fn quiet(activity: &Activity, linger: Duration) {
    let mut since = Instant::now();
    while since.elapsed() < linger {
        tokio::time::sleep(linger / 10).await;
        if activity.calls.load(Ordering::Acquire) > 0 {
            since = Instant::now();
        }
    }
}

fn builder(limits: &ConnectionLimits) -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(limits.header_list)
        .max_send_buf_size(limits.send_buffer)
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_local_error_reset_streams(limits.error_resets)
        .keep_alive_interval(limits.keepalive)
        .keep_alive_timeout(limits.keepalive_timeout);
    builder
}

/// A time within 10 % of the given one, so that connections made together do not end together.
fn vary(time: Duration) -> Duration {
    // Without randomness from the system all connections age alike, which is no harm.
    let share = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    time.mul_f64(0.9 + 0.2 * share)
}

/// The services, as one connection sees them.
struct ConnectionService {
    calls: Calls,
    activity: Arc<Activity>,
}

impl hyper::service::Service<Request<Incoming>> for ConnectionService {
    type Response = Response<Counted>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.calls.clone().call(request, LiveCall::new(&self.activity)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_by_peer_and_process_and_come_back() {
        let limits = ConnectionLimits { per_process: 3, per_peer: 2, ..ConnectionLimits::default() };
        let peers = Arc::new(Peers::default());
        let (one, two) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().expect("an address");
        let first = peers.admit(one, &limits).map_err(str::to_owned).expect("a place");
        let _second = peers.admit(mapped, &limits).map_err(str::to_owned).expect("a place");
        assert_eq!(peers.admit(one, &limits).err(), Some("peer"));
        let _third = peers.admit(two, &limits).map_err(str::to_owned).expect("a place");
        assert_eq!(peers.admit(two, &limits).err(), Some("process"));
        drop(first);
        assert!(peers.admit(one, &limits).is_ok());
    }

    #[test]
    fn ages_differ_by_a_tenth_at_most() {
        for _ in 0..1000 {
            let age = vary(Duration::from_secs(60)).as_secs_f64();
            assert!((53.99..=66.01).contains(&age), "{age}");
        }
    }
}
