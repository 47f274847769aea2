//! Watch: everything that changes after a revision, in order, without a gap.
//!
//! A watcher holds a position in the cache's window of events, no buffer of its own. HTTP/2's flow control stops the stream
//! of a reader that does not read; when its position has left the window meanwhile, it is told SLOW_WATCHER and where to
//! resume.

use std::{ops::Bound, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream, stream::BoxStream};
use orlop_proto::{Resource, ResourceKind, api::v1::WatchRequest};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{ObjectsService, RawWatchEvent, errors, raw::encode, select::Selection};
use crate::{
    cache::{Entry, Event, EventStream, ObjectKey, Snapshot},
    kinds::{KindVisitor, visit_kind},
    registry::Registered,
    store::Revision,
};

/// A watch's events.
pub(super) type RawStream = BoxStream<'static, Result<RawWatchEvent, Status>>;

/// Between bookmarks on a quiet watch.
const BOOKMARKS: Duration = Duration::from_secs(10);

/// Begins a watch.
pub(super) async fn open(
    service: &ObjectsService,
    kind: &ResourceKind,
    request: WatchRequest,
) -> Result<RawStream, Status> {
    let selection = Selection::parse(
        kind,
        &request.namespace,
        &request.label_selector,
        &request.field_selector,
    )?;
    let after = match request.resource_version.as_str() {
        "" | "0" => None,
        text => {
            let revision: Revision = text
                .parse()
                .map_err(|_| errors::invalid("resourceVersion", "is not a resourceVersion of ours"))?;
            Some(revision)
        }
    };
    if after.is_none() {
        service.catch_up().await?;
    }
    let start = Start {
        service: service.clone(),
        selection,
        after,
        bookmarks: request.allow_watch_bookmarks,
    };
    match visit_kind(kind, start) {
        Some(answer) => answer.await,
        None => Err(Status::internal("a kind without a cache")),
    }
}

struct Start {
    service: ObjectsService,
    selection: Selection,
    after: Option<Revision>,
    bookmarks: bool,
}

impl KindVisitor for Start {
    type Output = BoxFuture<'static, Result<RawStream, Status>>;

    fn visit<T: Registered>(self) -> Self::Output {
        Box::pin(async move {
            let reader = self.service.cache().reader::<T>();
            let (initial, events) = match self.after {
                None => {
                    let (snapshot, events) = reader.events();
                    (Some(Initial::new(snapshot)), events)
                }
                Some(revision) => {
                    let events = reader
                        .events_after(revision)
                        .await
                        .map_err(|error| errors::of_store(&error))?;
                    (None, events)
                }
            };
            let watcher = Watcher {
                events,
                initial,
                selection: self.selection,
                bookmark_at: self.bookmarks.then(|| Instant::now() + BOOKMARKS),
                told: self.after.unwrap_or_default(),
                shutdown: self.service.shutdown.clone(),
            };
            let stream = stream::unfold(Some(watcher), |state| async move {
                let mut watcher = state?;
                match watcher.next().await {
                    Ok(event) => Some((Ok(event), Some(watcher))),
                    Err(status) => Some((Err(status), None)),
                }
            });
            Ok(stream.boxed())
        })
    }
}

/// What exists at the beginning, told one by one.
struct Initial<T> {
    snapshot: Snapshot<T>,
    last: Option<ObjectKey>,
}

impl<T: Registered> Initial<T> {
    fn new(snapshot: Snapshot<T>) -> Self {
        Self { snapshot, last: None }
    }

    fn next(&mut self, selection: &Selection) -> Option<Arc<T>> {
        let namespace = selection.namespace();
        let start = match self.last.take() {
            Some(last) => Bound::Excluded(last),
            None => Bound::Included(ObjectKey::new(namespace, "")),
        };
        let (key, object) = self
            .snapshot
            .objects
            .range((start, Bound::Unbounded))
            .take_while(|(key, _)| namespace.is_empty() || &*key.namespace == namespace)
            .find(|(_, object)| selection.matches(&**object))?;
        self.last = Some(key.clone());
        Some(object)
    }
}

struct Watcher<T: Resource> {
    events: EventStream<T>,
    initial: Option<Initial<T>>,
    selection: Selection,
    /// When the next bookmark is due; `None`: the watcher wants none.
    bookmark_at: Option<Instant>,
    /// The last revision that the watcher was told.
    told: Revision,
    shutdown: CancellationToken,
}

impl<T: Registered> Watcher<T> {
    /// The next event that the watcher is to see.
    async fn next(&mut self) -> Result<RawWatchEvent, Status> {
        if let Some(initial) = &mut self.initial {
            let revision = initial.snapshot.revision;
            if let Some(object) = initial.next(&self.selection) {
                // No revision to resume after: objects that were written before this one are still to come.
                return Ok(event("ADDED", encode(T::clone(&object)), String::new()));
            }
            self.initial = None;
            self.told = revision;
            return Ok(bookmark(revision));
        }
        loop {
            let due = self.bookmark_at;
            // Cancel safety: EventStream::next loses nothing when it is dropped; the others have no state.
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return Err(Status::unavailable("control is shutting down")),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.bookmark_at = Some(Instant::now() + BOOKMARKS);
                    let revision = self.events.revision();
                    if revision > self.told {
                        self.told = revision;
                        return Ok(bookmark(revision));
                    }
                }
                entry = self.events.next() => {
                    let entry = entry.map_err(|lagged| {
                        errors::out_of_range("SLOW_WATCHER", lagged.to_string(), lagged.resume_after)
                    })?;
                    // Of several objects written in one transaction, only after the last can be resumed.
                    let revision = self.events.revision().min(entry.revision);
                    if let Some(event) = self.see(&entry, revision) {
                        self.told = revision;
                        return Ok(event);
                    }
                }
            }
        }
    }

    /// The event as this watcher's selection sees it: what begins to match is ADDED, what ceases to is DELETED.
    fn see(&self, entry: &Entry<T>, revision: Revision) -> Option<RawWatchEvent> {
        let told = |kind: &str| Some(event(kind, entry.encoded_object().clone(), revision.to_string()));
        if !self.selection.has_namespace(entry.namespace()) {
            return None;
        }
        if self.selection.is_by_namespace() {
            // Without decoding it once for each of a thousand watchers.
            return told(entry.kind());
        }
        match &entry.event() {
            Event::Added(object) => self.selection.matches(&**object).then(|| told("ADDED")).flatten(),
            Event::Deleted(object) => self.selection.matches(&**object).then(|| told("DELETED")).flatten(),
            Event::Modified { old, new } => match (self.selection.matches(&**old), self.selection.matches(&**new)) {
                (true, true) => told("MODIFIED"),
                (false, true) => told("ADDED"),
                (true, false) => {
                    // As in Kubernetes: the last state that the watcher could see, with the revision at which it left.
                    let mut last = T::clone(old);
                    last.meta_mut().resource_version = entry.revision.to_string();
                    Some(event("DELETED", encode(last), revision.to_string()))
                }
                (false, false) => None,
            },
        }
    }
}

fn event(kind: &str, object: Bytes, resource_version: String) -> RawWatchEvent {
    RawWatchEvent {
        r#type: kind.to_owned(),
        object: Some(object),
        resource_version,
    }
}

fn bookmark(revision: Revision) -> RawWatchEvent {
    RawWatchEvent {
        r#type: "BOOKMARK".to_owned(),
        object: None,
        resource_version: revision.to_string(),
    }
}
