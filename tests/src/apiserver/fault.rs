//! Faults: what goes wrong with which request.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::call::Call;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Effect {
    /// The answer is this HTTP status: 429, 500, 503, 504 and so on.
    Status(u16),
    /// The connection breaks.
    Reset,
    /// No answer ever comes.
    Hang,
    /// The answer comes late.
    Delay(Duration),
    /// The client's process dies: no answer ever comes, and [`super::ApiServer::crashed`] resolves.
    Crash,
}

/// Whether the request has taken effect when the fault strikes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moment {
    /// It has not, and never will.
    Before,
    /// It has; only the answer is lost.
    After,
}

type Filter = Arc<dyn Fn(&Call) -> bool + Send + Sync>;

/// A rule: from the n-th request that it matches on, for a number of requests, something goes wrong.
#[derive(Clone)]
pub struct Fault {
    filter: Filter,
    effect: Effect,
    moment: Moment,
    first: u64,
    count: u64,
    seen: u64,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { filter: _, effect, moment, first, count, seen } = self;
        write!(f, "Fault({effect:?} {moment:?} from {first} for {count}, seen {seen})")
    }
}

impl Fault {
    /// The first request that the filter accepts fails before it takes effect.
    pub fn new(effect: Effect, filter: impl Fn(&Call) -> bool + Send + Sync + 'static) -> Self {
        Self { filter: Arc::new(filter), effect, moment: Moment::Before, first: 1, count: 1, seen: 0 }
    }

    /// The request takes effect and its answer is lost.
    #[must_use]
    pub fn after(self) -> Self {
        self.at(Moment::After)
    }

    /// Sets the moment.
    #[must_use]
    pub fn at(mut self, moment: Moment) -> Self {
        self.moment = moment;
        self
    }

    /// Strikes from the n-th matching request on, counted from 1.
    #[must_use]
    pub fn nth(mut self, n: u64) -> Self {
        self.first = n.max(1);
        self
    }

    /// Strikes this many times.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.count = count;
        self
    }

    /// Strikes every time.
    #[must_use]
    pub fn always(self) -> Self {
        self.times(u64::MAX)
    }

    /// Counts a request: the fault, when it strikes.
    pub(super) fn strike(&mut self, call: &Call) -> Option<(Effect, Moment)> {
        if !(self.filter)(call) {
            return None;
        }
        self.seen += 1;
        let struck = self.seen >= self.first && self.seen - self.first < self.count;
        struck.then_some((self.effect, self.moment))
    }

    /// Whether the fault has struck as often as it was to.
    pub fn is_spent(&self) -> bool {
        self.seen >= self.first && self.seen - self.first >= self.count.saturating_sub(1)
    }
}
