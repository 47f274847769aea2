//! The engine of simulations: everything in memory, in one place, without threads.
//!
//! It keeps what the other engines promise (the same contract suite says so), does everything at the moment of the call, and
//! remembers its whole history, so that a simulation can ask afterwards what ever was.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{sync::watch as latest, time::Instant};

use super::{ChangeSet, Expected, Key, Listing, Record, Revision, Store, StoreError, Transaction, Watch, Write, frame};

/// How often a watch that has nothing to tell gives a bookmark.
const BOOKMARKS: Duration = Duration::from_secs(2);
/// Change sets that a watch takes from the log at once.
const CHUNK: usize = 256;

/// A store that ends with its last clone: what a control process writes is there for the next one over a clone.
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    revision: latest::Sender<Revision>,
}

#[derive(Default)]
struct State {
    /// Key -> revision of the last write, framed value.
    records: BTreeMap<String, (Revision, Bytes)>,
    /// The changes of revision 1, 2, ...
    log: Vec<Vec<Logged>>,
    /// Watches begin after this revision or later.
    compacted: Revision,
}

#[derive(Clone)]
struct Logged {
    key: Key,
    now: Option<Bytes>,
    before: Option<Bytes>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                revision: latest::Sender::new(0),
            }),
        }
    }
}

impl MemoryStore {
    /// Watches can no longer begin before this revision, nor go on from there.
    pub fn compact_to(&self, revision: Revision) {
        let mut state = self.shared.lock();
        state.compacted = state.compacted.max(revision);
    }

    /// Everything that ever changed.
    pub fn history(&self) -> Vec<ChangeSet> {
        let state = self.shared.lock();
        (1..=state.revision())
            .filter_map(|revision| state.set(revision).ok())
            .collect()
    }

    /// Writes bytes without a frame, as a revision of its own.
    #[cfg(test)]
    pub(crate) fn write_raw(&self, key: &Key, bytes: &[u8]) {
        let mut state = self.shared.lock();
        let bytes = Bytes::copy_from_slice(bytes);
        let revision = state.revision() + 1;
        let before = state
            .records
            .insert(key.as_str().to_owned(), (revision, bytes.clone()))
            .map(|(_, before)| before);
        state.log.push(vec![Logged {
            key: key.clone(),
            now: Some(bytes),
            before,
        }]);
        drop(state);
        self.shared.revision.send_replace(revision);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock in the middle of a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn revision(&self) -> Revision {
        self.log.len() as Revision
    }

    /// The changes of a revision that was written.
    fn set(&self, revision: Revision) -> Result<ChangeSet, StoreError> {
        let index = usize::try_from(revision - 1).unwrap_or(usize::MAX);
        let changes = self.log[index].iter().filter_map(|logged| {
            frame::change(
                logged.key.clone(),
                revision,
                logged.now.as_deref(),
                logged.before.as_deref(),
            )
            .transpose()
        });
        Ok(ChangeSet {
            revision,
            changes: changes.collect::<Result<_, _>>()?,
        })
    }

    fn conflict(&self, transaction: &Transaction) -> Option<StoreError> {
        transaction.operations.iter().find_map(|operation| {
            let found = self.records.get(operation.key.as_str()).map(|(revision, _)| *revision);
            let holds = match operation.expected {
                Expected::Absent => found.is_none(),
                Expected::Revision(revision) => found == Some(revision),
                Expected::Any => true,
            };
            (!holds).then(|| StoreError::Conflict {
                key: operation.key.clone(),
                expected: operation.expected,
                found,
            })
        })
    }

    fn apply(&mut self, transaction: Transaction) {
        let revision = self.revision() + 1;
        let mut operations = transaction.operations;
        operations.sort_by(|one, other| one.key.cmp(&other.key));
        let mut changes = Vec::new();
        for operation in operations {
            let text = operation.key.as_str();
            let (now, before) = match operation.write {
                Write::Check => continue,
                Write::Put(value) => {
                    let framed = Bytes::from(frame::frame(&value));
                    let before = self.records.insert(text.to_owned(), (revision, framed.clone()));
                    (Some(framed), before)
                }
                Write::Delete => match self.records.remove(text) {
                    Some(before) => (None, Some(before)),
                    None => continue,
                },
            };
            changes.push(Logged {
                key: operation.key,
                now,
                before: before.map(|(_, before)| before),
            });
        }
        if !changes.is_empty() {
            self.log.push(changes);
        }
    }

    fn check_resumable(&self, after: Revision) -> Result<(), StoreError> {
        if after > self.revision() {
            return Err(StoreError::Future {
                requested: after,
                current: self.revision(),
            });
        }
        if after < self.compacted {
            return Err(StoreError::Compacted {
                requested: after,
                oldest: self.compacted,
            });
        }
        Ok(())
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        let state = self.shared.lock();
        let found = state.records.get(key.as_str()).map(|(revision, framed)| {
            Ok(Record {
                key: key.clone(),
                value: frame::unframe(key, framed)?,
                revision: *revision,
            })
        });
        found.transpose()
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let state = self.shared.lock();
        let under = state
            .records
            .range(prefix.to_owned()..)
            .take_while(|(key, _)| key.starts_with(prefix));
        let records = under.filter_map(|(text, (revision, framed))| {
            let key = Key::from_text(text);
            let value = frame::unframe_or_report(&key, framed).transpose()?;
            Some(value.map(|value| Record {
                key,
                value,
                revision: *revision,
            }))
        });
        Ok(Listing {
            revision: state.revision(),
            records: records.collect::<Result<_, _>>()?,
        })
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        transaction.check_limits()?;
        let mut state = self.shared.lock();
        if let Some(conflict) = state.conflict(&transaction) {
            return Err(conflict);
        }
        state.apply(transaction);
        let revision = state.revision();
        drop(state);
        self.shared.revision.send_if_modified(|told| {
            let newer = revision > *told;
            *told = revision.max(*told);
            newer
        });
        Ok(revision)
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.shared.lock().check_resumable(after)?;
        let watcher = Watcher {
            revisions: self.shared.revision.subscribe(),
            shared: self.shared.clone(),
            prefix: prefix.to_owned(),
            seen: after,
            queue: VecDeque::new(),
        };
        let stream = futures::stream::unfold(Some(watcher), |state| async move {
            let mut watcher = state?;
            match watcher.next().await {
                Ok(set) => Some((Ok(set), Some(watcher))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Box::pin(stream))
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.shared.lock().revision())
    }
}

struct Watcher {
    shared: Arc<Shared>,
    revisions: latest::Receiver<Revision>,
    prefix: String,
    /// Everything up to here was told, or is in the queue.
    seen: Revision,
    queue: VecDeque<ChangeSet>,
}

impl Watcher {
    async fn next(&mut self) -> Result<ChangeSet, StoreError> {
        let bookmark_at = Instant::now() + BOOKMARKS;
        loop {
            if let Some(set) = self.queue.pop_front() {
                return Ok(set);
            }
            self.revisions.mark_unchanged();
            if self.read()? {
                continue;
            }
            tokio::select! {
                biased;
                // The sender lives in `shared`.
                _ = self.revisions.changed() => {}
                () = tokio::time::sleep_until(bookmark_at) => {
                    return Ok(ChangeSet { revision: self.seen, changes: Vec::new() });
                }
            }
        }
    }

    /// Takes the next piece of the log; whether there was any.
    fn read(&mut self) -> Result<bool, StoreError> {
        let state = self.shared.lock();
        let current = state.revision();
        if self.seen == current {
            return Ok(false);
        }
        state.check_resumable(self.seen)?;
        let until = current.min(self.seen + CHUNK as Revision);
        for revision in self.seen + 1..=until {
            let mut set = state.set(revision)?;
            set.changes.retain(|change| {
                let key = match change {
                    super::Change::Put { record, .. } => &record.key,
                    super::Change::Delete { key, .. } => key,
                };
                key.as_str().starts_with(&self.prefix)
            });
            if !set.changes.is_empty() {
                self.queue.push_back(set);
            }
        }
        self.seen = until;
        Ok(true)
    }
}
