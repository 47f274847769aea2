//! The loop that makes the node's pods what control wants them to be: observe, plan, execute, report.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use orlop_proto::{
    Resource as _,
    core::v1::{Event, Pod, PodStatus},
};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    dataplane::Dataplane,
    desired::Desired,
    network::Network,
    plan::{self, Action, Context, Failure, PodPlan, Progress, Stop},
    runtime::{Observed, ObservedPod, PodId, Runtime},
};

mod clock;
mod events;
mod execute;

use clock::Clock;
use events::Events;
use execute::{Done, Executor, Failed};

/// So many pods are started at once; the others wait for their turn.
const PARALLEL_STARTS: usize = 8;
/// The wait after a failed observation.
const RETRY_OBSERVE: Duration = Duration::from_millis(500);
/// The wait when the link does not take an update now.
const RETRY_REPORT: Duration = Duration::from_millis(50);

/// What the reconciler works with.
pub struct Inputs {
    /// What control wants.
    pub desired: watch::Receiver<Arc<Desired>>,
    /// The containers.
    pub runtime: Arc<dyn Runtime>,
    /// The pods' network.
    pub network: Arc<dyn Network>,
    /// Counts the pods' traffic.
    pub dataplane: Arc<dyn Dataplane>,
    /// Where statuses go. For each pod the latest wins; an update is sent again only when it differs.
    pub updates: mpsc::Sender<PodUpdate>,
    /// Where events about pods go; what finds no room is dropped.
    pub events: mpsc::Sender<Event>,
    /// Times and addresses.
    pub settings: Settings,
}

/// Times and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The node's own addresses, for `hostIP`.
    pub host_addresses: Vec<IpAddr>,
    /// The wait before a crashed container's second restart; doubles with each (default 10 s).
    pub backoff_initial: Duration,
    /// The longest such wait (default 5 min).
    pub backoff_max: Duration,
    /// A container that ran for this long starts with no back-off again (default 10 min).
    pub backoff_reset: Duration,
    /// The machine's memory in bytes, for oom_score_adj.
    pub memory_capacity: u64,
    /// Everything is looked at again after this time even when nothing woke the loop (default 10 s).
    pub resync: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host_addresses: Vec::new(),
            backoff_initial: Duration::from_secs(10),
            backoff_max: Duration::from_secs(300),
            backoff_reset: Duration::from_secs(600),
            memory_capacity: memory_capacity(),
            resync: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// As the configuration says, for a node with these addresses.
    pub fn from_config(config: &Config, host_addresses: Vec<IpAddr>) -> Self {
        Self {
            host_addresses,
            backoff_initial: Duration::from_millis(config.restart_backoff_ms),
            backoff_max: Duration::from_millis(config.restart_backoff_max_ms),
            ..Self::default()
        }
    }
}

/// MemTotal; 0 where it cannot be read.
fn memory_capacity() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// A pod's status has changed, or the pod is gone.
#[derive(Debug, Clone, PartialEq)]
pub struct PodUpdate {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// Its status.
    pub status: PodStatus,
    /// It was to be deleted, and nothing of it is left on the node.
    pub gone: bool,
}

/// Runs until `stop` is cancelled. Pods go on running afterwards.
pub async fn run(inputs: Inputs, stop: CancellationToken) {
    let (sender, done) = mpsc::unbounded_channel();
    let executor = Executor {
        runtime: inputs.runtime.clone(),
        network: inputs.network.clone(),
        dataplane: inputs.dataplane.clone(),
        starts: Arc::new(Semaphore::new(PARALLEL_STARTS)),
        events: Events(inputs.events.clone()),
    };
    let reconciler = Reconciler {
        inputs,
        executor,
        sender,
        progress: Progress::default(),
        busy: BTreeMap::new(),
        reported: BTreeMap::new(),
        cleared: false,
        looked_after: Instant::now(),
    };
    reconciler.run(done, stop).await;
}

struct Reconciler {
    inputs: Inputs,
    executor: Executor,
    /// Workers' ends.
    sender: mpsc::UnboundedSender<Done>,
    progress: Progress,
    /// Pods whose worker runs, or has ended but not been heard yet: what was observed meanwhile may be stale for them. The
    /// token tells the worker that the pod is not wanted any more.
    busy: BTreeMap<String, CancellationToken>,
    /// The latest update of each pod.
    reported: BTreeMap<String, PodUpdate>,
    /// Whether networks that an earlier life left half-made have been cleared.
    cleared: bool,
    /// When the dataplane's hooks were last looked at.
    looked_after: Instant,
}

impl Reconciler {
    async fn run(mut self, mut done: mpsc::UnboundedReceiver<Done>, stop: CancellationToken) {
        let changed = self.inputs.runtime.changed();
        let mut wait = Duration::ZERO;
        let mut clock = Clock::new(Timestamp::now(), Instant::now());
        loop {
            // Every branch is cancel-safe: a permit of Notify, a version of watch and a message of mpsc are only taken by the
            // branch that is chosen.
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => None,
                () = changed.notified() => None,
                ended = done.recv() => ended,
                result = self.inputs.desired.changed() => {
                    if result.is_err() {
                        return;
                    }
                    None
                }
            };
            let step = clock.step(Timestamp::now(), Instant::now());
            if !step.is_zero() {
                tracing::warn!(seconds = step.as_secs(), "the wall clock was set");
                self.progress.shift(step);
            }
            let more = std::iter::from_fn(|| done.try_recv().ok());
            for ended in ended.into_iter().chain(more).collect::<Vec<_>>() {
                self.settle(ended);
            }
            wait = self.round().await;
        }
    }

    /// Takes what a worker did into account.
    fn settle(&mut self, done: Done) {
        self.busy.remove(&done.uid);
        let now = Timestamp::now();
        for (subject, result) in done.results {
            let failures = self.progress.failures.entry(done.uid.clone()).or_default();
            match result {
                Ok(()) => drop(failures.remove(&subject)),
                Err(Failed { reason, message }) => {
                    let count = failures.get(&subject).map_or(0, |failure| failure.count) + 1;
                    failures.insert(
                        subject,
                        Failure {
                            count,
                            at: now,
                            reason,
                            message,
                        },
                    );
                }
            }
        }
        for id in done.detached {
            self.progress.attached.remove(&id);
        }
        self.progress.attached.extend(done.attached);
    }

    /// Observes, plans, dispatches, reports; returns how long to wait if nothing happens.
    async fn round(&mut self) -> Duration {
        let observed = match self.observe().await {
            Ok(observed) => observed,
            Err(error) => {
                tracing::warn!(%error, "cannot observe");
                return RETRY_OBSERVE;
            }
        };
        let desired = self.inputs.desired.borrow_and_update().clone();
        self.forget(&desired, &observed);
        self.look_after_hooks(&observed).await;
        let now = Timestamp::now();
        self.progress.see(&observed, now);
        let progress = self.progress.clone();
        let settings = self.inputs.settings.clone();
        let context = Context {
            desired: &desired,
            progress: &progress,
            settings: &settings,
            now,
        };
        let plans = plan::plan(context, &observed);
        let mut wait = settings.resync;
        for (uid, pod_plan) in plans {
            if let Some(pod) = desired.pods.get(&uid)
                && !self.report(
                    context,
                    pod,
                    observed.pods.get(&uid),
                    pod_plan.gone && !self.busy.contains_key(&uid),
                )
            {
                wait = wait.min(RETRY_REPORT);
            }
            if let Some(worker) = self.busy.get(&uid) {
                if desired.pods.get(&uid).is_none_or(|pod| pod.is_deleting()) {
                    worker.cancel();
                }
                continue;
            }
            if let Some(at) = pod_plan.wake_at {
                wait = wait.min(Duration::try_from(at.duration_since(now)).unwrap_or_default());
            }
            self.dispatch(pod_plan, observed.pods.get(&uid), now);
        }
        wait
    }

    async fn observe(&mut self) -> Result<Observed, ObserveError> {
        let mut observed = self.inputs.runtime.observe().await?;
        // While nothing is under way a network without a sandbox is one whose making was cut off. After a failure, and so a
        // second try, this is not so by itself: a worker may be between its ADD and its sandbox.
        if !self.cleared && self.busy.is_empty() {
            let valid = sandbox_ids(&observed);
            match self.inputs.network.gc(&valid).await {
                Ok(()) => self.cleared = true,
                Err(error) => tracing::warn!(%error, "cannot clear networks that nobody uses"),
            }
        }
        for attachment in self.inputs.network.list().await? {
            let Some(pod) = attachment.pod else { continue };
            let id = PodId {
                namespace: pod.namespace,
                name: pod.name,
                uid: pod.uid,
            };
            let found = observed.pods.entry(id.uid.clone()).or_insert_with(|| ObservedPod {
                id,
                sandboxes: Vec::new(),
                containers: Vec::new(),
                networks: Vec::new(),
                remains: false,
            });
            found.networks.push(attachment.sandbox_id);
        }
        Ok(observed)
    }

    /// Drops what is remembered of what is no more.
    fn forget(&mut self, desired: &Desired, observed: &Observed) {
        let known = |uid: &String| desired.pods.contains_key(uid) || observed.pods.contains_key(uid);
        self.progress
            .failures
            .retain(|uid, failures| known(uid) && !failures.is_empty());
        self.reported.retain(|uid, _| desired.pods.contains_key(uid));
        let containers: BTreeSet<&str> = observed
            .pods
            .values()
            .flat_map(|pod| &pod.containers)
            .map(|container| container.id.as_str())
            .collect();
        self.progress.stops.retain(|id, _| containers.contains(id.as_str()));
        if self.busy.is_empty() {
            let sandboxes = sandbox_ids(observed);
            self.progress.attached.retain(|id| sandboxes.contains(id));
        }
    }

    /// What somebody else detached from a pod's interface is planned to be attached again.
    async fn look_after_hooks(&mut self, observed: &Observed) {
        if self.looked_after.elapsed() < self.inputs.settings.resync {
            return;
        }
        self.looked_after = Instant::now();
        let lost = match self.inputs.dataplane.repair().await {
            Ok(lost) => lost,
            Err(error) => {
                tracing::warn!(%error, "cannot see whether programs are attached");
                return;
            }
        };
        // A worker attaches and detaches, too: its pod is looked at the next time.
        for uid in lost.iter().filter(|uid| !self.busy.contains_key(*uid)) {
            let Some(found) = observed.pods.get(uid) else { continue };
            let mut hooked = false;
            for sandbox in &found.sandboxes {
                hooked |= self.progress.attached.remove(&sandbox.id);
            }
            if hooked {
                tracing::warn!(pod = uid, name = found.id.name, "somebody detached the pod's programs");
                self.executor.events.hooks_lost(&found.id);
            }
        }
    }

    /// Reports the pod when something is new; `false` when the update could not be handed on now.
    fn report(&mut self, context: Context<'_>, pod: &Pod, found: Option<&ObservedPod>, gone: bool) -> bool {
        let reported = self.reported.get(pod.uid());
        if reported.is_some_and(|update| update.gone) {
            return true;
        }
        let empty = PodStatus::default();
        let previous = reported
            .map(|update| &update.status)
            .or(pod.status.as_ref())
            .unwrap_or(&empty);
        let update = PodUpdate {
            namespace: pod.namespace().to_owned(),
            name: pod.name().to_owned(),
            uid: pod.uid().to_owned(),
            status: plan::status::pod_status(context, pod, found, previous),
            gone,
        };
        if reported == Some(&update) {
            return true;
        }
        match self.inputs.updates.try_send(update.clone()) {
            Ok(()) => {
                self.executor.events.back_offs(pod, previous, &update.status);
                self.reported.insert(update.uid.clone(), update);
                true
            }
            Err(mpsc::error::TrySendError::Full(_)) => false,
            Err(mpsc::error::TrySendError::Closed(_)) => true,
        }
    }

    /// Starts the pod's worker.
    fn dispatch(&mut self, plan: PodPlan, found: Option<&ObservedPod>, now: Timestamp) {
        if plan.actions.is_empty() {
            return;
        }
        for action in &plan.actions {
            tracing::debug!(pod = plan.id.uid, name = plan.id.name, ?action, "doing");
            if let Action::Terminate { id } | Action::Kill { id } = action
                && !self.progress.stops.contains_key(id)
                && let Some(container) = found.and_then(|found| found.containers.iter().find(|other| other.id == *id))
            {
                self.executor.events.killing(&plan.id, &container.name);
            }
            match action {
                Action::Terminate { id } => {
                    self.progress.stops.entry(id.clone()).or_insert(Stop {
                        asked_at: now,
                        killed_at: None,
                    });
                }
                Action::Kill { id } => {
                    let stop = self.progress.stops.entry(id.clone()).or_insert(Stop {
                        asked_at: now,
                        killed_at: None,
                    });
                    stop.killed_at = Some(now);
                }
                _ => {}
            }
        }
        let uid = plan.id.uid.clone();
        let unwanted = CancellationToken::new();
        self.busy.insert(uid.clone(), unwanted.clone());
        let sandboxes = found
            .map(|found| found.sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect())
            .unwrap_or_default();
        let (executor, sender) = (self.executor.clone(), self.sender.clone());
        let worker = tokio::spawn(async move { executor.execute(plan.id, plan.actions, sandboxes, unwanted).await });
        tokio::spawn(async move {
            // A worker that panicked is heard too: its pod must not stay busy.
            let done = worker.await.unwrap_or_else(|error| Done::panicked(uid, &error));
            // Nobody listens any more only when the agent ends.
            sender.send(done).ok();
        });
    }
}

fn sandbox_ids(observed: &Observed) -> BTreeSet<String> {
    observed
        .pods
        .values()
        .flat_map(|pod| &pod.sandboxes)
        .map(|sandbox| sandbox.id.clone())
        .collect()
}

#[derive(Debug, thiserror::Error)]
enum ObserveError {
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
}

#[cfg(test)]
mod tests;
