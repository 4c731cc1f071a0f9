//! Bounds on requests that have arrived and are not yet with the engine, which hold memory that no queue counts: how
//! many there are, how large they are together, and how much text is being worked on at once.
//!
//! The memory plan reserves for both: [`ARRIVING_BYTES`] in its overhead, and the text by its factor for each byte.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};

use super::{calls::MAX_REQUEST_BYTES, status};

/// Bytes of all requests that are arriving. Each may be held twice: as it came, and as a message.
pub const ARRIVING_BYTES: usize = 4 << 20;
/// What one call may send beside its message: the frame's header, and a second message that is none of ours.
const BESIDE_THE_MESSAGE: usize = 64 << 10;

/// What all arriving requests share.
#[derive(Debug)]
pub(super) struct Arrivals {
    places: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Arrivals {
    /// Room for so many requests of so many bytes together.
    pub(super) fn new(places: usize, bytes: usize) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { places: semaphore(places), bytes: semaphore(bytes) }
    }

    /// A place for a request of which nothing has been read, or the refusal.
    pub(super) fn admit(&self) -> Result<Arrival, Status> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_full| full())?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(0).map_err(|_closed| full())?;
        Ok(Arrival(Arc::new(Held { bytes: Mutex::new(bytes), budget: Arc::clone(&self.bytes), _place: place })))
    }
}

fn full() -> Status {
    let sentence = "the server is receiving as many requests as it can; retry";
    status::retry(Code::ResourceExhausted, sentence, std::time::Duration::from_secs(1))
}

/// What one arriving request holds. Clones share it; the last one to go gives it back.
#[derive(Clone, Debug)]
pub(super) struct Arrival(Arc<Held>);

#[derive(Debug)]
struct Held {
    bytes: Mutex<OwnedSemaphorePermit>,
    budget: Arc<Semaphore>,
    _place: OwnedSemaphorePermit,
}

/// How much text is worked on at once. Clones share it.
#[derive(Clone, Debug)]
pub struct TextBudget {
    bytes: usize,
    free: Arc<Semaphore>,
}

impl TextBudget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.min(u32::MAX as usize);
        Self { bytes, free: Arc::new(Semaphore::new(bytes)) }
    }

    /// The most that one text may have, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The right to work on a request's text. Keeps the request's place as well.
#[derive(Debug)]
pub(super) struct Working {
    _arrival: Arrival,
    _share: OwnedSemaphorePermit,
}

impl Arrival {
    /// Counts bytes that came.
    fn receive(&self, bytes: usize) -> Result<(), Status> {
        let mut held = self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if held.num_permits() + bytes > MAX_REQUEST_BYTES + BESIDE_THE_MESSAGE {
            return Err(status::too_large(MAX_REQUEST_BYTES));
        }
        let more =
            u32::try_from(bytes).ok().and_then(|bytes| Arc::clone(&self.0.budget).try_acquire_many_owned(bytes).ok());
        held.merge(more.ok_or_else(full)?);
        Ok(())
    }

    /// Waits until the request's text may be worked on.
    pub(super) async fn work(self, budget: &TextBudget) -> Result<Working, Status> {
        let bytes = self.0.bytes.lock().unwrap_or_else(PoisonError::into_inner).num_permits().min(budget.bytes);
        let share = Arc::clone(&budget.free).acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX));
        // Never closed.
        let share = share.await.map_err(|_closed| full())?;
        Ok(Working { _arrival: self, _share: share })
    }
}

/// Runs slow work once its turn has come. What arrived is held until the work is done, even when nobody waits any more.
pub(super) async fn off_the_async_threads<T: Send + 'static>(
    budget: &TextBudget,
    arrival: Option<Arrival>,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let working = match arrival {
        Some(arrival) => Some(arrival.work(budget).await?),
        None => None,
    };
    let work = move || {
        let result = work();
        drop(working);
        result
    };
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_panic| Err(Status::internal("the server failed on this request; its log says more")))
}

/// A request's body whose bytes are counted.
#[derive(Debug)]
pub(super) struct Received<B> {
    inner: B,
    arrival: Option<Arrival>,
}

impl<B> Received<B> {
    /// Counts against an arrival; without one, nothing is counted.
    pub(super) fn new(inner: B, arrival: Option<Arrival>) -> Self {
        Self { inner, arrival }
    }
}

impl<B> HttpBody for Received<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        if let (Some(Ok(frame)), Some(arrival)) = (&frame, &self.arrival)
            && let Some(data) = frame.data_ref()
            && let Err(status) = arrival.receive(data.remaining())
        {
            return Poll::Ready(Some(Err(status.into())));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn requests_that_arrive_are_bounded_in_number_and_bytes() {
        let arrivals = Arrivals::new(2, 1000);
        let (first, second) = (arrivals.admit().expect("a place"), arrivals.admit().expect("a place"));
        assert_eq!(arrivals.admit().expect_err("full").code(), Code::ResourceExhausted);
        first.receive(400).expect("room");
        first.receive(300).expect("room");
        let status = second.receive(301).expect_err("too many bytes");
        assert!(status.metadata().contains_key(status::PUSHBACK), "{status}");
        second.receive(300).expect("room");
        drop(first);
        second.receive(700).expect("room again");
        arrivals.admit().expect("a place again");
    }

    #[test]
    fn one_request_cannot_take_the_bytes_of_all() {
        let arrival = Arrivals::new(1, ARRIVING_BYTES).admit().expect("a place");
        arrival.receive(MAX_REQUEST_BYTES + 5).expect("the largest message");
        let status = arrival.receive(BESIDE_THE_MESSAGE).expect_err("more");
        assert_eq!(status.message(), "the request is larger than 1 MiB; send less text");
    }

    #[test]
    fn a_request_that_is_worked_on_keeps_its_place_when_its_call_is_gone() {
        let arrivals = Arrivals::new(1, ARRIVING_BYTES);
        let arrival = arrivals.admit().expect("a place");
        arrival.receive(10).expect("room");
        let working = arrival.clone().work(&TextBudget::new(5)).now_or_never().expect("at once").expect("open");
        drop(arrival);
        assert!(arrivals.admit().is_err());
        drop(working);
        assert!(arrivals.admit().is_ok());
    }

    #[test]
    fn large_texts_are_worked_on_one_after_the_other() {
        let budget = TextBudget::new(64 << 10);
        let arrivals = Arrivals::new(3, ARRIVING_BYTES);
        let of = |bytes| {
            let arrival = arrivals.admit().expect("a place");
            arrival.receive(bytes).expect("room");
            arrival
        };
        let (small, large, other) = (of(1000), of(MAX_REQUEST_BYTES), of(1000));
        let working = small.work(&budget).now_or_never().expect("at once").expect("open");
        let mut large = Box::pin(large.work(&budget));
        assert!(large.as_mut().now_or_never().is_none());
        drop(working);
        let working = large.now_or_never().expect("now").expect("open");
        assert!(other.work(&budget).now_or_never().is_none());
        drop(working);
    }
}
