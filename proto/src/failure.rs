//! Why a worker gave up: the reason, its exit code, and the message it leaves for the operator.

use serde::{Deserialize, Serialize};

use crate::contract::TERMINATION_MESSAGE_LIMIT;

/// A permanent failure of a worker, with the exit code that scripts may rely on.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Reason {
    /// Folder, config.json, weights or tokenizer absent.
    ModelNotFound,
    /// A model this worker cannot compute: architecture, option or dtype.
    UnsupportedModel,
    /// Files that contradict themselves or each other.
    CorruptModel,
    /// Weights and a useful key-value cache do not fit the memory limit.
    InsufficientMemory,
    /// An accelerator that fails or is absent.
    DeviceError,
    /// Bytes that differ from the digest given.
    DigestMismatch,
    /// Flags that contradict each other or cannot be parsed.
    Usage,
    /// Anything else.
    Internal,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 8] = [
        Reason::ModelNotFound,
        Reason::UnsupportedModel,
        Reason::CorruptModel,
        Reason::InsufficientMemory,
        Reason::DeviceError,
        Reason::DigestMismatch,
        Reason::Usage,
        Reason::Internal,
    ];

    /// The process exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Reason::Internal => 1,
            Reason::Usage => 2,
            Reason::ModelNotFound => 10,
            Reason::UnsupportedModel => 11,
            Reason::CorruptModel => 12,
            Reason::InsufficientMemory => 13,
            Reason::DeviceError => 14,
            Reason::DigestMismatch => 15,
        }
    }

    /// The reason of an exit code, when it is one of ours.
    pub fn of_exit_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| i32::from(reason.exit_code()) == code)
    }

    /// The word used in conditions and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::ModelNotFound => "ModelNotFound",
            Reason::UnsupportedModel => "UnsupportedModel",
            Reason::CorruptModel => "CorruptModel",
            Reason::InsufficientMemory => "InsufficientMemory",
            Reason::DeviceError => "DeviceError",
            Reason::DigestMismatch => "DigestMismatch",
            Reason::Usage => "Usage",
            Reason::Internal => "Internal",
        }
    }
}

/// A worker's last words, written once to the termination log as JSON.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TerminationMessage {
    /// Why.
    pub reason: Reason,
    /// One sentence that names the thing, the value and the remedy.
    pub message: String,
    /// Numbers for machines, such as the memory plan.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub detail: serde_json::Value,
}

impl TerminationMessage {
    /// JSON of at most [`TERMINATION_MESSAGE_LIMIT`] bytes: the detail is dropped first, then the sentence is cut at
    /// a character boundary and ends in `…`.
    pub fn to_json(&self) -> String {
        let encode = |message: &Self| serde_json::to_string(message).unwrap_or_default();
        let whole = encode(self);
        if whole.len() <= TERMINATION_MESSAGE_LIMIT {
            return whole;
        }
        let mut short = Self { detail: serde_json::Value::Null, ..self.clone() };
        let mut text = encode(&short);
        while text.len() > TERMINATION_MESSAGE_LIMIT {
            // JSON writes a byte as six at most.
            let cut = (text.len() - TERMINATION_MESSAGE_LIMIT).div_ceil(6) + '…'.len_utf8();
            let keep = short.message.floor_char_boundary(short.message.len().saturating_sub(cut));
            short.message.truncate(keep);
            short.message.push('…');
            text = encode(&short);
        }
        text
    }

    /// Reads what a worker wrote; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text.trim()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_distinct_and_read_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::of_exit_code(i32::from(reason.exit_code())), Some(reason));
        }
        assert_eq!(Reason::of_exit_code(137), None);
    }

    #[test]
    fn a_long_message_is_cut_to_the_limit_and_still_parses() {
        let message = TerminationMessage {
            reason: Reason::CorruptModel,
            message: "é\"\n".repeat(4000),
            detail: serde_json::json!({"tensor": "x".repeat(5000)}),
        };
        let text = message.to_json();
        assert!(text.len() <= TERMINATION_MESSAGE_LIMIT, "{}", text.len());
        let back = TerminationMessage::parse(&text).expect("parses");
        assert_eq!(back.reason, Reason::CorruptModel);
        assert!(back.message.ends_with('…') && back.message.starts_with('é'));
        assert!(text.len() > TERMINATION_MESSAGE_LIMIT - 100, "cut more than needed: {}", text.len());
    }

    #[test]
    fn a_short_message_survives_unchanged() {
        let message = TerminationMessage {
            reason: Reason::InsufficientMemory,
            message: "needs 3 GiB".into(),
            detail: serde_json::json!({"neededBytes": 3u64 << 30}),
        };
        assert_eq!(TerminationMessage::parse(&message.to_json()), Some(message));
        assert_eq!(TerminationMessage::parse("panicked at"), None);
    }
}
