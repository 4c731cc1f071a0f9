//! What the person at the terminal is told while something takes a while.

use std::io::Write;
use std::time::{Duration, Instant};

/// Prints one line to standard error, apart from what a command prints as its result.
pub fn say(line: &str) {
    // A closed standard error must not stop the work.
    let _ = writeln!(std::io::stderr().lock(), "cluster: {line}");
}

/// A long step that reports how far it is, at most every ten seconds.
pub(crate) struct Step {
    what: String,
    start: Instant,
    said: Instant,
}

impl Step {
    const INTERVAL: Duration = Duration::from_secs(10);

    pub(crate) fn begin(what: impl Into<String>) -> Self {
        let (what, now) = (what.into(), Instant::now());
        say(&what);
        Self { what, start: now, said: now }
    }

    /// Says how far the step is, if it has been silent for long enough.
    pub(crate) fn advance(&mut self, detail: impl FnOnce() -> String) {
        if self.said.elapsed() >= Self::INTERVAL {
            self.said = Instant::now();
            say(&format!("  {} ({} s)", detail(), self.start.elapsed().as_secs()));
        }
    }

    pub(crate) fn finish(self) {
        say(&format!("{}: done in {:.1} s", self.what, self.start.elapsed().as_secs_f32()));
    }
}
