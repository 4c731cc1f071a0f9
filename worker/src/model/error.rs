//! Why a model could not be loaded.

use std::path::Path;

use ernie_proto::failure::{Reason, TerminationMessage};

/// A model that could not be loaded: the reason that decides the exit code, and one sentence that names the file, the
/// tensor or key, the value found and the remedy.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct LoadError {
    reason: Reason,
    message: String,
    detail: serde_json::Value,
}

/// The result of looking at or loading a model.
pub type LoadResult<T> = Result<T, LoadError>;

impl LoadError {
    /// An error for `reason` that says `message`.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), detail: serde_json::Value::Null }
    }

    /// A folder or file that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Reason::ModelNotFound, message)
    }

    /// A model that this worker cannot compute.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Reason::UnsupportedModel, message)
    }

    /// Files that contradict themselves or each other.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(Reason::CorruptModel, message)
    }

    /// A file that could not be opened or read.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied => Reason::ModelNotFound,
            std::io::ErrorKind::UnexpectedEof => Reason::CorruptModel,
            _ => Reason::Internal,
        };
        Self::new(reason, format!("cannot read {}: {error}", path.display()))
    }

    /// The same error with numbers for machines.
    #[must_use]
    pub fn with_detail(mut self, detail: serde_json::Value) -> Self {
        self.detail = detail;
        self
    }

    /// The reason, which decides the exit code.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Numbers for machines, such as the memory plan; null when there are none.
    pub fn detail(&self) -> &serde_json::Value {
        &self.detail
    }

    /// What a worker that stops because of this writes to its termination log.
    pub fn termination(&self) -> TerminationMessage {
        TerminationMessage { reason: self.reason, message: self.message.clone(), detail: self.detail.clone() }
    }
}
