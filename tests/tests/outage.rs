//! Most nodes, then all of them, go silent at once: eviction stops, as it does in a zone of Kubernetes, and who comes back finds its pods.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, node_is_ready},
    supervisor::Request,
    workload::pod,
};

const PATIENCE: Duration = Duration::from_secs(120);
const NODES: u16 = 5;
/// How long pods bear a node that cannot be reached, in this lab.
const DELAY: Duration = Duration::from_secs(3);

fn names(numbers: impl Iterator<Item = u16>) -> Vec<String> {
    numbers.map(|number| format!("node{number}")).collect()
}

fn cables(lab: &Lab, nodes: &[String], up: bool) -> Result<()> {
    nodes
        .iter()
        .try_for_each(|node| lab.request(&Request::Link(node.clone(), up)))
}

/// The nodes that have the taint that evicts.
fn evicting(lab: &Lab) -> Result<BTreeSet<String>> {
    let nodes: Vec<Node> = lab.client.list("", "")?;
    let evicts = |node: &&Node| {
        node.spec
            .iter()
            .flat_map(|spec| &spec.taints)
            .any(|taint| taint.effect == "NoExecute")
    };
    Ok(nodes.iter().filter(evicts).map(|node| node.name().to_owned()).collect())
}

fn wait_until_silent(lab: &Lab, nodes: &[String]) -> Result<()> {
    lab.wait(&format!("{nodes:?} are NotReady"), PATIENCE, || {
        let all: Vec<Node> = lab.client.list("", "")?;
        let silent = all.iter().filter(|node| !node_is_ready(node)).count();
        Ok((silent == nodes.len()).then_some(()))
    })
}

/// Of each pod: its uid, and its first process.
fn pods(lab: &Lab) -> Result<BTreeMap<String, (String, i32)>> {
    let pods: Vec<Pod> = lab.client.list("default", "")?;
    pods.iter()
        .filter(|pod| !pod.is_deleting())
        .map(|pod| {
            let node = pod.spec.as_ref().map_or("", |spec| spec.node_name.as_str());
            Ok((
                node.to_owned(),
                (pod.uid().to_owned(), lab.pod_process(node, pod.uid())?),
            ))
        })
        .collect()
}

#[test]
fn a_mass_outage_stops_eviction() -> Result<()> {
    let options = Options {
        nodes: NODES,
        control_extra: format!(
            "[node]\nmonitor_grace = \"11s\"\neviction_delay = \"{}s\"\n",
            DELAY.as_secs()
        ),
        ..Options::default()
    };
    let lab = Lab::start("outage", &options)?;
    let all = names(1..=NODES);
    let manifest: String = all
        .iter()
        .map(|node| pod(&format!("on-{node}"), node, &["sleep"]))
        .collect();
    lab.client.apply(&manifest)?;
    for node in &all {
        lab.wait_for_pod(&format!("on-{node}"))?;
    }
    let before = pods(&lab)?;
    ensure!(before.len() == usize::from(NODES), "a pod on each node: {before:?}");

    // All at once: rather our fault than theirs, and there is nowhere to go.
    cables(&lab, &all, false)?;
    wait_until_silent(&lab, &all)?;
    lab.wait("no node evicts", PATIENCE, || {
        Ok(evicting(&lab)?.is_empty().then_some(()))
    })?;
    stays(&lab, "nobody is evicted", || Ok(evicting(&lab)?.is_empty()))?;
    // Who was the first to be silent may have lost its pods before the others were.
    let kept = pods(&lab)?;
    ensure!(kept.len() + 2 >= before.len(), "most pods are kept: {kept:?}");
    cables(&lab, &all, true)?;
    lab.wait_for_nodes()?;
    ensure!(pods(&lab)? == kept, "pods of nodes that came back were touched");

    // Most of them: the first two that are silent may look like two broken nodes; from the third on it is an outage.
    let most = names(2..=NODES);
    cables(&lab, &most, false)?;
    wait_until_silent(&lab, &most)?;
    // Where there is no pod nobody is evicted.
    let evicted = |lab: &Lab| -> Result<BTreeSet<String>> {
        Ok(evicting(lab)?
            .into_iter()
            .filter(|node| kept.contains_key(node))
            .collect())
    };
    let lost = evicted(&lab)?;
    ensure!(lost.len() <= 2, "{lost:?} evict, and most nodes are silent");
    stays(&lab, "no further node evicts", || Ok(evicted(&lab)? == lost))?;
    cables(&lab, &most, true)?;
    lab.wait_for_nodes()?;
    let after = pods(&lab)?;
    for (node, pod) in kept.iter().filter(|(node, _)| !lost.contains(*node)) {
        ensure!(
            after.get(node) == Some(pod),
            "the pod of {node} was evicted in the outage"
        );
    }
    lab.finish()
}

/// Looks for as long as eviction would take, several times over.
fn stays(lab: &Lab, what: &str, mut question: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DELAY * 3;
    lab.wait(what, PATIENCE, || {
        if !question().context("asking")? {
            return Ok(Some(false));
        }
        Ok((Instant::now() > end).then_some(true))
    })
    .and_then(|held| {
        ensure!(held, "not any more: {what}");
        Ok(())
    })
}
