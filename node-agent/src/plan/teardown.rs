//! Pods that are to go: asked to end, killed after their grace, removed.

use std::time::Duration;

use orlop_proto::core::v1::Pod;

use super::{Action, Context, PodPlan, Subject, UNWANTED_GRACE, after, pod_id, retry_at};
use crate::runtime::{ObservedContainer, ObservedPod, ProcessState};

/// Kubernetes' default.
const DEFAULT_GRACE_SECONDS: i64 = 30;
/// A killed container that is still there is killed again after this time.
const KILL_AGAIN: Duration = Duration::from_secs(5);
/// A container whose runtime does not answer is removed by force this long after it was killed.
const GIVE_UP: Duration = Duration::from_secs(10);

/// A pod whose deletion was asked for; `gone` when nothing is left.
pub fn plan_deleted(context: Context<'_>, pod: &Pod, found: Option<&ObservedPod>) -> PodPlan {
    let mut plan = PodPlan::new(pod_id(pod));
    let deletion = pod
        .metadata
        .as_ref()
        .and_then(|meta| meta.deletion_grace_period_seconds);
    let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let grace = deletion.or(own).unwrap_or(DEFAULT_GRACE_SECONDS);
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    match found {
        Some(found) => take_down(context, &mut plan, found, |_| grace),
        None => plan.gone = true,
    }
    plan
}

/// A pod that control does not name.
pub fn plan_unwanted(context: Context<'_>, found: &ObservedPod) -> PodPlan {
    let mut plan = PodPlan::new(found.id.clone());
    let grace = |container: &ObservedContainer| Duration::from_secs(container.grace_seconds).min(UNWANTED_GRACE);
    take_down(context, &mut plan, found, grace);
    plan
}

fn take_down(
    context: Context<'_>,
    plan: &mut PodPlan,
    found: &ObservedPod,
    grace: impl Fn(&ObservedContainer) -> Duration,
) {
    if let Some(at) = retry_at(context, &found.id.uid, &Subject::Removal)
        && at > context.now
    {
        plan.wake(at);
        return;
    }
    let mut running = false;
    for container in &found.containers {
        running |= stop(context, plan, container, grace(container));
    }
    if running {
        return;
    }
    plan.actions
        .extend(found.containers.iter().map(|container| Action::RemoveContainer {
            id: container.id.clone(),
        }));
    plan.actions.extend(
        found
            .sandboxes
            .iter()
            .map(|sandbox| Action::RemoveSandbox { id: sandbox.id.clone() }),
    );
    plan.actions.extend(orphan_networks(found));
    plan.actions.push(Action::RemovePod);
}

/// The next step towards a container's end; whether it still runs.
pub fn stop(context: Context<'_>, plan: &mut PodPlan, container: &ObservedContainer, grace: Duration) -> bool {
    if !matches!(container.state, ProcessState::Running { .. } | ProcessState::Unknown) {
        return false;
    }
    let id = container.id.clone();
    let Some(stop) = context.progress.stops.get(&id) else {
        plan.actions.push(if grace.is_zero() {
            Action::Kill { id }
        } else {
            Action::Terminate { id }
        });
        return true;
    };
    let due = match stop.killed_at {
        None => after(stop.asked_at, grace),
        Some(killed_at) if container.state == ProcessState::Unknown && after(killed_at, GIVE_UP) <= context.now => {
            return false;
        }
        Some(killed_at) => after(killed_at, KILL_AGAIN),
    };
    if due <= context.now {
        plan.actions.push(Action::Kill { id });
    } else {
        plan.wake(due);
    }
    true
}

/// Networks of sandboxes that have no pause container.
pub fn orphan_networks(found: &ObservedPod) -> impl Iterator<Item = Action> {
    found
        .networks
        .iter()
        .filter(|id| found.sandboxes.iter().all(|sandbox| sandbox.id != **id))
        .map(|id| Action::RemoveNetwork { id: id.clone() })
}
