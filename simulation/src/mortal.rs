//! A store whose process can be killed at a write.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use futures::StreamExt as _;
use orlop_control::store::{Key, Listing, Operation, Record, Revision, Store, StoreError, Transaction, Watch, Write};
use tokio_util::sync::CancellationToken;

/// Whether the write at which the process dies has taken effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dies {
    /// It never reached the store.
    Before,
    /// It is in the store, and nobody was told.
    After,
}

/// The write at which a process dies, the first being 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashPoint {
    /// Which write.
    pub write: u64,
    /// When.
    pub dies: Dies,
}

/// The store as one process has it. When the process is dead no call returns any more, so that whatever is left of it does nothing.
pub struct Mortal {
    inner: Arc<dyn Store>,
    writes: AtomicU64,
    crash: Option<CrashPoint>,
    died: CancellationToken,
}

impl Mortal {
    /// A process over the store, which dies at a write or lives on.
    pub fn new(inner: Arc<dyn Store>, crash: Option<CrashPoint>) -> Self {
        Self {
            inner,
            writes: AtomicU64::new(0),
            crash,
            died: CancellationToken::new(),
        }
    }

    /// Kills the process now.
    pub fn kill(&self) {
        self.died.cancel();
    }

    /// Cancelled when the process is dead.
    pub fn died(&self) -> &CancellationToken {
        &self.died
    }

    /// How many writes it has asked for.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// What a living process gets; a dead one gets nothing for ever.
    async fn alive<T>(&self, call: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            () = self.died.cancelled() => std::future::pending().await,
            result = call => result,
        }
    }
}

/// Signs of life and news come with time, not with what is done: a crash between two of them is one between two other writes. That they
/// are a leader's changes nothing; that a replica becomes the leader does count.
fn counts(transaction: &Transaction) -> bool {
    let told = |operation: &Operation| {
        let key = operation.key.as_str();
        let is_fence = key.starts_with("leaders/") && matches!(operation.write, Write::Check);
        is_fence || key.starts_with("leases/") || key.starts_with("events/")
    };
    !transaction.operations.iter().all(told)
}

#[async_trait]
impl Store for Mortal {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.alive(self.inner.get(key)).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.alive(self.inner.list(prefix)).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        if self.died.is_cancelled() {
            return std::future::pending().await;
        }
        if counts(&transaction) {
            let write = self.writes.fetch_add(1, Ordering::Relaxed) + 1;
            match self.crash.filter(|crash| crash.write == write) {
                None => {}
                Some(crash) => {
                    if crash.dies == Dies::After {
                        // A conflict is an answer that nobody hears, too.
                        let _unheard = self.inner.commit(transaction).await;
                    }
                    self.kill();
                    return std::future::pending().await;
                }
            }
        }
        self.alive(self.inner.commit(transaction)).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let watch = self.alive(self.inner.watch(prefix, after)).await?;
        let died = self.died.clone();
        Ok(Box::pin(
            watch
                .take_until(died.cancelled_owned())
                .chain(futures::stream::pending()),
        ))
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.alive(self.inner.revision()).await
    }
}
