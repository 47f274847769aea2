//! What all controllers share: keys in from events, one look at a time, and never a look at a cache that lacks our own writes.

#[cfg(test)]
mod tests;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::FutureExt as _;
use orlop_proto::Resource;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::queue::{Key, WorkQueue};
use crate::{
    cache::{Cache, Event, Reader, Snapshot},
    panics,
    registry::RegistryError,
    store::{Revision, StoreError},
};

/// How long a worker waits at a time for the cache to catch up with the store.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Why a look failed. It is repeated with back-off.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A write or a read of the store failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store could not be asked for its revision.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object that is stored has no meaning to the controller.
    #[error("{0}")]
    Malformed(String),
    /// The look ended in a panic, which was told where it happened.
    #[error("it ended in a panic")]
    Panicked,
}

/// What a look left behind.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The revision of the last write, when it is known.
    pub written: Revision,
    /// Something was written whose revision is not known (a deletion).
    pub wrote_unknown: bool,
    /// Look again after so long, whatever happens.
    pub again_after: Option<Duration>,
}

impl Outcome {
    /// Takes note of an object that was written.
    pub fn wrote<T: Resource>(&mut self, object: &T) {
        match object.meta().resource_version.parse::<Revision>() {
            Ok(revision) => self.written = self.written.max(revision),
            Err(_) => self.wrote_unknown = true,
        }
    }

    /// Asks for another look; the earliest of several wishes counts.
    pub fn look_again(&mut self, after: Duration) {
        self.again_after = Some(self.again_after.map_or(after, |earlier| earlier.min(after)));
    }
}

/// A controller: brings the state of one key to what it should be. It must be idempotent, and take what it knows from the
/// cache at the moment of the call.
#[async_trait]
pub trait Controller: Send + Sync + 'static {
    /// Its name, in logs.
    const NAME: &'static str;
    /// What it looks at.
    type Key: Key;

    /// One look.
    async fn reconcile(&self, key: &Self::Key) -> Result<Outcome, ControlError>;
}

/// Works on the queue until `cancel` says so.
pub async fn work<C: Controller>(
    controller: Arc<C>,
    queue: WorkQueue<C::Key>,
    cache: Cache,
    workers: usize,
    cancel: CancellationToken,
) {
    let mut tasks = JoinSet::new();
    for _ in 0..workers {
        let (controller, queue, cache) = (controller.clone(), queue.clone(), cache.clone());
        tasks.spawn(async move {
            loop {
                let key = queue.take().await;
                look(&*controller, &queue, &cache, key).await;
            }
        });
    }
    cancel.cancelled().await;
    tasks.shutdown().await;
}

async fn look<C: Controller>(controller: &C, queue: &WorkQueue<C::Key>, cache: &Cache, key: C::Key) {
    // One object that makes us panic must end neither the worker, by which all others are looked at, nor the process, again and again.
    let looked = AssertUnwindSafe(panics::contained(controller.reconcile(&key))).catch_unwind();
    let result = looked.await.unwrap_or(Err(ControlError::Panicked));
    // Invariant: a key never runs on a cache that lacks a write of its last run; else a ReplicaSet would create its pods twice.
    match result {
        Ok(outcome) => {
            if outcome.wrote_unknown {
                catch_up(cache).await;
            } else if outcome.written > 0 {
                cache.wait_for(outcome.written).await;
            }
            queue.succeeded(&key);
            if let Some(delay) = outcome.again_after {
                queue.add_after(key, delay);
            }
        }
        Err(error) => {
            // What was written before the failure, or by a write whose answer was lost, is not known.
            catch_up(cache).await;
            let delay = queue.failed(&key);
            let conflict = matches!(&error, ControlError::Registry(error) if error.is_conflict());
            if conflict {
                tracing::debug!(controller = C::NAME, ?key, %error, ?delay, "somebody else wrote in between");
            } else {
                tracing::warn!(controller = C::NAME, ?key, %error, ?delay, "will be tried again");
            }
        }
    }
}

/// Returns when the cache is as fresh as the store was at the call.
pub async fn catch_up(cache: &Cache) {
    loop {
        match cache.catch_up(CATCH_UP).await {
            Ok(true) => return,
            Ok(false) => tracing::warn!("the cache is behind the store"),
            Err(error) => {
                tracing::warn!(%error, "the store cannot be reached");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// What [`follow`] tells.
#[derive(Debug)]
pub enum Seen<'a, T> {
    /// The beginning, or a new beginning after events were missed: everything that is there.
    All(&'a Snapshot<T>),
    /// A change.
    Event(&'a Event<T>),
}

impl<'a, T: Resource> Seen<'a, T> {
    /// The objects that it speaks of: all, or the one that changed (before and after).
    pub fn objects(&self) -> Box<dyn Iterator<Item = Arc<T>> + 'a> {
        match self {
            Seen::All(snapshot) => Box::new(snapshot.objects.values()),
            Seen::Event(Event::Modified { old, new }) => Box::new([old.clone(), new.clone()].into_iter()),
            Seen::Event(Event::Added(object) | Event::Deleted(object)) => Box::new(std::iter::once(object.clone())),
        }
    }

    /// Whether what is there must be taken as unknown.
    pub fn is_all(&self) -> bool {
        matches!(self, Seen::All(_))
    }
}

/// Tells `on` what is there and what happens, until the task is dropped.
pub async fn follow<T: Resource>(reader: Reader<T>, mut on: impl FnMut(Seen<'_, T>) + Send) {
    loop {
        let (snapshot, mut events) = reader.events();
        on(Seen::All(&snapshot));
        drop(snapshot);
        let lagged = loop {
            match events.next_batch(256).await {
                Ok(batch) => batch.iter().for_each(|entry| on(Seen::Event(&entry.event()))),
                Err(lagged) => break lagged,
            }
        };
        tracing::warn!(%lagged, kind = T::KIND.resource, "a controller begins anew from a snapshot");
    }
}
