//! What the autoscaler and the reconcile tell each other, in memory.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::scale::Finding;

/// A mark of what a decision depends on besides time and load: another one is worth another decision.
pub type Print = u64;

/// Findings and what is wanted of the autoscaler, by the uid of the model.
#[derive(Debug, Default)]
pub struct Findings {
    entries: Mutex<HashMap<String, Entry>>,
    news: Notify,
}

#[derive(Debug)]
struct Entry {
    /// Workers that the reconcile found to be asked for, before anything was decided.
    replicas: i32,
    print: Print,
    changed: bool,
    finding: Option<Finding>,
}

impl Findings {
    /// The last finding about a model.
    pub fn get(&self, uid: &str) -> Option<Finding> {
        self.entries().get(uid)?.finding.clone()
    }

    /// The workers that are asked for; `None` until the reconcile has said so.
    pub fn replicas(&self, uid: &str) -> Option<i32> {
        let entries = self.entries();
        let entry = entries.get(uid)?;
        Some(entry.finding.as_ref().map_or(entry.replicas, |finding| finding.status.desired_replicas))
    }

    /// The reconcile's word: how many workers a model is to have as far as it knows, which counts only at first, and what a
    /// decision depends on.
    pub fn register(&self, uid: &str, replicas: i32, print: Print) {
        let mut entries = self.entries();
        let new = Entry { replicas, print, changed: true, finding: None };
        match entries.get_mut(uid) {
            Some(entry) if entry.print == print => return,
            Some(entry) => (entry.print, entry.changed) = (print, true),
            None => drop(entries.insert(uid.to_owned(), new)),
        }
        self.news.notify_one();
    }

    /// The autoscaler's word: whether it differs from the last.
    pub fn put(&self, uid: &str, finding: Finding) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(uid) else { return false };
        let is_new = entry.finding.as_ref() != Some(&finding);
        entry.finding = Some(finding);
        is_new
    }

    /// Waits for models whose prints have changed, and names them.
    pub async fn changed(&self) -> HashSet<String> {
        loop {
            let changed = self.take_changed();
            if !changed.is_empty() {
                return changed;
            }
            self.news.notified().await;
        }
    }

    fn take_changed(&self) -> HashSet<String> {
        let mut entries = self.entries();
        let changed = entries.iter_mut().filter_map(|(uid, entry)| {
            let changed = std::mem::take(&mut entry.changed);
            changed.then(|| uid.clone())
        });
        changed.collect()
    }

    /// Forgets a model.
    pub fn forget(&self, uid: &str) {
        self.entries().remove(uid);
    }

    /// Forgets every model.
    pub fn clear(&self) {
        self.entries().clear();
    }

    /// Forgets every model but these.
    pub fn retain(&self, uids: &HashSet<String>) {
        self.entries().retain(|uid, _| uids.contains(uid));
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
