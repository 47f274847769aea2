//! Watches: one etcd watch each, begun anew after the last delivered revision when its connection fails.

use std::{sync::Arc, time::Duration};

use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;

use super::{MARKER, Shared, StoreError, behind, is_too_large, number, revision, short};
use crate::store::{Change, ChangeSet, Revision, Watch, frame};

/// Sets that wait for the reader; after that etcd has to wait.
const BUFFER: usize = 64;
/// Between two attempts to begin anew.
const RETRY: Duration = Duration::from_millis(300);

type Sender = mpsc::Sender<Result<ChangeSet, StoreError>>;

pub(super) async fn open(shared: Arc<Shared>, prefix: String, after: Revision) -> Result<Watch, StoreError> {
    let head = shared.probe(after).await?;
    let (sender, receiver) = mpsc::channel(BUFFER);
    let follower = Follower {
        shared,
        prefix: format!("{}{prefix}", frame::PREFIX),
        last: after,
        unmarked: false,
    };
    tokio::spawn(follower.run(head, sender));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

/// The revision up to which etcd is compacted: only a watch that begins too early is told.
pub(super) async fn compacted(shared: &Shared) -> Result<Revision, StoreError> {
    let options = WatchOptions::new().with_start_revision(1);
    let told = async {
        let mut stream = shared.client.watch_client().watch(frame::PREFIX, Some(options)).await?;
        while let Some(response) = stream.message().await? {
            if response.canceled() {
                return Ok(response.compact_revision());
            }
        }
        Ok(0)
    };
    Ok(revision(shared.bounded(told).await?))
}

struct Follower {
    shared: Arc<Shared>,
    prefix: String,
    /// Everything up to here was delivered.
    last: Revision,
    /// There is a past whose end could not be marked.
    unmarked: bool,
}

enum Ended {
    /// Nobody reads any more.
    Unread,
    /// It cannot go on.
    Failed(StoreError),
    /// It can be begun anew.
    Lost(String),
}

impl Follower {
    async fn run(mut self, mut head: Revision, sender: Sender) {
        loop {
            let ended = match self.begin(head).await {
                Ok(stream) => self.follow(stream, head, &sender).await,
                Err(error) => Ended::Lost(error.to_string()),
            };
            match ended {
                Ended::Unread => return,
                Ended::Failed(error) => {
                    // Who no longer reads does not want the error.
                    let _ = sender.send(Err(error)).await;
                    return;
                }
                Ended::Lost(reason) => tracing::warn!(reason, after = self.last, "a watch of etcd is begun anew"),
            }
            head = loop {
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
                match self.shared.probe(self.last).await {
                    Ok(head) => break head,
                    Err(StoreError::Unavailable(error)) => tracing::debug!(%error, "etcd cannot be reached"),
                    Err(other) => {
                        let _ = sender.send(Err(other)).await;
                        return;
                    }
                }
            };
        }
    }

    /// Marks the end of the past, which the watch is told of then. An etcd that has no room takes no mark.
    async fn mark(&self) -> Result<(), StoreError> {
        let marker = format!("{}{MARKER}", self.prefix);
        let mut kv = self.shared.kv.clone();
        let marked = self.shared.bounded(kv.put(marker, frame::frame(b""), None));
        marked.await.map(drop)
    }

    /// Opens the watch. When there is a past to catch up with, its end is marked first, or later when there is no room for that.
    async fn begin(&mut self, head: Revision) -> Result<WatchStream, StoreError> {
        self.unmarked = false;
        if head > self.last {
            match self.mark().await {
                Ok(()) => {}
                Err(StoreError::Full { .. }) => self.unmarked = true,
                Err(error) => return Err(error),
            }
        }
        let options = WatchOptions::new()
            .with_range(behind(&self.prefix))
            .with_start_revision(number(self.last + 1))
            .with_prev_key();
        let mut client = self
            .shared
            .client
            .watch_client()
            .max_decoding_message_size(self.shared.options.message_bytes);
        self.shared
            .bounded(client.watch(self.prefix.clone(), Some(options)))
            .await
    }

    async fn follow(&mut self, mut stream: WatchStream, head: Revision, sender: &Sender) -> Ended {
        let interval = self.shared.options.bookmark_interval;
        let mut bookmark_at = if head == self.last {
            Instant::now()
        } else {
            Instant::now() + interval
        };
        loop {
            // All branches are cancel-safe: a message is taken only when it is whole.
            let sets = tokio::select! {
                () = sender.closed() => return Ended::Unread,
                () = tokio::time::sleep_until(bookmark_at) => {
                    if self.unmarked {
                        self.unmarked = self.mark().await.is_err();
                    }
                    vec![ChangeSet { revision: self.last, changes: Vec::new() }]
                }
                message = stream.message() => match message {
                    Ok(Some(response)) => match self.sets(&response) {
                        Ok(sets) => sets,
                        Err(ended) => return ended,
                    },
                    Ok(None) => return Ended::Lost("the stream ended".to_owned()),
                    // It would be as large again. Who reads it all anew does so in pages.
                    Err(error) if is_too_large(&error) => {
                        return Ended::Failed(StoreError::Compacted { requested: self.last, oldest: head.max(self.last + 1) });
                    }
                    Err(error) => return Ended::Lost(error.to_string()),
                },
            };
            for set in sets {
                self.last = set.revision;
                bookmark_at = Instant::now() + interval;
                if sender.send(Ok(set)).await.is_err() {
                    return Ended::Unread;
                }
            }
        }
    }

    /// The changes of a response by revision. Responses hold whole revisions: fragments were not asked for.
    fn sets(&self, response: &WatchResponse) -> Result<Vec<ChangeSet>, Ended> {
        if response.canceled() {
            return Err(match revision(response.compact_revision()) {
                0 => Ended::Lost(response.cancel_reason().to_owned()),
                oldest => Ended::Failed(StoreError::Compacted {
                    requested: self.last,
                    oldest,
                }),
            });
        }
        let mut sets: Vec<ChangeSet> = Vec::new();
        for event in response.events() {
            let Some(at) = event.kv().map(|kv| revision(kv.mod_revision())) else {
                continue;
            };
            if at <= self.last {
                continue;
            }
            if lacks_previous(event) {
                return Err(Ended::Failed(StoreError::Compacted {
                    requested: self.last,
                    oldest: at,
                }));
            }
            if sets.last().is_none_or(|set| set.revision != at) {
                sets.push(ChangeSet {
                    revision: at,
                    changes: Vec::new(),
                });
            }
            let change = change(event, at).map_err(Ended::Failed)?;
            if let (Some(set), Some(change)) = (sets.last_mut(), change) {
                set.changes.push(change);
            }
        }
        for set in &mut sets {
            set.changes.sort_by(|one, other| key_of(one).cmp(key_of(other)));
        }
        Ok(sets)
    }
}

/// Whether etcd left out what was there before, since that was compacted before the event was sent: so it does for a reader that is
/// far behind, and says nothing. Without it nobody can be told what was deleted, or what a selector no longer matches.
fn lacks_previous(event: &Event) -> bool {
    event.prev_kv().is_none()
        && event.kv().is_some_and(|kv| {
            let is_first = event.event_type() == EventType::Put && kv.create_revision() == kv.mod_revision();
            !is_first && short(kv.key()).is_some()
        })
}

fn change(event: &Event, at: Revision) -> Result<Option<Change>, StoreError> {
    let Some((kv, key)) = event.kv().and_then(|kv| Some((kv, short(kv.key())?))) else {
        return Ok(None);
    };
    let now = (event.event_type() == EventType::Put).then(|| kv.value());
    frame::change(key, at, now, event.prev_kv().map(etcd_client::KeyValue::value))
}

fn key_of(change: &Change) -> &str {
    match change {
        Change::Put { record, .. } => record.key.as_str(),
        Change::Delete { key, .. } => key.as_str(),
    }
}
