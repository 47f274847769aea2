//! Writers and watchers that go on through every fault, and record what they did and saw for [`super::history::check`].
//!
//! They know all control replicas. Each is at one of them and turns to the next when that one does not answer, as clients do. Writers
//! also turn without a reason now and then, and one watcher all the time: so all replicas are written at again after a fault, and a
//! watch goes on at a replica that may lack what it was told. What is written is read at another replica.

mod watcher;
mod writer;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{
    Resource,
    api::v1::{GetRequest, ListRequest, objects_client::ObjectsClient},
    coordination::v1::Lease,
};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use super::history::{Change, History, Outcome, Read, Seen, Snapshot, Write};
use crate::layout::Members;
pub use watcher::Watcher;

/// No call takes longer; what has no answer by then is unknown.
const CALL: Duration = Duration::from_secs(4);
/// Every so often a replica is asked for a sign of life: a stopped process ends no stream.
const ASK: Duration = Duration::from_secs(2);
/// After so many events a watcher that is not content with any replica resumes at the next, which may be behind.
const RESTLESS: usize = 10;
/// How many write at the same time, each its own keys, and one that all of them change.
const WRITERS: usize = 4;
/// After a fault everything goes on within this time.
const PATIENCE: Duration = Duration::from_secs(90);

/// What all tasks share.
struct Shared {
    /// To each control replica.
    channels: Vec<Channel>,
    namespace: String,
    clock: AtomicU64,
    writes: Mutex<Vec<Write>>,
    reads: Mutex<Vec<Read>>,
}

impl Shared {
    /// The replica at a turn: turns go on and on, from one replica to the next.
    fn objects(&self, turn: usize) -> ObjectsClient<Channel> {
        ObjectsClient::new(self.channels[turn % self.channels.len()].clone())
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Gets once and records what was returned; `None`: there was no answer.
    async fn get(&self, turn: usize, key: &str) -> Option<Read> {
        let request = GetRequest {
            resource: Lease::KIND.resource.to_owned(),
            namespace: self.namespace.clone(),
            name: key.to_owned(),
        };
        let begun = self.now();
        let answer = tokio::time::timeout(CALL, self.objects(turn).get(request)).await.ok()?;
        let found = match answer {
            Ok(object) => {
                let lease = Lease::from_object(object.into_inner())?;
                Some((value(&lease), revision(&lease.meta().resource_version).ok()?))
            }
            Err(status) if status.code() == Code::NotFound => None,
            Err(_) => return None,
        };
        let read = Read {
            key: key.to_owned(),
            begun,
            ended: self.now(),
            found,
        };
        lock(&self.reads).push(read.clone());
        Some(read)
    }

    /// Everything that is there, at one revision.
    async fn list(&self, turn: usize) -> Result<Snapshot> {
        let request = ListRequest {
            resource: Lease::KIND.resource.to_owned(),
            namespace: self.namespace.clone(),
            ..ListRequest::default()
        };
        let list = tokio::time::timeout(CALL, self.objects(turn).list(request))
            .await??
            .into_inner();
        let mut objects = BTreeMap::new();
        for lease in list.items.into_iter().filter_map(Lease::from_object) {
            objects.insert(
                lease.name().to_owned(),
                (value(&lease), revision(&lease.meta().resource_version)?),
            );
        }
        let revision = revision(&list.resource_version)?;
        Ok(Snapshot { revision, objects })
    }
}

fn value(lease: &Lease) -> String {
    lease
        .spec
        .as_ref()
        .map(|spec| spec.holder_identity.clone())
        .unwrap_or_default()
}

fn revision(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("{text:?} is no revision"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The running writers and watchers.
pub struct Recorder {
    runtime: Runtime,
    shared: Arc<Shared>,
    stop: CancellationToken,
    writers: Vec<JoinHandle<()>>,
    /// One that only resumes when it must, one that does so all the time, one that sleeps through a compaction.
    watchers: Vec<Watcher>,
}

impl Recorder {
    /// Begins to write Leases in a namespace of its own, which must exist, and to watch them, at all these control replicas.
    pub fn begin(members: &Members, replicas: &[String], namespace: &str, seed: u64) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let mut channels = Vec::new();
        for replica in replicas {
            let endpoint = Endpoint::from_shared(format!("unix://{}", members.control_socket(replica)?))?
                .connect_timeout(CALL)
                .http2_keep_alive_interval(ASK)
                .keep_alive_timeout(CALL)
                .keep_alive_while_idle(true);
            channels.push(runtime.block_on(async { endpoint.connect_lazy() }));
        }
        let shared = Arc::new(Shared {
            channels,
            namespace: namespace.to_owned(),
            clock: AtomicU64::new(0),
            writes: Mutex::default(),
            reads: Mutex::default(),
        });
        let base = runtime.block_on(shared.list(0)).context("the recorder's first list")?;
        let stop = CancellationToken::new();
        let watchers = [None, Some(RESTLESS), None].into_iter().enumerate();
        let watchers = watchers
            .map(|(index, stays)| Watcher::begin(&runtime, &shared, index, stays, base.clone()))
            .collect();
        let writers = (0..WRITERS)
            .map(|index| runtime.spawn(writer::run(shared.clone(), stop.child_token(), index, seed)))
            .collect();
        let recorder = Self {
            runtime,
            shared,
            stop,
            writers,
            watchers,
        };
        recorder.wait_for_writes()?;
        Ok(recorder)
    }

    /// The watcher that sleeps through a compaction.
    pub fn sleeper(&self) -> &Watcher {
        &self.watchers[2]
    }

    /// A reading of the clock of all writes.
    pub fn now(&self) -> u64 {
        self.shared.now()
    }

    /// Begins one more write of a key of its own, and does not wait for its outcome.
    pub fn attempt(&self) {
        let (shared, key) = (self.shared.clone(), format!("attempt-{}", self.shared.now()));
        let change = Change::Put(key.clone());
        self.runtime
            .spawn(async move { writer::write(&shared, 0, key, change, Some(0)).await });
    }

    /// What was begun and acknowledged between two readings of the clock.
    pub fn acknowledged_within(&self, from: u64, until: u64) -> Vec<Write> {
        let writes = lock(&self.shared.writes);
        let within = |write: &&Write| write.begun > from && write.ended < until;
        let acknowledged = |write: &&Write| matches!(write.outcome, Outcome::Acknowledged(_));
        writes.iter().filter(within).filter(acknowledged).cloned().collect()
    }

    /// Waits until a write that begins from now on is acknowledged; how long that took.
    pub fn wait_for_writes(&self) -> Result<Duration> {
        let (since, from) = (Instant::now(), self.shared.now());
        loop {
            let acknowledged = lock(&self.shared.writes)
                .iter()
                .rev()
                .any(|write| write.begun > from && matches!(write.outcome, Outcome::Acknowledged(_)));
            if acknowledged {
                return Ok(since.elapsed());
            }
            ensure!(since.elapsed() < PATIENCE, "no write was acknowledged for {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until every control replica has acknowledged a write that begins from now on.
    pub fn write_at_each(&self) -> Result<()> {
        let now = self.shared.now();
        for replica in 0..self.shared.channels.len() {
            self.mark(replica, &format!("at-{replica}-{now}"))?;
        }
        Ok(())
    }

    /// Ends the writers, waits until every watcher was told of everything, and returns what was recorded.
    pub fn finish(mut self) -> Result<History> {
        self.stop.cancel();
        for writer in std::mem::take(&mut self.writers) {
            self.runtime.block_on(writer).context("a writer panicked")?;
        }
        self.mark(0, "before-the-end")?;
        let end = self
            .runtime
            .block_on(self.shared.list(0))
            .context("the list at the end")?;
        // Who was told of this one was told of everything in the list, too.
        let last = self.mark(0, "after-the-end")?;
        let since = Instant::now();
        while let Some(late) = self.watchers.iter().position(|watcher| watcher.at() < last) {
            if since.elapsed() > PATIENCE {
                bail!(
                    "watcher {late} was told nothing after revision {} for {PATIENCE:?}",
                    self.watchers[late].at()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let history = History {
            writes: lock(&self.shared.writes).clone(),
            reads: lock(&self.shared.reads).clone(),
            watchers: self.watchers.iter().map(Watcher::story).collect(),
            end,
        };
        let lost = |write: &&Write| write.base.is_some_and(|base| base > 0) && write.outcome == Outcome::Refused;
        ensure!(
            history.writes.iter().any(|write| lost(&write)),
            "no writer came too late: nothing is known of contention"
        );
        Ok(history)
    }

    /// One more write at a replica, tried under new names until it is acknowledged; its revision.
    fn mark(&self, replica: usize, name: &str) -> Result<u64> {
        let since = Instant::now();
        for attempt in 0.. {
            let key = format!("{name}-{attempt}");
            let change = Change::Put(key.clone());
            let write = writer::write(&self.shared, replica, key, change, Some(0));
            let made = self.runtime.block_on(write);
            if let Outcome::Acknowledged(revision) = made {
                return Ok(revision);
            }
            ensure!(
                since.elapsed() < PATIENCE,
                "no write at control replica {} was acknowledged for {PATIENCE:?}",
                replica + 1
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("unreachable: the attempts have no end")
    }
}

/// (acknowledged, refused, unknown) writes, and how often watchers began anew: resumed, or with a list.
pub fn summary(history: &History) -> String {
    let count = |wanted: fn(&Outcome) -> bool| history.writes.iter().filter(|write| wanted(&write.outcome)).count();
    let seen = |wanted: fn(&Seen) -> bool| history.watchers.iter().flatten().filter(|seen| wanted(seen)).count();
    format!(
        "{} writes acknowledged, {} refused, {} unknown; {} Gets; {} events, {} watches resumed, {} begun with a list",
        count(|outcome| matches!(outcome, Outcome::Acknowledged(_))),
        count(|outcome| matches!(outcome, Outcome::Refused)),
        count(|outcome| matches!(outcome, Outcome::Unknown)),
        history.reads.len(),
        seen(|seen| matches!(seen, Seen::Event { .. })),
        seen(|seen| matches!(seen, Seen::Resumed(_))),
        seen(|seen| matches!(seen, Seen::Listed(_))),
    )
}
