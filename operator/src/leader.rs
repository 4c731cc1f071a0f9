//! One process leads, by a Lease. Nothing depends on it for safety: two leaders at once break nothing, they only do the
//! work twice.

use tokio::sync::watch;

/// Whether this process may write.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<bool>);

impl Leadership {
    /// For a process that has no rival.
    pub fn always() -> Self {
        Self(watch::channel(true).1)
    }

    /// True while this process leads.
    pub fn holds(&self) -> bool {
        *self.0.borrow()
    }
}
