//! Three control replicas over etcd: any of them serves, one leads, and losing the leader costs seconds and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{
    Resource,
    coordination::v1::Lease,
    core::v1::{Event, Node, Pod},
    discovery::v1::EndpointSlice,
};
use orlop_tests::{
    client::Client,
    lab::{Lab, Options, output},
    layout::{API_PORT, StoreEngine, control_address, control_name},
    supervisor::Request,
    workload::web,
};

const SIGKILL: i32 = 9;
const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;
/// For a machine that is much slower than it should be.
const LONG: Duration = Duration::from_secs(120);

/// The replica that leads, by what a client of another one reads.
fn leader(client: &Client) -> Result<Option<String>> {
    let lease: Option<Lease> = client.get("kube-system", "orlop-control")?;
    let holder = lease.and_then(|lease| lease.spec).map(|spec| spec.holder_identity);
    let host = holder
        .as_deref()
        .and_then(|holder| holder.split_once('_'))
        .map(|(host, _)| host.to_owned());
    Ok(host.filter(|host| !host.is_empty()))
}

fn wait_for_leader(lab: &Lab, client: &Client, before: Option<&str>) -> Result<String> {
    lab.wait("another replica leads", LONG, || {
        Ok(leader(client)?.filter(|leader| Some(leader.as_str()) != before))
    })
}

fn clients(lab: &Lab) -> Result<BTreeMap<String, Client>> {
    let names = (1..=3).map(control_name);
    names
        .map(|name| Ok((name.clone(), Client::connect_to(&lab.members, &name)?)))
        .collect()
}

/// Waits, at one replica, until the web servers of a set run.
fn wait_for_web(lab: &Lab, client: &Client, name: &str, count: usize) -> Result<Vec<Pod>> {
    lab.wait(&format!("{count} pods of {name} are ready"), LONG, || {
        let pods: Vec<Pod> = client.list("default", &format!("app={name}"))?;
        let ready = pods.len() == count && pods.iter().all(orlop_tests::lab::pod_is_ready);
        Ok(ready.then_some(pods))
    })
}

/// The addresses behind `default/kubernetes`.
fn endpoints(client: &Client) -> Result<BTreeSet<String>> {
    let slices: Vec<EndpointSlice> = client.list("default", "kubernetes.io/service-name=kubernetes")?;
    let endpoints = slices.into_iter().flat_map(|slice| slice.endpoints);
    Ok(endpoints.flat_map(|endpoint| endpoint.addresses).collect())
}

fn addresses(replicas: impl Iterator<Item = u16>) -> BTreeSet<String> {
    replicas.map(|index| control_address(index).to_string()).collect()
}

fn containers(pods: &[Pod]) -> BTreeSet<String> {
    let statuses = pods.iter().filter_map(|pod| pod.status.as_ref());
    let containers = statuses.flat_map(|status| &status.container_statuses);
    containers
        .map(|container| format!("{} {}", container.container_id, container.restart_count))
        .collect()
}

#[test]
fn replicas_share_the_work_and_outlive_their_leader() -> Result<()> {
    let options = Options {
        nodes: 2,
        store: StoreEngine::Etcd,
        controls: 3,
        ..Options::default()
    };
    let lab = Lab::start("replicas", &options)?;
    let clients = clients(&lab)?;
    let begun = clients["control"].revision()?;
    let first = wait_for_leader(&lab, &clients["control"], None)?;

    // A write at each, seen at each.
    for (index, client) in clients.values().enumerate() {
        client.apply(&web(&format!("web{index}"), 2))?;
    }
    for client in clients.values() {
        for index in 0..3 {
            wait_for_web(&lab, client, &format!("web{index}"), 2)?;
        }
    }
    let before = containers(&clients["control"].list::<Pod>("default", "")?);
    ensure!(before.len() == 6, "six containers: {before:?}");
    every_replica_knows_all(&lab, &clients)?;

    // The leader is killed and stays dead: another goes on.
    lab.request(&Request::Signal(format!("{first}/control"), SIGKILL))?;
    lab.request(&Request::Stop(format!("{first}/control")))?;
    let others: Vec<&Client> = clients
        .iter()
        .filter(|(name, _)| **name != first)
        .map(|(_, client)| client)
        .collect();
    let second = wait_for_leader(&lab, others[0], Some(&first))?;
    others[0].apply(&web("web0", 4))?;
    wait_for_web(&lab, others[1], "web0", 4)?;
    let living = (1..=3).filter(|index| control_name(*index) != first);
    let living = addresses(living);
    lab.wait("default/kubernetes drops the dead replica", LONG, || {
        Ok((endpoints(others[0])? == living).then_some(()))
    })?;
    lab.request(&Request::Start(format!("{first}/control")))?;
    let returned = lab.wait("the first replica serves again", LONG, || {
        let client = Client::connect_to(&lab.members, &first)?;
        client.ready()?;
        Ok(Some(client))
    })?;

    // The leader stays. What befalls one that hangs is in the campaigns of faults.
    returned.apply(&web("web1", 6))?;
    wait_for_web(&lab, &returned, "web1", 6)?;
    ensure!(
        leader(&returned)?.as_deref() == Some(second.as_str()),
        "{second} no longer leads"
    );

    nothing_happened_twice(&lab, &returned, begun)?;
    let now = containers(&returned.list::<Pod>("default", "")?);
    ensure!(
        before.is_subset(&now),
        "a container was restarted: {before:?}, now {now:?}"
    );
    every_replica_knows_all(&lab, &self::clients(&lab)?)?;
    a_node_turns_away_from_a_replica_that_hangs(&lab, &second)?;
    lab.finish()
}

/// A replica stops in the middle of things, with a node on it: the node goes to another one before it counts as lost.
fn a_node_turns_away_from_a_replica_that_hangs(lab: &Lab, leader: &str) -> Result<()> {
    let client = Client::connect_to(&lab.members, leader)?;
    let follower = a_follower_with(lab, "node1", leader)?;
    let before = ready(&client, "node1")?;
    let renewed = || -> Result<Option<Duration>> {
        let lease: Option<Lease> = client.get("kube-node-lease", "node1")?;
        let renewed = lease.and_then(|lease| lease.spec).and_then(|spec| spec.renew_time);
        let renewed = renewed.context("the node has a lease")?;
        let renewed = UNIX_EPOCH + Duration::from_secs(renewed.seconds.unsigned_abs());
        Ok(renewed.elapsed().ok())
    };
    // Its next renewal is some seconds off, and so is the time from which on it would be missed.
    lab.wait("the node's lease is not fresh", LONG, || {
        let middle = Duration::from_secs(4)..Duration::from_secs(6);
        Ok(renewed()?.filter(|age| middle.contains(age)).map(drop))
    })?;
    let stopped = Instant::now();
    lab.request(&Request::Signal(format!("{follower}/control"), SIGSTOP))?;
    let other = lab.wait("the node is at another replica", LONG, || {
        Ok(replica_of(lab, "node1")?.filter(|replica| *replica != follower))
    })?;
    lab.wait("its lease is renewed there", LONG, || {
        Ok(renewed()?.filter(|age| *age < stopped.elapsed()).map(drop))
    })?;
    let after = ready(&client, "node1")?;
    ensure!(
        before == after,
        "at {other} now, but Ready was {before:?} and is {after:?}"
    );
    let events: Vec<Event> = client.list("", "")?;
    let lost = |event: &Event| {
        let about = event
            .involved_object
            .as_ref()
            .is_some_and(|about| about.name == "node1");
        about && event.reason == "NodeNotReady"
    };
    ensure!(!events.iter().any(lost), "the node was given up: {events:?}");
    lab.request(&Request::Signal(format!("{follower}/control"), SIGCONT))
}

/// Restarts a node's agent until it is at a replica that does not lead.
fn a_follower_with(lab: &Lab, node: &str, leader: &str) -> Result<String> {
    let agent = format!("{node}/agent");
    for _ in 0..30 {
        let replica = lab.wait("the agent is connected", LONG, || replica_of(lab, node))?;
        if replica != leader {
            return Ok(replica);
        }
        lab.request(&Request::Stop(agent.clone()))?;
        lab.request(&Request::Start(agent.clone()))?;
    }
    bail!("{node} always goes to {leader}")
}

/// The replica that a node's agent is connected to.
fn replica_of(lab: &Lab, node: &str) -> Result<Option<String>> {
    let established = ["ss", "-tnH", "state", "established", "( dport = :6443 )"];
    let text = output(lab.on_node(node, &established)?)?;
    let at = |index: &u16| {
        let peer = format!("{}:{API_PORT}", control_address(*index));
        text.split_whitespace().any(|word| word == peer)
    };
    Ok((1..=3).find(at).map(control_name))
}

/// The status of a node's Ready condition, and since when it has it.
fn ready(client: &Client, name: &str) -> Result<(String, Option<i64>)> {
    let node: Node = client.get("", name)?.context("a node")?;
    let conditions = node.status.map(|status| status.conditions).unwrap_or_default();
    let ready = conditions.into_iter().find(|condition| condition.r#type == "Ready");
    let ready = ready.context("a Ready condition")?;
    Ok((ready.status, ready.last_transition_time.map(|time| time.seconds)))
}

/// Endpoints, nodes and metrics are the same wherever one asks.
fn every_replica_knows_all(lab: &Lab, clients: &BTreeMap<String, Client>) -> Result<()> {
    for (name, client) in clients {
        lab.wait(
            &format!("{name} knows all replicas, and what all nodes measure"),
            LONG,
            || {
                let nodes = client.node_metrics()?;
                let names: BTreeSet<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
                let all = endpoints(client)? == addresses(1..=3) && nodes.len() == 2 && names.len() == 2;
                Ok(all.then_some(()))
            },
        )?;
    }
    Ok(())
}

/// From the whole history, as each replica tells it: as many pods were made as were asked for, and none went.
fn nothing_happened_twice(lab: &Lab, client: &Client, begun: u64) -> Result<()> {
    let pods: Vec<Pod> = client.list("default", "")?;
    let last = pods
        .iter()
        .filter_map(|pod| pod.meta().resource_version.parse().ok())
        .max();
    let until: u64 = last.context("there are pods")?;
    let history = client.history("pods", begun, until)?;
    for (name, other) in clients(lab)? {
        let same = lab.wait(&format!("{name} tells the history"), LONG, || {
            other.revision()?;
            other.history("pods", begun, until).map(Some)
        })?;
        ensure!(same == history, "{name} tells another history");
    }
    let count = |what: &str| history.iter().filter(|(kind, _, _)| kind == what).count();
    let made: BTreeSet<&str> = history.iter().map(|(_, name, _)| name.as_str()).collect();
    ensure!(
        count("ADDED") == 12 && made.len() == 12 && count("DELETED") == 0,
        "12 pods were asked for; {} were made and {} deleted: {made:?}",
        count("ADDED"),
        count("DELETED"),
    );
    Ok(())
}
