//! What a session still has to tell its node, folded per key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use indexmap::IndexMap;
use orlop_proto::{core::v1::Pod, node::v1::change::Change};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::services::encode;
use crate::cache::ObjectKey;

/// What a change is about: a later one of the same key takes its place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum ChangeKey {
    /// By uid: a pod's namesake is another pod.
    Pod(Arc<str>),
    Service(ObjectKey),
    /// By the node's name.
    Route(Arc<str>),
}

/// A change on its way.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// Concerns one node: encoded when it is sent.
    Pod(Arc<Pod>),
    /// Encoded once, for all nodes.
    Encoded(Bytes),
}

impl Item {
    pub fn into_encoded(self) -> Bytes {
        match self {
            Item::Pod(pod) => encode(Change::Pod(Pod::clone(&pod))),
            Item::Encoded(bytes) => bytes,
        }
    }
}

/// A session's pending changes. Bounded by the number of objects that concern the node.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    pending: Mutex<IndexMap<ChangeKey, Item>>,
    changed: Notify,
    /// The session is over: its node has another, or is no longer a node.
    pub closed: CancellationToken,
}

impl Mailbox {
    pub fn put(&self, key: ChangeKey, item: Item) {
        self.pending().insert(key, item);
        self.changed.notify_one();
    }

    /// The oldest changes, until they are `count` or `bytes`.
    pub fn take(&self, count: usize, bytes: usize) -> Vec<Bytes> {
        let mut pending = self.pending();
        let mut size = 0;
        let mut taken = Vec::new();
        let mut end = 0;
        while end < count
            && size < bytes
            && let Some((_, item)) = pending.get_index(end)
        {
            let encoded = item.clone().into_encoded();
            size += encoded.len();
            taken.push(encoded);
            end += 1;
        }
        pending.drain(..end);
        taken
    }

    pub fn is_empty(&self) -> bool {
        self.pending().is_empty()
    }

    /// Waits for a change. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn pending(&self) -> MutexGuard<'_, IndexMap<ChangeKey, Item>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ChangeKey {
        ChangeKey::Service(ObjectKey::new("default", name))
    }

    #[test]
    fn later_changes_of_a_key_take_the_place_of_earlier_ones() {
        let mailbox = Mailbox::default();
        mailbox.put(key("a"), Item::Encoded(Bytes::from_static(b"a1")));
        mailbox.put(key("b"), Item::Encoded(Bytes::from_static(b"b1")));
        mailbox.put(key("a"), Item::Encoded(Bytes::from_static(b"a2")));
        assert_eq!(mailbox.take(10, 100), ["a2", "b1"]);
        assert!(mailbox.is_empty());
    }

    #[test]
    fn takes_in_pieces() {
        let mailbox = Mailbox::default();
        for index in 0..10 {
            mailbox.put(key(&index.to_string()), Item::Encoded(Bytes::from_static(b"1234")));
        }
        assert_eq!(mailbox.take(3, 1000).len(), 3);
        assert_eq!(mailbox.take(100, 8).len(), 2);
        assert_eq!(mailbox.take(100, 1000).len(), 5);
    }
}
