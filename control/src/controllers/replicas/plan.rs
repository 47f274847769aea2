//! What an owner's pods and status should become. Pure.

use std::{
    cmp::{Ordering, Reverse},
    collections::HashMap,
    sync::Arc,
    time::Duration,
};

use orlop_proto::{
    Resource as _,
    core::v1::Pod,
    meta::v1::{ObjectMeta, OwnerReference},
};

use super::owner::{ReplicaOwner, ReplicaStatus};
use crate::controllers::pods;

/// Pods that are created or deleted in one look at most (Kubernetes' figure).
pub const BURST: usize = 500;

/// Which pods go first, when there are too many.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What is to be written.
#[derive(Debug, Default)]
pub struct Plan {
    /// Orphans to take.
    pub adopt: Vec<Arc<Pod>>,
    /// Own pods that are no longer selected.
    pub release: Vec<Arc<Pod>>,
    /// How many pods to create.
    pub create: usize,
    /// Pods to delete, in this order.
    pub delete: Vec<Arc<Pod>>,
    /// The status as it should be; its failure is the caller's to set.
    pub status: ReplicaStatus,
    /// When a ready pod becomes available by mere waiting.
    pub look_again: Option<Duration>,
}

/// Compares an owner with the pods that concern it; others of its namespace do no harm. `now` in seconds since the epoch.
pub fn plan<'a, O: ReplicaOwner>(
    owner: &O,
    candidates: impl Iterator<Item = &'a Arc<Pod>>,
    now: i64,
) -> Result<Plan, String> {
    let selector = owner.selector()?;
    let mut plan = Plan::default();
    let mut active: Vec<Arc<Pod>> = Vec::new();
    for pod in candidates {
        let selected = selector.matches(&pod.meta().labels);
        match pods::controller(pod) {
            Some(reference) if reference.uid == owner.uid() => {
                if selected {
                    active.extend(pods::is_active(pod).then(|| pod.clone()));
                } else if !owner.is_deleting() && !pod.is_deleting() {
                    plan.release.push(pod.clone());
                }
            }
            Some(_) => {}
            None if selected && pods::is_active(pod) && !owner.is_deleting() => {
                active.push(pod.clone());
                plan.adopt.push(pod.clone());
            }
            None => {}
        }
    }
    if !owner.is_deleting() {
        let wanted = usize::try_from(owner.replicas()).unwrap_or(0);
        match active.len().cmp(&wanted) {
            Ordering::Less => plan.create = (wanted - active.len()).min(BURST),
            Ordering::Greater => plan.delete = victims(&active, (active.len() - wanted).min(BURST)),
            Ordering::Equal => {}
        }
    }
    plan.status = status(owner, &active, now, &mut plan.look_again);
    Ok(plan)
}

fn status<O: ReplicaOwner>(
    owner: &O,
    active: &[Arc<Pod>],
    now: i64,
    look_again: &mut Option<Duration>,
) -> ReplicaStatus {
    let mut status = ReplicaStatus {
        observed_generation: owner.meta().generation,
        failure: owner.status().failure,
        ..ReplicaStatus::default()
    };
    let template_labels = owner
        .template()
        .and_then(|template| template.metadata.as_ref())
        .map(|meta| &meta.labels);
    for pod in active {
        status.replicas += 1;
        let labels = &pod.meta().labels;
        if template_labels.is_none_or(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value))) {
            status.fully_labeled += 1;
        }
        let Some(since) = pods::ready_since(pod) else { continue };
        status.ready += 1;
        let remaining = since + i64::from(owner.min_ready_seconds()) - now;
        if owner.min_ready_seconds() == 0 || remaining <= 0 {
            status.available += 1;
        } else {
            let wait = Duration::from_secs(u64::try_from(remaining).unwrap_or(1));
            *look_again = Some(look_again.map_or(wait, |earlier| earlier.min(wait)));
        }
    }
    status
}

/// The pods to delete, in Kubernetes' order: unassigned, pending, not ready, cheapest, most doubled up on their node, ready for
/// the shortest time, most restarted, newest.
fn victims(active: &[Arc<Pod>], count: usize) -> Vec<Arc<Pod>> {
    let mut on_node: HashMap<&str, usize> = HashMap::new();
    for pod in active {
        *on_node.entry(pods::node_name(pod)).or_default() += 1;
    }
    let mut ranked: Vec<&Arc<Pod>> = active.iter().collect();
    ranked.sort_by_cached_key(|pod| {
        let node = pods::node_name(pod);
        let phase = match pods::phase(pod) {
            "Running" => 2,
            "Unknown" => 1,
            _ => 0,
        };
        let cost: i32 = pod
            .meta()
            .annotations
            .get(DELETION_COST)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let created = pod.meta().creation_timestamp.map_or(0, |time| time.seconds);
        (
            (!node.is_empty(), phase, pods::is_ready(pod), cost),
            Reverse(on_node.get(node).copied().unwrap_or(0)),
            Reverse(pods::ready_since(pod)),
            Reverse(restarts(pod)),
            Reverse(created),
            pod.name().to_owned(),
        )
    });
    ranked.into_iter().take(count).cloned().collect()
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().flat_map(|status| &status.container_statuses);
    statuses.map(|status| status.restart_count).max().unwrap_or(0)
}

/// A new pod of an owner, from its template.
pub fn new_pod<O: ReplicaOwner>(owner: &O) -> Result<Pod, String> {
    let template = owner.template().ok_or("spec.template is missing")?;
    let meta = template.metadata.clone().unwrap_or_default();
    Ok(Pod {
        metadata: Some(ObjectMeta {
            generate_name: format!("{}-", owner.name()),
            namespace: owner.namespace().to_owned(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: vec![reference(owner)],
            ..ObjectMeta::default()
        }),
        spec: template.spec.clone(),
        ..Pod::default()
    })
}

/// The reference of a pod to its owner.
pub fn reference<O: ReplicaOwner>(owner: &O) -> OwnerReference {
    OwnerReference {
        api_version: O::KIND.api_version.to_owned(),
        kind: O::KIND.kind.to_owned(),
        name: owner.name().to_owned(),
        uid: owner.uid().to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::{
        apps::v1::{ReplicaSet, ReplicaSetSpec},
        core::v1::{PodCondition, PodSpec, PodStatus, PodTemplateSpec},
        meta::v1::LabelSelector,
    };

    fn owner(replicas: i32) -> ReplicaSet {
        let labels = [("app".to_owned(), "web".to_owned())]
            .into_iter()
            .collect::<std::collections::BTreeMap<_, _>>();
        ReplicaSet {
            metadata: Some(ObjectMeta {
                name: "web".into(),
                namespace: "default".into(),
                uid: "owner".into(),
                generation: 3,
                ..ObjectMeta::default()
            }),
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                selector: Some(LabelSelector {
                    match_labels: labels.clone(),
                    match_expressions: Vec::new(),
                }),
                template: Some(PodTemplateSpec {
                    metadata: Some(ObjectMeta {
                        labels,
                        ..ObjectMeta::default()
                    }),
                    spec: Some(PodSpec::default()),
                }),
                ..ReplicaSetSpec::default()
            }),
            ..ReplicaSet::default()
        }
    }

    fn pod(name: &str, change: impl FnOnce(&mut Pod)) -> Arc<Pod> {
        let mut pod = new_pod(&owner(1)).unwrap();
        pod.meta_mut().name = name.into();
        pod.meta_mut().uid = name.into();
        pod.spec.get_or_insert_default().node_name = format!("node-of-{name}");
        pod.status = Some(PodStatus {
            phase: "Running".into(),
            ..PodStatus::default()
        });
        ready(&mut pod, 100);
        change(&mut pod);
        Arc::new(pod)
    }

    fn ready(pod: &mut Pod, since: i64) {
        pod.status.get_or_insert_default().conditions = vec![PodCondition {
            r#type: "Ready".into(),
            status: "True".into(),
            last_transition_time: Some(prost_types::Timestamp {
                seconds: since,
                nanos: 0,
            }),
            ..PodCondition::default()
        }];
    }

    fn unready(pod: &mut Pod) {
        pod.status.get_or_insert_default().conditions.clear();
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().map(|pod| pod.name()).collect()
    }

    #[test]
    fn creates_what_is_missing_and_counts() {
        let pods = [pod("a", |_| {}), pod("b", unready)];
        let plan = plan(&owner(5), pods.iter(), 200).unwrap();
        assert_eq!(plan.create, 3);
        assert!(plan.delete.is_empty() && plan.adopt.is_empty() && plan.release.is_empty());
        let expected = ReplicaStatus {
            replicas: 2,
            fully_labeled: 2,
            ready: 1,
            available: 1,
            observed_generation: 3,
            failure: None,
        };
        assert_eq!(plan.status, expected);
    }

    #[test]
    fn ended_and_leaving_pods_are_replaced() {
        let pods = [
            pod("failed", |pod| {
                pod.status.get_or_insert_default().phase = "Failed".into();
            }),
            pod("leaving", |pod| {
                pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
            }),
            pod("fine", |_| {}),
        ];
        let plan = plan(&owner(3), pods.iter(), 200).unwrap();
        assert_eq!((plan.create, plan.status.replicas), (2, 1));
    }

    #[test]
    fn adopts_orphans_and_releases_what_is_relabelled() {
        let pods = [
            pod("orphan", |pod| pod.meta_mut().owner_references.clear()),
            pod("relabelled", |pod| {
                pod.meta_mut().labels.insert("app".into(), "other".into());
            }),
            pod("foreign", |pod| {
                pod.meta_mut().owner_references[0].uid = "someone".into();
            }),
            pod("stranger", |pod| {
                pod.meta_mut().owner_references.clear();
                pod.meta_mut().labels.clear();
            }),
        ];
        let plan = plan(&owner(1), pods.iter(), 200).unwrap();
        assert_eq!(names(&plan.adopt), ["orphan"]);
        assert_eq!(names(&plan.release), ["relabelled"]);
        assert_eq!((plan.create, plan.delete.len()), (0, 0));
    }

    #[test]
    fn an_owner_that_is_deleted_does_nothing() {
        let mut owner = owner(5);
        owner.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
        let pods = [
            pod("orphan", |pod| pod.meta_mut().owner_references.clear()),
            pod("a", |_| {}),
        ];
        let plan = plan(&owner, pods.iter(), 200).unwrap();
        assert!(plan.create == 0 && plan.adopt.is_empty() && plan.delete.is_empty() && plan.release.is_empty());
    }

    #[test]
    fn victims_go_in_order() {
        let pods = [
            pod("old", |pod| ready(pod, 10)),
            pod("young", |pod| ready(pod, 90)),
            pod("twin-1", |pod| {
                pod.spec.get_or_insert_default().node_name = "twins".into();
            }),
            pod("twin-2", |pod| {
                pod.spec.get_or_insert_default().node_name = "twins".into();
            }),
            pod("cheap", |pod| {
                pod.meta_mut().annotations.insert(DELETION_COST.into(), "-5".into());
            }),
            pod("unready", unready),
            pod("pending", |pod| {
                unready(pod);
                pod.status.get_or_insert_default().phase = "Pending".into();
            }),
            pod("unassigned", |pod| {
                unready(pod);
                pod.status.get_or_insert_default().phase = "Pending".into();
                pod.spec.get_or_insert_default().node_name.clear();
            }),
        ];
        let plan = plan(&owner(0), pods.iter(), 200).unwrap();
        assert_eq!(
            names(&plan.delete),
            [
                "unassigned",
                "pending",
                "unready",
                "cheap",
                "twin-1",
                "twin-2",
                "young",
                "old"
            ]
        );
    }

    #[test]
    fn available_after_min_ready_seconds() {
        let mut owner = owner(2);
        owner.spec.get_or_insert_default().min_ready_seconds = 30;
        let pods = [pod("a", |pod| ready(pod, 100)), pod("b", |pod| ready(pod, 115))];
        let plan = plan(&owner, pods.iter(), 131).unwrap();
        assert_eq!((plan.status.ready, plan.status.available), (2, 1));
        assert_eq!(plan.look_again, Some(Duration::from_secs(14)));
    }

    #[test]
    fn a_look_is_bounded() {
        assert_eq!(plan(&owner(100_000), [].iter(), 0).unwrap().create, BURST);
    }
}
