//! Which of several replicas runs the controllers and the scheduler.
//!
//! The leader renews its claim, the Lease `kube-system/orlop-control`; the others watch it by their own clocks and take it when it
//! was not renewed for as long as it says. Clocks need not agree, and a wrong judgement costs nothing but a change of leader: each
//! term has a fence ([`Registry::take_leadership`]) that the store checks with every write of that term.
//!
//! A leader that was killed and is started again before its claim ends takes it up at once: the claim is its own, the fence is a new one, and
//! nobody waits until the claim ends. The others take over when it does not come back.
//!
//! Invariant: in one process a term's tasks have ended before the next term begins, and a term begins on a cache that has every
//! write of the terms before it.

#[cfg(test)]
mod tests;

use std::{
    io::{self, Write as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use orlop_proto::coordination::v1::Lease;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::LeaderConfig,
    registry::{Registry, RegistryError, Term},
};

/// What a replica is called in the Lease: the machine's name and a number that the replica gives itself at its first start and
/// keeps in its folder.
///
/// # Errors
/// When the file cannot be read or written.
pub fn identity(data_dir: &Path) -> io::Result<String> {
    let path = data_dir.join("replica-id");
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let identity = format!("{}_{}", host.trim(), uuid::Uuid::new_v4());
    let temporary = data_dir.join("replica-id.new");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(identity.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)?;
    std::fs::File::open(data_dir)?.sync_all()?;
    Ok(identity)
}

/// What others may know of a replica's part in the election. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    leading: Arc<AtomicBool>,
    terms: Arc<AtomicU64>,
}

impl Standing {
    /// Whether this replica believes that it leads.
    pub fn is_leading(&self) -> bool {
        self.leading.load(Ordering::Relaxed)
    }

    /// As Prometheus text, with the writes that a fence refused.
    pub fn prometheus(&self, fenced_writes: u64) -> String {
        format!(
            "# HELP orlop_control_leader Whether this replica runs the controllers and the scheduler.\n\
             # TYPE orlop_control_leader gauge\norlop_control_leader {}\n\
             # HELP orlop_control_leader_terms_total How often this replica became the leader.\n\
             # TYPE orlop_control_leader_terms_total counter\norlop_control_leader_terms_total {}\n\
             # HELP orlop_control_fenced_writes_total Writes that the store refused because their leader's claim was lost.\n\
             # TYPE orlop_control_fenced_writes_total counter\norlop_control_fenced_writes_total {fenced_writes}\n",
            u8::from(self.is_leading()),
            self.terms.load(Ordering::Relaxed),
        )
    }
}

/// One replica's part in the election.
pub struct Election {
    registry: Registry,
    identity: String,
    times: LeaderConfig,
    standing: Standing,
    shutdown: CancellationToken,
}

/// Why a term ended.
#[derive(Debug)]
enum Ended {
    /// This replica stops.
    Shutdown,
    /// The claim was not renewed in time.
    Late,
    /// Somebody else has it.
    Taken,
}

impl Election {
    /// `identity` tells this replica from all others.
    pub fn new(registry: Registry, identity: String, times: LeaderConfig, shutdown: CancellationToken) -> Self {
        Self {
            registry,
            identity,
            times,
            standing: Standing::default(),
            shutdown,
        }
    }

    /// How it stands, also while [`Election::run`] runs.
    pub fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// Leads whenever it can, until the shutdown. `lead` starts a term's tasks, which write through the registry that it is given and
    /// end when the token says so.
    pub async fn run(self, lead: impl Fn(&Registry, &CancellationToken) -> Vec<JoinHandle<()>>) {
        let mut seen = Sighting::new(&self.identity);
        loop {
            // From before the claim was written: whoever sees it counts from later on.
            let (mut term, begun) = tokio::select! {
                claimed = self.campaign(&mut seen) => claimed,
                () = self.shutdown.cancelled() => return,
            };
            let over = CancellationToken::new();
            tracing::info!(
                identity = self.identity,
                revision = term.fence.revision,
                "this replica leads"
            );
            self.standing.terms.fetch_add(1, Ordering::Relaxed);
            self.standing.leading.store(true, Ordering::Relaxed);
            let fenced = self.registry.with_fence(term.fence.clone());
            let leading = async {
                tokio::select! {
                    () = over.cancelled() => return,
                    () = self.registry.cache().wait_for(term.fence.revision) => {}
                }
                let tasks = lead(&fenced, &over);
                for ended in join_all(tasks).await {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a controller ended");
                    }
                }
            };
            let mut held = term.clone();
            let holding = async {
                let why = self.hold(&mut held, begun).await;
                over.cancel();
                self.standing.leading.store(false, Ordering::Relaxed);
                match why {
                    Ended::Shutdown => tracing::info!("this replica no longer leads: it stops"),
                    Ended::Late => {
                        tracing::warn!("this replica no longer leads: its claim could not be renewed in time");
                    }
                    Ended::Taken => tracing::warn!("this replica no longer leads: somebody else does"),
                }
            };
            // Both on one task: the renewals go on while the term's tasks are started.
            tokio::join!(holding, leading);
            term = held;
            self.leave(&mut term).await;
            seen.ours = Some(version(&term.lease));
            if self.shutdown.is_cancelled() {
                return;
            }
        }
    }

    /// Returns when the claim is ours, with the moment before it was.
    async fn campaign(&self, seen: &mut Sighting) -> (Term, Instant) {
        loop {
            match self.try_take(seen).await {
                Ok(Some(claimed)) => return claimed,
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "who leads cannot be read or written"),
            }
            // Candidates that began together do not ask together for ever.
            let longer = self.times.retry_period.mul_f64(rand::random_range(0.0..0.2));
            sleep(self.times.retry_period + longer).await;
        }
    }

    async fn try_take(&self, seen: &mut Sighting) -> Result<Option<(Term, Instant)>, RegistryError> {
        let lease = self.registry.leadership().await?;
        let begun = Instant::now();
        if !seen.may_take(&lease, self.times.lease_duration, begun) {
            return Ok(None);
        }
        let seconds = i32::try_from(self.times.lease_duration.as_secs()).unwrap_or(i32::MAX);
        let term = self.registry.take_leadership(&lease, &self.identity, seconds).await?;
        Ok(term.map(|term| (term, begun)))
    }

    /// Renews until that fails for too long, or is refused.
    async fn hold(&self, term: &mut Term, begun: Instant) -> Ended {
        let mut renewed = begun;
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return Ended::Shutdown,
                () = sleep(self.times.retry_period) => {}
            }
            let now = Instant::now();
            // First: a process that was stopped for long finds out here.
            let Some(left) = self.times.renew_deadline.checked_sub(now - renewed) else {
                return Ended::Late;
            };
            match timeout(left, self.registry.renew_leadership(term, &self.identity)).await {
                Ok(Ok(true)) => renewed = now,
                Ok(Ok(false) | Err(RegistryError::Fenced(_))) => return Ended::Taken,
                Ok(Err(error)) => tracing::warn!(%error, "the claim to lead could not be renewed"),
                Err(_) => return Ended::Late,
            }
        }
    }

    /// Lets others lead at once. Who comes too late with it is told by the fence.
    async fn leave(&self, term: &mut Term) {
        let limit = self.times.renew_deadline.min(Duration::from_secs(2));
        match timeout(limit, self.registry.leave_leadership(term, &self.identity)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error @ RegistryError::Fenced(_))) => tracing::warn!(%error, "a late write was refused"),
            Ok(Err(error)) => tracing::warn!(%error, "the claim to lead expires by itself"),
            Err(_) => tracing::warn!("the claim to lead expires by itself: the store does not answer"),
        }
    }
}

/// What a candidate has seen of the Lease. Only its own clock counts.
struct Sighting {
    identity: String,
    /// The Lease's version, and since when it is that.
    last: Option<(String, Instant)>,
    /// The version that our last term ended with.
    ours: Option<String>,
}

impl Sighting {
    fn new(identity: &str) -> Self {
        Self {
            identity: identity.to_owned(),
            last: None,
            ours: None,
        }
    }

    /// Whether the Lease is free, or expired, or our own from before.
    fn may_take(&mut self, lease: &Lease, duration: Duration, now: Instant) -> bool {
        let version = version(lease);
        let first = self.last.is_none();
        let since = match &self.last {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.last = Some((version.clone(), since));
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.is_empty() {
            return true;
        }
        // This process has just begun: the one before it, whose name it has, is dead, or fenced from now on. Later on the same name
        // in a version that is not ours is another process with a copy of our folder, which is treated as anybody else.
        if spec.holder_identity == self.identity && (first || self.ours.as_ref() == Some(&version)) {
            return true;
        }
        let said = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        now - since >= said.map_or(duration, Duration::from_secs)
    }
}

fn version(lease: &Lease) -> String {
    lease
        .metadata
        .as_ref()
        .map(|metadata| metadata.resource_version.clone())
        .unwrap_or_default()
}
