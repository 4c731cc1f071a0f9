//! A worker's last words: the reason of a failure for whoever reads `/dev/termination-log`.

use std::{
    fs::OpenOptions,
    io::Write,
    panic,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use ernie_proto::failure::{Reason, TerminationMessage};

/// Longest part of a panic's message that is kept.
const PANIC_CHARACTERS: usize = 500;

static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);
static WRITTEN: AtomicBool = AtomicBool::new(false);

/// Logs every panic and remembers the last one, so that a process that dies of it can say so.
pub fn install_panic_hook() {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let text = info.payload_as_str().unwrap_or("no message");
        let thread = std::thread::current();
        let text: String = text.chars().take(PANIC_CHARACTERS).collect();
        let words = format!("thread {} panicked at {place}: {text}", thread.name().unwrap_or("without a name"));
        tracing::error!("{words}");
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
    }));
}

/// What the last panic of this process said.
pub fn last_panic() -> Option<String> {
    LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The message of a process that ends by a panic.
pub fn of_panic() -> TerminationMessage {
    let message = last_panic().unwrap_or_else(|| "a panic without a message".to_owned());
    TerminationMessage { reason: Reason::Internal, message, detail: serde_json::Value::Null }
}

/// Writes the message, with one write and once per process. The file is not replaced, because the kubelet mounts it.
///
/// A file that cannot be written is logged: the exit code still tells the reason.
pub fn write(path: Option<&Path>, message: &TerminationMessage) {
    let Some(path) = path else { return };
    if WRITTEN.swap(true, Ordering::SeqCst) {
        return;
    }
    if let Err(error) = write_to(path, message) {
        tracing::warn!("the termination message cannot be written to {}: {error}", path.display());
    }
}

fn write_to(path: &Path, message: &TerminationMessage) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(message.to_json().as_bytes())?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_message_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        std::fs::write(&path, "x".repeat(5000)).expect("written");
        let first = TerminationMessage {
            reason: Reason::CorruptModel,
            message: "first".into(),
            detail: serde_json::Value::Null,
        };
        write(Some(&path), &first);
        write(Some(&path), &TerminationMessage { message: "second".into(), ..first.clone() });
        assert_eq!(TerminationMessage::parse(&std::fs::read_to_string(&path).expect("read")), Some(first));
    }
}
