//! What controllers ask of a pod.

use orlop_proto::{
    Resource as _,
    core::v1::{Pod, PodCondition},
    meta::v1::OwnerReference,
};

/// The phase; empty before the first status.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().map_or("", |status| status.phase.as_str())
}

/// The node that it is bound to, or nothing.
pub fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().map_or("", |spec| spec.node_name.as_str())
}

/// Neither ended nor asked to go. A pod of a node that cannot be reached counts as inactive from its deletionTimestamp on:
/// its replacement does not wait for the node.
pub fn is_active(pod: &Pod) -> bool {
    !pod.is_deleting() && !crate::scheduler::is_terminal(pod)
}

/// A condition.
pub fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|condition| condition.r#type == kind)
}

/// Whether condition Ready is True.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// Since when condition Ready is True, in seconds since the epoch.
pub fn ready_since(pod: &Pod) -> Option<i64> {
    condition(pod, "Ready")
        .filter(|condition| condition.status == "True")
        .map(|condition| condition.last_transition_time.map_or(0, |time| time.seconds))
}

/// The owner that manages it.
pub fn controller(pod: &Pod) -> Option<&OwnerReference> {
    pod.meta()
        .owner_references
        .iter()
        .find(|owner| owner.controller == Some(true))
}
