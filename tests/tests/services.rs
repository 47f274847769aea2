//! Services in the kernel: who answers, through which kind of socket, from where.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output},
    workload::{client, web},
};

#[test]
fn six_pods_behind_a_cluster_ip_answer_from_every_node() -> Result<()> {
    let lab = Lab::start("services", &Options::default())?;
    let mut manifest = web("web", 6);
    for node in lab.spec.node_names() {
        manifest.push_str(&client(&format!("client-{node}"), &node));
    }
    lab.client.apply(&manifest)?;
    let pods = lab.wait_for_pods("app=web", 6)?;
    spread_over_all_nodes(&lab, &pods)?;
    let address = lab.cluster_ip("web")?;
    for node in lab.spec.node_names() {
        let client = lab.wait_for_pod(&format!("client-{node}"))?;
        every_kind_of_socket(&lab, &client, &address, &pods).with_context(|| format!("from {node}"))?;
    }
    scaling(&lab, &address)?;
    no_trace_after_deleting_all(&lab)?;
    lab.finish()
}

/// The scheduler spreads; so both same-node and cross-node backends are in play for every client.
fn spread_over_all_nodes(lab: &Lab, pods: &[Pod]) -> Result<()> {
    let nodes: BTreeSet<&str> = pods
        .iter()
        .filter_map(|pod| pod.spec.as_ref())
        .map(|spec| spec.node_name.as_str())
        .collect();
    ensure!(
        nodes.len() == usize::from(lab.spec.nodes),
        "the pods run on {nodes:?} only"
    );
    Ok(())
}

fn every_kind_of_socket(lab: &Lab, client: &Pod, address: &str, pods: &[Pod]) -> Result<()> {
    lab.wait_for_answers(client, &["get", address, "80", "60"], pods)?;
    lab.wait_for_answers(client, &["get", address, "80", "60", "mapped"], pods)?;
    lab.wait_for_answers(client, &["udp", address, "80", "60"], pods)?;
    lab.wait_for_answers(client, &["udp", address, "80", "60", "connected"], pods)?;
    lab.wait_for_answers(client, &["udp", address, "80", "60", "mapped"], pods)?;
    // The client sees the service as its peer, never the pod behind it.
    let expected = format!("{address}:80");
    ensure!(
        lab.ask(client, &["peername", address, "80"])?.trim() == expected,
        "getpeername of an AF_INET socket"
    );
    let mapped: SocketAddr = lab
        .ask(client, &["peername", address, "80", "mapped"])?
        .trim()
        .parse()?;
    ensure!(
        mapped.ip().to_canonical().to_string() == address && mapped.port() == 80,
        "getpeername gave {mapped}"
    );
    for line in lab.ask(client, &["udp", address, "80", "3"])?.lines() {
        ensure!(
            line.ends_with(&format!(" from {expected}")),
            "a datagram came from elsewhere: {line}"
        );
    }
    // One unconnected socket keeps its backend while that is ready.
    let answers = lab.ask(client, &["udp-one", address, "80", "20"])?;
    let backends: BTreeSet<&str> = answers.lines().filter_map(|line| line.split(' ').next()).collect();
    ensure!(backends.len() == 1, "one socket was answered by {backends:?}");
    Ok(())
}

fn scaling(lab: &Lab, address: &str) -> Result<()> {
    let client = lab.wait_for_pod("client-node1")?;
    lab.client.apply(&web("web", 0))?;
    lab.wait_for_pods("app=web", 0)?;
    let refused = lab.wait("connections are refused at once", Duration::from_secs(10), || {
        Ok(lab
            .ask(&client, &["get", address, "80", "1"])
            .err()
            .map(|error| format!("{error:#}")))
    })?;
    ensure!(refused.contains("refused"), "without endpoints: {refused}");
    let udp = lab
        .ask(&client, &["udp", address, "80", "1"])
        .err()
        .context("UDP without endpoints was answered")?;
    ensure!(format!("{udp:#}").contains("refused"), "UDP without endpoints: {udp:#}");
    lab.client.apply(&web("web", 2))?;
    let pods = lab.wait_for_pods("app=web", 2)?;
    lab.wait_for_answers(&client, &["get", address, "80", "20"], &pods)
}

fn no_trace_after_deleting_all(lab: &Lab) -> Result<()> {
    // What is looked for is there as long as the pods are.
    let before = traces(lab, "node1")?;
    for sign in ["frontend", "slots", "10.244.", "master orlop0", "orlop-pod-", "cgroup"] {
        ensure!(
            before.iter().any(|trace| trace.contains(sign)),
            "no {sign} among {before:?}"
        );
    }
    lab.client.delete("services", "default", "web", None)?;
    lab.client.delete("replicasets", "default", "web", None)?;
    for node in lab.spec.node_names() {
        lab.client.delete("pods", "default", &format!("client-{node}"), None)?;
    }
    lab.wait("all pods are gone", Duration::from_secs(60), || {
        Ok(lab.client.list::<Pod>("default", "")?.is_empty().then_some(()))
    })?;
    for node in lab.spec.node_names() {
        let look = || traces(lab, &node);
        lab.wait(
            &format!("{node} is as empty as before"),
            Duration::from_secs(20),
            || {
                let traces = look()?;
                ensure!(traces.is_empty(), "{}", traces.join("; "));
                Ok(Some(()))
            },
        )?;
    }
    Ok(())
}

/// What pods and the service left on a node: frontends, slots, leases, veths, cgroups, network namespaces.
fn traces(lab: &Lab, node: &str) -> Result<Vec<String>> {
    let pins = format!("/sys/fs/bpf/orlop/{node}");
    let dump = |map: &str| -> Result<Vec<serde_json::Value>> {
        let json = output(lab.on_node(
            node,
            &["bpftool", "-j", "map", "dump", "pinned", &format!("{pins}/{map}")],
        )?)?;
        Ok(serde_json::from_str(&json)?)
    };
    let mut found = Vec::new();
    let ours = |entry: &serde_json::Value| entry["formatted"]["key"]["port"] == 80;
    if dump("svc4_v1")?.iter().any(ours) {
        found.push("a frontend of port 80".to_owned());
    }
    // Whatever the cluster itself has (the API's own service) is not of these pods.
    let zero = serde_json::json!([0, 0, 0, 0]);
    let foreign = |value: &serde_json::Value| value["port"] == orlop_tests::layout::API_PORT;
    let slots = dump("arena4_v1")?;
    let used = slots.iter().map(|entry| &entry["formatted"]["value"]);
    let used = used.filter(|value| value["address"] != zero && !foreign(value)).count();
    if used > 0 || slots.is_empty() {
        found.push(format!("{used} used slots of {}", slots.len()));
    }
    let script = "ls /run/orlop/netns; ip -o link show type veth | grep -v eth0; \
                  ctr -n orlop containers ls -q; ctr -n orlop tasks ls -q; ctr -n orlop leases ls -q; \
                  cat /run/orlop/ipam/*.json | jq -r '.leases | keys[]'";
    let rest = output(lab.on_node(node, &["sh", "-c", script])?)?;
    found.extend(rest.lines().map(str::to_owned));
    let cgroup = orlop_tests::cgroup::hierarchies()?[0]
        .mount
        .join(lab.spec.cgroup(node))
        .join("orlop")
        .join(node);
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.push(format!("cgroup {}", entry.path().display()));
        }
    }
    Ok(found)
}

/// `default/kubernetes` leads to control. Pods' addresses are not translated on their way out, so control must know the way back.
fn the_api_answers_pods(lab: &Lab, client: &Pod) -> Result<()> {
    for node in lab.client.list::<Node>("", "")? {
        let range = node.spec.as_ref().map(|spec| spec.pod_cidr.clone()).unwrap_or_default();
        let addresses = node.status.iter().flat_map(|status| &status.addresses);
        let address = addresses
            .into_iter()
            .find(|one| one.r#type == "InternalIP")
            .context("a node without an address")?;
        let route = ["ip", "route", "replace", &range, "via", &address.address];
        output(lab.on_node("control", &route)?)?;
    }
    let request = ["curl", "-ksS", "--max-time", "3", "https://10.96.0.1/healthz"];
    lab.wait("the API answers behind its ClusterIP", Duration::from_secs(30), || {
        let answer = output(lab.in_pod(client, &request)?);
        Ok(answer.ok().filter(|text| text.trim() == "ok"))
    })?;
    Ok(())
}

#[test]
fn one_node_one_pod_one_cluster_ip() -> Result<()> {
    let lab = Lab::start(
        "first",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    lab.client.apply(&(web("web", 1) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 1)?;
    let client = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(&client, &["get", &address, "80", "3"], &pods)?;
    the_api_answers_pods(&lab, &client)?;
    ensure!(
        pods[0]
            .status
            .as_ref()
            .is_some_and(|status| status.pod_ip.starts_with("10.244."))
    );
    ensure!(!pods[0].uid().is_empty());
    lab.finish()
}
