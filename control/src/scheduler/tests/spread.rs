//! Topology spread.

mod oracle;

use std::collections::{BTreeMap, BTreeSet};

use orlop_proto::{
    core::v1::TopologySpreadConstraint,
    meta::v1::{LabelSelector, LabelSelectorRequirement},
};

use super::{
    super::{
        spread::{Limits, Spread, SpreadMisfit, scores},
        taints::UNSCHEDULABLE,
    },
    *,
};
use crate::model::selector::Selector;

const ZONE: &str = "topology.kubernetes.io/zone";
const HOST: &str = "kubernetes.io/hostname";

fn zoned(name: &str, zone: &str) -> Node {
    let mut node = node(name, "64", "64Gi");
    node.meta_mut().labels = amounts(&[(ZONE, zone), (HOST, name)]);
    node
}

fn constraint(key: &str, action: &str) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.into(),
        when_unsatisfiable: action.into(),
        label_selector: Some(LabelSelector {
            match_labels: amounts(&[("app", "web")]),
            match_expressions: Vec::new(),
        }),
        ..TopologySpreadConstraint::default()
    }
}

fn labelled(uid: &str, labels: &[(&str, &str)], constraints: &[TopologySpreadConstraint]) -> Pod {
    let mut pod = pod(uid, "");
    pod.meta_mut().labels = amounts(labels);
    pod.spec.get_or_insert_default().topology_spread_constraints = constraints.to_vec();
    pod
}

fn web(uid: &str, constraints: &[TopologySpreadConstraint]) -> Pod {
    labelled(uid, &[("app", "web")], constraints)
}

fn bound(mut pod: Pod, node: &str) -> Arc<Pod> {
    pod.spec.get_or_insert_default().node_name = node.into();
    Arc::new(pod)
}

#[test]
fn zones_get_as_many_and_the_rest_waits() {
    let nodes = [("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c")];
    let mut view = view(nodes.map(|(name, zone)| zoned(name, zone)));
    let hard = constraint(ZONE, "DoNotSchedule");
    let counts = fill(
        &mut view,
        (0..9).map(|index| web(&format!("p{index}"), std::slice::from_ref(&hard))),
    );
    let zone = |names: &[&str]| names.iter().filter_map(|name| counts.get(*name)).sum::<usize>();
    assert_eq!([zone(&["a1", "a2"]), zone(&["b1"]), zone(&["c1"])], [3, 3, 3]);
    let mut full = zoned("c1", "c");
    full.spec.get_or_insert_default().unschedulable = true;
    view.set_node(&full);
    view.set_node(&node("bare", "64", "64Gi"));
    for uid in ["q1", "q2"] {
        let pod = info(web(uid, std::slice::from_ref(&hard)));
        let Decision::Bind(node) = schedule(&view, &pod, 0).decision else {
            panic!("{uid} fits")
        };
        view.reserve(&pod, &node);
    }
    assert_eq!(
        why(&view, web("q3", std::slice::from_ref(&hard))),
        "0/5 nodes are available: 1 node(s) didn't match pod topology spread constraints (missing required label), \
         1 node(s) were unschedulable, 3 node(s) didn't match pod topology spread constraints."
    );
}

#[test]
fn too_few_domains_take_only_the_skew() {
    let mut view = view([zoned("a1", "a"), zoned("b1", "b")]);
    let hard = TopologySpreadConstraint {
        max_skew: 2,
        min_domains: Some(3),
        ..constraint(ZONE, "DoNotSchedule")
    };
    let counts = fill(
        &mut view,
        (0..9).map(|index| web(&format!("p{index}"), std::slice::from_ref(&hard))),
    );
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn what_is_preferred_is_no_condition() {
    let mut view = view([zoned("a1", "a"), zoned("b1", "b"), node("bare", "64", "64Gi")]);
    let soft = constraint(ZONE, "ScheduleAnyway");
    for index in 0..4 {
        view.set_pod(&bound(web(&format!("a{index}"), &[]), "a1"));
    }
    let counts = fill(
        &mut view,
        (0..4).map(|index| web(&format!("p{index}"), std::slice::from_ref(&soft))),
    );
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), [("b1".to_owned(), 4)]);
}

#[test]
fn without_constraints_a_group_is_spread_over_zones_too() {
    let nodes = (0..8).map(|index| zoned(&format!("n{index}"), if index < 6 { "a" } else { "b" }));
    let mut view = view(nodes);
    let counts = fill(&mut view, (0..4).map(|index| web(&format!("p{index}"), &[])));
    let in_b: usize = ["n6", "n7"].iter().filter_map(|name| counts.get(*name)).sum();
    assert_eq!(in_b, 2, "{counts:?}");
}

#[test]
fn zones_that_follow_each_other_are_all_seen_in_a_large_cluster() {
    let zones = ["a", "b", "c"];
    let nodes = (0..3000).map(|index| zoned(&format!("n{index}"), zones[index / 1000]));
    let mut view = view(nodes);
    let counts = fill(&mut view, (0..30).map(|index| web(&format!("p{index}"), &[])));
    let mut by_zone = [0; 3];
    for (name, count) in counts {
        by_zone[name[1..].parse::<usize>().unwrap() / 1000] += count;
    }
    assert_eq!(by_zone, [10, 10, 10]);
}

#[test]
fn selections_that_are_forgotten_are_counted_anew() {
    let mut view = view([zoned("a1", "a"), zoned("b1", "b")]);
    let with = |index: usize| {
        let app = format!("app{index}");
        let hard = TopologySpreadConstraint {
            label_selector: Some(LabelSelector {
                match_labels: amounts(&[("app", &app)]),
                match_expressions: Vec::new(),
            }),
            ..constraint(ZONE, "DoNotSchedule")
        };
        labelled(&format!("p{index}"), &[("app", &app)], &[hard])
    };
    for index in 0..2000 {
        let one = info(with(index));
        view.keep_for(&one);
        view.reserve(&one, "a1");
    }
    for index in 0..2000 {
        let mut another = with(index);
        another.meta_mut().uid = "q".into();
        assert_eq!(decide(&view, another), Decision::Bind("b1".into()), "{index}");
    }
}

#[test]
fn pods_that_each_name_other_nodes_are_counted_with_bounded_memory() {
    let mut view = view([zoned("a1", "a"), zoned("b1", "b")]);
    for index in 0..2000 {
        let mut one = web(&format!("p{index}"), &[constraint(ZONE, "DoNotSchedule")]);
        // Its nodes are those of this one's alone, and count as such (nodeAffinityPolicy: Honor).
        one.spec.get_or_insert_default().node_selector = amounts(&[(HOST, &format!("n{index}"))]);
        view.keep_for(&info(one));
        let (sets, tallies) = view.counts_kept();
        assert!(sets <= 128 && tallies <= 128, "{index}: {sets} sets, {tallies} tallies");
    }
    let hard = constraint(ZONE, "DoNotSchedule");
    view.reserve(&info(web("q", std::slice::from_ref(&hard))), "a1");
    assert_eq!(decide(&view, web("r", &[hard])), Decision::Bind("b1".into()));
}
