//! The index of one kind: its objects and the window of its last events.

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use orlop_proto::{Resource, coordination::v1::Lease};
use tokio::{sync::watch, time::Instant};

use super::{CacheConfig, Entry, ObjectKey, Objects, Snapshot, events::Kept, held::Held, packed::Packer};
use crate::{
    kinds::{KindVisitor, visit_kind},
    registry::Registered,
    store::{Change, Record, Revision},
};

/// Changes that are decoded before they are applied: at most so many, or those of one revision.
const STEPS: usize = 32;

/// One index for every kind of the model.
pub(super) struct Indexes {
    by_resource: HashMap<&'static str, Slot>,
}

struct Slot {
    feed: Arc<dyn Feed>,
    any: Arc<dyn Any + Send + Sync>,
}

impl Indexes {
    pub(super) fn new(config: &CacheConfig) -> Self {
        struct Make<'a>(&'a CacheConfig);
        impl KindVisitor for Make<'_> {
            type Output = Slot;
            fn visit<T: Registered>(self) -> Slot {
                let index = Arc::new(Index::<T>::new(self.0.clone()));
                Slot {
                    feed: index.clone(),
                    any: index,
                }
            }
        }
        let kinds = orlop_proto::ResourceKind::ALL.iter();
        let by_resource = kinds
            .filter_map(|kind| Some((kind.resource, visit_kind(kind, Make(config))?)))
            .collect();
        Self { by_resource }
    }

    /// # Panics
    /// When `T` is not a kind of the model, which no code can bring about: only the model's kinds are resources.
    pub(super) fn of<T: Resource>(&self) -> Arc<Index<T>> {
        let slot = self
            .by_resource
            .get(T::KIND.resource)
            .expect("every resource of the model has an index");
        slot.any
            .clone()
            .downcast()
            .expect("the index of a kind holds that kind")
    }

    /// The index that a key belongs to; `None` for records that are not objects.
    pub(super) fn feed_of(&self, resource: &str) -> Option<&Arc<dyn Feed>> {
        self.by_resource.get(resource).map(|slot| &slot.feed)
    }

    pub(super) fn feeds(&self) -> impl Iterator<Item = (&'static str, &Arc<dyn Feed>)> {
        self.by_resource.iter().map(|(resource, slot)| (*resource, &slot.feed))
    }
}

/// The follower's side of an index.
pub(super) trait Feed: Send + Sync {
    /// Replaces everything; readers of events are told that they lagged.
    fn load(&self, revision: Revision, records: Vec<Record>);
    /// Takes changes in the order of their revisions.
    fn apply(&self, changes: Vec<(Revision, Change)>);
    /// Forgets what is too old, and objects that are no longer asked for. To be called every now and then.
    fn trim(&self);
}

pub(super) struct Index<T> {
    state: RwLock<State<T>>,
    changed: watch::Sender<u64>,
    /// `None` for what is written anew before packing it would have been worth it.
    packer: Option<Packer>,
    config: CacheConfig,
}

struct State<T> {
    /// Incremented by every load: positions of an older epoch are lost.
    epoch: u64,
    objects: Objects<T>,
    /// The revision of the last change.
    revision: Revision,
    /// The sequence number of the first entry in the window.
    first: u64,
    window: VecDeque<(Instant, Arc<Entry<T>>)>,
    /// The sequence number of the first entry that is still decoded.
    fresh: u64,
    /// The sizes of those that are.
    fresh_bytes: usize,
    /// The window has every event after this revision.
    window_start: Revision,
    kept: VecDeque<(Instant, Snapshot<T>)>,
}

/// Where a reader of events is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    epoch: u64,
    next: u64,
    /// Everything up to here has been delivered.
    pub(super) revision: Revision,
}

/// The reader's position is no longer in the window.
pub(super) struct OutOfWindow;

impl<T: Resource> Index<T> {
    fn new(config: CacheConfig) -> Self {
        let state = State {
            epoch: 0,
            objects: Objects::new(),
            revision: 0,
            first: 0,
            window: VecDeque::new(),
            fresh: 0,
            fresh_bytes: 0,
            window_start: 0,
            kept: VecDeque::new(),
        };
        Self {
            state: RwLock::new(state),
            changed: watch::Sender::new(0),
            packer: (T::KIND != Lease::KIND).then(Packer::default),
            config,
        }
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn get(&self, key: &ObjectKey) -> Option<Arc<T>> {
        let held = self.read().objects.held.get(key).cloned();
        held.map(|held| held.object())
    }

    pub(super) fn peek(&self, key: &ObjectKey) -> Option<Arc<T>> {
        let held = self.read().objects.held.get(key).cloned();
        held.map(|held| held.peek())
    }

    /// `progress` must have been read before: then the index has everything up to it.
    pub(super) fn snapshot(&self, progress: Revision) -> Snapshot<T> {
        self.read().snapshot(progress)
    }

    pub(super) fn snapshot_and_position(&self, progress: Revision) -> (Snapshot<T>, Position) {
        let state = self.read();
        let snapshot = state.snapshot(progress);
        let position = Position {
            epoch: state.epoch,
            next: state.next(),
            revision: snapshot.revision,
        };
        (snapshot, position)
    }

    /// The position after a revision that the index has; `None` when the window begins later.
    pub(super) fn position_after(&self, revision: Revision) -> Option<Position> {
        let state = self.read();
        if revision < state.window_start {
            return None;
        }
        let passed = state.window.partition_point(|(_, entry)| entry.revision <= revision);
        Some(Position {
            epoch: state.epoch,
            next: state.first + passed as u64,
            revision,
        })
    }

    /// At most `max` entries from `position` on, which moves behind them.
    pub(super) fn entries(
        &self,
        position: &mut Position,
        progress: Revision,
        max: usize,
    ) -> Result<Vec<Arc<Entry<T>>>, OutOfWindow> {
        let state = self.read();
        if position.epoch != state.epoch || position.next < state.first {
            return Err(OutOfWindow);
        }
        let skip = usize::try_from(position.next - state.first).unwrap_or(usize::MAX);
        let entries: Vec<_> = state
            .window
            .iter()
            .skip(skip)
            .take(max)
            .map(|(_, entry)| entry.clone())
            .collect();
        position.next += entries.len() as u64;
        if position.next == state.next() {
            position.revision = position.revision.max(progress).max(state.revision);
        } else if let Some(last) = entries.last() {
            // More entries of the same revision may follow.
            position.revision = position.revision.max(last.revision.saturating_sub(1));
        }
        Ok(entries)
    }

    pub(super) fn keep(&self, snapshot: Snapshot<T>) {
        let mut state = self.write();
        state.kept.retain(|(_, kept)| kept.revision != snapshot.revision);
        state.kept.push_back((Instant::now(), snapshot));
        state.trim(&self.config);
    }

    pub(super) fn snapshot_at(&self, revision: Revision, progress: Revision) -> Option<Snapshot<T>> {
        let state = self.read();
        if let Some((_, kept)) = state.kept.iter().find(|(_, kept)| kept.revision == revision) {
            return Some(kept.clone());
        }
        if revision < state.window_start || revision > progress.max(state.revision) {
            return None;
        }
        let mut objects = state.objects.clone();
        for (_, entry) in state
            .window
            .iter()
            .rev()
            .take_while(|(_, entry)| entry.revision > revision)
        {
            entry.undo(&mut objects.held);
        }
        Some(Snapshot { revision, objects })
    }

    fn read(&self) -> RwLockReadGuard<'_, State<T>> {
        // A panic while writing would leave a state between two events; the follower is the only writer and does not panic there.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State<T>> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Resource> Feed for Index<T> {
    fn load(&self, revision: Revision, records: Vec<Record>) {
        let packer = self.packer.as_ref();
        let mut before: Option<ObjectKey> = None;
        let held = records.into_iter().filter_map(|record| {
            let (held, object) = Held::<T>::new(&record.key, &record.value, record.revision, packer)?;
            held.age();
            let key = ObjectKey::of(&*object).beside(before.as_ref());
            before = Some(key.clone());
            Some((key, held))
        });
        let objects = Objects { held: held.collect() };
        let mut state = self.write();
        state.epoch += 1;
        state.objects = objects;
        state.revision = revision;
        state.first = state.next();
        state.fresh = state.first;
        state.fresh_bytes = 0;
        state.window.clear();
        state.window_start = revision;
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    fn apply(&self, changes: Vec<(Revision, Change)>) {
        let packer = self.packer.as_ref();
        let mut changes = changes.into_iter().peekable();
        while let Some((mut last, first)) = changes.next() {
            // Decoding and packing happen outside of the lock; a few at a time, for decoded they are large. A revision is not divided.
            let mut steps = Vec::from_iter(Step::decode(last, first, packer));
            while let Some((revision, change)) = changes.next_if(|(next, _)| steps.len() < STEPS || *next == last) {
                last = revision;
                steps.extend(Step::decode(revision, change, packer));
            }
            let mut state = self.write();
            for step in steps {
                state.apply(step);
            }
            state.trim(&self.config);
            drop(state);
            self.changed.send_modify(|count| *count += 1);
        }
    }

    fn trim(&self) {
        self.write().trim(&self.config);
        let objects = self.read().objects.clone();
        objects.sweep();
    }
}

enum Step<T> {
    Put(Revision, ObjectKey, Held<T>),
    Delete(Revision, ObjectKey),
}

impl<T: Resource> Step<T> {
    fn decode(revision: Revision, change: Change, packer: Option<&Packer>) -> Option<Self> {
        match change {
            Change::Put { record, .. } => {
                let (held, object) = Held::new(&record.key, &record.value, record.revision, packer)?;
                Some(Step::Put(revision, ObjectKey::of(&*object), held))
            }
            Change::Delete { key, .. } => Some(Step::Delete(revision, super::events::object_key(&key)?)),
        }
    }
}

impl<T: Resource> State<T> {
    fn next(&self) -> u64 {
        self.first + self.window.len() as u64
    }

    fn snapshot(&self, progress: Revision) -> Snapshot<T> {
        Snapshot {
            revision: progress.max(self.revision),
            objects: self.objects.clone(),
        }
    }

    fn apply(&mut self, step: Step<T>) {
        let (revision, entry) = match step {
            Step::Put(revision, key, new) => {
                let beside = self.objects.held.get_prev(&key).map(|(beside, _)| beside);
                let key = key.beside(beside);
                let kept = match self.objects.held.insert(key.clone(), new.clone()) {
                    Some(old) => {
                        old.replaced();
                        Kept::Modified { old, new }
                    }
                    None => Kept::Added(new),
                };
                (revision, Entry::new(revision, key, kept))
            }
            Step::Delete(revision, key) => {
                // What was put aside as damaged was never in the index.
                let Some(old) = self.objects.held.remove(&key) else {
                    return;
                };
                (revision, Entry::new(revision, key, Kept::Deleted(old)))
            }
        };
        self.revision = revision;
        self.fresh_bytes += entry.size();
        self.window.push_back((Instant::now(), Arc::new(entry)));
    }

    /// The first entry that is still decoded.
    fn oldest_fresh(&self) -> Option<&(Instant, Arc<Entry<T>>)> {
        self.window.get(usize::try_from(self.fresh - self.first).ok()?)
    }

    fn age_oldest(&mut self) {
        if let Some((_, entry)) = self.oldest_fresh() {
            entry.forget();
            self.fresh_bytes -= entry.size();
            self.fresh += 1;
        }
    }

    fn trim(&mut self, config: &CacheConfig) {
        let now = Instant::now();
        while let Some((at, _)) = self.oldest_fresh()
            && (self.fresh_bytes > config.fresh_bytes || now.duration_since(*at) > config.fresh)
        {
            self.age_oldest();
        }
        while let Some((at, entry)) = self.window.front() {
            if self.window.len() <= config.window_events && now.duration_since(*at) <= config.window_age {
                break;
            }
            self.window_start = entry.revision;
            if self.fresh == self.first {
                self.age_oldest();
            }
            self.first += 1;
            self.window.pop_front();
        }
        while self
            .kept
            .front()
            .is_some_and(|(at, _)| self.kept.len() > config.kept_snapshots || now.duration_since(*at) > config.keep_for)
        {
            self.kept.pop_front();
        }
    }
}
