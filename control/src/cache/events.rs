//! Events: their entries in the window, and the streams that read them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use orlop_proto::Resource;
use prost::Message as _;
use tokio::sync::watch;

use super::{
    Event, ObjectKey, Shared,
    held::Held,
    index::{Index, Position},
};
use crate::store::{Change, ChangeSet, Key, Revision, StoreError, Watch};

/// How many entries a stream takes from the window at a time.
const BATCH: usize = 256;

/// An event and its revision, shared by everybody who watches.
#[derive(Debug)]
pub struct Entry<T> {
    /// When it happened. Several events have the same revision when one transaction wrote several objects.
    pub revision: Revision,
    key: ObjectKey,
    kept: Kept<T>,
    decoded: Mutex<Decoded<T>>,
    encoded: OnceLock<Bytes>,
}

/// What of an event is kept decoded.
#[derive(Debug)]
enum Decoded<T> {
    /// It is fresh, and nobody has read it yet.
    Unread,
    /// It is fresh, and others will read it too.
    Read(Event<T>),
    /// Those who follow have read it.
    Nothing,
}

/// What an event is about, as it stays in the window.
#[derive(Debug)]
pub(super) enum Kept<T> {
    Added(Held<T>),
    Modified { old: Held<T>, new: Held<T> },
    Deleted(Held<T>),
}

impl<T: Resource> Entry<T> {
    /// A fresh one.
    pub(super) fn new(revision: Revision, key: ObjectKey, kept: Kept<T>) -> Self {
        Self {
            revision,
            key,
            kept,
            decoded: Mutex::new(Decoded::Unread),
            encoded: OnceLock::new(),
        }
    }

    /// Bytes of the encodings of what it may keep decoded while it is fresh.
    pub(super) fn size(&self) -> usize {
        match &self.kept {
            Kept::Added(only) | Kept::Deleted(only) => only.size(),
            Kept::Modified { old, new } => old.size() + new.size(),
        }
    }

    /// It is not fresh any more.
    pub(super) fn forget(&self) {
        *self.lock() = Decoded::Nothing;
        if let Kept::Added(new) | Kept::Modified { new, .. } = &self.kept {
            new.age();
        }
    }

    /// The namespace of its object; empty for cluster-wide kinds.
    pub fn namespace(&self) -> &str {
        &self.key.namespace
    }

    /// "ADDED", "MODIFIED" or "DELETED", as a watch has it.
    pub fn kind(&self) -> &'static str {
        match &self.kept {
            Kept::Added(_) => "ADDED",
            Kept::Modified { .. } => "MODIFIED",
            Kept::Deleted(_) => "DELETED",
        }
    }

    /// What happened. Who reads it while it is fresh shares it with all others.
    pub fn event(&self) -> Event<T> {
        let mut decoded = self.lock();
        match &mut *decoded {
            Decoded::Read(event) => event.clone(),
            Decoded::Unread => {
                let event = self.decode();
                *decoded = Decoded::Read(event.clone());
                event
            }
            Decoded::Nothing => {
                drop(decoded);
                self.decode()
            }
        }
    }

    /// The event's object as an encoded `orlop.api.v1.Object`. Encoded at the first call, then shared.
    pub fn encoded_object(&self) -> &Bytes {
        self.encoded.get_or_init(|| {
            let event = self.event();
            T::clone(event.object()).into_object().encode_to_vec().into()
        })
    }

    /// Takes the event back.
    pub(super) fn undo(&self, objects: &mut imbl::OrdMap<ObjectKey, Held<T>>) {
        match &self.kept {
            Kept::Added(_) => objects.remove(&self.key),
            Kept::Modified { old, .. } | Kept::Deleted(old) => objects.insert(self.key.clone(), old.clone()),
        };
    }

    fn decode(&self) -> Event<T> {
        match &self.kept {
            Kept::Added(new) => Event::Added(new.peek()),
            Kept::Modified { old, new } => Event::Modified {
                old: old.peek(),
                new: new.peek(),
            },
            Kept::Deleted(old) => {
                let mut last = Arc::unwrap_or_clone(old.peek());
                last.meta_mut().resource_version = self.revision.to_string();
                Event::Deleted(Arc::new(last))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Decoded<T>> {
        self.decoded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reader was too slow, or the cache had to begin anew: events are missing. Nothing that was delivered is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("events were missed; everything up to revision {resume_after} was delivered")]
pub struct Lagged {
    /// A new watch can begin here ([`super::Reader::events_after`]), if the store still has it.
    pub resume_after: Revision,
}

/// Events in their order. After an error it gives nothing but that error.
pub struct EventStream<T: Resource> {
    shared: Arc<Shared>,
    index: Arc<Index<T>>,
    changes: watch::Receiver<u64>,
    position: Position,
    pending: VecDeque<Arc<Entry<T>>>,
    /// Revision of the last entry that was handed out, or the start.
    delivered: Revision,
    backlog: Option<Backlog>,
}

impl<T: Resource> EventStream<T> {
    pub(super) fn new(shared: Arc<Shared>, index: Arc<Index<T>>, position: Position, backlog: Option<Backlog>) -> Self {
        let changes = index.changes();
        let delivered = backlog.as_ref().map_or(position.revision, |backlog| backlog.after);
        Self {
            shared,
            index,
            changes,
            position,
            pending: VecDeque::new(),
            delivered,
            backlog,
        }
    }

    /// The next event. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Arc<Entry<T>>, Lagged> {
        loop {
            if let Some(entry) = self.pending.pop_front() {
                self.delivered = match self.pending.front() {
                    Some(next) if next.revision == entry.revision => entry.revision - 1,
                    Some(_) => entry.revision,
                    None if self.backlog.is_none() => self.position.revision,
                    None => entry.revision,
                };
                return Ok(entry);
            }
            self.fill().await?;
        }
    }

    /// All events that are there, at least one, at most `max`. Cancel-safe.
    pub async fn next_batch(&mut self, max: usize) -> Result<Vec<Arc<Entry<T>>>, Lagged> {
        let mut batch = vec![self.next().await?];
        while batch.len() < max && !self.pending.is_empty() {
            batch.push(self.next().await?);
        }
        Ok(batch)
    }

    /// All events that there are now, perhaps none, without waiting: after this everything that a snapshot shows has been handed out.
    /// Only for streams that begin at a snapshot ([`super::Reader::events`]).
    pub fn take_ready(&mut self) -> Result<Vec<Arc<Entry<T>>>, Lagged> {
        debug_assert!(
            self.backlog.is_none(),
            "a stream from the past has to wait for the store"
        );
        let mut ready: Vec<_> = self.pending.drain(..).collect();
        loop {
            let progress = *self.shared.progress.borrow();
            let entries = self
                .index
                .entries(&mut self.position, progress, BATCH)
                .map_err(|_| Lagged {
                    resume_after: self.delivered,
                })?;
            if entries.is_empty() {
                self.delivered = self.position.revision;
                return Ok(ready);
            }
            ready.extend(entries);
        }
    }

    /// Everything up to here has been handed out, and no event of it is still to come: what a bookmark says.
    pub fn revision(&mut self) -> Revision {
        if self.pending.is_empty() && self.backlog.is_none() {
            let progress = *self.shared.progress.borrow();
            let mut position = self.position;
            if let Ok(entries) = self.index.entries(&mut position, progress, 1)
                && entries.is_empty()
            {
                self.position = position;
                self.delivered = position.revision;
            }
        }
        self.delivered
    }

    /// As a [`futures::Stream`]. It ends after an error.
    pub fn into_stream(self) -> BoxStream<'static, Result<Arc<Entry<T>>, Lagged>> {
        let stream = futures::stream::unfold(Some(self), |state| async move {
            let mut events = state?;
            match events.next().await {
                Ok(entry) => Some((Ok(entry), Some(events))),
                Err(lagged) => Some((Err(lagged), None)),
            }
        });
        Box::pin(stream)
    }

    /// Waits until there is something pending. Cancel-safe: entries move to `pending` without a wait between.
    async fn fill(&mut self) -> Result<(), Lagged> {
        if let Some(backlog) = &mut self.backlog {
            let more = backlog.next().await.map_err(|error| {
                tracing::warn!(%error, resource = T::KIND.resource, "a resumed watch failed");
                Lagged {
                    resume_after: self.delivered,
                }
            })?;
            match more {
                Some(set) => self.pending.extend(entries_of(set)),
                None => {
                    self.backlog = None;
                    self.delivered = self.position.revision;
                }
            }
            return Ok(());
        }
        loop {
            self.changes.borrow_and_update();
            let progress = *self.shared.progress.borrow();
            let entries = self
                .index
                .entries(&mut self.position, progress, BATCH)
                .map_err(|_| Lagged {
                    resume_after: self.delivered,
                })?;
            if !entries.is_empty() {
                self.pending.extend(entries);
                return Ok(());
            }
            self.delivered = self.position.revision;
            if self.changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Events that the window no longer has, from the store's own log.
pub(super) struct Backlog {
    watch: Watch,
    after: Revision,
    /// The window takes over after this revision.
    until: Revision,
    reached: Revision,
}

impl Backlog {
    pub(super) fn new(watch: Watch, after: Revision, until: Revision) -> Self {
        Self {
            watch,
            after,
            until,
            reached: after,
        }
    }

    /// The next set; `None` when the window takes over. Cancel-safe, as the watch is.
    async fn next(&mut self) -> Result<Option<ChangeSet>, StoreError> {
        while self.reached < self.until {
            let Some(set) = self.watch.next().await.transpose()? else {
                let oldest = self.reached;
                return Err(StoreError::Compacted {
                    requested: self.reached,
                    oldest,
                });
            };
            self.reached = set.revision;
            if set.revision <= self.until && !set.changes.is_empty() {
                return Ok(Some(set));
            }
        }
        Ok(None)
    }
}

fn entries_of<T: Resource>(set: ChangeSet) -> impl Iterator<Item = Arc<Entry<T>>> {
    let revision = set.revision;
    set.changes.into_iter().filter_map(move |change| {
        let (key, kept) = match change {
            Change::Put { record, previous } => {
                let (new, object) = Held::<T>::new(&record.key, &record.value, record.revision, None)?;
                // The revision of what was there before is not told.
                let old = previous.and_then(|previous| Held::new(&record.key, &previous, 0, None));
                let kept = match old {
                    Some((old, _)) => Kept::Modified { old, new },
                    None => Kept::Added(new),
                };
                (ObjectKey::of(&*object), kept)
            }
            Change::Delete { key, previous } => {
                let (old, object) = Held::new(&key, &previous, revision, None)?;
                (ObjectKey::of(&*object), Kept::Deleted(old))
            }
        };
        Some(Arc::new(Entry::new(revision, key, kept)))
    })
}

/// The object key in a store key; `None` when it is not the key of an object.
pub(super) fn object_key(key: &Key) -> Option<ObjectKey> {
    let mut parts = key.as_str().splitn(3, '/');
    let _resource = parts.next()?;
    let first = parts.next()?;
    Some(
        parts
            .next()
            .map_or_else(|| ObjectKey::new("", first), |name| ObjectKey::new(first, name)),
    )
}
