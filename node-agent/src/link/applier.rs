//! Makes what control says durable and real: the ledger for pods, the dataplane for services, the network for ranges and
//! routes; then [`Desired`] goes to the reconciler.
//!
//! One task takes all Updates that wait, so a burst costs one batch of map writes and one sync. A snapshot is gathered and
//! takes effect at its end mark, as one change; only then is swept what it did not name. The ledger is written beside the task:
//! while the disk is slow, or hangs, services go on.

mod batch;
mod disk;
mod failures;
mod handle;

use std::{future, sync::Arc};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

#[doc(hidden)]
pub use self::batch::told;
pub(crate) use self::failures::Chain;
use self::handle::Input;
pub use self::handle::{Applied, ApplierHandle};
use self::{
    batch::{Batch, Orders},
    disk::{Disk, File, WRITE_BEHIND, Written, routes_pause},
    failures::{RETRY_MAX, Retry, Unwritten},
};
use crate::{
    dataplane::{Dataplane, ServiceChanges},
    desired::Desired,
    ledger::{Generation, Ledger},
    network::{Network, Stale},
};

/// The task's state.
pub struct Applier {
    inputs: mpsc::Receiver<Input>,
    applied: watch::Sender<Applied>,
    desired: Desired,
    publish: watch::Sender<Arc<Desired>>,
    disk: Disk,
    /// What the ledger is being told.
    writing: Option<Writing>,
    /// The last write of the ledger's pods and ranges failed: there is something to write even if nothing changes.
    doubtful: bool,
    dataplane: Arc<dyn Dataplane>,
    network: Arc<dyn Network>,
    /// The network has not taken the ranges and routes in force.
    unwired: bool,
    session: u64,
    /// Control has told this process of all routes: what else the kernel has is to go.
    told_all: bool,
    /// What this session may write as; `None` while the ledger could not be told that it began.
    generation: Option<Generation>,
    batch: Batch,
    /// The maps are to be made equal to all of `desired.services`.
    resync: bool,
    /// Since when something could be acknowledged, and is not.
    unacknowledged: Option<Instant>,
    /// Nothing new is begun.
    ending: bool,
    /// When the ledger's file of services, which is behind, is to be written.
    services_due: Option<Instant>,
    /// The same of routes.
    routes_due: Option<Instant>,
    routes_written: Instant,
    /// When the dataplane and the network are tried again.
    retry: Retry,
    /// When the ledger is.
    rewrite: Retry,
    unwritten: Unwritten,
    trouble: watch::Sender<Option<String>>,
}

/// What becomes of a write of the ledger's pods and ranges when it ends.
struct Writing {
    session: u64,
    orders: Orders,
    /// What is in force then, but for services and routes.
    next: Desired,
    rewired: bool,
    changed: bool,
}

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
            disk: Disk::new(ledger),
            writing: None,
            doubtful: false,
            dataplane,
            network,
            unwired: true,
            session: 0,
            told_all: false,
            generation: None,
            batch: Batch::default(),
            unacknowledged: None,
            ending: false,
            services_due: None,
            routes_due: None,
            routes_written: Instant::now(),
            retry: Retry::default(),
            rewrite: Retry::default(),
            unwritten: Unwritten::default(),
            trouble,
        };
        (
            applier,
            ApplierHandle::new(sender, applied_receiver, ledger_trouble),
            published,
        )
    }

    /// Runs until `stop`; then writes what the ledger lacks.
    pub async fn run(mut self, stop: CancellationToken) {
        self.flush().await;
        loop {
            let free = !self.disk.is_busy();
            let retry = self.retry.at;
            let rewrite = self.rewrite.at.filter(|_| free);
            let due = self.due().filter(|_| free);
            let late = self.unacknowledged.map(|since| since + disk::PATIENCE);
            let hangs = self.disk.hangs_at().filter(|_| self.unwritten.hangs.is_none());
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
                // Cancel-safe, by its own word.
                written = self.disk.written() => self.settle(written).await,
                // Cancel-safe: timers only.
                () = until(retry) => self.flush().await,
                () = until(rewrite) => self.write_state(),
                () = until(due) => self.write_behind(due),
                () = until(late) => self.acknowledge(),
                () = until(hangs) => {
                    let error = format!("a write of the ledger has not ended for {} s", disk::HANGS.as_secs());
                    tracing::error!(error, "the disk hangs; services go on, and orders for pods wait");
                    self.note(|unwritten| &mut unwritten.hangs, Some(error));
                }
                () = stop.cancelled() => break,
            }
        }
        self.finish().await;
    }

    /// Writes what is behind, after what is being written.
    async fn finish(&mut self) {
        self.ending = true;
        self.drain().await;
        if let Some(generation) = self.generation {
            for (file, due) in [(File::Services, self.services_due), (File::Routes, self.routes_due)] {
                if due.is_some() {
                    self.write_file(file, generation);
                    self.drain().await;
                }
            }
        }
    }

    async fn drain(&mut self) {
        while self.disk.is_busy() {
            let written = self.disk.written().await;
            self.settle(written).await;
        }
    }

    /// When the next of the files that are behind is to be written.
    fn due(&self) -> Option<Instant> {
        self.services_due.into_iter().chain(self.routes_due).min()
    }

    fn absorb(&mut self, input: Input) {
        match input {
            Input::Welcome(session, welcome) if session > self.session => {
                self.session = session;
                self.generation = None;
                self.batch = Batch::begin(Arc::new(welcome));
            }
            Input::Update(session, update) if session == self.session => self.batch.absorb(update),
            // An earlier session's: a later one has replaced it.
            Input::Welcome(..) | Input::Update(..) => {}
        }
    }

    async fn flush(&mut self) {
        let services = self.flush_services().await;
        self.take_routes();
        // What the disk did not take is tried again when it is time, whatever else comes.
        if self.rewrite.at.is_none() {
            self.write_state();
        }
        let wired = self.wire().await;
        self.retry.note(services && wired);
        self.acknowledge();
    }

    /// Tells control how far this is. What is being written is waited for, and not for ever: control sends nothing more when too
    /// much is not acknowledged, and services are to go on. Orders that the ledger does not take wait in the batch.
    fn acknowledge(&mut self) {
        let reached = self.reached();
        if reached == *self.applied.borrow() {
            self.unacknowledged = None;
            return;
        }
        let since = *self.unacknowledged.get_or_insert_with(Instant::now);
        let waits = self.disk.is_busy() && (self.writing.is_some() || self.batch.has_orders());
        if waits && since.elapsed() < disk::PATIENCE {
            return;
        }
        self.applied.send_replace(reached);
        self.unacknowledged = None;
    }

    /// What could be acknowledged: a snapshot at its end mark.
    fn reached(&self) -> Applied {
        if self.session == 0 || !self.batch.in_force() {
            return *self.applied.borrow();
        }
        Applied {
            session: self.session,
            version: self.batch.version,
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
            if self.services_due.is_none() {
                self.services_due = Some(Instant::now() + WRITE_BEHIND);
                self.disk.note_services_behind().await;
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

    /// Puts routes in. They are not waited for: services lead to where they lead.
    fn take_routes(&mut self) {
        let (changed, all) = self.batch.take_routes(&mut self.desired.routes);
        self.unwired |= changed || (all && !self.told_all);
        self.told_all |= all;
        if changed {
            // Each write is of all of them: when they come one after the other, they are gathered.
            let pause = routes_pause(self.desired.routes.len());
            self.routes_due.get_or_insert(self.routes_written + pause);
            self.publish_quietly();
        }
    }

    /// Gives ranges and routes to the network when they are new, or were not taken.
    async fn wire(&mut self) -> bool {
        let Some(ranges) = self.desired.ranges.clone().filter(|_| self.unwired) else {
            return true;
        };
        // Until control has told of all, what there is is the ledger's, which may lack some.
        let stale = if self.told_all { Stale::Removed } else { Stale::Kept };
        match self.network.configure(&ranges, &self.desired.routes, stale).await {
            Ok(()) => self.unwired = false,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "the network did not take ranges and routes; trying again");
            }
        }
        !self.unwired
    }

    /// Begins to make pods and ranges durable, when there is something to write and nothing is being written.
    fn write_state(&mut self) {
        if self.session == 0 || self.disk.is_busy() {
            return;
        }
        let mut next = self.desired.clone();
        let orders = self.batch.take_orders();
        let pods = orders.apply(&mut next);
        let rewired = next.ranges != self.desired.ranges;
        let changed = !pods.is_empty() || self.doubtful || rewired || next.complete != self.desired.complete;
        if !changed && self.generation.is_some() {
            // They ask for what is in force.
            return;
        }
        self.disk.write_state(self.generation, next.clone(), pods);
        self.writing = Some(Writing {
            session: self.session,
            orders,
            next,
            rewired,
            changed,
        });
    }

    /// A write has ended: what it made durable is acted on, and the next one begins.
    async fn settle(&mut self, written: Written) {
        self.note(|unwritten| &mut unwritten.hangs, None);
        match (written, self.writing.take()) {
            (Written::State(written), Some(writing)) => self.settle_state(written, writing).await,
            (Written::State(_), None) => {}
            (Written::File(file, written), writing) => {
                self.writing = writing;
                self.settle_file(file, written);
            }
        }
        if self.ending {
            return;
        }
        let due = self.due().filter(|due| *due <= Instant::now());
        if due.is_some() {
            // Orders that come one after the other would keep the files waiting.
            self.write_behind(due);
        }
        if self.rewrite.at.is_none() {
            self.write_state();
        }
        self.acknowledge();
    }

    async fn settle_state(&mut self, written: Result<Generation, String>, writing: Writing) {
        let same_session = writing.session == self.session;
        self.doubtful = written.is_err();
        self.rewrite.note(written.is_ok());
        self.note(|unwritten| &mut unwritten.state, written.as_ref().err().cloned());
        match written {
            Ok(generation) => {
                if same_session {
                    self.generation = Some(generation);
                }
                self.unwired |= writing.rewired;
                // These went on meanwhile.
                let (services, routes) = (&mut self.desired.services, &mut self.desired.routes);
                self.desired = Desired {
                    services: std::mem::take(services),
                    routes: std::mem::take(routes),
                    ..writing.next
                };
                // Before the pods, so that their networks can be made at once.
                if !self.wire().await {
                    self.retry.note(false);
                }
                if writing.changed {
                    self.publish.send_replace(Arc::new(self.desired.clone()));
                }
            }
            Err(error) => {
                tracing::error!(
                    error,
                    "the ledger cannot be written; what it is to hold is not acted on"
                );
                // A later session says all of it again.
                if same_session {
                    self.batch.put_back(writing.orders);
                }
            }
        }
    }

    fn settle_file(&mut self, file: File, written: Result<(), String>) {
        let failed = written.err();
        if let Some(error) = &failed {
            tracing::warn!(
                error,
                "services or routes could not be written to the ledger; trying again"
            );
            let again = Instant::now() + RETRY_MAX;
            match file {
                File::Services => self.services_due = Some(again),
                File::Routes => self.routes_due = Some(again),
            }
        } else if file == File::Routes {
            self.routes_written = Instant::now();
        }
        match file {
            File::Services => self.note(|unwritten| &mut unwritten.services, failed),
            File::Routes => self.note(|unwritten| &mut unwritten.routes, failed),
        }
    }

    /// Notes how a write of the ledger went, for the node's condition.
    fn note(&mut self, part: impl FnOnce(&mut Unwritten) -> &mut Option<String>, error: Option<String>) {
        *part(&mut self.unwritten) = error;
        let trouble = self.unwritten.trouble();
        self.trouble
            .send_if_modified(|told| std::mem::replace(told, trouble.clone()) != trouble);
    }

    /// A service's or route's change wakes nobody: containers that start later read it.
    fn publish_quietly(&self) {
        self.publish.send_if_modified(|published| {
            *published = Arc::new(Desired {
                services: self.desired.services.clone(),
                routes: self.desired.routes.clone(),
                ..(**published).clone()
            });
            false
        });
    }

    /// Begins to write one of the files that are due at a time.
    fn write_behind(&mut self, at: Option<Instant>) {
        let Some(generation) = self.generation else {
            let later = Some(Instant::now() + RETRY_MAX);
            self.services_due = self.services_due.and(later);
            self.routes_due = self.routes_due.and(later);
            return;
        };
        let services = self.services_due.is_some() && self.services_due <= at;
        self.write_file(if services { File::Services } else { File::Routes }, generation);
    }

    fn write_file(&mut self, file: File, generation: Generation) {
        match file {
            File::Services => self.services_due = None,
            File::Routes => self.routes_due = None,
        }
        self.disk.write_file(file, generation, self.desired.clone());
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => future::pending().await,
    }
}

#[cfg(test)]
mod tests;
