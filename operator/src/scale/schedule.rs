//! Floors by the clock: a cron expression in a time zone and how long the floor holds from each time that it names.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{Timestamp, Zoned};

use super::moment::Moment;

/// The longest time that a floor may hold from one start, in seconds: a week.
pub const LONGEST: f64 = 7.0 * 86_400.0;

/// Times of one schedule that are compared with another's: an hour's worth, where it names every minute.
const MOST_STARTS: usize = 60;

/// A floor that holds from each time that a cron expression names.
#[derive(Clone, Debug)]
pub struct Schedule {
    text: String,
    cron: Cron,
    zone: TimeZone,
    /// Seconds.
    duration: f64,
    /// Fewest replicas while it holds.
    pub min_replicas: u32,
}

/// Why a schedule cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// Not a cron expression.
    #[error("schedule {text:?} is not a cron expression of five fields, such as \"0 8 * * 1-5\": {cause}")]
    Cron {
        /// What was written.
        text: String,
        /// What is wrong with it.
        cause: String,
    },
    /// It names no time.
    #[error("schedule {text:?} names no time that ever comes: correct day and month")]
    Never {
        /// What was written.
        text: String,
    },
    /// Not a zone.
    #[error("timeZone {0:?} is unknown: write a name of the IANA database, such as Asia/Shanghai or UTC")]
    Zone(String),
    /// Too short or too long.
    #[error("the duration of schedule {text:?} is {seconds} s: it must be between 1 s and 7 days")]
    Duration {
        /// The schedule.
        text: String,
        /// What was written.
        seconds: f64,
    },
}

impl Schedule {
    /// Parses a cron expression of five fields (minute, hour, day of month, month, day of week), a name of the IANA time
    /// zone database, which is compiled in, and a duration in seconds.
    ///
    /// # Errors
    ///
    /// The part that makes no sense, with a form that does.
    pub fn new(text: &str, zone: &str, duration: f64, min_replicas: u32) -> Result<Self, ScheduleError> {
        let refused = |cause: String| ScheduleError::Cron { text: text.to_owned(), cause };
        if text.split_ascii_whitespace().count() != 5 {
            return Err(refused("there must be five fields".to_owned()));
        }
        // The parser takes an empty part for nothing, and then looks for a time that never comes.
        if text.split_ascii_whitespace().flat_map(|field| field.split(',')).any(str::is_empty) {
            return Err(refused("a list has an empty part: write a value on both sides of each comma".to_owned()));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| refused(error.to_string()))?;
        let found = TimeZoneDatabase::bundled().get(zone).map_err(|_| ScheduleError::Zone(zone.to_owned()))?;
        if !(1.0..=LONGEST).contains(&duration) {
            return Err(ScheduleError::Duration { text: text.to_owned(), seconds: duration });
        }
        let epoch = Timestamp::UNIX_EPOCH.to_zoned(found.clone());
        if cron.find_next_occurrence(&epoch, true).is_err() {
            return Err(ScheduleError::Never { text: text.to_owned() });
        }
        Ok(Self { text: text.to_owned(), cron, zone: found, duration, min_replicas })
    }

    /// Whether the floor holds at a moment: one of the times that it names is at most `duration` ago.
    pub fn holds(&self, at: Moment) -> bool {
        let Some(now) = self.zoned(at) else { return false };
        let start = self.cron.find_previous_occurrence(&now, true);
        start.is_ok_and(|start: Zoned| {
            let ago = at.0.saturating_sub(start.timestamp().as_microsecond()) as f64 * 1e-6;
            ago < self.duration
        })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether both hold at some moment of the week after `from`: one of them begins while the other holds.
    pub fn overlaps(&self, other: &Self, from: Moment) -> bool {
        let meets = |one: &Self, another: &Self| one.starts(from).any(|start| another.holds(start));
        meets(self, other) || meets(other, self)
    }

    /// The times that it names in the week after a moment; of very many, the first.
    fn starts(&self, from: Moment) -> impl Iterator<Item = Moment> {
        let until = from.after(LONGEST);
        let first = self.zoned(from);
        let starts = first.into_iter().flat_map(|first| self.cron.iter_after(first));
        starts
            .map(|start| Moment(start.timestamp().as_microsecond()))
            .take_while(move |at| *at <= until)
            .take(MOST_STARTS)
    }

    fn zoned(&self, at: Moment) -> Option<Zoned> {
        Timestamp::from_microsecond(at.0).ok().map(|time| time.to_zoned(self.zone.clone()))
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        let key = |of: &Self| (of.text.clone(), of.zone.iana_name().map(str::to_owned), of.duration, of.min_replicas);
        key(self) == key(other)
    }
}

/// The highest floor that holds now, or will hold once a replica that is asked for now can be ready.
pub fn floor(schedules: &[Schedule], now: Moment, lead_time: f64) -> u32 {
    let soon = now.after(lead_time);
    schedules.iter().filter(|s| s.holds(now) || s.holds(soon)).map(|s| s.min_replicas).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Moment {
        Moment(text.parse::<Timestamp>().expect("a time").as_microsecond())
    }

    #[test]
    fn a_floor_holds_in_office_hours_of_its_own_time_zone() {
        let schedule = Schedule::new("0 8 * * 1-5", "Asia/Shanghai", 36_000.0, 3).expect("valid");
        let floor_at = |text: &str| floor(std::slice::from_ref(&schedule), at(text), 0.0);
        assert_eq!(floor_at("2026-11-24T07:59:59+08:00"), 0);
        assert_eq!(floor_at("2026-11-24T08:00:00+08:00"), 3);
        assert_eq!(floor_at("2026-11-24T17:59:59+08:00"), 3);
        assert_eq!(floor_at("2026-11-24T18:00:00+08:00"), 0);
        assert_eq!(floor_at("2026-11-28T12:00:00+08:00"), 0, "a Saturday");
    }

    #[test]
    fn replicas_are_asked_for_one_lead_time_ahead() {
        let schedule = Schedule::new("0 8 * * *", "UTC", 3600.0, 4).expect("valid");
        let ahead = |lead| floor(std::slice::from_ref(&schedule), at("2026-11-24T07:58:00Z"), lead);
        assert_eq!((ahead(60.0), ahead(120.0)), (0, 4));
    }

    #[test]
    fn local_time_counts_when_clocks_change() {
        let schedule = Schedule::new("30 8 * * *", "Europe/Berlin", 600.0, 2).expect("valid");
        for (day, offset) in [("2026-03-28", "+01:00"), ("2026-03-29", "+02:00"), ("2026-10-25", "+01:00")] {
            assert!(schedule.holds(at(&format!("{day}T08:35:00{offset}"))), "{day}");
            assert!(!schedule.holds(at(&format!("{day}T08:25:00{offset}"))), "{day}");
        }
    }

    #[test]
    fn a_time_that_the_clock_skips_still_has_its_floor() {
        let schedule = Schedule::new("30 2 * * *", "Europe/Berlin", 3600.0, 2).expect("valid");
        assert!(schedule.holds(at("2026-03-29T03:10:00+02:00")), "02:30 does not exist on that day");
    }

    #[test]
    fn nonsense_is_refused_with_a_form_that_works() {
        let error =
            |text: &str, zone: &str, seconds| Schedule::new(text, zone, seconds, 1).expect_err("refused").to_string();
        assert!(error("0 8 * *", "UTC", 60.0).contains("five fields"));
        assert!(error("0 25 * * *", "UTC", 60.0).contains("cron expression"));
        for text in [", * * * *", "0, 8 * * *", "0 8,,9 * * *", "0 8 * * ,1"] {
            assert!(error(text, "UTC", 60.0).contains("empty part"), "{text}");
        }
        assert!(error("0 0 31 2 *", "UTC", 60.0).contains("no time that ever comes"));
        assert!(error("0 8 * * *", "Mars/Olympus", 60.0).contains("Asia/Shanghai"));
        assert!(error("0 8 * * *", "UTC", f64::NAN).contains("7 days"));
    }
}
