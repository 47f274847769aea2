//! A pod's status from what is observed: pure, with the kubelet's words.

use std::time::Duration;

use jiff::Timestamp;
use orlop_proto::{
    Resource as _,
    core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIp, Pod, PodCondition, PodIp, PodStatus,
    },
};

use super::{Context, Subject, live, outcome, resources, restarts};
use crate::runtime::{Exit, ObservedContainer, ObservedPod, ProcessState};

/// For this long a failed pull is `ErrImagePull`, afterwards, while it waits, `ImagePullBackOff`.
const FRESH: Duration = Duration::from_secs(2);

/// The conditions that the agent decides about.
const OWN_CONDITIONS: &[&str] = &[
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
];

/// The pod's status now. `previous` is what was last reported, or, in the agent's first plan, what control has.
pub fn pod_status(context: Context<'_>, pod: &Pod, found: Option<&ObservedPod>, previous: &PodStatus) -> PodStatus {
    let ended = match previous.phase.as_str() {
        // Final: what is observed while the pod is taken down says less and less of it.
        "Succeeded" => Some("Succeeded"),
        "Failed" => Some("Failed"),
        _ => outcome(pod, found),
    };
    let sandbox = found.and_then(live::running);
    let containers: &[Container] = pod.spec.as_ref().map_or(&[], |spec| &spec.containers);
    // An ended or deleted pod, whose containers are being removed, keeps what was last said of them.
    let keeps = ended.is_some() || pod.is_deleting();
    let mut container_statuses: Vec<ContainerStatus> = containers
        .iter()
        .map(|container| {
            let before = previous
                .container_statuses
                .iter()
                .find(|status| status.name == container.name);
            container_status(&Of {
                context,
                pod,
                found,
                container,
                before,
                keeps,
            })
        })
        .collect();
    container_statuses.sort_by(|a, b| a.name.cmp(&b.name));
    let phase = match ended {
        Some(phase) => phase,
        None if container_statuses.iter().all(has_started) && !container_statuses.is_empty() => "Running",
        None => "Pending",
    };
    let addresses: Vec<String> = sandbox
        .map(|sandbox| sandbox.addresses.iter().map(ToString::to_string).collect())
        .unwrap_or_default();
    let told = pod.status.as_ref().unwrap_or(previous);
    let mut status = PodStatus {
        phase: phase.to_owned(),
        conditions: Vec::new(),
        message: told.message.clone(),
        reason: told.reason.clone(),
        start_time: previous.start_time.or_else(|| Some(seconds(context.now))),
        qos_class: if previous.qos_class.is_empty() {
            resources::qos_class(pod).to_owned()
        } else {
            previous.qos_class.clone()
        },
        container_statuses,
        ..PodStatus::default()
    };
    set_addresses(&mut status, context, addresses, previous, keeps);
    let mut all = conditions(context, &status, sandbox.is_some(), previous);
    // What others say of the pod stays.
    all.extend(
        told.conditions
            .iter()
            .filter(|other| !OWN_CONDITIONS.contains(&other.r#type.as_str()))
            .cloned(),
    );
    status.conditions = all;
    status
}

fn set_addresses(
    status: &mut PodStatus,
    context: Context<'_>,
    addresses: Vec<String>,
    previous: &PodStatus,
    keeps: bool,
) {
    let hosts: Vec<String> = context
        .settings
        .host_addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    status.host_ip = hosts.first().cloned().unwrap_or_else(|| previous.host_ip.clone());
    status.host_ips = hosts.into_iter().map(|ip| HostIp { ip }).collect();
    if addresses.is_empty() && keeps {
        status.pod_ip.clone_from(&previous.pod_ip);
        status.pod_ips.clone_from(&previous.pod_ips);
    } else {
        status.pod_ip = addresses.first().cloned().unwrap_or_default();
        status.pod_ips = addresses.into_iter().map(|ip| PodIp { ip }).collect();
    }
}

fn has_started(status: &ContainerStatus) -> bool {
    let set = |state: &Option<ContainerState>| {
        state
            .as_ref()
            .is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    };
    set(&status.state) || set(&status.last_state)
}

fn conditions(context: Context<'_>, status: &PodStatus, sandbox: bool, previous: &PodStatus) -> Vec<PodCondition> {
    let unready: Vec<&str> = status
        .container_statuses
        .iter()
        .filter(|container| !container.ready)
        .map(|container| container.name.as_str())
        .collect();
    let (ready, reason, message) = match status.phase.as_str() {
        "Succeeded" => (false, "PodCompleted", String::new()),
        "Failed" => (false, "PodFailed", String::new()),
        _ if unready.is_empty() => (true, "", String::new()),
        _ => (
            false,
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        ),
    };
    [
        ("PodReadyToStartContainers", sandbox, "", ""),
        (
            "Initialized",
            true,
            if status.phase == "Succeeded" {
                "PodCompleted"
            } else {
                ""
            },
            "",
        ),
        ("Ready", ready, reason, message.as_str()),
        ("ContainersReady", ready, reason, message.as_str()),
        ("PodScheduled", true, "", ""),
    ]
    .into_iter()
    .map(|(kind, value, reason, message)| {
        let value = if value { "True" } else { "False" };
        let before = previous.conditions.iter().find(|condition| condition.r#type == kind);
        let since = before
            .filter(|before| before.status == value)
            .and_then(|before| before.last_transition_time);
        PodCondition {
            r#type: kind.to_owned(),
            status: value.to_owned(),
            last_probe_time: None,
            last_transition_time: since.or_else(|| Some(seconds(context.now))),
            reason: reason.to_owned(),
            message: message.to_owned(),
        }
    })
    .collect()
}

/// Whose status.
struct Of<'a> {
    context: Context<'a>,
    pod: &'a Pod,
    found: Option<&'a ObservedPod>,
    container: &'a Container,
    before: Option<&'a ContainerStatus>,
    keeps: bool,
}

fn container_status(of: &Of<'_>) -> ContainerStatus {
    let name = &of.container.name;
    let starts = |skip: usize| {
        let mut all: Vec<&ObservedContainer> = of
            .found
            .iter()
            .flat_map(|found| &found.containers)
            // One that is being made is not there yet.
            .filter(|container| container.name == *name && container.state != ProcessState::Created)
            .collect();
        all.sort_by_key(|container| std::cmp::Reverse(container.restart_count));
        all.into_iter().nth(skip)
    };
    let Some(latest) = starts(0) else {
        return match of.before {
            Some(before) if of.keeps => not_running(before),
            _ => waiting_status(of),
        };
    };
    if latest.state == ProcessState::Unknown
        && let Some(before) = of.before
    {
        return before.clone();
    }
    let last = match starts(1).map(|previous| (previous, &previous.state)) {
        Some((previous, ProcessState::Exited(exit))) => Some(terminated(of, previous, exit)),
        _ => of
            .before
            .filter(|before| before.container_id == container_id(latest))
            .and_then(|before| {
                // The one before it was removed: what was said of it stays.
                before.last_state.clone().filter(|last| {
                    last.terminated
                        .as_ref()
                        .is_some_and(|t| t.container_id != before.container_id)
                })
            }),
    };
    let (state, last_state) = state_of(of, latest, last);
    let runs = state.running.is_some();
    ContainerStatus {
        name: name.clone(),
        state: Some(state),
        last_state,
        ready: runs,
        restart_count: i32::try_from(latest.restart_count).unwrap_or(i32::MAX),
        image: latest.image.clone(),
        image_id: latest.image_id.clone(),
        container_id: container_id(latest),
        started: Some(runs),
    }
}

/// The state of a container that was started, and the state before it.
fn state_of(
    of: &Of<'_>,
    latest: &ObservedContainer,
    last: Option<ContainerState>,
) -> (ContainerState, Option<ContainerState>) {
    let exit = match &latest.state {
        ProcessState::Running { started_at, .. } => {
            let running = ContainerStateRunning {
                started_at: Some(seconds(*started_at)),
            };
            return (
                ContainerState {
                    running: Some(running),
                    ..Default::default()
                },
                last,
            );
        }
        ProcessState::Exited(exit) => exit,
        ProcessState::Created | ProcessState::Unknown => {
            return (waiting("ContainerStatusUnknown", String::new()), last);
        }
    };
    let spec = of.pod.spec.as_ref();
    let will_restart = !of.keeps && spec.is_some_and(|spec| restarts(&spec.restart_policy, exit.code));
    if !will_restart {
        return (terminated(of, latest, exit), last);
    }
    let (delay, due) = live::restart_at(of.context, latest, exit);
    if due > of.context.now {
        let message = format!(
            "back-off {}s restarting failed container={} pod={}_{}({})",
            delay.as_secs(),
            of.container.name,
            of.pod.name(),
            of.pod.namespace(),
            of.pod.uid()
        );
        return (waiting("CrashLoopBackOff", message), Some(terminated(of, latest, exit)));
    }
    match failure(of) {
        Some((reason, message)) => (waiting(&reason, message), Some(terminated(of, latest, exit))),
        None => (terminated(of, latest, exit), last),
    }
}

/// A container that was never started.
fn waiting_status(of: &Of<'_>) -> ContainerStatus {
    let (reason, message) = failure(of).unwrap_or_else(|| ("ContainerCreating".to_owned(), String::new()));
    ContainerStatus {
        name: of.container.name.clone(),
        state: Some(waiting(&reason, message)),
        image: of.container.image.clone(),
        restart_count: of.before.map_or(0, |before| before.restart_count),
        started: Some(false),
        ..ContainerStatus::default()
    }
}

/// Of a container whose record is gone: it does not run any more, whatever was last said.
fn not_running(before: &ContainerStatus) -> ContainerStatus {
    let mut status = before.clone();
    (status.ready, status.started) = (false, Some(false));
    let Some(running) = status.state.as_ref().and_then(|state| state.running.as_ref()) else {
        return status;
    };
    let ended = ContainerStateTerminated {
        exit_code: 137,
        reason: "ContainerStatusUnknown".to_owned(),
        message: "the container was removed before its end was seen".to_owned(),
        started_at: running.started_at,
        container_id: status.container_id.clone(),
        ..Default::default()
    };
    status.state = Some(ContainerState {
        terminated: Some(ended),
        ..Default::default()
    });
    status
}

/// Why a container does not start, if it was tried.
fn failure(of: &Of<'_>) -> Option<(String, String)> {
    let failures = of.context.progress.failures.get(of.pod.uid())?;
    if let Some(failure) = failures.get(&Subject::Container(of.container.name.clone())) {
        let old = super::after(failure.at, FRESH) <= of.context.now;
        return Some(match failure.reason.as_str() {
            "ErrImagePull" if old || failure.count > 1 => (
                "ImagePullBackOff".to_owned(),
                format!("Back-off pulling image {:?}: {}", of.container.image, failure.message),
            ),
            reason => (reason.to_owned(), failure.message.clone()),
        });
    }
    let failure = failures.get(&Subject::Sandbox)?;
    Some(("ContainerCreating".to_owned(), failure.message.clone()))
}

fn waiting(reason: &str, message: String) -> ContainerState {
    let waiting = ContainerStateWaiting {
        reason: reason.to_owned(),
        message,
    };
    ContainerState {
        waiting: Some(waiting),
        ..Default::default()
    }
}

/// How a container ended, as it was first told: when one is removed its task goes first, and with it what is known of the end.
fn terminated(of: &Of<'_>, container: &ObservedContainer, exit: &Exit) -> ContainerState {
    let states = of.before.iter().flat_map(|before| [&before.state, &before.last_state]);
    let told = states
        .filter_map(|state| state.as_ref()?.terminated.as_ref())
        .find(|told| told.container_id == container_id(container));
    if let Some(told) = told {
        return ContainerState {
            terminated: Some(told.clone()),
            ..Default::default()
        };
    }
    let terminated = ContainerStateTerminated {
        exit_code: exit.code,
        signal: 0,
        reason: exit.reason.clone(),
        message: exit.message.clone(),
        started_at: Some(seconds(exit.started_at)),
        finished_at: Some(seconds(exit.finished_at)),
        container_id: container_id(container),
    };
    ContainerState {
        terminated: Some(terminated),
        ..Default::default()
    }
}

fn container_id(container: &ObservedContainer) -> String {
    format!("containerd://{}", container.id)
}

/// Kubernetes' times have seconds.
fn seconds(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: 0,
    }
}
