//! Watches: a stream of changes from a resource version on.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::call::Call;
use super::catalogue::Resource;
use super::failure::Failure;
use super::object;
use super::read::{self, Selection};
use super::store::Change;
use super::{Shared, State};

/// How long a watch lasts when its client does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1800);

/// How changes reach watches; all healthy at first.
#[derive(Clone, Debug, Default)]
pub(super) struct Delivery {
    /// Raised to end every watch.
    pub(super) epoch: u64,
    /// The newest revision that watches may see; `None` for all.
    pub(super) horizon: Option<u64>,
    /// Every event is sent twice.
    pub(super) twice: bool,
}

/// A watch that has begun.
#[derive(Debug)]
pub(super) struct Watch {
    selection: Selection,
    /// Changes up to here have been sent or skipped.
    position: u64,
    queue: VecDeque<Value>,
    bookmarks: bool,
    deadline: Duration,
    epoch: u64,
}

impl State {
    /// Begins a watch.
    pub(super) fn watch(&self, resource: &Arc<Resource>, call: &Call) -> Result<Watch, Failure> {
        let selection = Selection::of(resource, call)?;
        let current = self.store.revision();
        let version = call.parameter("resourceVersion");
        let initial = call.parameter("sendInitialEvents") == "true";
        let bookmarks = call.parameter("allowWatchBookmarks") == "true";
        if initial && call.parameter("resourceVersionMatch") != "NotOlderThan" {
            let message =
                "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan".to_owned();
            let cause = ("resourceVersionMatch".to_owned(), message);
            return Err(Failure::invalid("meta.k8s.io", "ListOptions", "", &[cause]));
        }
        let from_now = version.is_empty() || version == "0";
        let position = if from_now { current } else { read::parse_version(version)? };
        let mut queue = VecDeque::new();
        if initial || from_now {
            let objects = self.store.list(&resource.storage, &call.namespace);
            let added = objects.filter(|(key, object)| selection.includes(key, object));
            queue.extend(added.map(|(_, object)| json!({"type": "ADDED", "object": selection.view(object)})));
            if initial && bookmarks {
                let mut mark = bookmark(resource, current);
                object::set_at(
                    &mut mark["object"],
                    "metadata.annotations",
                    json!({"k8s.io/initial-events-end": "true"}),
                );
                queue.push_back(mark);
            }
        } else if position > current {
            return Err(read::too_large(position, current));
        }
        let seconds = call.parameter("timeoutSeconds").parse().ok().filter(|seconds| *seconds > 0);
        Ok(Watch {
            selection,
            position: if initial { current } else { position },
            queue,
            bookmarks,
            deadline: seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs),
            epoch: self.delivery.epoch,
        })
    }

    /// Moves a watch on: what it sends next, or why it ends.
    fn advance(&self, watch: &mut Watch) -> Progress {
        if self.delivery.epoch != watch.epoch {
            return Progress::End;
        }
        if let Some(event) = watch.queue.pop_front() {
            return Progress::Send(event);
        }
        if watch.position < self.store.compacted() {
            let message = format!("too old resource version: {} ({})", watch.position, self.store.compacted());
            return Progress::Last(json!({"type": "ERROR", "object": Failure::expired(message).to_status()}));
        }
        for change in self.store.changes_after(watch.position) {
            if self.delivery.horizon.is_some_and(|horizon| change.revision > horizon) {
                break;
            }
            watch.position = change.revision;
            if let Some(event) = event_of(change, &watch.selection) {
                if self.delivery.twice {
                    watch.queue.push_back(event.clone());
                }
                return Progress::Send(event);
            }
        }
        Progress::Wait
    }
}

enum Progress {
    Send(Value),
    Last(Value),
    Wait,
    End,
}

/// The event that a change is for a selection: an object that begins or ceases to match is added or deleted.
fn event_of(change: &Change, selection: &Selection) -> Option<Value> {
    let included = |object: &Option<Arc<Value>>| object.as_ref().is_some_and(|o| selection.includes(&change.key, o));
    let kind = match (included(&change.before), included(&change.after)) {
        (false, true) => "ADDED",
        (true, true) => "MODIFIED",
        (true, false) => "DELETED",
        (false, false) => return None,
    };
    let mut object = match (&change.before, &change.after, kind) {
        (Some(before), Some(_), "DELETED") => (**before).clone(),
        _ => (*change.object).clone(),
    };
    object::set_metadata(&mut object, "resourceVersion", Value::from(change.revision.to_string()));
    Some(json!({"type": kind, "object": selection.view(&object)}))
}

fn bookmark(resource: &Resource, revision: u64) -> Value {
    json!({"type": "BOOKMARK", "object": {"kind": resource.kind, "apiVersion": resource.api_version(),
        "metadata": {"resourceVersion": revision.to_string()}}})
}

/// The body of a watch: one JSON document a line.
pub(super) fn stream(shared: Arc<Shared>, watch: Watch) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let changes = shared.changed.subscribe();
    let end = Instant::now() + watch.deadline;
    let start = Reader { shared, watch, changes, end, finished: false };
    futures::stream::unfold(start, |mut reader| async move {
        let event = reader.next().await?;
        let mut line = event.to_string();
        line.push('\n');
        Some((Ok(Bytes::from(line)), reader))
    })
}

struct Reader {
    shared: Arc<Shared>,
    watch: Watch,
    changes: watch::Receiver<u64>,
    end: Instant,
    finished: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<Value> {
        while !self.finished {
            self.changes.borrow_and_update();
            match self.shared.lock().advance(&mut self.watch) {
                Progress::Send(event) => return Some(event),
                Progress::Last(event) => {
                    self.finished = true;
                    return Some(event);
                }
                Progress::End => return None,
                Progress::Wait => {}
            }
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                () = tokio::time::sleep_until(self.end) => {
                    self.finished = true;
                    if self.watch.bookmarks {
                        return Some(bookmark(&self.watch.selection.resource, self.watch.position));
                    }
                }
            }
        }
        None
    }
}
