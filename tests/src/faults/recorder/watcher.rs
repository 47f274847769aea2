//! A watcher: lists once, then follows, and resumes after the last revision that it was told, at the next control replica.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use orlop_proto::{
    Resource,
    api::v1::{WatchEvent, WatchRequest},
    coordination::v1::Lease,
};
use tokio::{runtime::Runtime, sync::Notify, sync::watch};
use tonic::{Code, Streaming};

use super::{CALL, Shared, Snapshot, lock, revision, value};
use crate::faults::history::{Change, Kind, Seen};

/// Between two attempts to watch, after one that failed.
const RETRY: Duration = Duration::from_millis(100);

/// A running watcher.
pub struct Watcher {
    story: Arc<Mutex<Vec<Seen>>>,
    at: Arc<AtomicU64>,
    interrupt: Arc<Notify>,
    asleep: watch::Sender<bool>,
}

impl Watcher {
    /// Watches from a list on, until the runtime ends. It stays at a replica for so many events, or as long as it can (`None`).
    pub(super) fn begin(
        runtime: &Runtime,
        shared: &Arc<Shared>,
        turn: usize,
        stays: Option<usize>,
        base: Snapshot,
    ) -> Self {
        let (asleep, sleeps) = watch::channel(false);
        let watcher = Self {
            at: Arc::new(AtomicU64::new(base.revision)),
            story: Arc::new(Mutex::new(vec![Seen::Listed(base)])),
            interrupt: Arc::new(Notify::new()),
            asleep,
        };
        let task = Task {
            shared: shared.clone(),
            turn,
            stays,
            story: watcher.story.clone(),
            at: watcher.at.clone(),
            interrupt: watcher.interrupt.clone(),
            sleeps,
        };
        runtime.spawn(task.run());
        watcher
    }

    /// Up to here it was told everything.
    pub fn at(&self) -> u64 {
        self.at.load(Ordering::SeqCst)
    }

    /// What it was told.
    pub fn story(&self) -> Vec<Seen> {
        lock(&self.story).clone()
    }

    /// Drops its stream, and resumes when it is woken.
    pub fn sleep(&self) {
        self.asleep.send_replace(true);
        self.interrupt.notify_one();
    }

    /// See [`Self::sleep`].
    pub fn wake(&self) {
        self.asleep.send_replace(false);
    }

    /// How often it began with a list.
    pub fn lists(&self) -> usize {
        lock(&self.story)
            .iter()
            .filter(|seen| matches!(seen, Seen::Listed(_)))
            .count()
    }
}

struct Task {
    shared: Arc<Shared>,
    turn: usize,
    stays: Option<usize>,
    story: Arc<Mutex<Vec<Seen>>>,
    at: Arc<AtomicU64>,
    interrupt: Arc<Notify>,
    sleeps: watch::Receiver<bool>,
}

impl Task {
    async fn run(mut self) {
        let mut first = true;
        loop {
            if self.sleeps.wait_for(|asleep| !asleep).await.is_err() {
                return;
            }
            let interrupted = self.interrupt.clone();
            let ended = tokio::select! {
                () = interrupted.notified() => Ok(()),
                ended = self.follow(&mut first) => ended,
            };
            self.turn += 1;
            let Err(error) = ended else { continue };
            // A watch that fails says why by its code: what is compacted begins anew with a list.
            if let Some(status) = error.downcast_ref::<tonic::Status>()
                && status.code() == Code::OutOfRange
                && let Ok(list) = self.shared.list(self.turn).await
            {
                self.tell(list.revision, Seen::Listed(list));
                first = true;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn tell(&self, revision: u64, seen: Seen) {
        lock(&self.story).push(seen);
        self.at.fetch_max(revision, Ordering::SeqCst);
    }

    async fn follow(&mut self, first: &mut bool) -> Result<()> {
        let after = self.at.load(Ordering::SeqCst);
        let request = WatchRequest {
            resource: Lease::KIND.resource.to_owned(),
            namespace: self.shared.namespace.clone(),
            resource_version: after.to_string(),
            allow_watch_bookmarks: true,
            ..WatchRequest::default()
        };
        let opened = tokio::time::timeout(CALL, self.shared.objects(self.turn).watch(request)).await;
        let mut events: Streaming<WatchEvent> = opened??.into_inner();
        if !std::mem::take(first) {
            self.tell(after, Seen::Resumed(after));
        }
        let mut told = 0;
        while self.stays.is_none_or(|stays| told < stays) {
            let Some(event) = events.message().await? else {
                bail!("the stream has ended")
            };
            let (revision, seen) = read(event)?;
            self.tell(revision, seen);
            told += 1;
        }
        Ok(())
    }
}

fn read(event: WatchEvent) -> Result<(u64, Seen)> {
    let revision = revision(&event.resource_version)?;
    if event.r#type == "BOOKMARK" {
        return Ok((revision, Seen::Bookmark(revision)));
    }
    let lease = event
        .object
        .and_then(Lease::from_object)
        .context("an event without its Lease")?;
    let kind = match event.r#type.as_str() {
        "ADDED" => Kind::Added,
        "MODIFIED" => Kind::Modified,
        "DELETED" => Kind::Deleted,
        other => bail!("an event of type {other:?}"),
    };
    let change = if kind == Kind::Deleted {
        Change::Delete
    } else {
        Change::Put(value(&lease))
    };
    let key = lease.name().to_owned();
    Ok((
        revision,
        Seen::Event {
            revision,
            key,
            kind,
            change,
        },
    ))
}
