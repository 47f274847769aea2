//! A node is switched off and on while there is no control: what it was told stands on its disk, and that is enough.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output, pod_is_ready},
    supervisor::Request,
    workload::{client, pod},
};

const PATIENCE: Duration = Duration::from_secs(120);

/// A service over one labelled web server on each of the nodes, a client on the first, and pods there that ended.
fn workload() -> String {
    let web = |name: &str, node: &str| {
        pod(name, node, &["web", "8080"]).replace(
            "namespace: default}",
            &format!("namespace: default, labels: {{app: {node}}}}}"),
        )
    };
    let ended = |name: &str, policy: &str, code: &str| {
        pod(name, "node1", &["exit", code]).replace("spec:\n", &format!("spec:\n  restartPolicy: {policy}\n"))
    };
    let service = |name: &str, node: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
             spec: {{selector: {{app: {node}}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
        )
    };
    [
        // Before the others: their addresses are free after the reboot, so whoever took the first free ones would get others.
        ended("done", "OnFailure", "0"),
        ended("failed", "Never", "3"),
        web("near-a", "node1"),
        web("near-b", "node1"),
        web("far-a", "node2"),
        web("far-b", "node2"),
        client("client", "node1"),
        client("afar", "node2"),
        service("far", "node2"),
        service("near", "node1"),
    ]
    .concat()
}

fn addresses_of(pods: &[Pod]) -> BTreeMap<&str, &str> {
    pods.iter()
        .filter(|pod| phase(pod) == "Running")
        .filter_map(|pod| Some((pod.name(), pod.status.as_ref()?.pod_ip.as_str())))
        .collect()
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().map_or("", |status| status.phase.as_str())
}

fn restarts(pod: &Pod) -> i32 {
    let containers = pod.status.iter().flat_map(|status| &status.container_statuses);
    containers.map(|status| status.restart_count).sum()
}

/// The first process of each of these pods.
fn processes(lab: &Lab, pods: &[&Pod]) -> Result<BTreeMap<String, i32>> {
    pods.iter()
        .map(|pod| Ok((pod.name().to_owned(), lab.pod_process("node1", pod.uid())?)))
        .collect()
}

#[test]
fn a_node_comes_back_without_control() -> Result<()> {
    let options = Options {
        nodes: 2,
        ..Options::default()
    };
    let lab = Lab::start("reboot", &options)?;
    lab.client.apply(&workload())?;
    let near = vec![lab.wait_for_pod("near-a")?, lab.wait_for_pod("near-b")?];
    let far = vec![lab.wait_for_pod("far-a")?, lab.wait_for_pod("far-b")?];
    let (asks, afar) = (lab.wait_for_pod("client")?, lab.wait_for_pod("afar")?);
    let here = [&near[0], &near[1], &asks];
    let ended = |lab: &Lab| -> Result<Option<()>> {
        let found = |name: &str| lab.client.get::<Pod>("default", name)?.context("it is there");
        Ok((phase(&found("done")?) == "Succeeded" && phase(&found("failed")?) == "Failed").then_some(()))
    };
    lab.wait("two pods have ended", PATIENCE, || ended(&lab))?;
    let (address, own) = (lab.cluster_ip("far")?, lab.cluster_ip("near")?);
    lab.wait_for_answers(&asks, &["get", &address, "80", "40"], &far)?;
    lab.wait_for_answers(&afar, &["get", &own, "80", "40"], &near)?;
    let known: Vec<Pod> = lab.client.list("default", "")?;
    // Services are written behind the maps, and routes behind the kernel's.
    lab.wait("the ledger has services and routes", PATIENCE, || {
        let ledger = lab.spec.member_directory("node1").join("data/ledger");
        let behind = ledger.join("services.behind").exists();
        Ok((!behind && ledger.join("services").exists() && ledger.join("routes").exists()).then_some(()))
    })?;

    lab.request(&Request::Stop("control/control".to_owned()))?;
    lab.reboot("node1")?;
    lab.wait("the pods run again, from the ledger alone", PATIENCE, || {
        Ok(processes(&lab, &here).ok().map(drop))
    })?;
    lab.wait("traffic flows from the ledger's service state", PATIENCE, || {
        Ok(lab.ask(&asks, &["get", &address, "80", "5"]).ok().map(drop))
    })?;
    lab.wait_for_answers(&asks, &["get", &address, "80", "40"], &far)?;
    // No record of a service has changed, here or elsewhere: so the pods must be where they were.
    lab.wait_for_answers(&asks, &["get", &own, "80", "40"], &near)?;
    lab.wait_for_answers(&afar, &["get", &own, "80", "40"], &near)?;
    for name in ["done", "failed"] {
        let pod = lab.spec.member_directory("node1").join("data/ledger/pods");
        ensure!(fs::read_dir(&pod)?.count() >= 4, "{name} is still known to the ledger");
    }
    let before = processes(&lab, &here)?;

    lab.request(&Request::Start("control/control".to_owned()))?;
    lab.wait("control answers", PATIENCE, || Ok(lab.client.ready().ok()))?;
    lab.wait("the statuses tell of the reboot", PATIENCE, || {
        let mut told = true;
        for name in ["near-a", "near-b", "client"] {
            let pod = lab.client.get::<Pod>("default", name)?.context("it is there")?;
            told &= pod_is_ready(&pod) && restarts(&pod) == 1;
        }
        Ok(told.then_some(()))
    })?;
    lab.wait_for_nodes()?;
    ensure!(ended(&lab)?.is_some(), "pods that had ended were started again");
    ensure!(processes(&lab, &here)? == before, "control's return restarted a pod");
    let pods: Vec<Pod> = lab.client.list("default", "")?;
    let after = addresses_of(&pods);
    ensure!(after == addresses_of(&known), "pods have other addresses: {after:?}");
    let addresses: BTreeSet<&str> = after.values().copied().collect();
    ensure!(addresses.len() == after.len(), "an address is used twice: {after:?}");
    let node: Node = lab.client.get("", "node1")?.context("the node")?;
    let boot_id = fs::read_to_string(lab.spec.member_directory("node1").join("boot_id"))?;
    let told = node.status.and_then(|status| status.node_info).map(|info| info.boot_id);
    ensure!(
        told.as_deref() == Some(boot_id.trim()),
        "the node's boot id is {told:?}"
    );
    leases_are_of_living_pods(&lab, &addresses)?;
    lab.finish()
}

/// The reboot took networks without a word to the plugin: their leases are gone, too.
fn leases_are_of_living_pods(lab: &Lab, addresses: &BTreeSet<&str>) -> Result<()> {
    let leases = output(lab.on_node("node1", &["jq", "-r", ".leases | keys[]", "/run/orlop/ipam/orlop.json"])?)?;
    ensure!(leases.lines().count() == 3, "three pods run: {leases}");
    for lease in leases.lines() {
        ensure!(addresses.contains(lease), "{lease} is leased to nobody: {leases}");
    }
    Ok(())
}
