//! States that come and go with single decisions are told until they are over for good.

use super::Verdict;

/// Decisions without a state after which it is over.
const ABSENT: u32 = 3;

/// The state that was told last.
#[derive(Clone, Debug, Default)]
pub(super) struct Lasting {
    told: Option<Verdict>,
    absent: u32,
}

impl Lasting {
    /// What to tell: `verdict`, or the state that was there a moment ago. `is_state` says whether `verdict` is one.
    pub(super) fn tell(&mut self, verdict: Verdict, is_state: bool) -> Verdict {
        if is_state {
            *self = Self { told: Some(verdict.clone()), absent: 0 };
            return verdict;
        }
        self.absent = self.absent.saturating_add(1);
        if self.absent >= ABSENT {
            self.told = None;
        }
        self.told.clone().unwrap_or(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_over_after_three_decisions_without_it() {
        let mut lasting = Lasting::default();
        let mut reasons = String::new();
        for is_state in [false, true, false, false, true, false, false, false, false] {
            let verdict = Verdict::new(Some(is_state), if is_state { "x" } else { "-" }, "");
            reasons += lasting.tell(verdict, is_state).reason;
        }
        assert_eq!(reasons, "-xxxxxx--");
    }
}
