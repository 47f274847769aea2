//! Topology spread through controllers, scheduler and store.

use orlop_proto::core::v1::TopologySpreadConstraint;

use super::{
    world::{World, labels, replica_set},
    *,
};

const ZONE: &str = "topology.kubernetes.io/zone";

async fn zoned(world: &World, name: &str, zone: &str) {
    world.node(name).await;
    let label = |node: &mut Node| {
        node.meta_mut().labels.insert(ZONE.into(), zone.into());
        true
    };
    world.registry.modify(&ObjectKey::new("", name), label).await.unwrap();
}

fn in_zone(world: &World, nodes: &[&str]) -> usize {
    let running = world.running("web");
    running
        .iter()
        .filter(|pod| nodes.contains(&pods::node_name(pod)))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zones_are_filled_evenly_and_the_rest_waits_for_one() {
    let world = World::start().await;
    for (name, zone) in [("a1", "a"), ("a2", "a"), ("b1", "b")] {
        zoned(&world, name, zone).await;
    }
    let mut set = replica_set("web", 4);
    let template = set.spec.get_or_insert_default().template.get_or_insert_default();
    template
        .metadata
        .get_or_insert_default()
        .labels
        .insert("hash".into(), "1".into());
    let constraint = TopologySpreadConstraint {
        max_skew: 1,
        topology_key: ZONE.into(),
        when_unsatisfiable: "DoNotSchedule".into(),
        label_selector: Some(orlop_proto::meta::v1::LabelSelector {
            match_labels: labels("web"),
            match_expressions: Vec::new(),
        }),
        min_domains: Some(3),
        match_label_keys: vec!["hash".into()],
        ..TopologySpreadConstraint::default()
    };
    template.spec.get_or_insert_default().topology_spread_constraints = vec![constraint];
    world.registry.create(set).await.unwrap();
    // With two of three zones each takes only what may be more than in the missing one.
    let waiting = |world: &World| -> Vec<(String, Pod)> {
        let all = world.pods();
        let unbound = all.iter().filter(|pod| pods::node_name(pod).is_empty());
        unbound
            .filter_map(|pod| {
                let condition = pods::condition(pod, "PodScheduled")?;
                (condition.reason == "Unschedulable").then(|| (condition.message.clone(), Pod::clone(pod)))
            })
            .collect()
    };
    world
        .until("one in each zone, and two wait", |world| {
            in_zone(world, &["a1", "a2"]) == 1 && in_zone(world, &["b1"]) == 1 && waiting(world).len() == 2
        })
        .await;
    let expected = "0/3 nodes are available: 3 node(s) didn't match pod topology spread constraints.";
    for (message, pod) in waiting(&world) {
        assert_eq!(message, expected);
        let kept = &pod.spec.unwrap_or_default().topology_spread_constraints[0];
        let selector = kept.label_selector.clone().unwrap_or_default();
        assert_eq!(
            selector.match_expressions[0].values,
            ["1"],
            "the label's value is written down"
        );
    }
    world
        .until("an event says so", |world| {
            let events = world.cache().reader::<Event>().snapshot();
            let mut said = events.objects.values();
            said.any(|event| event.reason == "FailedScheduling" && event.message == expected)
        })
        .await;
    zoned(&world, "c1", "c").await;
    world
        .until("the third zone lets all in", |world| {
            let zones = [
                in_zone(world, &["a1", "a2"]),
                in_zone(world, &["b1"]),
                in_zone(world, &["c1"]),
            ];
            zones.iter().sum::<usize>() == 4 && zones.iter().all(|pods| (1..=2).contains(pods))
        })
        .await;
}
