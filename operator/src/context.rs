//! What a reconcile works with: the client, the settings, and where it reads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kube::Client;

use crate::autoscale::Findings;
use crate::desired::Defaults;
use crate::leader::Leadership;
use crate::metrics::Metrics;
use crate::observe::Reads;
use crate::scale::Moment;

/// Longest wait for one answer of the API server.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// What a reconcile works with.
#[derive(Clone)]
pub struct Context {
    /// Connection to the API server.
    pub client: Client,
    /// What the operator was told about workers.
    pub defaults: Defaults,
    /// Where it reads children and pods.
    pub reads: Reads,
    /// Whether this process may write.
    pub leadership: Leadership,
    /// The operator's own metrics.
    pub metrics: Arc<Metrics>,
    /// What the autoscaler found, for the reconcile.
    pub findings: Arc<Findings>,
    clock: Clock,
    failures: Arc<Mutex<HashMap<String, u32>>>,
}

impl Context {
    /// A context that reads from the API server itself and always leads: for tests and single shots.
    pub fn new(client: Client, defaults: Defaults) -> Self {
        Self {
            client,
            defaults,
            reads: Reads::Direct,
            leadership: Leadership::always(),
            metrics: Arc::new(Metrics::new()),
            findings: Arc::default(),
            clock: Arc::new(Timestamp::now),
            failures: Arc::default(),
        }
    }

    /// The same with other reads.
    #[must_use]
    pub fn with_reads(self, reads: Reads) -> Self {
        Self { reads, ..self }
    }

    /// The same, writing only while it leads.
    #[must_use]
    pub fn with_leadership(self, leadership: Leadership) -> Self {
        Self { leadership, ..self }
    }

    /// The same with other metrics.
    #[must_use]
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..self }
    }

    /// The same with another clock: simulations bring their own.
    #[must_use]
    pub fn with_clock(self, clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self { clock: Arc::new(clock), ..self }
    }

    /// The time, in whole seconds as Kubernetes writes it.
    pub fn now(&self) -> Timestamp {
        let now = (self.clock)();
        Timestamp::from_second(now.as_second()).unwrap_or(now)
    }

    /// The time, as decisions take it.
    pub fn moment(&self) -> Moment {
        Moment((self.clock)().as_microsecond())
    }

    /// Counts another failure of `key` in a row, and says how many there were before.
    pub(crate) fn count_failure(&self, key: &str) -> u32 {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key.to_owned()).or_default();
        let before = *count;
        *count = count.saturating_add(1);
        before
    }

    /// Forgets the failures of `key`.
    pub(crate) fn forget_failures(&self, key: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}
