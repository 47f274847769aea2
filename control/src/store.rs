//! The store: the only place with durable control state.
//!
//! One trait, two engines ([`embedded`] on redb, [`etcd`]) and that of simulations ([`memory`]), one contract suite that all pass.
//!
//! Invariant: every write has a [`Revision`], one greater than every earlier one; a record's revision is that of its last
//! write. Watches are ordered, gap-free, never split a revision, and can be resumed after any revision that is not compacted.

#[cfg(test)]
pub(crate) mod contract;
pub mod embedded;
pub mod etcd;
pub mod memory;

mod frame;
#[doc(hidden)]
pub use frame::{framed, unframed};

use std::{
    collections::HashSet,
    fmt,
    path::PathBuf,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use orlop_proto::ResourceKind;

/// A point in the history of the whole store. 0 is before the first write.
pub type Revision = u64;

/// A key, `RESOURCE/NAMESPACE/NAME` for namespaced kinds and `RESOURCE/NAME` for others. The engines put `/orlop/v1/` before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// The key of an object. `namespace` is ignored for kinds without one.
    pub fn object(kind: &ResourceKind, namespace: &str, name: &str) -> Self {
        if kind.namespaced {
            Self(format!("{}/{namespace}/{name}", kind.resource))
        } else {
            Self(format!("{}/{name}", kind.resource))
        }
    }

    /// The key of a record that is not an object: claims of addresses (`clusterips`), ranges (`podcidrs`) and
    /// what lengths they have (`podcidrlengths`), nodes' sessions (`nodesessions`), join tokens (`tokens`).
    pub fn internal(resource: &str, name: &str) -> Self {
        Self(format!("{resource}/{name}"))
    }

    /// From its text, as an engine has it (without the engine's prefix).
    pub fn from_text(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A stored value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it is.
    pub key: Key,
    /// What it holds: the encoded message, without the engine's framing (magic, format version).
    pub value: Bytes,
    /// The revision of its last write.
    pub revision: Revision,
}

/// All records under a prefix at one revision.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The store's revision when the list was read.
    pub revision: Revision,
    /// In ascending order of keys.
    pub records: Vec<Record>,
}

/// What must hold for a key when a transaction commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// There is no such record.
    Absent,
    /// The record is there and its last write was this one.
    Revision(Revision),
    /// Nothing.
    Any,
}

/// A change to one key.
#[derive(Debug, Clone)]
pub enum Write {
    /// Writes a value.
    Put(Bytes),
    /// Removes the record; removing what is not there is no change (with [`Expected::Any`]).
    Delete,
    /// Changes nothing: the operation only checks. Leaders fence their writes with it.
    Check,
}

/// One operation of a [`Transaction`].
#[derive(Debug, Clone)]
pub struct Operation {
    /// Where.
    pub key: Key,
    /// Under which condition.
    pub expected: Expected,
    /// What.
    pub write: Write,
}

/// Operations that happen together, under one revision, or not at all. At most 128 operations and 1.5 MiB.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// In any order; a key appears once.
    pub operations: Vec<Operation>,
}

/// Operations in one transaction.
pub const MAX_OPERATIONS: usize = 128;
/// Bytes of keys and values in one transaction.
pub const MAX_TRANSACTION_BYTES: usize = 1_536 * 1024;

impl Transaction {
    /// One operation.
    pub fn one(key: Key, expected: Expected, write: Write) -> Self {
        Self {
            operations: vec![Operation { key, expected, write }],
        }
    }

    /// With one more operation.
    #[must_use]
    pub fn and(mut self, key: Key, expected: Expected, write: Write) -> Self {
        self.operations.push(Operation { key, expected, write });
        self
    }

    /// Bytes of its keys and values.
    pub fn bytes(&self) -> usize {
        let size = |operation: &Operation| match &operation.write {
            Write::Put(value) => operation.key.as_str().len() + value.len(),
            Write::Delete | Write::Check => operation.key.as_str().len(),
        };
        self.operations.iter().map(size).sum()
    }

    /// Whether it is within the limits; both engines ask this before they begin.
    fn check_limits(&self) -> Result<(), StoreError> {
        if self.operations.len() > MAX_OPERATIONS {
            let count = self.operations.len();
            return Err(StoreError::TooLarge(format!(
                "{count} operations, at most {MAX_OPERATIONS}"
            )));
        }
        let bytes = self.bytes();
        if bytes > MAX_TRANSACTION_BYTES {
            return Err(StoreError::TooLarge(format!(
                "{bytes} bytes, at most {MAX_TRANSACTION_BYTES}"
            )));
        }
        let mut seen = HashSet::new();
        let mut keys = self.operations.iter().enumerate();
        // Of few, comparing is quicker than remembering.
        let twice = if self.operations.len() <= 8 {
            keys.find(|(index, one)| self.operations[..*index].iter().any(|other| other.key == one.key))
        } else {
            keys.find(|(_, one)| !seen.insert(one.key.as_str()))
        };
        match twice.map(|(_, one)| one) {
            Some(twice) => Err(StoreError::TooLarge(format!("{} appears twice", twice.key))),
            None => Ok(()),
        }
    }
}

/// One change that a watch saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A record was written.
    Put {
        /// As it is now.
        record: Record,
        /// What was there before.
        previous: Option<Bytes>,
    },
    /// A record was removed.
    Delete {
        /// Where it was.
        key: Key,
        /// What was there.
        previous: Bytes,
    },
}

/// All changes of one revision that lie under the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangeSet {
    /// Their revision.
    pub revision: Revision,
    /// In the order of keys. Empty in a bookmark: the watch has seen everything up to `revision`.
    pub changes: Vec<Change>,
}

/// A watch: ends after its first error.
pub type Watch = Pin<Box<dyn Stream<Item = Result<ChangeSet, StoreError>> + Send>>;

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A condition of a transaction did not hold; nothing was written.
    #[error("{key}: expected {expected:?}, found revision {found:?}")]
    Conflict {
        /// The first operation whose condition failed.
        key: Key,
        /// What it asked for.
        expected: Expected,
        /// What is there.
        found: Option<Revision>,
    },
    /// The revision is older than what is kept.
    #[error("revision {requested} is compacted; the oldest that can be resumed after is {oldest}")]
    Compacted {
        /// What was asked for.
        requested: Revision,
        /// Watches can start after this one.
        oldest: Revision,
    },
    /// The revision is not written yet.
    #[error("revision {requested} is in the future; the store is at {current}")]
    Future {
        /// What was asked for.
        requested: Revision,
        /// The store's revision.
        current: Revision,
    },
    /// The transaction breaks a limit (128 operations, 1.5 MiB, a key twice).
    #[error("transaction refused: {0}")]
    TooLarge(String),
    /// A value that is not what we write: truncated, another magic or format version.
    #[error("{key}: damaged value: {reason}")]
    Damaged {
        /// Where.
        key: Key,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that a newer version of control wrote.
    #[error(
        "{key}: a newer orlop-control wrote this in format {format}, and this one reads format {known}: start the newer one again"
    )]
    Newer {
        /// Where.
        key: Key,
        /// Its format.
        format: u8,
        /// The newest that is known here.
        known: u8,
    },
    /// The engine's disk is full, or fails. The engine goes on by itself when that is over.
    #[error("the store {} cannot be used: {reason}; {effect}", .path.display())]
    Disk {
        /// The engine's file.
        path: PathBuf,
        /// Whether it is for want of space.
        full: bool,
        /// What that means for who is told.
        effect: DiskEffect,
        /// What the disk said.
        reason: String,
    },
    /// The engine has no room for writes. Whether this one happened is unknown: one that crosses the quota is written and refused all the
    /// same. Deletions may be taken.
    #[error(
        "etcd takes no writes: {reason}; whether this one happened is unknown. Make room (`etcdctl compact --physical REVISION`, with the \
         revision that `etcdctl endpoint status -w json` tells, then `etcdctl defrag` for every member, or a larger --quota-backend-bytes), \
         then `etcdctl alarm disarm`"
    )]
    Full {
        /// What the engine said.
        reason: String,
    },
    /// The engine failed, or cannot be reached. Whether the write happened is unknown when `commit` returns this.
    #[error("store unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Values that were found damaged in this process.
static DAMAGED: AtomicU64 = AtomicU64::new(0);

impl StoreError {
    /// A damaged value, which is counted.
    pub fn damaged(key: &Key, reason: impl Into<String>) -> Self {
        DAMAGED.fetch_add(1, Ordering::Relaxed);
        Self::Damaged {
            key: key.clone(),
            reason: reason.into(),
        }
    }
}

/// The number of damaged values as Prometheus text.
pub fn prometheus() -> String {
    let name = "orlop_store_damaged_values_total";
    let help = "Stored values that were found damaged, each time that one was read.";
    let value = DAMAGED.load(Ordering::Relaxed);
    format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n")
}

/// What a failing disk did to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskEffect {
    /// The write was under way.
    Unknown,
    /// The write was not begun.
    NotWritten,
    /// A read failed.
    NotRead,
}

impl fmt::Display for DiskEffect {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Unknown => "whether the write happened is unknown",
            Self::NotWritten => "nothing was written",
            Self::NotRead => "nothing was read",
        })
    }
}

/// A durable, ordered, watchable map.
///
/// `get`, `list` and `revision` know every write that was acknowledged before they were called. What is written while their answer is on its
/// way they may lack.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The record at a key.
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError>;
    /// All records whose keys start with the prefix ("pods/", or "" for all), at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;
    /// Commits and returns the revision. Durable when it returns. A transaction that changes nothing returns the current revision.
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError>;
    /// All changes under a prefix after a revision. Bookmarks come at least every few seconds.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;
    /// The revision of the last write.
    async fn revision(&self) -> Result<Revision, StoreError>;
    /// Why writes fail or wait now, for people; `None` when they do not, or when only a write would tell.
    fn trouble(&self) -> Option<String> {
        None
    }
}
