//! A store that does everything that a store may do to who reads it: reads whose answers are old when they come, late watches, watches that
//! end, gaps that can only be closed by reading anew, changes that are told twice, writes that fail, and writes that fail though they
//! happened.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::StreamExt as _;
use orlop_control::store::{
    ChangeSet, Key, Listing, Record, Revision, Store, StoreError, Transaction, Watch, memory::MemoryStore,
};
use tokio::time::sleep;

use crate::environment::Chance;

/// So many change sets may be told again.
const REMEMBERED: usize = 4;

/// How hard it is.
#[derive(Debug, Clone)]
pub struct Hardness {
    /// The longest time that a watch, or the answer of a read, is behind, nearly always.
    pub lag: Duration,
    /// The longest time that it is behind once in a while.
    pub stall: Duration,
    /// One of so many changes ends the watch, is told twice, or comes after a stall; one of so many answers does that.
    pub trouble: u32,
    /// One of so many calls fails, some after they happened.
    pub failures: u32,
    /// The longest time that a call takes.
    pub latency: Duration,
}

impl Default for Hardness {
    fn default() -> Self {
        Self {
            lag: Duration::from_millis(200),
            stall: Duration::from_secs(8),
            trouble: 12,
            failures: 25,
            latency: Duration::from_millis(30),
        }
    }
}

/// The store as its adversary hands it on.
pub struct Adversary {
    inner: MemoryStore,
    hardness: Hardness,
    chance: Arc<Mutex<Chance>>,
}

#[derive(Debug)]
struct Mischief;

impl std::fmt::Display for Mischief {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the adversary says so")
    }
}

impl std::error::Error for Mischief {}

fn unavailable() -> StoreError {
    StoreError::Unavailable(Box::new(Mischief))
}

impl Adversary {
    /// Over a store, with choices that follow the seed.
    pub fn new(inner: MemoryStore, hardness: Hardness, seed: u64) -> Self {
        Self {
            inner,
            hardness,
            chance: Arc::new(Mutex::new(Chance::new(seed, 1))),
        }
    }

    fn choose<T>(&self, choice: impl FnOnce(&mut Chance) -> T) -> T {
        choice(&mut self.chance.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes its time; whether the call is to fail.
    async fn hinder(&self) -> bool {
        let (time, fails) = self.choose(|chance| {
            (
                chance.up_to(self.hardness.latency),
                chance.once_in(self.hardness.failures),
            )
        });
        sleep(time).await;
        fails
    }

    /// The answer of a read is on its way: what is written meanwhile is not in it.
    async fn travel(&self) {
        let time = self.choose(|chance| {
            let longest = if chance.once_in(self.hardness.trouble) {
                self.hardness.stall
            } else {
                self.hardness.lag
            };
            chance.up_to(longest)
        });
        sleep(time).await;
    }
}

#[async_trait]
impl Store for Adversary {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        if self.hinder().await {
            return Err(unavailable());
        }
        let found = self.inner.get(key).await;
        self.travel().await;
        found
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        if self.hinder().await {
            return Err(unavailable());
        }
        let found = self.inner.list(prefix).await;
        self.travel().await;
        found
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        if self.hinder().await {
            if self.choose(|chance| chance.once_in(2)) {
                // It happened, and its answer is lost.
                self.inner.commit(transaction).await?;
            }
            return Err(unavailable());
        }
        let result = self.inner.commit(transaction).await;
        self.hinder().await;
        result
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        if self.hinder().await {
            return Err(unavailable());
        }
        let hindered = Hindered {
            watch: self.inner.watch(prefix, after).await?,
            store: self.inner.clone(),
            hardness: self.hardness.clone(),
            chance: Chance::new(self.choose(Chance::seed), 2),
            told: VecDeque::new(),
            again: VecDeque::new(),
        };
        Ok(Box::pin(futures::stream::unfold(Some(hindered), |state| async move {
            let mut hindered = state?;
            let set = hindered.next().await?;
            let goes_on = set.is_ok();
            Some((set, goes_on.then_some(hindered)))
        })))
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        if self.hinder().await {
            return Err(unavailable());
        }
        let revision = self.inner.revision().await;
        self.travel().await;
        revision
    }
}

/// A watch in the adversary's hands.
struct Hindered {
    watch: Watch,
    store: MemoryStore,
    hardness: Hardness,
    chance: Chance,
    /// What was told last.
    told: VecDeque<ChangeSet>,
    /// What is told once more.
    again: VecDeque<ChangeSet>,
}

impl Hindered {
    async fn next(&mut self) -> Option<Result<ChangeSet, StoreError>> {
        if let Some(set) = self.again.pop_front() {
            return Some(Ok(set));
        }
        let set = match self.watch.next().await? {
            Ok(set) => set,
            Err(error) => return Some(Err(error)),
        };
        sleep(self.chance.up_to(self.hardness.lag)).await;
        if self.told.len() == REMEMBERED {
            self.told.pop_front();
        }
        self.told.push_back(set.clone());
        if !self.chance.once_in(self.hardness.trouble) {
            return Some(Ok(set));
        }
        match self.chance.below(4) {
            0 => sleep(self.chance.up_to(self.hardness.stall)).await,
            // It ends, and can be resumed.
            1 => return Some(Err(unavailable())),
            // It ends, and what comes next cannot be had any more.
            2 => {
                self.store.compact_to(set.revision);
                return Some(Err(unavailable()));
            }
            _ => self.again = self.told.clone(),
        }
        Some(Ok(set))
    }
}
