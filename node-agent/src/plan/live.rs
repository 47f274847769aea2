//! Pods that are to run: sandbox, containers, restarts.

use std::time::Duration;

use jiff::Timestamp;
use orlop_proto::{
    Resource as _,
    core::v1::{Container, Pod, PodSpec},
};

use super::{
    Action, Context, PodPlan, StartContainer, Subject, after, environment, newest, outcome, pod_id, resources,
    restarts, retry_at, teardown,
};
use crate::runtime::{Exit, ImageRequest, ObservedContainer, ObservedPod, ObservedSandbox, ProcessState, PullPolicy};

/// Exited containers that are kept, besides the latest, for `lastState`.
const KEPT: usize = 1;

/// The plan of a pod that is not being deleted.
pub fn plan_live(context: Context<'_>, pod: &Pod, found: Option<&ObservedPod>) -> PodPlan {
    let id = pod_id(pod);
    let mut plan = PodPlan::new(id.clone());
    let Some(spec) = &pod.spec else { return plan };
    let nothing = ObservedPod {
        id,
        sandboxes: Vec::new(),
        containers: Vec::new(),
        networks: Vec::new(),
        remains: false,
    };
    let ended = outcome(pod, found).is_some();
    let found = found.unwrap_or(&nothing);
    if ended {
        plan_ended(context, &mut plan, spec, found);
        return plan;
    }
    // Of a sandbox that the runtime does not speak about nothing may be concluded.
    if found
        .sandboxes
        .iter()
        .any(|sandbox| sandbox.state == ProcessState::Unknown)
    {
        return plan;
    }
    match running(found) {
        Some(sandbox) => plan_running(context, &mut plan, pod, spec, found, sandbox),
        None => plan_sandbox(context, &mut plan, pod, found),
    }
    plan
}

/// The pod's running sandbox.
pub fn running(found: &ObservedPod) -> Option<&ObservedSandbox> {
    found
        .sandboxes
        .iter()
        .rev()
        .find(|sandbox| matches!(sandbox.state, ProcessState::Running { .. }))
}

/// A pod that ended keeps its containers' records and logs, and gives its network back.
fn plan_ended(context: Context<'_>, plan: &mut PodPlan, spec: &PodSpec, found: &ObservedPod) {
    let mut runs = false;
    for container in &found.containers {
        runs |= teardown::stop(context, plan, container, Duration::from_secs(grace(spec)));
    }
    if runs || waits(context, plan, &Subject::Removal) {
        return;
    }
    plan.actions.extend(
        found
            .sandboxes
            .iter()
            .map(|sandbox| Action::RemoveSandbox { id: sandbox.id.clone() }),
    );
    plan.actions.extend(teardown::orphan_networks(found));
}

/// No sandbox runs: what is left of the last goes, with the containers that were in it; then there is a new one.
fn plan_sandbox(context: Context<'_>, plan: &mut PodPlan, pod: &Pod, found: &ObservedPod) {
    let mut runs = false;
    for container in &found.containers {
        runs |= teardown::stop(context, plan, container, Duration::ZERO);
    }
    if runs || waits(context, plan, &Subject::Sandbox) || waits(context, plan, &Subject::Removal) {
        return;
    }
    plan.actions.extend(
        found
            .sandboxes
            .iter()
            .map(|sandbox| Action::RemoveSandbox { id: sandbox.id.clone() }),
    );
    plan.actions.extend(teardown::orphan_networks(found));
    let attempt = found
        .sandboxes
        .iter()
        .map(|sandbox| sandbox.attempt + 1)
        .max()
        .unwrap_or(0);
    plan.actions.push(Action::CreateSandbox {
        attempt,
        hostname: hostname(pod),
    });
}

fn plan_running(
    context: Context<'_>,
    plan: &mut PodPlan,
    pod: &Pod,
    spec: &PodSpec,
    found: &ObservedPod,
    sandbox: &ObservedSandbox,
) {
    let others = found.sandboxes.iter().filter(|other| other.id != sandbox.id);
    plan.actions
        .extend(others.map(|other| Action::RemoveSandbox { id: other.id.clone() }));
    plan.actions.extend(teardown::orphan_networks(found));
    if !context.progress.attached.contains(&sandbox.id) && !waits(context, plan, &Subject::Sandbox) {
        plan.actions.push(Action::Attach {
            sandbox_id: sandbox.id.clone(),
            host_interface: sandbox.host_interface.clone(),
        });
    }
    for container in &spec.containers {
        plan_container(context, plan, pod, container, found, sandbox);
    }
}

fn plan_container(
    context: Context<'_>,
    plan: &mut PodPlan,
    pod: &Pod,
    container: &Container,
    found: &ObservedPod,
    sandbox: &ObservedSandbox,
) {
    remove_old(plan, found, &container.name);
    let (restart_count, backoff_ms) = match newest(found, &container.name) {
        None => (lost_restarts(pod, &container.name), None),
        Some(latest) => match &latest.state {
            ProcessState::Unknown => return,
            ProcessState::Running { .. } => {
                if latest.sandbox_id != sandbox.id {
                    teardown::stop(context, plan, latest, Duration::ZERO);
                }
                return;
            }
            ProcessState::Created => {
                plan.actions.push(Action::RemoveContainer { id: latest.id.clone() });
                (latest.restart_count, latest.backoff_ms)
            }
            ProcessState::Exited(exit) => {
                let policy = pod.spec.as_ref().map_or("", |spec| spec.restart_policy.as_str());
                if !restarts(policy, exit.code) {
                    return;
                }
                let (delay, due) = restart_at(context, latest, exit);
                if due > context.now {
                    plan.wake(due);
                    return;
                }
                (latest.restart_count + 1, Some(millis(delay)))
            }
        },
    };
    if waits(context, plan, &Subject::Container(container.name.clone())) {
        return;
    }
    let start = start(context, pod, container, &sandbox.id, restart_count, backoff_ms);
    plan.actions.push(Action::StartContainer(Box::new(start)));
}

/// When a container that ended is started again, and after which back-off.
pub fn restart_at(context: Context<'_>, container: &ObservedContainer, exit: &Exit) -> (Duration, Timestamp) {
    let settings = context.settings;
    let life = context.progress.lives.get(&container.id);
    let started_at = life.map_or(exit.started_at, |life| life.started_at);
    let ended_at = life.and_then(|life| life.ended_at).unwrap_or(exit.finished_at);
    let ran = Duration::try_from(ended_at.duration_since(started_at)).unwrap_or_default();
    let delay = match container.backoff_ms {
        _ if ran >= settings.backoff_reset => Duration::ZERO,
        None => Duration::ZERO,
        Some(0) => settings.backoff_initial,
        Some(last) => Duration::from_millis(last).saturating_mul(2),
    };
    let delay = delay.min(settings.backoff_max);
    (delay, after(ended_at, delay))
}

/// Whether an earlier failure makes this wait; if so the plan wakes when the wait is over.
fn waits(context: Context<'_>, plan: &mut PodPlan, subject: &Subject) -> bool {
    match retry_at(context, &plan.id.uid, subject) {
        Some(at) if at > context.now => {
            plan.wake(at);
            true
        }
        _ => false,
    }
}

fn remove_old(plan: &mut PodPlan, found: &ObservedPod, name: &str) {
    let mut starts: Vec<&ObservedContainer> = found
        .containers
        .iter()
        .filter(|container| container.name == name)
        .collect();
    starts.sort_by_key(|container| std::cmp::Reverse(container.restart_count));
    let old = starts
        .into_iter()
        .skip(1 + KEPT)
        .filter(|old| matches!(old.state, ProcessState::Exited(_)));
    plan.actions
        .extend(old.map(|old| Action::RemoveContainer { id: old.id.clone() }));
}

/// The count to begin with where the runtime knows nothing: after what control was told of earlier starts.
fn lost_restarts(pod: &Pod, name: &str) -> u32 {
    pod.status
        .iter()
        .flat_map(|status| &status.container_statuses)
        .find(|status| status.name == name && !status.container_id.is_empty())
        .map_or(0, |status| u32::try_from(status.restart_count).unwrap_or(0) + 1)
}

fn start(
    context: Context<'_>,
    pod: &Pod,
    container: &Container,
    sandbox_id: &str,
    restart_count: u32,
    backoff_ms: Option<u64>,
) -> StartContainer {
    let (words, refused) = match expanded(pod, container, context) {
        Ok(words) => (words, None),
        Err(too_large) => (Words::default(), Some(too_large.to_string())),
    };
    StartContainer {
        sandbox_id: sandbox_id.to_owned(),
        name: container.name.clone(),
        hostname: hostname(pod),
        restart_count,
        backoff_ms,
        image: ImageRequest {
            reference: container.image.clone(),
            policy: pull_policy(container),
        },
        command: words.command,
        args: words.args,
        working_dir: container.working_dir.clone(),
        resources: resources::limits(pod, container, context.settings.memory_capacity),
        grace_seconds: pod.spec.as_ref().map_or(0, grace),
        env: words.env,
        refused,
    }
}

/// What a container's process is given.
#[derive(Default)]
struct Words {
    command: Vec<String>,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

fn expanded(pod: &Pod, container: &Container, context: Context<'_>) -> Result<Words, environment::TooLarge> {
    let mut environment = environment::environment(pod, container, context.desired)?;
    Ok(Words {
        command: environment.words(&container.command)?,
        args: environment.words(&container.args)?,
        env: environment.into_variables(),
    })
}

fn pull_policy(container: &Container) -> PullPolicy {
    match container.image_pull_policy.as_str() {
        "Always" => PullPolicy::Always,
        "Never" => PullPolicy::Never,
        _ => PullPolicy::IfNotPresent,
    }
}

fn grace(spec: &PodSpec) -> u64 {
    u64::try_from(spec.termination_grace_period_seconds.unwrap_or(30)).unwrap_or(0)
}

/// The pod's host name: what it asks for, or its name; at most 63 characters, not ending in `-` or `.`.
fn hostname(pod: &Pod) -> String {
    let asked = pod.spec.as_ref().map_or("", |spec| spec.hostname.as_str());
    let name = if asked.is_empty() { pod.name() } else { asked };
    let cut: String = name.chars().take(63).collect();
    cut.trim_end_matches(['-', '.']).to_owned()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
