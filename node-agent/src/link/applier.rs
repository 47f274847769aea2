//! Makes what control says durable and real: the ledger for pods, the dataplane for services, the network for ranges and
//! routes; then [`Desired`] goes to the reconciler.
//!
//! One task takes all Updates that wait, so a burst costs one batch of map writes and one sync. A snapshot is gathered and
//! takes effect at its end mark, as one change; only then is swept what it did not name.

mod batch;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use orlop_proto::node::v1 as link;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::batch::{Batch, Pending};
use crate::{
    dataplane::{Dataplane, ServiceChanges},
    desired::Desired,
    ledger::{Generation, Ledger, LedgerError},
    memory,
    network::{Network, Stale},
};

/// Services, and routes, are written to the ledger at most this often.
const WRITE_BEHIND: Duration = Duration::from_secs(3);
/// Many routes are written more seldom: each write is of all of them, and while a large cluster comes up they change all the time.
const WRITE_BEHIND_PER_ROUTE: Duration = Duration::from_millis(5);
/// The first wait after a failure of the dataplane or the ledger; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// A step of a session, in the order in which control sent it.
#[derive(Debug)]
enum Input {
    Welcome(u64, link::Welcome),
    Update(u64, link::Update),
}

/// How far a session's Updates are taken in: what they ask for is durable and applied, or waits for the disk or the kernel to take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// The session, as [`ApplierHandle`] counts them.
    pub session: u64,
    /// The highest such version.
    pub version: u64,
}

/// Feeds the applier. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ApplierHandle {
    inputs: mpsc::Sender<Input>,
    applied: watch::Receiver<Applied>,
    ledger: watch::Receiver<Option<String>>,
}

impl ApplierHandle {
    /// A session begins with control's Welcome; whatever an earlier one still has under way is dropped.
    pub async fn welcome(&self, session: u64, welcome: link::Welcome) {
        let _closed = self.inputs.send(Input::Welcome(session, welcome)).await;
    }

    /// Hands an Update on. Waits when the applier is far behind.
    pub async fn update(&self, session: u64, update: link::Update) {
        let _closed = self.inputs.send(Input::Update(session, update)).await;
    }

    /// Follows how far it is.
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.applied.clone()
    }

    /// Why the ledger cannot be written; `None` while it can.
    pub fn ledger(&self) -> watch::Receiver<Option<String>> {
        self.ledger.clone()
    }
}

/// The task's state.
pub struct Applier {
    inputs: mpsc::Receiver<Input>,
    applied: watch::Sender<Applied>,
    desired: Desired,
    publish: watch::Sender<Arc<Desired>>,
    ledger: Arc<Mutex<Ledger>>,
    dataplane: Arc<dyn Dataplane>,
    network: Arc<dyn Network>,
    /// The network has not taken the ranges and routes in force.
    unwired: bool,
    session: u64,
    /// What this session may write as; `None` while the ledger could not be told that it began.
    generation: Option<Generation>,
    batch: Batch,
    /// The maps are to be made equal to all of `desired.services`.
    resync: bool,
    /// When the ledger's files of services and of routes, which are behind, are to be written.
    behind: [Option<Instant>; 2],
    routes_written: Instant,
    retry: Option<(Instant, Duration)>,
    /// Why services, routes, and pods and ranges could not be written the last time.
    unwritten: [Option<String>; 3],
    trouble: watch::Sender<Option<String>>,
}

/// Places in [`Applier::behind`] and [`Applier::unwritten`].
const SERVICES: usize = 0;
const ROUTES: usize = 1;
const STATE: usize = 2;

impl Applier {
    /// `desired` is what the ledger held; it is published at once.
    pub fn new(
        ledger: Ledger,
        desired: Desired,
        dataplane: Arc<dyn Dataplane>,
        network: Arc<dyn Network>,
    ) -> (Self, ApplierHandle, watch::Receiver<Arc<Desired>>) {
        let (sender, inputs) = mpsc::channel(64);
        let (applied, applied_receiver) = watch::channel(Applied::default());
        let (publish, published) = watch::channel(Arc::new(desired.clone()));
        let (trouble, ledger_trouble) = watch::channel(None);
        let applier = Self {
            inputs,
            applied,
            // What an earlier life was told goes into the maps before control is reached; unless they have it, and more than
            // the ledger: that would lead connections to backends that are gone.
            resync: desired.complete && !(ledger.services_are_behind() && dataplane.serves()),
            desired,
            publish,
            ledger: Arc::new(Mutex::new(ledger)),
            dataplane,
            network,
            unwired: true,
            session: 0,
            generation: None,
            batch: Batch::default(),
            behind: [None; 2],
            routes_written: Instant::now(),
            retry: None,
            unwritten: [None, None, None],
            trouble,
        };
        (
            applier,
            ApplierHandle {
                inputs: sender,
                applied: applied_receiver,
                ledger: ledger_trouble,
            },
            published,
        )
    }

    /// Runs until `stop`; then writes what the ledger lacks.
    pub async fn run(mut self, stop: CancellationToken) {
        self.flush().await;
        loop {
            let retry_at = self.retry.map(|(at, _)| at);
            let write_at = self.behind.iter().flatten().min().copied();
            tokio::select! {
                // Cancel-safe: `recv` loses nothing.
                input = self.inputs.recv() => {
                    let Some(input) = input else { break };
                    self.absorb(input);
                    while let Ok(input) = self.inputs.try_recv() {
                        self.absorb(input);
                    }
                    self.flush().await;
                }
                // Cancel-safe: timers only.
                () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => self.flush().await,
                () = sleep_until(write_at.unwrap_or_else(Instant::now)), if write_at.is_some() => self.write_behind(write_at).await,
                () = stop.cancelled() => break,
            }
        }
        let latest = self.behind.iter().flatten().max().copied();
        self.write_behind(latest).await;
    }

    fn absorb(&mut self, input: Input) {
        match input {
            Input::Welcome(session, welcome) if session > self.session => {
                self.session = session;
                self.generation = None;
                self.batch = Batch::begin(Arc::new(welcome));
            }
            Input::Update(session, update) if session == self.session => self.batch.absorb(update, &self.desired),
            // An earlier session's: a later one has replaced it.
            Input::Welcome(..) | Input::Update(..) => {}
        }
    }

    async fn flush(&mut self) {
        let services = self.flush_services().await;
        let (pods, publish) = self.flush_ledger().await;
        // Before the pods, so that their networks can be made at once.
        let wired = self.wire().await;
        if publish {
            self.publish.send_replace(Arc::new(self.desired.clone()));
        }
        if services && pods && wired {
            self.retry = None;
        } else {
            let wait = self.retry.map_or(RETRY_MIN, |(_, wait)| (wait * 2).min(RETRY_MAX));
            self.retry = Some((Instant::now() + wait, wait));
        }
        // Also of orders that the ledger did not take, which wait in the batch: control sends nothing more when too much is not
        // acknowledged, and services are to go on.
        if self.session > 0 && self.batch.in_force() {
            let applied = Applied {
                session: self.session,
                version: self.batch.version,
            };
            self.applied
                .send_if_modified(|last| std::mem::replace(last, applied) != applied);
        }
    }

    /// Brings the maps up to date. A failure is made good by a resync, later, and holds nothing else up: the node's
    /// condition shows it.
    async fn flush_services(&mut self) -> bool {
        let begin = Instant::now();
        let (upserts, removals, complete) = self.batch.take_services(&mut self.desired);
        if complete {
            self.resync = true;
        }
        if !upserts.is_empty() || !removals.is_empty() || complete {
            if self.behind[SERVICES].is_none() {
                self.behind[SERVICES] = Some(Instant::now() + WRITE_BEHIND);
                let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = ledger.note_services_behind() {
                    tracing::warn!(error = %Chain(&error), "the ledger's services count as current, and are not");
                }
            }
            self.publish_quietly();
        }
        let changes = if self.resync {
            ServiceChanges {
                upserts: self.desired.services.iter().cloned().collect(),
                removals: Vec::new(),
                complete: true,
            }
        } else if upserts.is_empty() && removals.is_empty() {
            return true;
        } else {
            ServiceChanges {
                upserts,
                removals,
                complete: false,
            }
        };
        match self.dataplane.apply(changes).await {
            Ok(()) => {
                if self.resync {
                    let microseconds = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
                    tracing::info!(
                        services = self.desired.services.len(),
                        microseconds,
                        "all services are in the maps"
                    );
                }
                self.resync = false;
                true
            }
            Err(error) => {
                tracing::error!(error = %Chain(&error), "services could not be written to the maps; trying again with all of them");
                self.resync = true;
                false
            }
        }
    }

    /// Gives ranges and routes to the network when they are new, or were not taken.
    async fn wire(&mut self) -> bool {
        let Some(ranges) = self.desired.ranges.clone().filter(|_| self.unwired) else {
            return true;
        };
        // Until this process has written a state of control's, what it has is the ledger's.
        let stale = if self.generation.is_some() {
            Stale::Removed
        } else {
            Stale::Kept
        };
        match self.network.configure(&ranges, &self.desired.routes, stale).await {
            Ok(()) => self.unwired = false,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "the network did not take ranges and routes; trying again");
            }
        }
        !self.unwired
    }

    /// Makes pods and ranges durable, and routes soon: whether that is done, and whether something is to be handed on.
    async fn flush_ledger(&mut self) -> (bool, bool) {
        if self.session == 0 {
            return (true, false);
        }
        let mut next = self.desired.clone();
        let Pending { pods, routes } = self.batch.pending(&mut next);
        let rewired = routes || next.ranges != self.desired.ranges;
        let doubtful = self.ledger.lock().unwrap_or_else(PoisonError::into_inner).is_doubtful();
        let changed = !pods.is_empty() || doubtful || rewired || next.complete != self.desired.complete;
        if !changed && self.generation.is_some() {
            self.batch.written();
            return (true, false);
        }
        let (ledger, known, state) = (Arc::clone(&self.ledger), self.generation, next.clone());
        let written = tokio::task::spawn_blocking(move || {
            let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
            let generation = known.map_or_else(|| ledger.begin_session(), Ok)?;
            ledger.write(generation, &state, pods)?;
            Ok::<_, LedgerError>(generation)
        });
        match written.await {
            Ok(Ok(generation)) => {
                self.note(STATE, None);
                self.generation = Some(generation);
                self.batch.written();
                // What the ledger did not know of goes with the first that control says.
                self.unwired |= rewired || known.is_none();
                self.desired = next;
                if routes {
                    // Each write is of all of them: when they come one after the other, they are gathered.
                    let pause = routes_pause(self.desired.routes.len());
                    self.behind[ROUTES].get_or_insert(self.routes_written + pause);
                }
                (true, changed)
            }
            Ok(Err(error)) => {
                let error = Chain(&error).to_string();
                tracing::error!(
                    error,
                    "the ledger cannot be written; what it is to hold is not acted on"
                );
                self.note(STATE, Some(error));
                (false, false)
            }
            Err(error) => {
                tracing::error!(%error, "writing the ledger failed");
                (false, false)
            }
        }
    }

    /// Notes how a write of the ledger went, for the node's condition.
    fn note(&mut self, part: usize, error: Option<String>) {
        self.unwritten[part] = error;
        let trouble = self.unwritten.iter().flatten().next().cloned();
        self.trouble
            .send_if_modified(|told| std::mem::replace(told, trouble.clone()) != trouble);
    }

    /// A service's change wakes nobody: containers that start later read it.
    fn publish_quietly(&self) {
        self.publish.send_if_modified(|published| {
            *published = Arc::new(Desired {
                services: self.desired.services.clone(),
                ..(**published).clone()
            });
            false
        });
    }

    /// Writes the files that are due at a time.
    async fn write_behind(&mut self, at: Option<Instant>) {
        for file in [SERVICES, ROUTES] {
            if self.behind[file].is_some() && self.behind[file] <= at {
                self.write_file(file).await;
            }
        }
    }

    async fn write_file(&mut self, file: usize) {
        self.behind[file] = None;
        let Some(generation) = self.generation else {
            self.behind[file] = Some(Instant::now() + RETRY_MAX);
            return;
        };
        let (ledger, desired) = (Arc::clone(&self.ledger), self.desired.clone());
        let written = tokio::task::spawn_blocking(move || {
            // The lock is not held while the file is written: it is this task's alone.
            let writer = ledger
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .writer(generation)?;
            let written = if file == ROUTES {
                writer.routes(&desired.routes)
            } else {
                writer.services(&desired.services)
            };
            // This was the end of a burst, if there was one: the snapshot, and now the file's contents.
            memory::give_back();
            written
        });
        let failed = match written.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Chain(&error).to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = &failed {
            tracing::warn!(
                error,
                "services or routes could not be written to the ledger; trying again"
            );
            self.behind[file] = Some(Instant::now() + RETRY_MAX);
        } else if file == ROUTES {
            self.routes_written = Instant::now();
        }
        self.note(file, failed);
    }
}

/// How long after a write of so many routes, at the least, the next one is.
fn routes_pause(routes: usize) -> Duration {
    let routes = u32::try_from(routes).unwrap_or(u32::MAX);
    WRITE_BEHIND.max(WRITE_BEHIND_PER_ROUTE.saturating_mul(routes))
}

/// What a node holds to be so after a session's Welcome and Updates; for who checks it from outside.
#[doc(hidden)]
pub fn told(welcome: link::Welcome, updates: impl IntoIterator<Item = link::Update>) -> Desired {
    let (mut batch, mut desired) = (Batch::begin(Arc::new(welcome)), Desired::default());
    for update in updates {
        batch.absorb(update, &desired);
        batch.take_services(&mut desired);
        batch.pending(&mut desired);
        batch.written();
    }
    desired
}

#[cfg(test)]
mod tests;

/// An error with all that caused it.
pub(crate) struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = self.0.to_string();
        let mut source = self.0.source();
        while let Some(error) = source {
            // Many errors name their source in their own text already.
            let cause = error.to_string();
            if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
            source = error.source();
        }
        formatter.write_str(&text)
    }
}
