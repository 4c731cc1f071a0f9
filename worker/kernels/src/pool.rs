//! The thread pool: parallel loops whose iterations are handed out from a shared counter.
//!
//! A loop is *opened* by its caller, who works on it like everybody else. Workers that are awake enter it and take one
//! iteration after the other; a worker that the operating system does not run takes none, so a busy neighbour costs its
//! share and no more. When nothing is left the caller *closes* the loop, after which nobody can enter, and waits for
//! those inside. Waiting means spinning for some microseconds, then sleeping: a sleeping caller leaves its core to the
//! worker it waits for.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker without work spins before it sleeps; longer than the steps between two loops of a forward pass.
const WORKER_SPIN: Duration = Duration::from_micros(60);
/// How long a caller spins for the last workers before it sleeps.
const CALLER_SPIN: Duration = Duration::from_micros(20);

/// Threads that run parallel loops. The thread that calls [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the one caller whose loop is open.
    turn: Mutex<()>,
}

/// One cache line pair, so that counters do not share lines.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    /// Loop number in the upper half, [`OPEN`], and how many workers are inside.
    state: Line<AtomicU64>,
    /// The next iteration to hand out.
    next: Line<AtomicUsize>,
    /// The loop; written only while closed and empty.
    job: UnsafeCell<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// Workers that sleep or are about to.
    sleeping: AtomicUsize,
    bed: Mutex<()>,
    wake: Condvar,
    /// Whether the caller sleeps or is about to.
    caller_sleeps: AtomicBool,
    caller_bed: Mutex<()>,
    caller_wake: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;

// SAFETY: `job` is the only field that is not Sync. It is written by the caller that holds `turn`, while the loop is
// closed and nobody is inside; workers read it only after entering an open loop. Entering is an acquire operation on
// `state` that reads the caller's release, and leaving is a release that the caller acquires before it writes again.
// The task it points to is Sync.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is only followed while the caller that borrowed the task is inside `run`.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] among them: it starts `threads - 1`.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let shared = Arc::new(Shared {
            state: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job { task: &|_| {}, tasks: 0 }),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
            caller_bed: Mutex::new(()),
            caller_wake: Condvar::new(),
        });
        let mut pool = Pool { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("kernels-{number}"));
            pool.workers.push(thread.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)`, …, `task(tasks - 1)`, each once, in any order and on any thread, and returns when all are done.
    /// Called from inside a task, or while another thread runs a loop, it runs the iterations itself.
    ///
    /// # Panics
    /// With the payload of the first iteration that panicked, after every thread has left the loop; iterations not
    /// begun by then are skipped. The pool stays usable.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        let turn =
            if tasks > 1 && !self.workers.is_empty() { self.turn.try_lock() } else { return inline(tasks, task) };
        let Ok(_turn) = turn else { return inline(tasks, task) };
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. The pointer is followed by workers inside the loop only, and this function
        // neither returns nor unwinds before it has closed the loop and seen the last of them leave.
        let task: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(task) };
        let job = Job { task, tasks };
        // SAFETY: `turn` is held, the last loop was closed and left by everybody: nobody else reads or writes `job`.
        unsafe { *shared.job.get() = job };
        shared.next.0.store(0, Ordering::Relaxed);
        let number = (shared.state.0.load(Ordering::Relaxed) & !INSIDE & !OPEN).wrapping_add(NUMBER);
        shared.state.0.store(number | OPEN, Ordering::SeqCst);
        shared.wake_workers(tasks - 1);
        shared.take_iterations(job);
        shared.state.0.fetch_and(!OPEN, Ordering::SeqCst);
        shared.wait_until_empty();
        let panic = lock(&shared.panic).take();
        if let Some(payload) = panic {
            drop(_turn);
            resume_unwind(payload);
        }
    }

    /// Splits `0..len` into ranges of at least `grain` and runs `task` on each, several for each thread.
    pub fn run_ranges(&self, len: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
        let pieces = (len / grain.max(1)).clamp(1, 4 * self.threads());
        self.run(pieces, |piece| {
            let range = len * piece / pieces..len * (piece + 1) / pieces;
            if !range.is_empty() {
                task(range);
            }
        });
    }
}

fn inline(tasks: usize, task: impl Fn(usize)) {
    (0..tasks).for_each(task);
}

/// Locks whatever a panicking thread may have left: no data is behind these locks that a panic could leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let state = self.wait_for_loop(seen);
            let Some(state) = state else { return };
            seen = state & !INSIDE & !OPEN;
            if self.enter(state) {
                // SAFETY: inside an open loop, `job` is not written, and its task is alive (see `run`).
                let job = unsafe { *self.job.get() };
                self.take_iterations(job);
                self.leave();
            }
        }
    }

    /// The state of an open loop other than `seen`, or `None` when the pool stops.
    fn wait_for_loop(&self, seen: u64) -> Option<u64> {
        let ready = || {
            let state = self.state.0.load(Ordering::SeqCst);
            (state & OPEN != 0 && state & !INSIDE & !OPEN != seen).then_some(state)
        };
        loop {
            if let Some(state) = spin(WORKER_SPIN, || ready().or(self.stop.load(Ordering::Relaxed).then_some(0))) {
                return (state != 0).then_some(state);
            }
            let mut guard = lock(&self.bed);
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            while ready().is_none() && !self.stop.load(Ordering::SeqCst) {
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Counts this worker in, unless the loop that was open at `state` has been closed.
    fn enter(&self, mut state: u64) -> bool {
        let number = state & !INSIDE & !OPEN;
        while state & OPEN != 0 && state & !INSIDE & !OPEN == number {
            match self.state.0.compare_exchange_weak(state, state + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    fn leave(&self) {
        let before = self.state.0.fetch_sub(1, Ordering::SeqCst);
        if before & (OPEN | INSIDE) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
            drop(lock(&self.caller_bed));
            self.caller_wake.notify_one();
        }
    }

    fn wake_workers(&self, wanted: usize) {
        let asleep = self.sleeping.load(Ordering::SeqCst);
        if asleep > 0 {
            drop(lock(&self.bed));
            (0..wanted.min(asleep)).for_each(|_| self.wake.notify_one());
        }
    }

    fn take_iterations(&self, job: Job) {
        // SAFETY: the caller of this function is inside the loop or is `run` itself, so the task is alive.
        let task = unsafe { &*job.task };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let iteration = self.next.0.fetch_add(1, Ordering::Relaxed);
                if iteration >= job.tasks {
                    break;
                }
                task(iteration);
            }
        }));
        if let Err(payload) = result {
            self.next.0.fetch_max(job.tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    fn wait_until_empty(&self) {
        let empty = || (self.state.0.load(Ordering::SeqCst) & INSIDE == 0).then_some(());
        if spin(CALLER_SPIN, empty).is_some() {
            return;
        }
        let mut guard = lock(&self.caller_bed);
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while empty().is_none() {
            guard = self.caller_wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }
}

/// Tries `ready` for about `limit`.
fn spin<T>(limit: Duration, ready: impl Fn() -> Option<T>) -> Option<T> {
    let mut start = None;
    loop {
        for _ in 0..32 {
            if let Some(value) = ready() {
                return Some(value);
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() >= limit {
            return None;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.bed));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks and has none of its own.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool of {} threads", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(threads).expect("threads can be started")
    }

    #[test]
    fn every_iteration_runs_once_at_every_thread_count() {
        for threads in [1, 2, 3, 8] {
            let pool = pool(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
                pool.run(tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks}");
            }
        }
    }

    #[test]
    fn thousands_of_short_loops_follow_each_other_and_results_are_visible_after_each() {
        let pool = pool(4);
        let cells: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        for round in 1..=20_000 {
            pool.run(cells.len(), |i| cells[i].store(round, Ordering::Relaxed));
            assert!(cells.iter().all(|cell| cell.load(Ordering::Relaxed) == round));
        }
    }

    #[test]
    fn sleeping_workers_are_woken_for_the_next_loop() {
        let pool = pool(2);
        for _ in 0..20 {
            let deadline = Instant::now() + Duration::from_secs(10);
            while pool.shared.sleeping.load(Ordering::SeqCst) == 0 {
                assert!(Instant::now() < deadline, "the worker never went to sleep");
                std::thread::yield_now();
            }
            // Both iterations must be under way at once: one of them on the worker.
            let inside = AtomicU32::new(0);
            pool.run(2, |_| {
                inside.fetch_add(1, Ordering::SeqCst);
                while inside.load(Ordering::SeqCst) < 2 {
                    assert!(Instant::now() < deadline, "the worker was not woken");
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_in_any_iteration_reaches_the_caller_and_the_pool_survives() {
        let pool = pool(3);
        for bad in [0, 5, 63] {
            let result =
                catch_unwind(AssertUnwindSafe(|| pool.run(64, |i| assert!(i != bad, "iteration {bad} fails"))));
            let payload = result.expect_err("the panic is passed on");
            let text = payload.downcast_ref::<String>().expect("a formatted message");
            assert!(text.contains(&format!("iteration {bad} fails")), "{text}");
            let sum = AtomicUsize::new(0);
            pool.run(64, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 63 * 64 / 2);
        }
    }

    #[test]
    fn a_loop_inside_a_loop_and_loops_from_two_threads_complete() {
        let pool = pool(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(4, |_| {
                            pool.run(4, |i| {
                                sum.fetch_add(i, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 2 * 500 * 4 * 6);
    }

    #[test]
    fn ranges_cover_everything_once() {
        let pool = pool(3);
        for (len, grain) in [(0, 1), (1, 10), (1000, 1), (1000, 300), (7, 0)] {
            let counts: Vec<AtomicU32> = (0..len).map(|_| AtomicU32::new(0)).collect();
            pool.run_ranges(len, grain, |range| {
                for i in range {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{len} by {grain}");
        }
    }
}
