//! The server's clock: it stands still until a test moves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;

/// 2026-01-01T00:00:00Z, where every clock starts.
const START: i64 = 1_767_225_600_000;

/// A clock shared by a server, its simulation and the test that owns them.
#[derive(Clone, Debug)]
pub struct Clock {
    milliseconds: Arc<AtomicI64>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { milliseconds: Arc::new(AtomicI64::new(START)) }
    }
}

impl Clock {
    /// The current time.
    pub fn now(&self) -> Timestamp {
        Timestamp::from_millisecond(self.milliseconds.load(Ordering::SeqCst)).unwrap_or(Timestamp::MAX)
    }

    /// The current time as `metav1.Time` prints it: whole seconds.
    pub fn text(&self) -> String {
        self.now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.milliseconds.fetch_add(by, Ordering::SeqCst);
    }
}
