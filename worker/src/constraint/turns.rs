//! How many grammars are compiled at once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Compilations at once; each may take a processor and hundreds of megabytes.
const AT_ONCE: usize = 2;
/// Those that wait, each on a thread that other requests want.
const WAITING: usize = 8;

/// Who compiles, and who waits for that.
#[derive(Default)]
pub(super) struct Turns {
    counts: Mutex<Counts>,
    freed: Condvar,
}

#[derive(Default)]
struct Counts {
    compiling: usize,
    waiting: usize,
}

/// The right to compile, given back when it is dropped.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn; `None` at once when too many wait.
    pub(super) fn take(&self) -> Option<Turn<'_>> {
        let mut counts = self.counts();
        if counts.compiling >= AT_ONCE {
            if counts.waiting >= WAITING {
                return None;
            }
            counts.waiting += 1;
            while counts.compiling >= AT_ONCE {
                counts = self.freed.wait(counts).unwrap_or_else(PoisonError::into_inner);
            }
            counts.waiting -= 1;
        }
        counts.compiling += 1;
        Some(Turn(self))
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.counts().compiling -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_compile_eight_wait_and_the_next_is_refused() {
        let turns = Turns::default();
        let compiling: Vec<_> = (0..AT_ONCE).map(|_| turns.take().expect("a turn")).collect();
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..WAITING).map(|_| scope.spawn(|| turns.take().is_some())).collect();
            while turns.counts().waiting < WAITING {
                std::thread::yield_now();
            }
            assert!(turns.take().is_none());
            drop(compiling);
            assert!(waiters.into_iter().all(|waiter| waiter.join().expect("ends")));
        });
        assert!(turns.take().is_some());
    }
}
