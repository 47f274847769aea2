//! `plan(desired, observed, progress, now) -> actions`: pure. It decides; the executor only does.
//!
//! Each pod's plan stands for itself: a few actions that are run in order, after which everything is observed and planned again.
//! No action waits for long; what takes time (a back-off, a grace period) is a point in time at which to plan again.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use orlop_proto::{Resource as _, core::v1::Pod};

use crate::{
    desired::Desired,
    reconciler::Settings,
    runtime::{ImageRequest, Observed, ObservedContainer, ObservedPod, PodId, ProcessState, Resources},
};

mod environment;
mod live;
mod resources;
pub mod status;
mod teardown;

/// Pods that control does not name any more are given at most this time to end.
const UNWANTED_GRACE: Duration = Duration::from_secs(10);

/// What there is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Network namespace, CNI ADD, pause, the dataplane's hooks; rolled back when a part fails.
    CreateSandbox {
        /// How many the pod had before.
        attempt: u32,
        /// The pod's host name.
        hostname: String,
    },
    /// The dataplane's hooks for a sandbox that an earlier life of the agent made.
    Attach {
        /// Which sandbox.
        sandbox_id: String,
        /// The host's end of its veth pair.
        host_interface: String,
    },
    /// Image, container, task.
    StartContainer(Box<StartContainer>),
    /// Asks a container to end (its image's StopSignal, or SIGTERM).
    Terminate {
        /// Which container.
        id: String,
    },
    /// Ends it.
    Kill {
        /// Which container.
        id: String,
    },
    /// Removes what is left of a container.
    RemoveContainer {
        /// Which container.
        id: String,
    },
    /// Hooks, CNI DEL, namespace, pause.
    RemoveSandbox {
        /// Which sandbox.
        id: String,
    },
    /// CNI DEL and namespace of a sandbox that has no pause container.
    RemoveNetwork {
        /// Which sandbox.
        id: String,
    },
    /// Logs, cgroups, lease, state directory.
    RemovePod,
}

/// A container to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct StartContainer {
    /// The sandbox to start it in.
    pub sandbox_id: String,
    /// Its name in the pod.
    pub name: String,
    /// The pod's host name.
    pub hostname: String,
    /// Which start of it this is.
    pub restart_count: u32,
    /// The back-off that went before this start, in milliseconds; `None` for the first.
    pub backoff_ms: Option<u64>,
    /// Its image.
    pub image: ImageRequest,
    /// Expanded.
    pub command: Vec<String>,
    /// Expanded.
    pub args: Vec<String>,
    /// As given.
    pub working_dir: String,
    /// Expanded, services' variables first.
    pub env: Vec<(String, String)>,
    /// Limits.
    pub resources: Resources,
    /// The pod's terminationGracePeriodSeconds.
    pub grace_seconds: u64,
    /// Why it cannot be started as it is; command, args and env are empty then.
    pub refused: Option<String>,
}

impl Action {
    /// What a failure of it is counted for.
    pub fn subject(&self) -> Subject {
        match self {
            Self::CreateSandbox { .. } | Self::Attach { .. } => Subject::Sandbox,
            Self::StartContainer(start) => Subject::Container(start.name.clone()),
            _ => Subject::Removal,
        }
    }
}

/// What the agent remembers between plans: all of it may be lost in a restart without harm.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// What failed, by pod uid; cleared by success.
    pub failures: BTreeMap<String, BTreeMap<Subject, Failure>>,
    /// Containers that were asked to end, by id.
    pub stops: BTreeMap<String, Stop>,
    /// Sandboxes whose hooks were attached in this life.
    pub attached: BTreeSet<String>,
    /// What was seen of containers, by id.
    pub lives: BTreeMap<String, Life>,
}

impl Progress {
    /// Notes which containers run and which have ended, and forgets those that are no more. The runtime's times are the wall
    /// clock's at that moment: they are taken over when they are first seen, none of them later than now, and an end not before
    /// the container was last seen to run.
    pub fn see(&mut self, observed: &Observed, now: Timestamp) {
        let containers = || observed.pods.values().flat_map(|pod| &pod.containers);
        let known: BTreeSet<&str> = containers().map(|container| container.id.as_str()).collect();
        self.lives.retain(|id, _| known.contains(id.as_str()));
        for container in containers() {
            let (started_at, finished_at) = match &container.state {
                ProcessState::Running { started_at, .. } => (*started_at, None),
                ProcessState::Exited(exit) => (exit.started_at, Some(exit.finished_at)),
                ProcessState::Created | ProcessState::Unknown => continue,
            };
            let life = self.lives.entry(container.id.clone()).or_insert_with(|| Life {
                started_at: started_at.min(now),
                ran_at: Timestamp::MIN,
                ended_at: None,
            });
            match finished_at {
                None => life.ran_at = now,
                Some(finished_at) => {
                    // Not `clamp`, which panics should the last look have been later than this.
                    life.ended_at.get_or_insert(finished_at.max(life.ran_at).min(now));
                }
            }
        }
    }

    /// The wall clock was set by this much: every wait lasts as long as it did.
    pub fn shift(&mut self, by: SignedDuration) {
        let failures = self
            .failures
            .values_mut()
            .flat_map(BTreeMap::values_mut)
            .map(|failure| &mut failure.at);
        let stops = self
            .stops
            .values_mut()
            .flat_map(|stop| std::iter::once(&mut stop.asked_at).chain(stop.killed_at.as_mut()));
        let lives = self.lives.values_mut().flat_map(|life| {
            [&mut life.started_at, &mut life.ran_at]
                .into_iter()
                .chain(life.ended_at.as_mut())
        });
        for time in failures.chain(stops).chain(lives) {
            *time = time.checked_add(by).unwrap_or(*time);
        }
    }
}

/// A container's times, which move along when the wall clock is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// When it was started.
    pub started_at: Timestamp,
    /// When it was last seen to run; `MIN`: never by this life of the agent.
    pub ran_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}

/// What an action is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The pod's sandbox.
    Sandbox,
    /// A container, by its name.
    Container(String),
    /// Taking things down.
    Removal,
}

/// A failure, and how many there were in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In a row.
    pub count: u32,
    /// When the last was.
    pub at: Timestamp,
    /// The word for the status.
    pub reason: String,
    /// What happened.
    pub message: String,
}

/// A container that was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// When it was first asked.
    pub asked_at: Timestamp,
    /// When it was last killed.
    pub killed_at: Option<Timestamp>,
}

/// The plan of one pod.
#[derive(Debug, Clone, PartialEq)]
pub struct PodPlan {
    /// Which pod.
    pub id: PodId,
    /// To be run in this order; when one fails the next for another container are still run.
    pub actions: Vec<Action>,
    /// Its deletion was asked for, and nothing of it is left.
    pub gone: bool,
    /// Plan again at this time, even when nothing happened.
    pub wake_at: Option<Timestamp>,
}

impl PodPlan {
    fn new(id: PodId) -> Self {
        Self {
            id,
            actions: Vec::new(),
            gone: false,
            wake_at: None,
        }
    }

    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }
}

/// What all pods' plans are made from.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// What control wants.
    pub desired: &'a Desired,
    /// What the agent remembers.
    pub progress: &'a Progress,
    /// Times.
    pub settings: &'a Settings,
    /// Now.
    pub now: Timestamp,
}

/// Plans all pods, by uid.
pub fn plan(context: Context<'_>, observed: &Observed) -> BTreeMap<String, PodPlan> {
    let mut plans = BTreeMap::new();
    for (uid, pod) in &context.desired.pods {
        let found = observed.pods.get(uid);
        let plan = if pod.is_deleting() {
            teardown::plan_deleted(context, pod, found)
        } else {
            live::plan_live(context, pod, found)
        };
        plans.insert(uid.clone(), plan);
    }
    if context.desired.complete {
        for (uid, found) in &observed.pods {
            if !context.desired.pods.contains_key(uid) {
                plans.insert(uid.clone(), teardown::plan_unwanted(context, found));
            }
        }
    }
    plans
}

/// The pod's identity.
pub fn pod_id(pod: &Pod) -> PodId {
    PodId {
        namespace: pod.namespace().to_owned(),
        name: pod.name().to_owned(),
        uid: pod.uid().to_owned(),
    }
}

/// `Succeeded` or `Failed` when the pod has ended and nothing of it is to be started again.
pub fn outcome(pod: &Pod, found: Option<&ObservedPod>) -> Option<&'static str> {
    match pod.status.as_ref().map(|status| status.phase.as_str()) {
        Some("Succeeded") => return Some("Succeeded"),
        Some("Failed") => return Some("Failed"),
        _ => {}
    }
    let spec = pod.spec.as_ref()?;
    let mut failed = false;
    for container in &spec.containers {
        let exit = match &newest(found?, &container.name)?.state {
            ProcessState::Exited(exit) => exit,
            _ => return None,
        };
        if !pod.is_deleting() && restarts(&spec.restart_policy, exit.code) {
            return None;
        }
        failed |= exit.code != 0;
    }
    if spec.containers.is_empty() {
        return None;
    }
    Some(if failed { "Failed" } else { "Succeeded" })
}

/// Whether the policy starts a container again that ended with this code.
fn restarts(policy: &str, code: i32) -> bool {
    match policy {
        "Never" => false,
        "OnFailure" => code != 0,
        _ => true,
    }
}

/// The latest start of a container.
fn newest<'a>(found: &'a ObservedPod, name: &str) -> Option<&'a ObservedContainer> {
    found
        .containers
        .iter()
        .filter(|container| container.name == name)
        .max_by_key(|container| container.restart_count)
}

/// When a failed action may be tried again: after 1 s, 2 s, 4 s ... for the sandbox and removals, after the crash back-off's
/// times for containers.
fn retry_at(context: Context<'_>, uid: &str, subject: &Subject) -> Option<Timestamp> {
    let failure = context.progress.failures.get(uid)?.get(subject)?;
    let (initial, max) = match subject {
        Subject::Container(_) => (context.settings.backoff_initial, context.settings.backoff_max),
        Subject::Sandbox | Subject::Removal => (
            context.settings.backoff_initial.min(Duration::from_secs(1)),
            context.settings.backoff_max.min(Duration::from_secs(30)),
        ),
    };
    let doubled = initial.saturating_mul(1_u32.checked_shl(failure.count.saturating_sub(1)).unwrap_or(u32::MAX));
    Some(after(failure.at, doubled.min(max)))
}

fn after(time: Timestamp, duration: Duration) -> Timestamp {
    SignedDuration::try_from(duration)
        .ok()
        .and_then(|duration| time.checked_add(duration).ok())
        .unwrap_or(time)
}

#[cfg(test)]
mod tests;
