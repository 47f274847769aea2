//! Most of many nodes fall silent at once, then all: eviction slows down, then stops, and who comes back finds its pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orlop_control::scheduler::taints::NO_EXECUTE;
use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod},
};
use orlop_simulation::{
    cluster::{Cluster, Fate},
    environment::{Chance, simulate},
    machine::start_all,
    scenarios::replica_set,
    state::{State, condition, node_name},
    wire::Weather,
};
use tokio::{
    task::LocalSet,
    time::{Instant, sleep},
};

/// More than 50: of a smaller cluster no further node would be evicted at all.
const NODES: u8 = 60;
/// More than 55 % of them.
const MOST: usize = 40;
const PODS: i32 = 120;
const SEED: u64 = 11;
const CUT: Weather = Weather {
    up_is_cut: true,
    down_is_cut: true,
};

#[test]
fn a_mass_outage_slows_eviction_down_and_stops_it() {
    simulate(SEED, || async { LocalSet::new().run_until(outage()).await });
}

fn evicting(state: &State) -> BTreeSet<String> {
    let evicts = |node: &Node| {
        let taints = node.spec.iter().flat_map(|spec| &spec.taints);
        taints.into_iter().any(|taint| taint.effect == NO_EXECUTE)
    };
    let nodes = state.all::<Node>().into_iter().filter(evicts);
    nodes.map(|node| node.name().to_owned()).collect()
}

fn silent(state: &State) -> usize {
    let nodes = state.all::<Node>();
    nodes
        .iter()
        .filter(|node| condition(node, "Ready") != Some("True"))
        .count()
}

/// Each pod's node, by uid.
fn pods(state: &State) -> BTreeMap<String, String> {
    let pods = state.all::<Pod>();
    pods.iter()
        .map(|pod| (pod.uid().to_owned(), node_name(pod).to_owned()))
        .collect()
}

/// All nodes that evicted at some time of the next ten minutes.
async fn watch_evictions(cluster: &Cluster) -> BTreeSet<String> {
    let (end, mut found) = (Instant::now() + Duration::from_secs(600), BTreeSet::new());
    while Instant::now() < end {
        found.extend(evicting(&cluster.state().await));
        sleep(Duration::from_secs(1)).await;
    }
    found
}

async fn outage() {
    let mut chance = Chance::new(SEED, 0);
    let cluster = Cluster::start(&Fate::default());
    let (_machines, weather) = start_all(NODES, &cluster, Duration::from_millis(20), &mut chance);
    let all = usize::from(NODES);
    let everybody = |state: &State| state.all::<Node>().len() == all && silent(state) == 0;
    cluster.until("all nodes are ready", everybody).await;
    cluster.create(replica_set("app", PODS)).await;
    let wanted = usize::try_from(PODS).expect("a count");
    let whole = |state: &State| state.ready("app").len() == wanted;
    let before = pods(&cluster.until("all pods are ready", whole).await);
    // Where there is no pod nobody is evicted, and nothing has to be slow.
    let homes: BTreeSet<String> = before.values().cloned().collect();

    for tell in &weather[..MOST] {
        tell.send_replace(CUT);
    }
    cluster
        .until("most nodes are silent", |state| silent(state) == MOST)
        .await;
    let mut lost = watch_evictions(&cluster).await;
    lost.retain(|node| homes.contains(node));
    // Two before it was an outage, the token of that moment, and one in each 100 s after it.
    assert!((4..=10).contains(&lost.len()), "{} nodes evict: {lost:?}", lost.len());

    for tell in &weather {
        tell.send_replace(CUT);
    }
    cluster
        .until("all nodes are silent", |state| silent(state) == all)
        .await;
    lost.extend(evicting(&cluster.state().await));
    cluster
        .until("no node evicts", |state| evicting(state).is_empty())
        .await;
    let more = watch_evictions(&cluster).await;
    lost.retain(|node| homes.contains(node));
    assert!(more.is_empty(), "{more:?} evict, and nobody can be reached");
    assert!(lost.len() <= 13, "{lost:?}");

    for tell in &weather {
        tell.send_replace(Weather::default());
    }
    cluster.until("all nodes are ready again", everybody).await;
    let after = pods(&cluster.until("all pods are ready again", whole).await);
    for (uid, node) in before.iter().filter(|(_, node)| !lost.contains(*node)) {
        assert_eq!(after.get(uid), Some(node), "a pod of {node} was evicted");
    }
}
