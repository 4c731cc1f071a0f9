//! What became of the damaged models.

use std::fmt::{Display, Formatter, Result};
use std::sync::atomic::{AtomicU64, Ordering};

static REFUSED: AtomicU64 = AtomicU64::new(0);
static SAME: AtomicU64 = AtomicU64::new(0);
static OTHER: AtomicU64 = AtomicU64::new(0);

/// One was refused.
pub(super) fn refused() {
    REFUSED.fetch_add(1, Ordering::Relaxed);
}

/// One was accepted, since it still says the same.
pub(super) fn same() {
    SAME.fetch_add(1, Ordering::Relaxed);
}

/// One was accepted as another model that could be: nothing but a digest can tell.
pub(super) fn other() {
    OTHER.fetch_add(1, Ordering::Relaxed);
}

/// The counts until now.
pub(super) struct Tally;

impl Display for Tally {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let [refused, same, other] = [&REFUSED, &SAME, &OTHER].map(|count| count.load(Ordering::Relaxed));
        let all = refused + same + other;
        write!(
            f,
            "{all} damaged: {refused} refused, {same} still the same model, {other} another sound model, which a digest tells"
        )
    }
}
