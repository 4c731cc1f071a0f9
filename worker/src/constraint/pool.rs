//! The threads that work out what may come next, beside the forward pass.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::matcher::{Matcher, Place, Stuck};
use super::vocabulary::Vocabulary;
use super::{ConstraintError, Grammar, unexpected};

/// Threads, at most: a mask takes a fraction of a forward pass, which wants the processors for itself.
const THREADS: usize = 4;
/// Stack of a thread. Grammars that were compiled recurse no deeper.
const STACK: usize = 64 << 20;

/// From where an answer goes on.
pub(super) enum Origin {
    /// The beginning of its grammar, whose matcher is not moved: it gets one of its own.
    Beginning(Arc<Grammar>),
    /// Where its matcher stands.
    Place(Matcher),
}

/// Where an answer is, and the token that it goes on with.
struct Job {
    from: Origin,
    token: u32,
    vocabulary: Arc<Vocabulary>,
    done: SyncSender<Done>,
}

/// What came of it.
pub(super) struct Done {
    /// Behind the token.
    pub(super) matcher: Matcher,
    /// What may come next.
    pub(super) place: Result<Place, Stuck>,
    /// How long that took.
    pub(super) took: Duration,
}

/// The threads. They end when it is dropped.
pub(super) struct Pool {
    jobs: Sender<Job>,
}

impl Pool {
    pub(super) fn start() -> Result<Self, ConstraintError> {
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for index in 0..cores.div_ceil(2).min(THREADS) {
            let receiver = Arc::clone(&receiver);
            let builder = std::thread::Builder::new().name(format!("ernie-mask-{index}")).stack_size(STACK);
            let thread = builder.spawn(move || work(&receiver));
            thread.map_err(|error| unexpected(&format!("the system gave no thread: {error}")))?;
        }
        Ok(Self { jobs })
    }

    /// Has an answer's matcher take a token and look on. The receiver hears nothing if that fails.
    pub(super) fn advance(&self, from: Origin, token: u32, vocabulary: Arc<Vocabulary>) -> Receiver<Done> {
        let (done, receiver) = sync_channel(1);
        // Fails when no thread is left; then `done` is dropped, and whoever receives knows.
        let _ = self.jobs.send(Job { from, token, vocabulary, done });
        receiver
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { from, token, vocabulary, done }) = job else { return };
        // What panics takes its matcher along, and the answer hears that `done` is gone.
        let _ = catch_unwind(AssertUnwindSafe(move || {
            let begun = Instant::now();
            let mut matcher = match from {
                Origin::Beginning(grammar) => grammar.matcher.fork(),
                Origin::Place(matcher) => matcher,
            };
            let place = matcher.advance(&[token]).and_then(|()| matcher.look(&vocabulary));
            // Fails when the answer is gone.
            let _ = done.send(Done { matcher, place, took: begun.elapsed() });
        }));
    }
}
