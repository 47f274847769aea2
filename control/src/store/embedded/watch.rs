//! Watches: from the log, then live; back to the log when the live buffer was missed.

use std::{collections::VecDeque, sync::Arc};

use tokio::{
    sync::broadcast::{self, error::RecvError},
    time::{Instant, sleep_until},
};

use super::{Shared, blocking, log};
use crate::store::{Change, ChangeSet, Revision, StoreError, Watch};

/// Opens a watch. It holds the database's shared state, not the writer.
pub(super) async fn open(shared: Arc<Shared>, prefix: String, after: Revision) -> Result<Watch, StoreError> {
    // First the subscription, then the revision: what the log does not have yet comes live.
    let live = shared.live.subscribe();
    let current = *shared.revision.borrow();
    if after > current {
        return Err(StoreError::Future {
            requested: after,
            current,
        });
    }
    let mut watcher = Watcher {
        bookmark_at: Instant::now() + shared.config.bookmark_interval,
        shared,
        prefix,
        live,
        seen: after,
        told: after,
        caught_up: after == current,
        queue: VecDeque::new(),
    };
    if !watcher.caught_up {
        // The first read tells whether the revision is compacted.
        watcher.read_log().await?;
    }
    let stream = futures::stream::unfold(Some(watcher), |state| async move {
        let mut watcher = state?;
        match watcher.next().await {
            Ok(Some(set)) => Some((Ok(set), Some(watcher))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(Box::pin(stream))
}

struct Watcher {
    shared: Arc<Shared>,
    prefix: String,
    live: broadcast::Receiver<Arc<Vec<ChangeSet>>>,
    /// Everything up to here is in `queue` or was told.
    seen: Revision,
    /// Everything up to here was told.
    told: Revision,
    caught_up: bool,
    queue: VecDeque<ChangeSet>,
    bookmark_at: Instant,
}

impl Watcher {
    /// `None` when the store was closed.
    async fn next(&mut self) -> Result<Option<ChangeSet>, StoreError> {
        loop {
            if let Some(set) = self.queue.pop_front() {
                return Ok(Some(self.tell(set)));
            }
            if !self.caught_up {
                self.read_log().await?;
                if self.caught_up && self.queue.is_empty() {
                    return Ok(Some(self.bookmark()));
                }
                continue;
            }
            // Both branches are cancel-safe: receiving takes a message only when it is ready.
            tokio::select! {
                received = self.live.recv() => match received {
                    Ok(sets) => self.take(&sets),
                    Err(RecvError::Lagged(_)) => self.caught_up = false,
                    Err(RecvError::Closed) => return Ok(None),
                },
                () = sleep_until(self.bookmark_at) => return Ok(Some(self.bookmark())),
            }
        }
    }

    fn tell(&mut self, set: ChangeSet) -> ChangeSet {
        self.told = set.revision;
        self.bookmark_at = Instant::now() + self.shared.config.bookmark_interval;
        set
    }

    fn bookmark(&mut self) -> ChangeSet {
        self.tell(ChangeSet {
            revision: self.seen.max(self.told),
            changes: Vec::new(),
        })
    }

    fn take(&mut self, sets: &[ChangeSet]) {
        for set in sets {
            if set.revision > self.seen {
                self.seen = set.revision;
                self.queue.extend(under(&self.prefix, set));
            }
        }
    }

    async fn read_log(&mut self) -> Result<(), StoreError> {
        let (shared, after) = (self.shared.clone(), self.seen);
        let current = *self.shared.revision.borrow();
        let sets = blocking(move || log::read(&shared, after)).await?;
        let end = sets.is_empty();
        self.take(&sets);
        self.caught_up = end || self.seen >= current;
        Ok(())
    }
}

/// The part of a set that lies under the prefix; `None` when that is nothing.
fn under(prefix: &str, set: &ChangeSet) -> Option<ChangeSet> {
    let key = |change: &Change| match change {
        Change::Put { record, .. } => record.key.as_str().starts_with(prefix),
        Change::Delete { key, .. } => key.as_str().starts_with(prefix),
    };
    let changes: Vec<_> = set.changes.iter().filter(|change| key(change)).cloned().collect();
    (!changes.is_empty()).then_some(ChangeSet {
        revision: set.revision,
        changes,
    })
}
