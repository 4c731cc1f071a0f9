//! Which lists were read, and which cannot be.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const STARTING: u8 = 0;
const SYNCED: u8 = 1;
const ABSENT: u8 = 2;

/// Which lists were read, and which cannot be.
#[derive(Debug, Default)]
pub struct Sync(Mutex<Vec<Mark>>);

/// How one list stands.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    kind: &'static str,
    state: Arc<AtomicU8>,
}

impl Mark {
    pub(super) fn synced(&self) {
        self.state.store(SYNCED, Ordering::Release);
    }

    pub(super) fn absent(&self) {
        self.state.store(ABSENT, Ordering::Release);
    }
}

impl Sync {
    pub(super) fn add(&self, kind: &'static str) -> Mark {
        let mark = Mark { kind, state: Arc::new(AtomicU8::new(STARTING)) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(mark.clone());
        mark
    }

    /// What is missing, in a sentence; `None` when every list was read.
    pub fn missing(&self) -> Option<String> {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = |wanted: u8| {
            let found = marks.iter().filter(|mark| mark.state.load(Ordering::Acquire) == wanted);
            let mut kinds = found.map(|mark| mark.kind).collect::<Vec<_>>();
            kinds.dedup();
            kinds.join(", ")
        };
        let (absent, starting) = (kinds(ABSENT), kinds(STARTING));
        if !absent.is_empty() {
            return Some(format!("the API server does not know {absent}: install the CustomResourceDefinition"));
        }
        (!starting.is_empty()).then(|| format!("not listed yet: {starting}"))
    }

    /// Waits until every list was read.
    pub async fn complete(&self) {
        while self.missing().is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
