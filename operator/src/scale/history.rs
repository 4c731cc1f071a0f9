//! What one decision leaves to the next. A few numbers per model: it fits an annotation, and a decision that begins without
//! it is safe, only slower to give replicas up.

use serde::{Deserialize, Serialize};

use super::demand::{Demand, WINDOW};
use super::down_window::DownWindow;
use super::error_budget::ErrorBudget;
use super::imbalance::Imbalance;
use super::lead_time::{ColdStarts, Growth};
use super::learn::StepFit;
use super::moment::Moment;
use super::observation::{FrontDoor, ReplicaId, Sample};
use super::step_cost::Room;

/// Changes of the number of replicas that are remembered.
const EVENTS: usize = 32;

/// Everything that decisions remember.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct History {
    /// When the first decision was made, or the first after a gap longer than the down window.
    pub began: Option<Moment>,
    /// When the last decision was made.
    pub decided: Option<Moment>,
    /// When anything was last heard.
    pub heard: Option<Moment>,
    /// When another controller took over.
    pub resumed: Option<Moment>,
    /// When a backlog was last worth extra replicas.
    pub surplus: Option<Moment>,
    /// Arrivals of the last minute.
    pub demand: Demand,
    /// Step costs.
    pub fit: StepFit,
    /// Limits of a replica, as one of them last told.
    pub room: Remembered,
    /// Cold starts.
    pub cold_starts: ColdStarts,
    /// Growth of demand within a cold start.
    pub growth: Growth,
    /// How unevenly requests lie on replicas.
    pub imbalance: Imbalance,
    /// How far the plan proved right.
    pub budget: ErrorBudget,
    /// How long a lower need must last.
    pub down_window: DownWindow,
    /// Changes of late, oldest first.
    pub events: Vec<ScaleEvent>,
    /// Last samples, by identity. Not kept across a change of leader: their differences are a few seconds of data.
    #[serde(skip)]
    pub(super) cursors: Vec<Cursor>,
    /// Last sample of the front door.
    #[serde(skip)]
    pub(super) front_door: Option<FrontDoor>,
}

/// Limits of a replica.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Remembered {
    /// Tokens that fit the key-value cache; 0 when unknown.
    pub kv_tokens: f64,
    /// Sequences that run at once; 0 when unknown.
    pub sequences: f64,
}

impl From<Remembered> for Room {
    fn from(room: Remembered) -> Self {
        Self { kv_tokens: room.kv_tokens, sequences: room.sequences }
    }
}

/// A change of the number of replicas.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ScaleEvent {
    /// When.
    pub at: Moment,
    /// By how many.
    pub change: i32,
}

/// The last sample of a replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cursor {
    pub(super) id: ReplicaId,
    pub(super) sample: Sample,
}

impl History {
    /// The last sample of a replica.
    pub(super) fn cursor(&self, id: ReplicaId) -> Option<Cursor> {
        let found = self.cursors.binary_search_by_key(&id, |cursor| cursor.id);
        found.ok().map(|index| self.cursors[index])
    }

    /// Remembers a change. Of very many, the oldest become one, at the later time: limits then err towards less change.
    pub(super) fn push_event(&mut self, event: ScaleEvent) {
        self.events.push(event);
        if self.events.len() > EVENTS {
            let oldest = self.events.remove(0);
            if let Some(next) = self.events.first_mut() {
                next.change = next.change.saturating_add(oldest.change);
            }
        }
    }

    /// Takes up what another process left: what arrived, or went wrong, more than a window ago is not what does now.
    pub fn resume(&mut self, now: Moment) {
        self.demand.entries.retain(|entry| now.since(entry.to) <= WINDOW);
        if self.decided.is_none_or(|decided| now.since(decided) > WINDOW) {
            self.budget.burn = 0.0;
        }
    }

    /// Goes on after a clock that was set back: nothing lies ahead of it, and a whole down window is to be seen again.
    pub(super) fn set_back(&mut self, now: Moment) {
        let past = |at: &Moment| *at <= now;
        self.began = None;
        self.decided = Some(now);
        self.heard = self.heard.map(|heard| heard.min(now));
        self.resumed = self.resumed.filter(past);
        self.surplus = self.surplus.filter(past);
        self.demand.entries.retain(|entry| past(&entry.to));
        self.down_window.forget_after(now);
        self.events.iter_mut().for_each(|event| event.at = event.at.min(now));
        self.cursors.retain(|cursor| past(&cursor.sample.at));
        self.front_door = self.front_door.filter(|door| past(&door.at));
    }

    /// Whether it holds what a successor should know, besides times: requests of late.
    pub fn is_busy(&self) -> bool {
        self.demand.entries.iter().any(|entry| entry.requests > 0.0)
    }

    /// The text to keep across a change of leader: at most 4 KiB, numbers to 5 digits.
    pub fn persisted(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        rounded(value).to_string()
    }

    /// The history of such a text; an empty one when it cannot be read, which is safe.
    pub fn restored(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_default()
    }
}

/// The longest text that `persisted` makes, in bytes.
pub const PERSISTED_BYTES: usize = 4096;

fn rounded(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Number(number) if number.is_f64() => {
            let exact = number.as_f64().unwrap_or_default();
            let short: f64 = format!("{exact:.4e}").parse().unwrap_or(exact);
            // A whole number needs no fraction.
            let whole = short.fract() == 0.0 && short.abs() < 1e15;
            if whole { Value::from(short as i64) } else { Value::from(short) }
        }
        Value::Array(values) => Value::Array(values.into_iter().map(rounded).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(name, value)| (name, rounded(value))).collect())
        }
        other => other,
    }
}
