//! What may change in a pod.

use std::{collections::HashSet, net::IpAddr};

use orlop_proto::core::v1::{Pod, PodSpec, PodStatus, Toleration};

use super::{
    error::{Errors, Path},
    meta, pod, taints, topology_spread,
};

const PHASES: [&str; 5] = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];

/// The spec stays as it is, but for images and tolerations that are added.
pub(super) fn validate(errors: &mut Errors, new: &Pod, old: &Pod) {
    let path = Path::root("spec");
    let (Some(new), Some(old)) = (&new.spec, &old.spec) else {
        return errors.immutable(&path, &new.spec, &old.spec);
    };
    let containers = path.child("containers");
    if new.containers.len() != old.containers.len() {
        return errors.forbidden(&containers, "pod updates may not add or remove containers");
    }
    for (index, container) in new.containers.iter().enumerate() {
        pod::image(errors, &containers.index(index).child("image"), &container.image);
    }
    tolerations(errors, &path.child("tolerations"), new, old);
    if with_mutable_fields_of(old, new) != *new {
        let detail = "pod updates may not change fields other than `spec.containers[*].image` and `spec.tolerations` (only \
                      additions to existing tolerations)";
        errors.forbidden(&path, detail);
    }
}

fn tolerations(errors: &mut Errors, path: &Path<'_>, new: &PodSpec, old: &PodSpec) {
    taints::tolerations(errors, path, &new.tolerations);
    fn identity(one: &Toleration) -> (&str, &str, &str, &str) {
        (&one.key, &one.operator, &one.value, &one.effect)
    }
    let there: HashSet<_> = new.tolerations.iter().map(identity).collect();
    if old.tolerations.iter().any(|old| !there.contains(&identity(old))) {
        errors.forbidden(
            path,
            "existing toleration can not be modified except its tolerationSeconds",
        );
    }
}

/// `old`, with what may change taken from `new`.
fn with_mutable_fields_of(old: &PodSpec, new: &PodSpec) -> PodSpec {
    let mut mixed = PodSpec {
        tolerations: new.tolerations.clone(),
        ..old.clone()
    };
    if topology_spread::same_as_created(&new.topology_spread_constraints, &old.topology_spread_constraints) {
        mixed
            .topology_spread_constraints
            .clone_from(&new.topology_spread_constraints);
    }
    for (mixed, new) in mixed.containers.iter_mut().zip(&new.containers) {
        mixed.image.clone_from(&new.image);
    }
    mixed
}

/// What a node may say of a pod.
pub(super) fn validate_status(errors: &mut Errors, path: &Path<'_>, status: &PodStatus) {
    if !status.phase.is_empty() {
        errors.one_of(&path.child("phase"), &status.phase, &PHASES);
    }
    let conditions = path.child("conditions");
    for (index, condition) in status.conditions.iter().enumerate() {
        let path = conditions.index(index);
        meta::condition(errors, &path, &condition.r#type, &condition.status);
        errors.time(&path.child("lastProbeTime"), condition.last_probe_time.as_ref());
        errors.time(
            &path.child("lastTransitionTime"),
            condition.last_transition_time.as_ref(),
        );
    }
    errors.time(&path.child("startTime"), status.start_time.as_ref());
    address(errors, &path.child("hostIP"), &status.host_ip);
    address(errors, &path.child("podIP"), &status.pod_ip);
    let ips = path.child("podIPs");
    for (index, ip) in status.pod_ips.iter().enumerate() {
        address(errors, &ips.index(index).child("ip"), &ip.ip);
    }
    if let Some(first) = status.pod_ips.first().filter(|first| first.ip != status.pod_ip) {
        errors.invalid(&ips.index(0).child("ip"), &first.ip, "must be the same as `podIP`");
    }
    let containers = path.child("containerStatuses");
    for (index, container) in status.container_statuses.iter().enumerate() {
        let path = containers.index(index);
        if container.name.is_empty() {
            errors.required(&path.child("name"), "");
        }
        errors.not_negative(&path.child("restartCount"), container.restart_count.into());
        for (field, state) in [("state", &container.state), ("lastState", &container.last_state)] {
            let Some(state) = state else { continue };
            let path = path.child(field);
            if let Some(running) = &state.running {
                errors.time(&path.child("running").child("startedAt"), running.started_at.as_ref());
            }
            if let Some(terminated) = &state.terminated {
                let path = path.child("terminated");
                errors.time(&path.child("startedAt"), terminated.started_at.as_ref());
                errors.time(&path.child("finishedAt"), terminated.finished_at.as_ref());
            }
        }
    }
}

fn address(errors: &mut Errors, path: &Path<'_>, text: &str) {
    if !text.is_empty() && text.parse::<IpAddr>().is_err() {
        errors.invalid(
            path,
            &text,
            "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
        );
    }
}
