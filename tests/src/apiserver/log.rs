//! The request log.

use std::fmt;

use serde_json::Value;

use super::call::{Call, Verb};
use super::fault::{Effect, Moment};

/// One request and what became of it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The request.
    pub call: Call,
    /// HTTP status of the answer; `None` when a fault struck before the request took effect.
    pub code: Option<u16>,
    /// Whether anything was stored.
    pub changed: bool,
    /// The fault that struck.
    pub fault: Option<(Effect, Moment)>,
}

impl Entry {
    /// Whether the request could change something, a dry run excepted.
    pub fn is_mutating(&self) -> bool {
        self.call.verb.is_mutating() && !self.call.is_dry_run()
    }

    /// Whether the request is about the resource.
    pub fn is_about(&self, plural: &str) -> bool {
        self.call.plural == plural
    }

    /// The body's field at a dotted path, null when absent.
    pub fn body_at(&self, path: &str) -> &Value {
        super::object::at(&self.call.body, path).unwrap_or(&Value::Null)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Call { client, verb, path, content_type, .. } = &self.call;
        write!(f, "{client}: {verb} {path}")?;
        if *verb == Verb::Patch {
            write!(f, " ({})", content_type.trim_start_matches("application/"))?;
        }
        match self.code {
            Some(code) => write!(f, " -> {code}")?,
            None => write!(f, " -> not served")?,
        }
        if let Some((effect, moment)) = self.fault {
            write!(f, " [{effect:?} {moment:?}]")?;
        }
        if self.is_mutating() && !self.call.body.is_null() {
            let body = self.call.body.to_string();
            let end = body.floor_char_boundary(body.len().min(300));
            write!(f, " {}", &body[..end])?;
        }
        Ok(())
    }
}

/// The entries of one client, as text, for the message of a failed test.
pub fn transcript(entries: &[Entry]) -> String {
    entries.iter().map(|entry| format!("  {entry}\n")).collect()
}
