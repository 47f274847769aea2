//! The task that follows the store.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt as _;
use tokio::{sync::watch, time::MissedTickBehavior};

use super::index::Indexes;
use crate::store::{Change, ChangeSet, Key, Record, Revision, Store, StoreError, Watch};

/// How many change sets are applied together when they are there.
const BATCH: usize = 512;
/// How often what is too old is forgotten, and which objects are asked for.
const TRIM: Duration = Duration::from_secs(1);
/// Between attempts to reach the store.
const RETRY: Duration = Duration::from_millis(500);

pub(super) struct Follower {
    store: Arc<dyn Store>,
    indexes: Arc<Indexes>,
    progress: watch::Sender<Revision>,
}

impl Follower {
    /// Loads everything; returns when that has worked.
    pub(super) async fn start(store: Arc<dyn Store>, indexes: Arc<Indexes>) -> (Self, watch::Receiver<Revision>) {
        let (progress, receiver) = watch::channel(0);
        let follower = Self {
            store,
            indexes,
            progress,
        };
        while let Err(error) = follower.load().await {
            tracing::warn!(%error, "the cache waits for the store");
            tokio::time::sleep(RETRY).await;
        }
        (follower, receiver)
    }

    /// Follows for ever. A watch that fails is begun again where it stopped; when that is compacted, everything is read anew.
    pub(super) async fn run(self) {
        loop {
            let after = *self.progress.borrow();
            let ended = match self.store.watch("", after).await {
                Ok(watch) => self.follow(watch).await,
                Err(error) => Some(error),
            };
            match ended {
                // What a newer version wrote may be gone by now: the log still has it.
                Some(error @ (StoreError::Compacted { .. } | StoreError::Future { .. } | StoreError::Newer { .. })) => {
                    tracing::warn!(%error, after, "the cache cannot go on by the store's log and is read anew");
                    if let Err(error) = self.load().await {
                        tracing::warn!(%error, "the cache cannot reach the store");
                        tokio::time::sleep(RETRY).await;
                    }
                }
                Some(error) => {
                    tracing::warn!(%error, after, "the cache's watch failed and is begun again");
                    tokio::time::sleep(RETRY).await;
                }
                None => {}
            }
        }
    }

    async fn load(&self) -> Result<(), StoreError> {
        let listing = self.store.list("").await?;
        let mut by_resource: HashMap<String, Vec<Record>> = HashMap::new();
        for record in listing.records {
            by_resource
                .entry(resource(&record.key).to_owned())
                .or_default()
                .push(record);
        }
        for (resource, feed) in self.indexes.feeds() {
            feed.load(listing.revision, by_resource.remove(resource).unwrap_or_default());
        }
        self.progress.send_replace(listing.revision);
        Ok(())
    }

    /// Returns the error that ended the watch.
    async fn follow(&self, watch: Watch) -> Option<StoreError> {
        let mut sets = watch.ready_chunks(BATCH);
        let mut ticks = tokio::time::interval(TRIM);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Cancel-safe: the stream keeps what it has not given.
            let chunk = tokio::select! {
                chunk = sets.next() => chunk?,
                _ = ticks.tick() => {
                    self.indexes.feeds().for_each(|(_, feed)| feed.trim());
                    continue;
                }
            };
            let mut failed = None;
            let mut done = Vec::with_capacity(chunk.len());
            for set in chunk {
                match set {
                    Ok(set) => done.push(set),
                    Err(error) => failed = Some(error),
                }
            }
            self.apply(done);
            if failed.is_some() {
                return failed;
            }
        }
    }

    fn apply(&self, mut sets: Vec<ChangeSet>) {
        // What is told again is old: it must not take the place of what came after it.
        let mut seen = *self.progress.borrow();
        sets.retain(|set| {
            let is_new = set.revision > seen || set.changes.is_empty();
            seen = seen.max(set.revision);
            is_new
        });
        let Some(last) = sets.last().map(|set| set.revision) else {
            return;
        };
        let mut by_resource: HashMap<String, Vec<(Revision, Change)>> = HashMap::new();
        for set in sets {
            for change in set.changes {
                let key = match &change {
                    Change::Put { record, .. } => &record.key,
                    Change::Delete { key, .. } => key,
                };
                if self.indexes.feed_of(resource(key)).is_some() {
                    let list = by_resource.entry(resource(key).to_owned()).or_default();
                    list.push((set.revision, change));
                }
            }
        }
        for (resource, changes) in by_resource {
            if let Some(feed) = self.indexes.feed_of(&resource) {
                feed.apply(changes);
            }
        }
        self.progress.send_modify(|progress| *progress = last.max(*progress));
    }
}

fn resource(key: &Key) -> &str {
    key.as_str().split('/').next().unwrap_or_default()
}
