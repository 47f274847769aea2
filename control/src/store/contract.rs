//! What all engines promise. Every test runs over the embedded engine, over a real etcd that it starts itself, and over the
//! simulations' engine.

mod disk;
mod embedded;
pub(crate) mod etcd;
mod memory;
mod transactions;
mod watches;

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;

use super::*;

/// One engine, ready to be tried.
#[async_trait]
trait Bench: Send + Sync {
    fn store(&self) -> Arc<dyn Store>;
    /// Closes the store, and its server, and opens it again on the same data.
    async fn restart(&mut self);
    /// Makes the store forget all changes up to a revision (or a few more).
    async fn compact(&self, revision: Revision);
    /// Writes bytes that are not ours at a key.
    async fn write_raw(&self, key: &Key, bytes: &[u8]);
}

/// A test for each engine.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod on_embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(&mut crate::store::contract::embedded::bench().await).await;
                }
            )*
        }
        mod on_etcd {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(&mut crate::store::contract::etcd::bench().await).await;
                }
            )*
        }
        mod on_memory {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(&mut crate::store::contract::memory::bench().await).await;
                }
            )*
        }
    };
}
use contract;

fn key(text: &str) -> Key {
    Key::from_text(text)
}

fn put(text: &str, value: &str) -> Operation {
    Operation {
        key: key(text),
        expected: Expected::Any,
        write: Write::Put(Bytes::copy_from_slice(value.as_bytes())),
    }
}

fn delete(text: &str) -> Operation {
    Operation {
        key: key(text),
        expected: Expected::Any,
        write: Write::Delete,
    }
}

fn if_(mut operation: Operation, expected: Expected) -> Operation {
    operation.expected = expected;
    operation
}

fn all(operations: impl IntoIterator<Item = Operation>) -> Transaction {
    Transaction {
        operations: operations.into_iter().collect(),
    }
}

async fn write(store: &Arc<dyn Store>, operation: Operation) -> Revision {
    store.commit(all([operation])).await.unwrap()
}

async fn value(store: &Arc<dyn Store>, text: &str) -> Option<(String, Revision)> {
    let record = store.get(&key(text)).await.unwrap()?;
    Some((String::from_utf8(record.value.to_vec()).unwrap(), record.revision))
}

/// The next set with changes. Bookmarks in between are checked for their order.
async fn next(watch: &mut Watch, last: &mut Revision) -> Result<ChangeSet, StoreError> {
    loop {
        let waited = tokio::time::timeout(Duration::from_secs(20), watch.next()).await;
        let set = waited
            .expect("a watch tells within 20 s")
            .expect("a watch does not end without an error")?;
        assert!(set.revision >= *last, "{} after {last}", set.revision);
        if set.changes.is_empty() {
            *last = set.revision;
            continue;
        }
        assert!(set.revision > *last, "{} after {last}", set.revision);
        *last = set.revision;
        return Ok(set);
    }
}

/// A change in short: "+key=value", "~key=value<before", "-key<before".
fn short(change: &Change) -> String {
    let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    match change {
        Change::Put { record, previous: None } => format!("+{}={}", record.key, text(&record.value)),
        Change::Put {
            record,
            previous: Some(before),
        } => {
            format!("~{}={}<{}", record.key, text(&record.value), text(before))
        }
        Change::Delete { key, previous } => format!("-{key}<{}", text(previous)),
    }
}

fn shorts(set: &ChangeSet) -> Vec<String> {
    set.changes.iter().map(short).collect()
}
