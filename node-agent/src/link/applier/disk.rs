//! Writes to the ledger beside the task that asks for them: one at a time, and however long the disk takes, services go on.

use std::{
    collections::BTreeSet,
    future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, timeout},
};

use super::Chain;
use crate::{
    desired::Desired,
    ledger::{Behind, Generation, Ledger, LedgerError},
    memory,
};

/// Neither acknowledgements nor services wait longer for the disk.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// A write that takes longer is told to people.
pub(super) const HANGS: Duration = Duration::from_secs(30);

/// Services, and routes, are written to the ledger at most this often.
pub(super) const WRITE_BEHIND: Duration = Duration::from_secs(3);
/// Many routes are written more seldom: each write is of all of them, and while a large cluster comes up they change all the time.
const WRITE_BEHIND_PER_ROUTE: Duration = Duration::from_millis(5);

/// How long after a write of so many routes, at the least, the next one is.
pub(super) fn routes_pause(routes: usize) -> Duration {
    let routes = u32::try_from(routes).unwrap_or(u32::MAX);
    WRITE_BEHIND.max(WRITE_BEHIND_PER_ROUTE.saturating_mul(routes))
}

/// What a file that is written behind what is in force holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum File {
    Services,
    Routes,
}

/// How a write ended; failures as they are told to people.
#[derive(Debug)]
pub(super) enum Written {
    /// Ranges and pods; with what this session may write as.
    State(Result<Generation, String>),
    File(File, Result<(), String>),
}

/// The ledger, and what is being written to it.
#[derive(Debug)]
pub(super) struct Disk {
    /// Locked by the job alone: the task would wait for a disk that hangs.
    ledger: Arc<Mutex<Ledger>>,
    behind: Arc<Behind>,
    job: Option<Job>,
}

#[derive(Debug)]
struct Job {
    /// What it writes, should it panic.
    file: Option<File>,
    since: Instant,
    handle: JoinHandle<Written>,
}

impl Disk {
    pub fn new(ledger: Ledger) -> Self {
        Self {
            behind: ledger.behind(),
            ledger: Arc::new(Mutex::new(ledger)),
            job: None,
        }
    }

    /// Whether something is being written: nothing else may be begun then.
    pub fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// When what is being written counts as hanging.
    pub fn hangs_at(&self) -> Option<Instant> {
        self.job.as_ref().map(|job| job.since + HANGS)
    }

    /// Writes what `state` says of ranges and of the pods `changed`. A session that has no generation gets one first.
    pub fn write_state(&mut self, known: Option<Generation>, state: Desired, changed: BTreeSet<String>) {
        self.begin(None, move |ledger| {
            let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
            let write = || -> Result<Generation, LedgerError> {
                let generation = known.map_or_else(|| ledger.begin_session(), Ok)?;
                ledger.write(generation, &state, changed)?;
                Ok(generation)
            };
            Written::State(told(write()))
        });
    }

    /// Writes all services, or all routes.
    pub fn write_file(&mut self, file: File, generation: Generation, desired: Desired) {
        let notes = self.behind.notes();
        self.begin(Some(file), move |ledger| {
            let writer = ledger.lock().unwrap_or_else(PoisonError::into_inner).writer(generation);
            let written = writer.and_then(|writer| match file {
                File::Services => writer.services(&desired.services, notes),
                File::Routes => writer.routes(&desired.routes),
            });
            // This was the end of a burst, if there was one: the snapshot, and now the file's contents.
            memory::give_back();
            Written::File(file, told(written))
        });
    }

    fn begin(&mut self, file: Option<File>, write: impl FnOnce(&Mutex<Ledger>) -> Written + Send + 'static) {
        debug_assert!(self.job.is_none(), "one at a time");
        let ledger = Arc::clone(&self.ledger);
        self.job = Some(Job {
            file,
            since: Instant::now(),
            handle: spawn_blocking(move || write(&ledger)),
        });
    }

    /// How what is being written ended; pending while nothing is. Cancel-safe.
    pub async fn written(&mut self) -> Written {
        let Some(job) = &mut self.job else {
            return future::pending().await;
        };
        let (file, ended) = (job.file, (&mut job.handle).await);
        self.job = None;
        ended.unwrap_or_else(|panicked| {
            let error = panicked.to_string();
            match file {
                Some(file) => Written::File(file, Err(error)),
                None => Written::State(Err(error)),
            }
        })
    }

    /// Notes that the maps are about to get what the services' file lacks. A disk that hangs is not waited for.
    pub async fn note_services_behind(&self) {
        let behind = Arc::clone(&self.behind);
        // Before a thread has time for it: a write that is under way must not say that the file has caught up.
        behind.announce();
        let error = match timeout(PATIENCE, spawn_blocking(move || behind.write())).await {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => Chain(&error).to_string(),
            Ok(Err(panicked)) => panicked.to_string(),
            Err(_late) => "the disk hangs".to_owned(),
        };
        tracing::warn!(error, "the ledger's services count as current, and are not");
    }
}

fn told<T>(written: Result<T, LedgerError>) -> Result<T, String> {
    written.map_err(|error| Chain(&error).to_string())
}
