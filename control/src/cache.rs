//! The watch cache: what everybody reads.
//!
//! One task follows the store and owns an index a kind as a persistent map, so that a snapshot costs a pointer. All kinds
//! come from one watch, so they advance together and a write of any kind moves the revision of all of them.
//!
//! Objects are held as the store has them, encoded (and packed), and decoded for who asks; only while an event is fresh, when
//! everybody reads it, it is kept decoded too: for half a second, and no longer than some hundred others have come after it.
//!
//! Each index keeps a bounded window of its last events. Readers of events hold a position in that window instead of a buffer
//! of their own: a thousand watchers share one copy of an event, one encoding of its object, and one bound on memory. Who falls
//! out of the window is told so by [`Lagged`].

mod events;
mod follower;
mod held;
mod index;
mod packed;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use orlop_proto::Resource;
use tokio::sync::watch;

use crate::store::{Revision, Store, StoreError};

pub use events::{Entry, EventStream, Lagged};
use follower::Follower;
pub use held::Objects;
use index::{Index, Indexes};

/// `namespace` (empty for cluster-wide kinds) and `name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// The object's name.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// From its parts; the namespace of cluster-wide kinds is empty.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an object.
    pub fn of<T: Resource>(object: &T) -> Self {
        Self::new(object.namespace(), object.name())
    }

    /// The same key, which shares what it has in common with the key of a neighbour: thousands of objects are in one namespace.
    fn beside(mut self, other: Option<&Self>) -> Self {
        if let Some(other) = other
            && other.namespace == self.namespace
        {
            self.namespace = other.namespace.clone();
            if other.name == self.name {
                self.name = other.name.clone();
            }
        }
        self
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            formatter.write_str(&self.name)
        } else {
            write!(formatter, "{}/{}", self.namespace, self.name)
        }
    }
}

/// All objects of a kind at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot<T> {
    /// Everything up to here is in it.
    pub revision: Revision,
    /// In the order of namespace, then name.
    pub objects: Objects<T>,
}

impl<T: Resource> Snapshot<T> {
    /// The object with this key.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.objects.get(&ObjectKey::new(namespace, name))
    }

    /// The same for somebody who goes through many now and then: it is not kept decoded for that.
    pub fn peek(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.objects.peek_at(&ObjectKey::new(namespace, name))
    }

    /// The objects of a namespace, in the order of their names; of all namespaces when it is empty.
    pub fn in_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = (&'a ObjectKey, Arc<T>)> {
        self.objects
            .range(ObjectKey::new(namespace, "")..)
            .take_while(move |(key, _)| namespace.is_empty() || &*key.namespace == namespace)
    }
}

/// What happened to one object.
#[derive(Debug, Clone)]
pub enum Event<T> {
    /// It is new.
    Added(Arc<T>),
    /// It changed.
    Modified {
        /// Before.
        old: Arc<T>,
        /// After.
        new: Arc<T>,
    },
    /// It is gone; this was its last state, with the revision of its removal.
    Deleted(Arc<T>),
}

impl<T: Resource> Event<T> {
    /// The object as it is now, or was last.
    pub fn object(&self) -> &Arc<T> {
        match self {
            Event::Added(object) | Event::Modified { new: object, .. } | Event::Deleted(object) => object,
        }
    }
}

/// Bounds of the cache's memory.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// Events of a kind that are kept for watchers.
    pub window_events: usize,
    /// How long they are kept.
    pub window_age: Duration,
    /// How long they are kept decoded, for all who follow.
    pub fresh: Duration,
    /// Bytes of the encodings of those of a kind that are kept decoded, at most: decoded they take some twelve times as much. Who follows
    /// further behind decodes again.
    pub fresh_bytes: usize,
    /// Snapshots of a kind that [`Reader::keep`] holds at most; the oldest goes first.
    pub kept_snapshots: usize,
    /// How long it holds them.
    pub keep_for: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            window_events: 4096,
            // Who is further behind reads the store's log; a burst of changes is not to be held much longer than it took.
            window_age: Duration::from_secs(30),
            fresh: Duration::from_millis(500),
            fresh_bytes: 128 << 10,
            kept_snapshots: 64,
            keep_for: Duration::from_secs(300),
        }
    }
}

/// The cache of all kinds. Clones share it; it follows the store until the last clone and reader are gone.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    indexes: Arc<Indexes>,
    store: Arc<dyn Store>,
    progress: watch::Receiver<Revision>,
    follower: tokio::task::JoinHandle<()>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Cache {
    /// Reads everything, then follows. Waits (and logs) as long as the store cannot be reached.
    pub async fn start(store: Arc<dyn Store>) -> Self {
        Self::start_with(store, CacheConfig::default()).await
    }

    /// The same with other bounds.
    pub async fn start_with(store: Arc<dyn Store>, config: CacheConfig) -> Self {
        let indexes = Arc::new(Indexes::new(&config));
        let (follower, progress) = Follower::start(store.clone(), indexes.clone()).await;
        let follower = tokio::spawn(follower.run());
        Self {
            shared: Arc::new(Shared {
                indexes,
                store,
                progress,
                follower,
            }),
        }
    }

    /// Reads one kind.
    pub fn reader<T: Resource>(&self) -> Reader<T> {
        let index = self.shared.indexes.of::<T>();
        let changes = index.changes();
        Reader {
            shared: self.shared.clone(),
            index,
            changes,
        }
    }

    /// Everything up to here is in the cache, of all kinds.
    pub fn revision(&self) -> Revision {
        *self.shared.progress.borrow()
    }

    /// Returns when everything up to `revision` is in the cache, of all kinds. The revision must be one that the store has given.
    pub async fn wait_for(&self, revision: Revision) {
        let mut progress = self.shared.progress.clone();
        // The sender lives in the follower, which lives as long as `shared`: waiting for it cannot fail while we hold that.
        let _ = progress.wait_for(|seen| *seen >= revision).await;
    }

    /// Asks the store for its revision and waits, for at most `limit`, until the cache has it: after this a snapshot is as fresh as
    /// a read of the store. Returns whether the cache got there.
    pub async fn catch_up(&self, limit: Duration) -> Result<bool, StoreError> {
        let revision = self.shared.store.revision().await?;
        Ok(tokio::time::timeout(limit, self.wait_for(revision)).await.is_ok())
    }
}

/// Reads one kind. Clones are independent of each other in what they have seen.
pub struct Reader<T: Resource> {
    shared: Arc<Shared>,
    index: Arc<Index<T>>,
    changes: watch::Receiver<u64>,
}

impl<T: Resource> Clone for Reader<T> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            index: self.index.clone(),
            changes: self.changes.clone(),
        }
    }
}

impl<T: Resource> Reader<T> {
    /// All objects now. Costs a pointer.
    pub fn snapshot(&self) -> Snapshot<T> {
        let progress = *self.shared.progress.borrow();
        self.index.snapshot(progress)
    }

    /// One object as it is now.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.index.get(&ObjectKey::new(namespace, name))
    }

    /// The same for somebody who asks in passing: it is not kept decoded for that.
    pub fn peek(&self, namespace: &str, name: &str) -> Option<Arc<T>> {
        self.index.peek(&ObjectKey::new(namespace, name))
    }

    /// Returns when an object of the kind has changed since the last call (or since the reader was made). Cancel-safe. What
    /// changes several times meanwhile is told once.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The index is gone only when nobody follows the store any more: there will be no change.
            std::future::pending::<()>().await;
        }
    }

    /// Returns when everything up to `revision` is in the cache.
    pub async fn wait_for(&self, revision: Revision) -> Snapshot<T> {
        Cache {
            shared: self.shared.clone(),
        }
        .wait_for(revision)
        .await;
        self.snapshot()
    }

    /// A snapshot and everything that happens after it, in order and without a gap.
    pub fn events(&self) -> (Snapshot<T>, EventStream<T>) {
        let progress = *self.shared.progress.borrow();
        let (snapshot, position) = self.index.snapshot_and_position(progress);
        let stream = EventStream::new(self.shared.clone(), self.index.clone(), position, None);
        (snapshot, stream)
    }

    /// Everything that happened after `revision`. What the window no longer has comes from the store's own log.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when neither has it, [`StoreError::Future`] when the revision is not written yet.
    pub async fn events_after(&self, revision: Revision) -> Result<EventStream<T>, StoreError> {
        if revision > *self.shared.progress.borrow() {
            let current = self.shared.store.revision().await?;
            if revision > current {
                return Err(StoreError::Future {
                    requested: revision,
                    current,
                });
            }
            Cache {
                shared: self.shared.clone(),
            }
            .wait_for(revision)
            .await;
        }
        if let Some(position) = self.index.position_after(revision) {
            return Ok(EventStream::new(
                self.shared.clone(),
                self.index.clone(),
                position,
                None,
            ));
        }
        let progress = *self.shared.progress.borrow();
        let (snapshot, position) = self.index.snapshot_and_position(progress);
        let prefix = format!("{}/", T::KIND.resource);
        let watch = self.shared.store.watch(&prefix, revision).await?;
        let backlog = events::Backlog::new(watch, revision, snapshot.revision);
        Ok(EventStream::new(
            self.shared.clone(),
            self.index.clone(),
            position,
            Some(backlog),
        ))
    }

    /// Keeps a snapshot for the next pages of a list. It costs what has changed since.
    pub fn keep(&self, snapshot: &Snapshot<T>) {
        self.index.keep(snapshot.clone());
    }

    /// The objects as they were at a revision: one that was kept, or one that the window of events reaches. `None` when it is
    /// neither, or in the future.
    pub fn snapshot_at(&self, revision: Revision) -> Option<Snapshot<T>> {
        let progress = *self.shared.progress.borrow();
        self.index.snapshot_at(revision, progress)
    }
}

#[cfg(test)]
mod keys {
    use super::*;

    #[test]
    fn neighbours_share_what_they_have_in_common() {
        let first = ObjectKey::new("default", "a");
        let same = ObjectKey::new("default", "a").beside(Some(&first));
        assert!(Arc::ptr_eq(&same.namespace, &first.namespace) && Arc::ptr_eq(&same.name, &first.name));
        let second = ObjectKey::new("default", "b").beside(Some(&first));
        assert_eq!(second, ObjectKey::new("default", "b"));
        assert!(Arc::ptr_eq(&second.namespace, &first.namespace));
        assert_eq!(
            ObjectKey::new("shop", "a").beside(Some(&first)),
            ObjectKey::new("shop", "a")
        );
        assert_eq!(ObjectKey::new("shop", "a").beside(None), ObjectKey::new("shop", "a"));
    }
}
