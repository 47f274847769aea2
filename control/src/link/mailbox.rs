//! What a session still has to tell its node of its pods, folded per pod.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use indexmap::IndexMap;
use orlop_proto::{
    Resource as _,
    core::v1::Pod,
    node::v1::{self as link, change::Change},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::services::encode;
use crate::cache::ObjectKey;

/// What became of a pod.
#[derive(Debug, Clone)]
pub(super) enum PodChange {
    /// It is there, or differs.
    Put(Arc<Pod>),
    /// Its object is gone.
    Removed {
        /// Its name.
        key: ObjectKey,
        /// Its uid.
        uid: Arc<str>,
    },
}

impl PodChange {
    /// As Updates carry it.
    pub fn encode(&self) -> Bytes {
        encode(match self {
            Self::Put(pod) => Change::Pod(Pod::clone(pod)),
            Self::Removed { key, uid } => Change::PodRemoved(link::PodKey {
                namespace: key.namespace.to_string(),
                name: key.name.to_string(),
                uid: uid.to_string(),
            }),
        })
    }

    fn uid(&self) -> &str {
        match self {
            Self::Put(pod) => pod.uid(),
            Self::Removed { uid, .. } => uid,
        }
    }
}

/// A session's pending changes. Bounded by the number of pods on the node.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    /// By uid: a pod's namesake is another pod.
    pending: Mutex<IndexMap<String, PodChange>>,
    changed: Notify,
    /// The session is over: its node has another, or is no longer a node.
    pub closed: CancellationToken,
}

impl Mailbox {
    /// A later change of a pod takes the place of an earlier one.
    pub fn put(&self, change: PodChange) {
        let uid = change.uid().to_owned();
        self.pending().insert(uid, change);
        self.changed.notify_one();
    }

    /// All changes, the oldest first. Nothing is kept, not even room: a mailbox is empty nearly always, and there are many.
    pub fn take(&self) -> impl Iterator<Item = PodChange> + Send + use<> {
        std::mem::take(&mut *self.pending()).into_values()
    }

    /// Waits for a change. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn pending(&self) -> MutexGuard<'_, IndexMap<String, PodChange>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::meta::v1::ObjectMeta;
    use prost::Message as _;

    use super::*;

    fn pod(uid: &str, generation: i64) -> Arc<Pod> {
        let metadata = ObjectMeta {
            uid: uid.to_owned(),
            generation,
            ..ObjectMeta::default()
        };
        Arc::new(Pod {
            metadata: Some(metadata),
            ..Pod::default()
        })
    }

    #[test]
    fn later_changes_of_a_pod_take_the_place_of_earlier_ones() {
        let mailbox = Mailbox::default();
        mailbox.put(PodChange::Put(pod("a", 1)));
        mailbox.put(PodChange::Put(pod("b", 1)));
        mailbox.put(PodChange::Put(pod("c", 1)));
        mailbox.put(PodChange::Put(pod("a", 2)));
        mailbox.put(PodChange::Removed {
            key: ObjectKey::new("default", "b"),
            uid: "b".into(),
        });
        let told = mailbox.take().map(|change| {
            let change = link::Change::decode(change.encode()).unwrap();
            match change.change.unwrap() {
                Change::Pod(pod) => format!("{} {}", pod.uid(), pod.meta().generation),
                Change::PodRemoved(key) => format!("no {}", key.uid),
                other => panic!("{other:?}"),
            }
        });
        assert_eq!(told.collect::<Vec<_>>(), ["a 2", "no b", "c 1"]);
        assert_eq!(mailbox.take().count(), 0);
    }
}
