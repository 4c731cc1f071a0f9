//! Eighth rule: how long a lower need must last before replicas go, learnt from regret.
//!
//! When a replica is wanted back soon after it was given up, the window grows; unused, it decays to where it began. Idling a
//! replica for about as long as its cold start costs at most twice what the best choice would have cost (ski rental), so the
//! window begins near a cold start and stays within bounds.

use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// Seconds of the window at first, at least and at most.
pub const FIRST: f64 = 120.0;
const LEAST: f64 = 60.0;
const MOST: f64 = 900.0;
/// Growth of the window with each regret.
const REGRET: f64 = 2.0;
/// Seconds within which a replica that is wanted back is regretted at least: a change of direction within them is flapping.
const SOON: f64 = 600.0;
/// Seconds without regret after which the window decays, and the share that it keeps each second then. Constant load near a
/// whole number of replicas strays across it once in a few hours: a window that forgets sooner learns the same each time.
const CALM: f64 = 1800.0;
const DECAY: f64 = 0.99999;
/// Stretches of time whose recommendations are remembered apart.
const STRETCHES: f64 = 24.0;

/// The window and what was recommended within it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DownWindow {
    /// Seconds.
    pub seconds: f64,
    /// Recommendations: end of the stretch, highest for a decrease, lowest for an increase.
    stretches: Vec<(Moment, u32, u32)>,
    /// When replicas were last given up.
    pub last_down: Option<Moment>,
    /// When that was last regretted.
    last_regret: Option<Moment>,
}

impl Default for DownWindow {
    fn default() -> Self {
        Self { seconds: FIRST, stretches: Vec::new(), last_down: None, last_regret: None }
    }
}

impl DownWindow {
    /// Remembers what would be recommended now, for windows of up to `seconds`.
    pub fn record(&mut self, for_decrease: u32, for_increase: u32, seconds: f64, now: Moment) {
        // As long as the window may become by one regret.
        let seconds = seconds * REGRET;
        let width = (seconds / STRETCHES * 2.0).max(1.0);
        let count = self.stretches.len();
        // The end of a stretch moves on while it is open: measured from the end of the one before.
        let opened = count.checked_sub(2).map_or(Moment(i64::MIN), |before| self.stretches[before].0);
        match self.stretches.last_mut() {
            Some(last) if count >= 2 && now.since(opened) <= width => {
                *last = (now, last.1.max(for_decrease), last.2.min(for_increase));
            }
            _ => self.stretches.push((now, for_decrease, for_increase)),
        }
        let old = self.stretches.iter().take_while(|stretch| now.since(stretch.0) > seconds).count();
        let excess = self.stretches.len().saturating_sub(STRETCHES as usize + 3);
        self.stretches.drain(..old.max(excess));
    }

    /// Forgets what was recommended after a moment: the clock was set back to it.
    pub fn forget_after(&mut self, now: Moment) {
        self.stretches.retain(|stretch| stretch.0 <= now);
    }

    /// The highest recommendation for a decrease in the last `seconds`.
    pub fn highest(&self, seconds: f64, now: Moment) -> u32 {
        self.within(seconds, now).map(|stretch| stretch.1).max().unwrap_or(0)
    }

    /// The lowest recommendation for an increase in the last `seconds`.
    pub fn lowest(&self, seconds: f64, now: Moment) -> u32 {
        self.within(seconds, now).map(|stretch| stretch.2).min().unwrap_or(u32::MAX)
    }

    fn within(&self, seconds: f64, now: Moment) -> impl Iterator<Item = &(Moment, u32, u32)> {
        self.stretches.iter().filter(move |stretch| now.since(stretch.0) <= seconds)
    }

    /// Learns from a decision: whether replicas were added or given up, after `elapsed` seconds since the last.
    pub fn learn(&mut self, from: u32, to: u32, lead_time: f64, elapsed: f64, now: Moment) {
        if to < from {
            self.last_down = Some(now);
            return;
        }
        let soon = (4.0 * lead_time).max(SOON);
        let wanted_back = to > from && self.last_down.is_some_and(|down| now.since(down) <= soon);
        // Several regrets within one window are one: what is remembered reaches back for one growth of the window.
        let is_new = self.last_regret.is_none_or(|regret| now.since(regret) >= self.seconds);
        if wanted_back && is_new {
            self.seconds = (self.seconds * REGRET).min(MOST);
            self.last_regret = Some(now);
        } else if self.last_regret.is_none_or(|regret| now.since(regret) > CALM) && self.seconds > FIRST {
            self.seconds = (self.seconds * DECAY.powf(elapsed.clamp(0.0, CALM))).clamp(FIRST.max(LEAST), MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn the_highest_recommendation_counts_until_the_window_has_passed() {
        let mut window = DownWindow::default();
        for tick in 0..200 {
            let now = at(f64::from(tick) * 5.0);
            window.record(if tick == 10 { 9 } else { 3 }, 3, 180.0, now);
            let expected = (10..=46).contains(&tick);
            assert!(!expected || window.highest(180.0, now) == 9, "tick {tick}");
            assert!(tick < 50 || window.highest(180.0, now) == 3, "tick {tick}: at most one stretch longer");
            assert!(window.stretches.len() <= STRETCHES as usize + 3);
        }
    }

    #[test]
    fn a_replica_wanted_back_soon_lengthens_the_window_and_calm_shortens_it() {
        let mut window = DownWindow::default();
        window.learn(5, 4, 60.0, 5.0, at(0.0));
        window.learn(4, 5, 60.0, 5.0, at(100.0));
        assert_eq!(window.seconds, FIRST * REGRET);
        window.learn(5, 6, 60.0, 5.0, at(110.0));
        assert_eq!(window.seconds, FIRST * REGRET, "the same regret");
        window.learn(6, 6, 60.0, 5.0, at(1000.0));
        assert_eq!(window.seconds, FIRST * REGRET);
        let mut calm = |from: u32, to: u32| {
            (from..to).for_each(|hour| window.learn(6, 6, 60.0, 1800.0, at(3600.0 * f64::from(hour))));
            window.seconds
        };
        let evening = calm(1, 11);
        assert!(evening > 1.5 * FIRST && evening < FIRST * REGRET, "{evening}");
        assert_eq!(calm(11, 96), FIRST);
    }

    #[test]
    fn a_replica_wanted_back_within_ten_minutes_is_regretted_however_short_cold_starts_are() {
        for (later, expected) in [(599.0, FIRST * REGRET), (601.0, FIRST)] {
            let mut window = DownWindow::default();
            window.learn(5, 4, 5.0, 5.0, at(0.0));
            window.learn(4, 5, 5.0, 5.0, at(later));
            assert_eq!(window.seconds, expected, "{later}");
        }
    }
}
