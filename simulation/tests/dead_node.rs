//! A node dies at each of many moments of its heartbeat: it is NotReady within 20 s, and its pods run elsewhere within 60 s. The times
//! are the simulation's own, and control's configuration is the default one. One that returns finds its pods ready again.

use std::time::Duration;

use orlop_control::store::{Key, Store as _};
use orlop_proto::{Resource as _, coordination::v1::Lease, core::v1::Node};
use orlop_simulation::{
    adversary::Hardness,
    cluster::{Cluster, Fate},
    environment::{Chance, simulate},
    machine::{Machine, start_all},
    scenarios::replica_set,
    state::{State, condition, node_name},
    wire::Weather,
};
use tokio::{
    sync::watch,
    task::LocalSet,
    time::{Instant, sleep},
};

/// Until control says that the node is not ready.
const NOT_READY: Duration = Duration::from_secs(20);
/// Until its pods run on the other nodes.
const ELSEWHERE: Duration = Duration::from_secs(60);
/// Between two looks; the bars hold for what a look finds.
const LOOK: Duration = Duration::from_millis(200);
/// Moments at which the node dies, and how far they are apart: together two heartbeats.
const MOMENTS: u32 = 10;
const STEP: Duration = Duration::from_secs(1);
const NODES: u8 = 4;
const PODS: i32 = 8;
const DIES: &str = "n1";
/// Clusters in which it returns, and how often.
const RETURNS: u64 = 8;
const EPISODES: u32 = 4;

/// How a node dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// Nothing passes any more, and nobody is told.
    Cut,
    /// Nothing that it says arrives.
    Mute,
    /// Its agent is gone, and its connection is reset.
    Killed,
}

#[test]
fn a_node_that_is_cut_off_is_replaced_in_time() {
    replaced_in_time(Death::Cut);
}

#[test]
fn a_node_that_is_not_heard_is_replaced_in_time() {
    replaced_in_time(Death::Mute);
}

#[test]
fn a_node_whose_agent_is_killed_is_replaced_in_time() {
    replaced_in_time(Death::Killed);
}

fn replaced_in_time(death: Death) {
    let mut latest = (Duration::ZERO, Duration::ZERO);
    for moment in 0..MOMENTS {
        let seed = u64::from(moment) + 1;
        let story = move || async move { LocalSet::new().run_until(dies(death, STEP * moment, seed)).await };
        let (silent, elsewhere) = simulate(seed, story);
        assert!(
            silent <= NOT_READY && elsewhere <= ELSEWHERE,
            "{death:?} {:?} after a heartbeat: NotReady after {silent:?}, its pods elsewhere after {elsewhere:?}",
            STEP * moment
        );
        latest = (latest.0.max(silent), latest.1.max(elsewhere));
    }
    println!(
        "{death:?}: NotReady after {:?}, its pods elsewhere after {:?}",
        latest.0, latest.1
    );
}

#[test]
fn pods_of_a_node_that_returns_are_ready_again_though_writes_fail() {
    for seed in 1..=RETURNS {
        simulate(
            seed,
            move || async move { LocalSet::new().run_until(returns(seed)).await },
        );
    }
}

/// What the node says of its pods when it returns may come before the last that is said because it was not heard of.
async fn returns(seed: u64) {
    let mut chance = Chance::new(seed, 0);
    let hardness = Hardness {
        failures: 5,
        ..Hardness::default()
    };
    let cluster = Cluster::start(&Fate {
        adversary: Some((hardness, chance.seed())),
        ..Fate::default()
    });
    let (_machines, weather) = running(&cluster, &mut chance).await;
    for _ in 0..EPISODES {
        weather[0].send_replace(Weather {
            up_is_cut: true,
            down_is_cut: true,
        });
        let on_it = |state: &State| state.ready("app").iter().any(|pod| node_name(pod) == DIES);
        cluster.until("none of its pods is ready", |state| !on_it(state)).await;
        weather[0].send_replace(Weather::default());
        cluster
            .until("all are again", |state| nodes_are_ready(state) && all_run(state))
            .await;
    }
}

fn is_ready(node: &Node) -> bool {
    condition(node, "Ready") == Some("True")
}

fn nodes_are_ready(state: &State) -> bool {
    let nodes = state.all::<Node>();
    nodes.len() == usize::from(NODES) && nodes.iter().all(is_ready)
}

fn all_run(state: &State) -> bool {
    i32::try_from(state.ready("app").len()) == Ok(PODS)
}

/// The machines, with all pods ready on them.
async fn running(cluster: &Cluster, chance: &mut Chance) -> (Vec<Machine>, Vec<watch::Sender<Weather>>) {
    let machines = start_all(NODES, cluster, Duration::from_millis(50), chance);
    cluster.until("all nodes are ready", nodes_are_ready).await;
    cluster.create(replica_set("app", PODS)).await;
    let state = cluster.until("all pods are ready", all_run).await;
    let here = state.ready("app").iter().filter(|pod| node_name(pod) == DIES).count();
    assert!(here > 0, "no pod is on {DIES}");
    machines
}

/// Both times, from its death on.
async fn dies(death: Death, offset: Duration, seed: u64) -> (Duration, Duration) {
    let mut chance = Chance::new(seed, 0);
    let cluster = Cluster::start(&Fate::default());
    let (mut machines, weather) = running(&cluster, &mut chance).await;

    heartbeat(&cluster).await;
    sleep(offset).await;
    let dead = Instant::now();
    die(death, &mut machines[0], &weather[0]);
    let silent = until(&cluster, dead, |state| {
        state.get::<Node>(DIES).is_some_and(|node| !is_ready(&node))
    });
    let silent = silent.await;
    let elsewhere = until(&cluster, dead, |state| {
        let ready = state.ready("app");
        let runs: usize = machines[1..].iter().map(|machine| machine.runtime.containers()).sum();
        all_run(state) && ready.iter().all(|pod| node_name(pod) != DIES) && i32::try_from(runs) == Ok(PODS)
    });
    (silent, elsewhere.await)
}

fn die(death: Death, machine: &mut Machine, weather: &watch::Sender<Weather>) {
    match death {
        Death::Cut | Death::Mute => {
            weather.send_replace(Weather {
                up_is_cut: true,
                down_is_cut: matches!(death, Death::Cut),
            });
        }
        Death::Killed => machine.kill(),
    }
}

/// Returns when control has written that it heard of the node.
async fn heartbeat(cluster: &Cluster) {
    let key = Key::object(&Lease::KIND, "kube-node-lease", DIES);
    let written = async || {
        let record = cluster.data.get(&key).await.expect("the data are there");
        record.map(|record| record.revision)
    };
    let before = written().await;
    while written().await == before {
        sleep(Duration::from_millis(10)).await;
    }
}

/// How long after `since` it is so; what is twice above the bar is waited for no longer.
async fn until(cluster: &Cluster, since: Instant, holds: impl Fn(&State) -> bool) -> Duration {
    while !holds(&cluster.state().await) && since.elapsed() < 2 * ELSEWHERE {
        sleep(LOOK).await;
    }
    since.elapsed()
}
