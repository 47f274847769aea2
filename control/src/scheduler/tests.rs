use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orlop_proto::{
    Resource as _,
    core::v1::{
        Affinity, Container, Node, NodeAffinity, NodeCondition, NodeSelectorTerm, NodeSpec, NodeStatus, Pod, PodSpec,
        PreferredSchedulingTerm, ResourceRequirements, Taint, Toleration,
    },
    meta::v1::OwnerReference,
};
use proptest::prelude::*;
use tokio::time::Instant;

use super::{taints::NO_SCHEDULE, *};

mod spread;

fn amounts(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn node(name: &str, cpu: &str, memory: &str) -> Node {
    let mut node = Node {
        spec: Some(NodeSpec::default()),
        status: Some(NodeStatus {
            allocatable: amounts(&[("cpu", cpu), ("memory", memory), ("pods", "110")]),
            conditions: vec![NodeCondition {
                r#type: "Ready".into(),
                status: "True".into(),
                ..NodeCondition::default()
            }],
            ..NodeStatus::default()
        }),
        ..Node::default()
    };
    node.meta_mut().name = name.into();
    node
}

fn pod(uid: &str, cpu: &str) -> Pod {
    let requests = if cpu.is_empty() {
        BTreeMap::new()
    } else {
        amounts(&[("cpu", cpu)])
    };
    let resources = ResourceRequirements {
        requests,
        limits: BTreeMap::new(),
    };
    let container = Container {
        name: "c".into(),
        resources: Some(resources),
        ..Container::default()
    };
    let mut pod = Pod {
        spec: Some(PodSpec {
            containers: vec![container],
            ..PodSpec::default()
        }),
        ..Pod::default()
    };
    pod.meta_mut().name = uid.into();
    pod.meta_mut().uid = uid.into();
    pod.meta_mut().namespace = "default".into();
    pod.meta_mut().owner_references = vec![OwnerReference {
        uid: "owner".into(),
        controller: Some(true),
        ..OwnerReference::default()
    }];
    pod
}

fn view(nodes: impl IntoIterator<Item = Node>) -> ClusterView {
    let mut view = ClusterView::default();
    for node in nodes {
        view.set_node(&node);
    }
    view
}

fn info(pod: Pod) -> PodInfo {
    PodInfo::new(Arc::new(pod))
}

fn decide(view: &ClusterView, pod: Pod) -> Decision {
    schedule(view, &info(pod), 0).decision
}

fn why(view: &ClusterView, pod: Pod) -> String {
    match decide(view, pod) {
        Decision::Unschedulable(diagnosis) => diagnosis.to_string(),
        Decision::Bind(node) => panic!("bound to {node}"),
    }
}

/// Schedules one after the other; returns how many each node got.
fn fill(view: &mut ClusterView, pods: impl IntoIterator<Item = Pod>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let mut start = 0;
    for pod in pods {
        let info = info(pod);
        view.keep_for(&info);
        let scheduled = schedule(view, &info, start);
        start = scheduled.next_start;
        if let Decision::Bind(node) = scheduled.decision {
            view.reserve(&info, &node);
            *counts.entry(node.to_string()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn replicas_are_spread_evenly() {
    let mut view = view(["n1", "n2", "n3"].map(|name| node(name, "4", "8Gi")));
    let counts = fill(&mut view, (0..6).map(|index| pod(&format!("p{index}"), "")));
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [2, 2, 2]);
}

#[test]
fn replicas_are_spread_over_unequal_nodes() {
    let mut view = view([node("small", "2", "4Gi"), node("large", "32", "64Gi")]);
    let counts = fill(&mut view, (0..6).map(|index| pod(&format!("p{index}"), "100m")));
    assert_eq!(counts["small"].min(counts["large"]), 3, "{counts:?}");
}

#[test]
fn says_why_in_kubernetes_words() {
    let mut tainted = node("n2", "4", "8Gi");
    tainted.spec.get_or_insert_default().taints = vec![Taint {
        key: "gpu".into(),
        value: "yes".into(),
        effect: NO_SCHEDULE.into(),
        time_added: None,
    }];
    let mut same = tainted.clone();
    same.meta_mut().name = "n3".into();
    let mut cordoned = node("n4", "4", "8Gi");
    cordoned.spec.get_or_insert_default().unschedulable = true;
    let view = view([node("n1", "1", "8Gi"), tainted, same, cordoned]);
    assert_eq!(
        why(&view, pod("p", "2")),
        "0/4 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable, 2 node(s) had untolerated taint {gpu: yes}."
    );
    assert_eq!(
        why(&ClusterView::default(), pod("p", "")),
        "no nodes available to schedule pods"
    );
    let mut picky = pod("p", "");
    picky.spec.get_or_insert_default().node_selector = amounts(&[("disk", "ssd")]);
    picky.spec.get_or_insert_default().tolerations = vec![Toleration {
        operator: "Exists".into(),
        ..Toleration::default()
    }];
    assert_eq!(
        why(&view, picky),
        "0/4 nodes are available: 4 node(s) didn't match Pod's node affinity/selector."
    );
}

#[test]
fn a_node_that_is_not_ready_gets_nothing_even_before_it_is_tainted() {
    let mut fresh = node("n1", "4", "8Gi");
    fresh.status.get_or_insert_default().conditions.clear();
    let mut lost = node("n2", "4", "8Gi");
    lost.status.get_or_insert_default().conditions[0].status = "Unknown".into();
    assert_eq!(
        why(&view([fresh, lost]), pod("p", "")),
        "0/2 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }, \
         1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }."
    );
}

#[test]
fn pods_are_counted_and_freed() {
    let mut view = view([node("n1", "1", "8Gi")]);
    let first = info(pod("a", "600m"));
    view.reserve(&first, "n1");
    assert!(matches!(decide(&view, pod("b", "600m")), Decision::Unschedulable(_)));
    assert_eq!(view.release("a").as_deref(), Some("n1"));
    assert!(matches!(decide(&view, pod("b", "600m")), Decision::Bind(_)));
    view.reserve(&first, "n1");
    let mut bound = pod("a", "600m");
    bound.spec.get_or_insert_default().node_name = "n1".into();
    assert_eq!(view.set_pod(&Arc::new(bound.clone())), None);
    assert_eq!(view.release("a"), None, "what the cache has shown is no reservation");
    bound.status.get_or_insert_default().phase = "Succeeded".into();
    assert_eq!(
        view.set_pod(&Arc::new(bound)).as_deref(),
        Some("n1"),
        "an ended pod holds nothing"
    );
    assert_eq!(view.node("n1").unwrap().requested, resources::Resources::default());
}

#[test]
fn pods_known_before_their_node_are_counted_on_it() {
    let mut view = ClusterView::default();
    let mut bound = pod("a", "600m");
    bound.spec.get_or_insert_default().node_name = "n1".into();
    view.set_pod(&Arc::new(bound));
    view.set_node(&node("n1", "1", "8Gi"));
    assert_eq!(
        why(&view, pod("b", "600m")),
        "0/1 nodes are available: 1 Insufficient cpu."
    );
}

#[test]
fn a_large_cluster_is_sampled_in_rotation() {
    let view = view((0..1000).map(|index| node(&format!("n{index}"), "4", "8Gi")));
    let start = |pod: Pod, start: usize| schedule(&view, &info(pod), start).next_start;
    assert_eq!(start(pod("p", ""), 0), 100);
    assert_eq!(start(pod("p", ""), 950), 50, "around the end");
    let mut picky = pod("p", "");
    let preferred = PreferredSchedulingTerm {
        weight: 1,
        preference: Some(NodeSelectorTerm::default()),
    };
    picky.spec.get_or_insert_default().affinity = Some(Affinity {
        node_affinity: Some(NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: vec![preferred],
            ..NodeAffinity::default()
        }),
    });
    assert_eq!(start(picky.clone(), 0), 420, "50 % less 1 % for each 125 nodes");
    assert_eq!(start(picky, 900), 320, "around the end");
}

#[test]
fn a_heartbeat_is_no_change() {
    let mut view = view([node("n1", "4", "8Gi")]);
    let mut beat = node("n1", "4", "8Gi");
    beat.status.get_or_insert_default().conditions[0].last_heartbeat_time = Some(orlop_proto::time::now());
    assert!(!view.set_node(&beat));
    beat.meta_mut().labels = amounts(&[("disk", "ssd")]);
    assert!(view.set_node(&beat));
}

proptest! {
    /// Never over capacity, nothing refused that fits, and the sums come back to nothing.
    #[test]
    fn never_over_capacity(sizes in prop::collection::vec(1i64..1500, 1..80), nodes in 1usize..8) {
        let mut view = view((0..nodes).map(|index| node(&format!("n{index}"), "4", "800Gi")));
        let mut start = 0;
        let mut placed = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let info = info(pod(&format!("p{index}"), &format!("{size}m")));
            let scheduled = schedule(&view, &info, start);
            start = scheduled.next_start;
            match scheduled.decision {
                Decision::Bind(node) => {
                    view.reserve(&info, &node);
                    placed.push(format!("p{index}"));
                }
                Decision::Unschedulable(_) => {
                    prop_assert!(view.nodes().all(|node| node.requested.milli_cpu + size > 4000));
                }
            }
            prop_assert!(view.nodes().all(|node| node.requested.milli_cpu <= 4000));
        }
        for uid in placed {
            view.release(&uid);
        }
        prop_assert!(view.nodes().all(|node| node.requested == resources::Resources::default()));
    }
}

mod queue {
    use super::*;

    fn created(uid: &str, seconds: i64) -> Arc<Pod> {
        let mut pod = pod(uid, "");
        pod.meta_mut().creation_timestamp = Some(prost_types::Timestamp { seconds, nanos: 0 });
        Arc::new(pod)
    }

    fn next(queue: &mut Queue, now: Instant) -> Option<String> {
        queue.advance(now);
        queue.pop(now).map(|info| info.pod.uid().to_owned())
    }

    #[test]
    fn first_come_first_served() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for (uid, seconds) in [("c", 7), ("a", 5), ("b", 5)] {
            queue.set(&created(uid, seconds), now);
        }
        queue.remove("b");
        assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
        assert_eq!(next(&mut queue, now).as_deref(), Some("c"));
        assert_eq!(next(&mut queue, now), None);
    }

    #[test]
    fn failures_back_off_up_to_ten_seconds() {
        let mut now = Instant::now();
        let mut queue = Queue::default();
        queue.set(&created("a", 1), now);
        for expected in [1, 2, 4, 8, 10, 10] {
            assert!(next(&mut queue, now).is_some());
            queue.failed("a", now);
            assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(expected)));
            assert_eq!(next(&mut queue, now), None);
            now += Duration::from_secs(expected);
        }
    }

    #[test]
    fn the_unschedulable_wait_for_what_can_help() {
        let start = Instant::now();
        let mut queue = Queue::default();
        queue.set(&created("a", 1), start);
        queue.set(&created("b", 2), start);
        for uid in ["a", "b"] {
            assert_eq!(next(&mut queue, start).as_deref(), Some(uid));
            queue.unschedulable(uid, start);
        }
        let later = start + Duration::from_secs(60);
        assert_eq!(next(&mut queue, later), None);
        queue.wake(later, |info| info.pod.uid() == "b");
        assert_eq!(next(&mut queue, later).as_deref(), Some("b"));
        assert_eq!(next(&mut queue, later), None);
        assert_eq!(
            next(&mut queue, start + Duration::from_secs(301)).as_deref(),
            Some("a"),
            "tried again at last"
        );
    }

    #[test]
    fn waking_respects_the_back_off() {
        let start = Instant::now();
        let mut queue = Queue::default();
        queue.set(&created("a", 1), start);
        next(&mut queue, start);
        queue.unschedulable("a", start);
        queue.wake(start, |_| true);
        assert_eq!(next(&mut queue, start), None);
        assert_eq!(next(&mut queue, start + Duration::from_secs(1)).as_deref(), Some("a"));
    }

    #[test]
    fn a_pods_own_change_wakes_it_but_its_status_does_not() {
        let start = Instant::now();
        let mut queue = Queue::default();
        queue.set(&created("a", 1), start);
        next(&mut queue, start);
        queue.unschedulable("a", start);
        let later = start + Duration::from_secs(30);
        let mut pod = Pod::clone(&created("a", 1));
        pod.status.get_or_insert_default().phase = "Pending".into();
        queue.set(&Arc::new(pod.clone()), later);
        assert_eq!(next(&mut queue, later), None);
        pod.spec.get_or_insert_default().tolerations.push(Toleration {
            operator: "Exists".into(),
            ..Toleration::default()
        });
        queue.set(&Arc::new(pod), later);
        assert_eq!(next(&mut queue, later).as_deref(), Some("a"));
    }
}
