//! PURE: what to do about a Lease.

use std::time::Duration;

use tokio::time::Instant;

/// What a Lease says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Claim {
    /// Who holds it; `None` when it was handed back.
    pub(super) holder: Option<String>,
    /// Changes with every renewal.
    pub(super) version: String,
    /// How long it holds without a renewal.
    pub(super) duration: Duration,
}

/// A Lease as we saw it last, and when we first saw it so.
#[derive(Clone, Debug)]
pub(super) struct Observation {
    claim: Claim,
    since: Instant,
}

impl Observation {
    pub(super) fn new(claim: Claim, since: Instant) -> Self {
        Self { claim, since }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// There is no Lease.
    Create,
    /// It is ours, or nobody's any more: write it.
    Hold,
    /// It is another's.
    Wait,
}

/// The step for the Lease as it is now; remembers when it was first seen so.
pub(super) fn next(now_is: Option<Claim>, seen: &mut Option<Observation>, me: &str, now: Instant) -> Step {
    let Some(claim) = now_is else {
        *seen = None;
        return Step::Create;
    };
    let since = match seen {
        Some(before) if before.claim == claim => before.since,
        _ => now,
    };
    let expired = now.duration_since(since) > claim.duration;
    let free = claim.holder.as_deref().is_none_or(|holder| holder == me);
    *seen = Some(Observation { claim, since });
    if free || expired { Step::Hold } else { Step::Wait }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(holder: Option<&str>, version: &str) -> Claim {
        Claim { holder: holder.map(str::to_owned), version: version.to_owned(), duration: Duration::from_secs(15) }
    }

    #[test]
    fn an_absent_lease_is_created_and_a_free_one_taken_at_once() {
        let now = Instant::now();
        assert_eq!(next(None, &mut None, "me", now), Step::Create);
        assert_eq!(next(Some(claim(None, "1")), &mut None, "me", now), Step::Hold);
        assert_eq!(next(Some(claim(Some("me"), "1")), &mut None, "me", now), Step::Hold);
    }

    #[test]
    fn a_holder_is_given_up_only_after_the_lease_stood_still_before_our_own_eyes() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut seen = None;
        assert_eq!(next(Some(claim(Some("other"), "1")), &mut seen, "me", start), Step::Wait);
        assert_eq!(next(Some(claim(Some("other"), "1")), &mut seen, "me", after(14)), Step::Wait);
        assert_eq!(next(Some(claim(Some("other"), "2")), &mut seen, "me", after(15)), Step::Wait, "renewed");
        assert_eq!(next(Some(claim(Some("other"), "2")), &mut seen, "me", after(30)), Step::Wait);
        assert_eq!(next(Some(claim(Some("other"), "2")), &mut seen, "me", after(31)), Step::Hold);
    }

    #[test]
    fn a_lease_that_was_deleted_and_made_again_is_observed_anew() {
        let start = Instant::now();
        let mut seen = None;
        next(Some(claim(Some("other"), "1")), &mut seen, "me", start);
        assert_eq!(next(None, &mut seen, "me", start), Step::Create);
        let later = start + Duration::from_secs(60);
        assert_eq!(next(Some(claim(Some("other"), "1")), &mut seen, "me", later), Step::Wait);
    }
}
