//! Events: what happened to an object, told to people.
//!
//! A [`Recorder`] never waits and never fails its caller: notes go through a bounded channel to one task that folds equal ones
//! into one object with a count (as client-go's correlator does), limits how much one object may say, and writes.
//!
//! What is said once for every pod has a queue and a task of its own, whose writes are few a second: the store's commits are for
//! the pods themselves, and nobody waits behind such notes to be told of trouble.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, stream};
use orlop_proto::{
    Resource,
    core::v1::{Event, EventSource, ObjectReference},
    meta::v1::ObjectMeta,
    time,
};
use prost::Message as _;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    cache::ObjectKey,
    registry::{Registry, RegistryError},
};

/// Notes that wait at most; more are dropped and counted.
const WAITING: usize = 8192;
/// How long notes are gathered before they are written.
const GATHER: Duration = Duration::from_millis(200);
/// Writes under way at once.
const WRITES: usize = 32;
/// Notes of the routine that are written after one gathering: some 500 a second.
const ROUTINE_CHUNK: usize = 100;
/// Different notes that are remembered, for counting them up.
const REMEMBERED: usize = 4096;
/// An object may say so much at once (client-go's figure) ...
const BURST: f64 = 25.0;
/// ... and then one note in so many seconds (client-go's figure).
const REFILL_SECONDS: f64 = 300.0;

/// Takes notes. Clones are cheap and feed the same task.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Note>,
    routine: mpsc::Sender<Note>,
    component: &'static str,
    dropped: Arc<AtomicU64>,
}

/// A note as it waits: an event without a name, encoded, which is a fraction of the memory. After a burst of pods the routine's queues
/// are full, both of the nodes' recorder and of control's own.
type Note = Box<[u8]>;

impl Recorder {
    /// Starts the tasks that write. They end when `cancel` says so or the last recorder is gone.
    pub fn start(registry: Registry, cancel: CancellationToken) -> Self {
        let writer = |chunk: usize| {
            let (sender, receiver) = mpsc::channel(WAITING);
            let writer = Writer {
                registry: registry.clone(),
                chunk,
                keys: RandomState::new(),
                known: HashMap::new(),
                order: VecDeque::new(),
                budgets: HashMap::new(),
            };
            tokio::spawn(writer.run(receiver, cancel.clone()));
            sender
        };
        Self {
            sender: writer(WAITING),
            routine: writer(ROUTINE_CHUNK),
            component: "orlop-control",
            dropped: Arc::default(),
        }
    }

    /// The same recorder, speaking for another component.
    #[must_use]
    pub fn from_component(&self, component: &'static str) -> Self {
        Self {
            component,
            ..self.clone()
        }
    }

    /// Notes that something went as it should.
    pub fn normal<T: Resource>(&self, object: &T, reason: &str, message: impl Into<String>) {
        self.send(&self.sender, &self.note(object, NORMAL, reason, message.into()));
    }

    /// Notes what is said once for every pod when all goes well: it waits behind everything else, and is the first to be dropped.
    pub fn routine<T: Resource>(&self, object: &T, reason: &str, message: impl Into<String>) {
        self.send(&self.routine, &self.note(object, NORMAL, reason, message.into()));
    }

    /// Notes that something is wrong.
    pub fn warning<T: Resource>(&self, object: &T, reason: &str, message: impl Into<String>) {
        self.send(&self.sender, &self.note(object, WARNING, reason, message.into()));
    }

    /// How many notes were dropped because too many waited.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn note<T: Resource>(&self, object: &T, r#type: &str, reason: &str, message: String) -> Event {
        let meta = object.meta();
        let at = time::now_seconds();
        Event {
            involved_object: Some(ObjectReference {
                api_version: T::KIND.api_version.to_owned(),
                kind: T::KIND.kind.to_owned(),
                namespace: meta.namespace.clone(),
                name: meta.name.clone(),
                uid: meta.uid.clone(),
                resource_version: meta.resource_version.clone(),
                field_path: String::new(),
            }),
            reason: reason.to_owned(),
            message,
            source: Some(EventSource {
                component: self.component.to_owned(),
                host: String::new(),
            }),
            r#type: r#type.to_owned(),
            count: 1,
            first_timestamp: Some(at),
            last_timestamp: Some(at),
            ..Event::default()
        }
    }

    /// Takes over what another component said of an object, perhaps several times; who calls has checked and shortened it.
    pub fn event(&self, event: Event) {
        let now = time::now_seconds();
        // A node says several things of each of its pods: what is no trouble is routine.
        let (kind, sender) = match &*event.r#type {
            WARNING => (WARNING, &self.sender),
            _ => (NORMAL, &self.routine),
        };
        let note = Event {
            source: Some(EventSource {
                component: self.component.to_owned(),
                host: event.source.unwrap_or_default().host,
            }),
            count: event.count.max(1),
            first_timestamp: event.first_timestamp.or(Some(now)),
            last_timestamp: event.last_timestamp.or(Some(now)),
            r#type: kind.to_owned(),
            ..event
        };
        self.send(sender, &note);
    }

    fn send(&self, sender: &mpsc::Sender<Note>, note: &Event) {
        match sender.try_reserve() {
            Ok(place) => place.send(note.encode_to_vec().into()),
            Err(_) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The type of an event that tells of trouble.
const WARNING: &str = "Warning";
/// The type of all others.
const NORMAL: &str = "Normal";

/// What makes two notes the same: the object, who says it, and what.
fn identity(note: &Event) -> impl std::hash::Hash + '_ {
    let source = note.source.as_ref().map(|source| (&*source.component, &*source.host));
    let about = note.involved_object.as_ref();
    let field_path = about.map(|about| &*about.field_path);
    (
        object(note),
        field_path,
        source,
        &*note.r#type,
        &*note.reason,
        &*note.message,
    )
}

/// The object that a note is about.
fn object(note: &Event) -> impl std::hash::Hash + '_ {
    let about = note.involved_object.as_ref();
    about.map(|about| (&*about.kind, &*about.namespace, &*about.name, &*about.uid))
}

struct Writer {
    registry: Registry,
    /// Notes that are taken at a time.
    chunk: usize,
    keys: RandomState,
    /// The object that holds a note's count. By fingerprints: notes are long, and thousands are remembered.
    known: HashMap<Fingerprint, ObjectKey>,
    order: VecDeque<Fingerprint>,
    budgets: HashMap<Fingerprint, Budget>,
}

/// A keyed hash: nobody can make two notes that have the same.
type Fingerprint = u64;

#[derive(Debug, Clone, Copy)]
struct Budget {
    tokens: f64,
    at: Instant,
}

impl Writer {
    async fn run(mut self, mut receiver: mpsc::Receiver<Note>, cancel: CancellationToken) {
        let mut batch = Vec::new();
        loop {
            let received = tokio::select! {
                () = cancel.cancelled() => return,
                // Cancel-safe: what is not received stays in the channel.
                received = receiver.recv_many(&mut batch, self.chunk) => received,
            };
            if received == 0 {
                return;
            }
            tokio::time::sleep(GATHER).await;
            while batch.len() < self.chunk
                && let Ok(note) = receiver.try_recv()
            {
                batch.push(note);
            }
            self.write(std::mem::take(&mut batch)).await;
        }
    }

    async fn write(&mut self, batch: Vec<Note>) {
        let mut folded: Vec<(Fingerprint, Event)> = Vec::new();
        let mut positions: HashMap<Fingerprint, usize> = HashMap::new();
        for note in batch {
            let note = Event::decode(&*note).expect("it was encoded by the recorder");
            let identity = self.keys.hash_one(identity(&note));
            if let Some(position) = positions.get(&identity) {
                let (_, first) = &mut folded[*position];
                first.count = first.count.saturating_add(note.count);
                first.last_timestamp = note.last_timestamp;
            } else if self.allowed(self.keys.hash_one(object(&note))) {
                positions.insert(identity, folded.len());
                folded.push((identity, note));
            }
        }
        let registry = &self.registry;
        let known = &self.known;
        let written: Vec<(Fingerprint, Result<ObjectKey, RegistryError>)> = stream::iter(folded)
            .map(|(identity, note)| async move {
                let key = known.get(&identity).cloned();
                (identity, write_one(registry, key, note).await)
            })
            .buffer_unordered(WRITES)
            .collect()
            .await;
        for (identity, result) in written {
            match result {
                Ok(key) => self.remember(identity, key),
                // A namespace that is going or gone takes no events.
                Err(RegistryError::NotFound { .. } | RegistryError::Precondition(_)) => {}
                Err(error) => tracing::debug!(%error, "event could not be written"),
            }
        }
    }

    fn remember(&mut self, identity: Fingerprint, key: ObjectKey) {
        if self.known.insert(identity, key).is_none() {
            self.order.push_back(identity);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }

    /// A token bucket an object.
    fn allowed(&mut self, object: Fingerprint) -> bool {
        let now = Instant::now();
        if self.budgets.len() > REMEMBERED {
            let full =
                |budget: &Budget| budget.tokens + now.duration_since(budget.at).as_secs_f64() / REFILL_SECONDS < BURST;
            self.budgets.retain(|_, budget| full(budget));
            if self.budgets.len() > REMEMBERED * 4 {
                self.budgets.clear();
            }
        }
        let budget = self.budgets.entry(object).or_insert(Budget { tokens: BURST, at: now });
        budget.tokens = (budget.tokens + now.duration_since(budget.at).as_secs_f64() / REFILL_SECONDS).min(BURST);
        budget.at = now;
        if budget.tokens < 1.0 {
            return false;
        }
        budget.tokens -= 1.0;
        true
    }
}

async fn write_one(registry: &Registry, known: Option<ObjectKey>, folded: Event) -> Result<ObjectKey, RegistryError> {
    if let Some(key) = known {
        let counted = registry
            .modify(&key, |event: &mut Event| {
                event.count = event.count.saturating_add(folded.count);
                event.last_timestamp = folded.last_timestamp;
                true
            })
            .await;
        match counted {
            Ok(_) => return Ok(key),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    let event = registry.create(new_event(folded)).await?;
    Ok(ObjectKey::of(&event))
}

/// The note as it is written: with a name of its own.
fn new_event(note: Event) -> Event {
    let mut hasher = DefaultHasher::new();
    let first = note.first_timestamp.map(|first| first.seconds);
    (identity(&note), first, rand::random::<u32>()).hash(&mut hasher);
    let about = note.involved_object.clone().unwrap_or_default();
    let source = note.source.clone().unwrap_or_default();
    // Events of cluster-wide objects live in "default", as in Kubernetes.
    let namespace = Some(about.namespace).filter(|namespace| !namespace.is_empty());
    let name: String = about.name.chars().take(230).collect();
    Event {
        metadata: Some(ObjectMeta {
            name: format!("{name}.{:016x}", hasher.finish()),
            namespace: namespace.unwrap_or_else(|| "default".to_owned()),
            ..ObjectMeta::default()
        }),
        reporting_component: source.component,
        reporting_instance: source.host,
        ..note
    }
}

#[cfg(test)]
mod tests;
