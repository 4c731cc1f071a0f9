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

/// Flags of `serve` that the operator fills in from an `ErnieModel`, and the fields that they come from.
const SPEC_FIELDS: [(&str, &str); 8] = [
    ("--model-digest", "spec.model.digest"),
    ("--served-model-name", "spec.model.name"),
    ("--dtype", "spec.engine.dtype"),
    ("--quantization", "spec.engine.quantization"),
    ("--max-model-len", "spec.engine.maxModelLen"),
    ("--max-num-seqs", "spec.engine.maxNumSeqs"),
    ("--max-queued-requests", "spec.engine.maxQueuedRequests"),
    ("--drain-timeout", "spec.drain.timeoutSeconds"),
];

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
    let message = TerminationMessage { message: with_spec_fields(&message.message), ..message.clone() };
    if let Err(error) = write_to(path, &message) {
        tracing::warn!("the termination message cannot be written to {}: {error}", path.display());
    }
}

/// The sentence for readers who wrote a spec and no flags: each flag is followed by its field where it is first named.
fn with_spec_fields(sentence: &str) -> String {
    let mut text = sentence.to_owned();
    for (flag, field) in SPEC_FIELDS {
        let goes_on = |rest: &str| rest.starts_with(|next: char| next == '-' || next.is_ascii_alphanumeric());
        let ends = text.match_indices(flag).map(|(at, _)| at + flag.len()).find(|&end| !goes_on(&text[end..]));
        if let Some(end) = ends {
            text.insert_str(end, &format!(" ({field})"));
        }
    }
    text
}

fn write_to(path: &Path, message: &TerminationMessage) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(message.to_json().as_bytes())?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_flag_is_followed_by_the_field_of_the_spec_that_it_comes_from() {
        assert_eq!(
            with_spec_fields("--max-model-len 8192 must be in 1..=2048, the context of this model"),
            "--max-model-len (spec.engine.maxModelLen) 8192 must be in 1..=2048, the context of this model"
        );
        assert_eq!(
            with_spec_fields("'--dtype <DTYPE>': --dtype-of-cache and --dtype"),
            "'--dtype (spec.engine.dtype) <DTYPE>': --dtype-of-cache and --dtype"
        );
        assert_eq!(with_spec_fields("--dtype-of-cache is no flag"), "--dtype-of-cache is no flag");
        assert_eq!(with_spec_fields("--kv-cache-memory is in no spec"), "--kv-cache-memory is in no spec");
    }

    #[test]
    fn the_flags_that_come_from_a_spec_exist() {
        let command = crate::cli::Cli::command();
        let serve = command.find_subcommand("serve").expect("serve");
        for (flag, _) in SPEC_FIELDS {
            assert!(serve.get_arguments().any(|known| known.get_long() == flag.strip_prefix("--")), "{flag}");
        }
    }

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
