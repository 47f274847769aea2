//! Events: what happened to an object, told to people.
//!
//! A [`Recorder`] never waits and never fails its caller: notes go through a bounded channel to one task that folds equal ones
//! into one object with a count (as client-go's correlator does), limits how much one object may say, and writes.
//!
//! What is said once for every pod has a queue and a task of its own, whose writes are few a second: the store's commits are for
//! the pods themselves, and nobody waits behind such notes to be told of trouble.

use std::{
    borrow::Cow,
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

/// What makes two notes the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    object: (String, String, String, String),
    field_path: String,
    component: &'static str,
    host: String,
    warning: bool,
    reason: Cow<'static, str>,
    message: String,
}

#[derive(Debug)]
struct Note {
    identity: Identity,
    reference: ObjectReference,
    count: i32,
    first: prost_types::Timestamp,
    last: prost_types::Timestamp,
}

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
    pub fn normal<T: Resource>(&self, object: &T, reason: &'static str, message: impl Into<String>) {
        self.send(self.note(object, false, reason, message.into()));
    }

    /// Notes what is said once for every pod when all goes well: it waits behind everything else, and is the first to be dropped.
    pub fn routine<T: Resource>(&self, object: &T, reason: &'static str, message: impl Into<String>) {
        self.send_routine(self.note(object, false, reason, message.into()));
    }

    /// Notes that something is wrong.
    pub fn warning<T: Resource>(&self, object: &T, reason: &'static str, message: impl Into<String>) {
        self.send(self.note(object, true, reason, message.into()));
    }

    /// How many notes were dropped because too many waited.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn note<T: Resource>(&self, object: &T, warning: bool, reason: &'static str, message: String) -> Note {
        let meta = object.meta();
        let reference = ObjectReference {
            api_version: T::KIND.api_version.to_owned(),
            kind: T::KIND.kind.to_owned(),
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            field_path: String::new(),
        };
        let at = time::now_seconds();
        Note {
            identity: identity(self.component, &reference, "", warning, Cow::Borrowed(reason), message),
            reference,
            count: 1,
            first: at,
            last: at,
        }
    }

    /// Takes over what another component said of an object, perhaps several times; who calls has checked and shortened it.
    pub fn event(&self, event: Event) {
        let reference = event.involved_object.unwrap_or_default();
        let host = event.source.unwrap_or_default().host;
        let warning = event.r#type == "Warning";
        let now = time::now_seconds();
        let reason = Cow::Owned(event.reason);
        let note = Note {
            identity: identity(self.component, &reference, &host, warning, reason, event.message),
            reference,
            count: event.count.max(1),
            first: event.first_timestamp.unwrap_or(now),
            last: event.last_timestamp.unwrap_or(now),
        };
        if warning {
            self.send(note);
        } else {
            // A node says several things of each of its pods.
            self.send_routine(note);
        }
    }

    fn send(&self, note: Note) {
        self.count_dropped(self.sender.try_send(note).is_err());
    }

    fn send_routine(&self, note: Note) {
        self.count_dropped(self.routine.try_send(note).is_err());
    }

    fn count_dropped(&self, is_dropped: bool) {
        self.dropped.fetch_add(u64::from(is_dropped), Ordering::Relaxed);
    }
}

fn identity(
    component: &'static str,
    about: &ObjectReference,
    host: &str,
    warning: bool,
    reason: Cow<'static, str>,
    message: String,
) -> Identity {
    Identity {
        object: (
            about.kind.clone(),
            about.namespace.clone(),
            about.name.clone(),
            about.uid.clone(),
        ),
        field_path: about.field_path.clone(),
        component,
        host: host.to_owned(),
        warning,
        reason,
        message,
    }
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
        let mut folded: Vec<Note> = Vec::new();
        let mut positions: HashMap<Fingerprint, usize> = HashMap::new();
        for note in batch {
            let identity = self.keys.hash_one(&note.identity);
            if let Some(position) = positions.get(&identity) {
                folded[*position].count = folded[*position].count.saturating_add(note.count);
                folded[*position].last = note.last;
            } else if self.allowed(self.keys.hash_one(&note.identity.object)) {
                positions.insert(identity, folded.len());
                folded.push(note);
            }
        }
        let registry = &self.registry;
        let (keys, known) = (&self.keys, &self.known);
        let written: Vec<(Fingerprint, Result<ObjectKey, RegistryError>)> = stream::iter(folded)
            .map(|note| async move {
                let identity = keys.hash_one(&note.identity);
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

async fn write_one(registry: &Registry, known: Option<ObjectKey>, folded: Note) -> Result<ObjectKey, RegistryError> {
    if let Some(key) = known {
        let counted = registry
            .modify(&key, |event: &mut Event| {
                event.count = event.count.saturating_add(folded.count);
                event.last_timestamp = Some(folded.last);
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

fn new_event(note: Note) -> Event {
    let Note {
        identity,
        reference,
        count,
        first,
        last,
    } = note;
    let mut hasher = DefaultHasher::new();
    (&identity, first.seconds, rand::random::<u32>()).hash(&mut hasher);
    // Events of cluster-wide objects live in "default", as in Kubernetes.
    let namespace = if reference.namespace.is_empty() {
        "default".to_owned()
    } else {
        reference.namespace.clone()
    };
    let name: String = reference.name.chars().take(230).collect();
    Event {
        metadata: Some(ObjectMeta {
            name: format!("{name}.{:016x}", hasher.finish()),
            namespace,
            ..ObjectMeta::default()
        }),
        involved_object: Some(reference),
        reason: identity.reason.into_owned(),
        message: identity.message,
        source: Some(EventSource {
            component: identity.component.to_owned(),
            host: identity.host.clone(),
        }),
        first_timestamp: Some(first),
        last_timestamp: Some(last),
        count,
        r#type: if identity.warning { "Warning" } else { "Normal" }.to_owned(),
        reporting_component: identity.component.to_owned(),
        reporting_instance: identity.host,
        ..Event::default()
    }
}

#[cfg(test)]
mod tests;
