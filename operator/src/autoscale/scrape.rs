//! SHELL: one page of one worker, within a deadline and a size.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ernie_proto::contract::METRICS;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::scale::exposition::Malformed;

/// Longest time until a whole page is there. Less than the time between two ticks: a worker is asked once at a time.
pub const DEADLINE: Duration = Duration::from_secs(4);
/// Largest page, in bytes; a worker's is a twentieth of it.
const PAGE_LIMIT: usize = 1 << 20;
/// Largest head of an answer, in bytes.
const HEAD_LIMIT: usize = 16 << 10;

/// Why a worker said nothing. Never taken for zero.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum Absence {
    /// It was not asked yet.
    #[error("not asked yet")]
    NotAsked,
    /// The pod has no address.
    #[error("the pod has no address")]
    NoAddress,
    /// No connection, or a broken one.
    #[error("{0}")]
    Unreachable(String),
    /// No whole answer in time.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Timeout,
    /// Another answer than a page.
    #[error("HTTP status {0}")]
    Status(u16),
    /// More than any worker writes.
    #[error("the page is larger than {} KiB", PAGE_LIMIT >> 10)]
    TooLarge,
    /// Not the page of a worker.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// The page of another model's worker: the address belongs to another pod by now.
    #[error("the worker at its address serves {0:?}")]
    OtherModel(String),
}

impl Absence {
    /// A word from a closed set, for metrics.
    pub fn category(&self) -> &'static str {
        match self {
            Absence::NotAsked => "not_asked",
            Absence::NoAddress => "no_address",
            Absence::Unreachable(_) => "unreachable",
            Absence::Timeout => "timeout",
            Absence::Status(_) => "status",
            Absence::TooLarge => "too_large",
            Absence::Malformed(_) => "malformed",
            Absence::OtherModel(_) => "other_model",
        }
    }
}

type Page = Result<Vec<u8>, Absence>;

/// How the metrics page of the worker at an address is had.
#[derive(Clone)]
pub struct Fetch(Arc<dyn Fn(IpAddr) -> BoxFuture<'static, Page> + Send + Sync>);

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fetch")
    }
}

impl Fetch {
    /// In a way of the caller's: simulations bring their own.
    pub fn new(fetch: impl Fn(IpAddr) -> BoxFuture<'static, Page> + Send + Sync + 'static) -> Self {
        Self(Arc::new(fetch))
    }

    /// By HTTP, from a port.
    pub fn http(port: u16) -> Self {
        Self::new(move |address| Box::pin(get(SocketAddr::new(address, port))))
    }

    /// The page, within the deadline.
    pub(super) async fn page(&self, address: IpAddr) -> Page {
        tokio::time::timeout(DEADLINE, (self.0)(address)).await.unwrap_or(Err(Absence::Timeout))
    }
}

async fn get(address: SocketAddr) -> Page {
    let stream = TcpStream::connect(address).await.map_err(|error| unreachable(&error))?;
    let handshake = http1::Builder::new().max_buf_size(HEAD_LIMIT).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|error| unreachable(&error))?;
    // Ends with this function, whichever way that ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let request = http::Request::get(METRICS)
        .header(http::header::HOST, address.to_string())
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| unreachable(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
    if !answer.status().is_success() {
        return Err(Absence::Status(answer.status().as_u16()));
    }
    match Limited::new(answer.into_body(), PAGE_LIMIT).collect().await {
        Ok(page) => Ok(page.to_bytes().to_vec()),
        Err(error) if error.is::<LengthLimitError>() => Err(Absence::TooLarge),
        Err(error) => Err(Absence::Unreachable(error.to_string())),
    }
}

/// The innermost cause says most: `Connection refused (os error 111)`.
fn unreachable(error: &dyn std::error::Error) -> Absence {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    Absence::Unreachable(cause.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// What the client makes of bytes that a server sends before it closes.
    async fn answered(bytes: Vec<u8>) -> Page {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.expect("a request");
            let _ = stream.write_all(&bytes).await;
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let page = Fetch::http(address.port()).page(address.ip()).await;
        let request = server.await.expect("served");
        assert!(request.starts_with("GET /metrics HTTP/1.1\r\n"), "{request}");
        page
    }

    #[tokio::test]
    async fn a_page_is_read_whole() {
        let page = answered(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\na 1\n".to_vec()).await;
        assert_eq!(page, Ok(b"a 1\n".to_vec()));
        let page =
            answered(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\na 1\n\r\n0\r\n\r\n".to_vec()).await;
        assert_eq!(page, Ok(b"a 1\n".to_vec()));
    }

    #[tokio::test]
    async fn every_other_answer_is_an_absence_with_its_cause() {
        let refused = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
        let page = Fetch::http(refused.port()).page(refused.ip()).await;
        assert!(matches!(&page, Err(Absence::Unreachable(why)) if why.contains("refused")), "{page:?}");
        assert_eq!(
            answered(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n".to_vec()).await,
            Err(Absence::Status(503))
        );
        for garbage in [&b"\x00\xffgarbage\r\n\r\n"[..], b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut"] {
            let page = answered(garbage.to_vec()).await;
            assert!(matches!(page, Err(Absence::Unreachable(_))), "{garbage:?}: {page:?}");
        }
        let mut huge = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", PAGE_LIMIT + 1).into_bytes();
        huge.resize(huge.len() + PAGE_LIMIT + 1, b'#');
        assert_eq!(answered(huge).await, Err(Absence::TooLarge));
        let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
        head.extend(b"x: y\r\n".repeat(HEAD_LIMIT));
        assert!(matches!(answered(head).await, Err(Absence::Unreachable(_))));
    }
}
