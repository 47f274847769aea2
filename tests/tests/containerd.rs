//! Nodes with the oldest and the newest containerd in one cluster.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Event, Node, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output},
    supervisor::Request,
    workload::{client, pod, web},
};
use serde_json::json;

#[test]
fn one_cluster_of_containerd_1_and_2() -> Result<()> {
    let lab = Lab::start(
        "containerds",
        &Options {
            nodes: 2,
            node_extra: "restart_backoff_ms = 200\nrestart_backoff_max_ms = 1000\n".to_owned(),
            containerd_2: vec!["node2".to_owned()],
            ..Options::default()
        },
    )?;
    nodes_name_their_containerd(&lab)?;
    lab.client
        .apply(&(web("web", 4) + &client("client-node1", "node1") + &client("client-node2", "node2")))?;
    let pods = lab.wait_for_pods("app=web", 4)?;
    let address = lab.cluster_ip("web")?;
    for node in ["node1", "node2"] {
        let client = lab.wait_for_pod(&format!("client-{node}"))?;
        lab.wait_for_answers(&client, &["get", &address, "80", "40"], &pods)
            .with_context(|| format!("from {node}"))?;
    }
    let before = processes(&lab)?;
    lab.request(&Request::Signal("node2/containerd".to_owned(), libc::SIGKILL))?;
    lab.wait("containerd is back", Duration::from_secs(60), || {
        Ok((lab.service("node2/containerd")?.starts == 2).then_some(()))
    })?;
    lab.client.apply(&pod("after", "node2", &["sleep"]))?;
    lab.wait_for_pod("after")?;
    for node in ["node1", "node2"] {
        a_containerd_that_lost_a_plugin_shows_on_its_node(&lab, node).with_context(|| node.to_owned())?;
    }
    ensure!(processes(&lab)? == before, "pods were restarted with containerd");
    a_network_that_fails_shows_on_the_pod(&lab)?;
    an_agent_that_dies_while_it_wires_leaves_nothing(&lab)?;
    a_pod_on_the_reference_plugins_is_as_any_other(&lab)?;
    lab.client.delete("replicasets", "default", "web", None)?;
    for name in ["client-node1", "client-node2", "after", "wired", "torn"] {
        lab.client.delete("pods", "default", name, None)?;
    }
    lab.wait("all pods are gone", Duration::from_secs(60), || {
        Ok(lab.client.list::<Pod>("default", "")?.is_empty().then_some(()))
    })?;
    lab.wait("containerd 2 has nothing left of them", Duration::from_secs(30), || {
        let script = "ctr -n orlop containers ls -q; ctr -n orlop tasks ls -q; ctr -n orlop leases ls -q";
        let left = output(lab.on_node("node2", &["sh", "-c", script])?)?;
        ensure!(left.is_empty(), "{left}");
        Ok(Some(()))
    })?;
    lab.finish()
}

fn nodes_name_their_containerd(lab: &Lab) -> Result<()> {
    for (name, series) in [("node1", "containerd://1."), ("node2", "containerd://2.")] {
        let node: Node = lab.client.get("", name)?.context("a node")?;
        let info = node.status.and_then(|status| status.node_info).unwrap_or_default();
        ensure!(
            info.container_runtime_version.starts_with(series),
            "{name} runs {}",
            info.container_runtime_version
        );
    }
    Ok(())
}

/// The first processes of all web servers and clients.
fn processes(lab: &Lab) -> Result<Vec<(String, i32)>> {
    let pods: Vec<Pod> = lab.client.list("default", "")?;
    let mut found = Vec::new();
    for pod in pods.iter().filter(|pod| pod.name() != "after") {
        let node = pod
            .spec
            .as_ref()
            .map(|spec| spec.node_name.as_str())
            .unwrap_or_default();
        found.push((pod.name().to_owned(), lab.pod_process(node, pod.uid())?));
    }
    Ok(found)
}

/// A containerd that came up without what runs pods serves everything else: its node is not Ready until it is whole again.
fn a_containerd_that_lost_a_plugin_shows_on_its_node(lab: &Lab, node: &str) -> Result<()> {
    let folder = lab
        .spec
        .member_directory(node)
        .join("containerd/root/io.containerd.runtime.v2.task");
    let folder = folder.display();
    let restart_after = |script: String| -> Result<()> {
        let service = format!("{node}/containerd");
        lab.request(&Request::Stop(service.clone()))?;
        output(lab.on_node(node, &["sh", "-c", &script])?)?;
        lab.resume(&service)
    };
    restart_after(format!("mv {folder} {folder}.aside && echo >{folder}"))?;
    lab.wait("the node is not ready", Duration::from_secs(60), || {
        let ready = lab.condition(node, "Ready")?;
        Ok((ready.status == "False" && ready.message.contains("asking for tasks")).then_some(()))
    })?;
    restart_after(format!("rm {folder} && mv {folder}.aside {folder}"))?;
    lab.wait_for_nodes()
}

/// A plugin at the end of the chain prints garbage: the pod says so, and runs as soon as the plugin is gone.
fn a_network_that_fails_shows_on_the_pod(lab: &Lab) -> Result<()> {
    let root = Path::new("/proc")
        .join(lab.members.get("node2")?.pid.to_string())
        .join("root");
    let bad = "cat /etc/cni/net.d/10-orlop.conflist | jq '.cniVersion = \"1.0.0\" | .plugins += [{\"type\": \"babble\"}]' \
               >/etc/cni/net.d/.new && mv /etc/cni/net.d/.new /etc/cni/net.d/05-babble.conflist && \
               printf '#!/bin/sh\\n[ $CNI_COMMAND = DEL ] || echo babble\\n' >/opt/cni/bin/babble && chmod 755 /opt/cni/bin/babble";
    output(lab.on_node("node2", &["sh", "-c", bad])?)?;
    ensure!(root.join("etc/cni/net.d/05-babble.conflist").exists());
    lab.client.apply(&pod("wired", "node2", &["sleep"]))?;
    lab.wait("an event tells of the plugin", Duration::from_secs(60), || {
        let events: Vec<Event> = lab.client.list("default", "")?;
        let about = |event: &&Event| {
            event
                .involved_object
                .as_ref()
                .is_some_and(|object| object.name == "wired")
                && event.message.contains("plugin babble ADD")
                && event.message.contains("not JSON")
        };
        Ok(events.iter().find(about).map(|event| event.reason.clone()))
    })
    .and_then(|reason| {
        ensure!(reason == "FailedCreatePodSandBox", "{reason}");
        Ok(())
    })?;
    output(lab.on_node("node2", &["rm", "/etc/cni/net.d/05-babble.conflist"])?)?;
    lab.wait_for_pod("wired").map(drop)
}

/// The agent is killed while the third plugin of a chain is at work: that one ends, and the next agent's DEL finds the rules that the
/// second had made for the first one's address.
fn an_agent_that_dies_while_it_wires_leaves_nothing(lab: &Lab) -> Result<()> {
    let stall = "jq '.cniVersion = \"1.0.0\" | .plugins += [{\"type\": \"firewall\", \"backend\": \"iptables\"}, {\"type\": \"stall\"}]' \
                 </etc/cni/net.d/10-orlop.conflist >/etc/cni/net.d/.new && ln -s /usr/lib/cni/firewall /opt/cni/bin/firewall && \
                 printf '#!/bin/sh\\n[ $CNI_COMMAND = DEL ] && exit 0\\necho $$ >/run/stalled\\nexec sleep 600\\n' >/opt/cni/bin/stall && \
                 chmod 755 /opt/cni/bin/stall && mv /etc/cni/net.d/.new /etc/cni/net.d/05-stall.conflist";
    output(lab.on_node("node2", &["sh", "-c", stall])?)?;
    let rules = || output(lab.on_node("node2", &["iptables", "-S"])?);
    lab.client.apply(&pod("torn", "node2", &["sleep"]))?;
    let stalled = lab.wait("the third plugin is at work", Duration::from_secs(60), || {
        let pid = output(lab.on_node("node2", &["cat", "/run/stalled"])?)?;
        Ok(Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty()))
    })?;
    ensure!(
        rules()?.contains("/32 -j ACCEPT"),
        "no rules of the second: {}",
        rules()?
    );
    output(lab.on_node("node2", &["rm", "/etc/cni/net.d/05-stall.conflist"])?)?;
    lab.request(&Request::Signal("node2/agent".to_owned(), libc::SIGKILL))?;
    lab.wait_for_pod("torn")?;
    ensure!(has_ended(&stalled)?, "the plugin {stalled} outlived its agent");
    let left = rules()?;
    ensure!(
        !left.contains("/32 -j ACCEPT"),
        "rules for an address that was given up: {left}"
    );
    Ok(())
}

/// Debian's bridge and host-local wire a pod in the place of ours: it is Ready at their address, reaches a ClusterIP, is reached through it
/// from the other node, and its end frees the address.
fn a_pod_on_the_reference_plugins_is_as_any_other(lab: &Lab) -> Result<()> {
    let node: Node = lab.client.get("", "node2")?.context("a node")?;
    let range = node.spec.unwrap_or_default().pod_cidr;
    let network = range
        .strip_suffix("0/24")
        .with_context(|| format!("{range} is no /24"))?;
    // The upper half of the node's range, which the other node's route leads to as well. Ours gives addresses from the lower end.
    let ipam =
        json!({"type": "host-local", "dataDir": "/run/theirs", "ranges": [[{"subnet": format!("{network}128/25")}]]});
    let bridge = json!({"type": "bridge", "bridge": "theirs0", "isDefaultGateway": true, "ipam": ipam});
    let list = json!({"cniVersion": "1.0.0", "name": "theirs", "plugins": [bridge]});
    let install = format!(
        "ln -s /usr/lib/cni/bridge /usr/lib/cni/host-local /opt/cni/bin/ && echo '{list}' >/etc/cni/net.d/.new && \
         mv /etc/cni/net.d/.new /etc/cni/net.d/05-theirs.conflist"
    );
    output(lab.on_node("node2", &["sh", "-c", &install])?)?;
    let mut manifest = String::from(
        "apiVersion: v1\nkind: Service\nmetadata: {name: mixed, namespace: default}\nspec:\n  selector: {app: mixed}\n\
         \x20 ports: [{port: 80, targetPort: 8080}]\n",
    );
    for (name, node) in [("ours", "node1"), ("theirs", "node2")] {
        let pod = pod(name, node, &["web", "8080"]);
        manifest += &pod.replace("metadata: {", "metadata: {labels: {app: mixed}, ");
    }
    lab.client.apply(&manifest)?;
    let pods = lab.wait_for_pods("app=mixed", 2)?;
    let theirs = pods
        .iter()
        .find(|pod| pod.name() == "theirs")
        .context("a pod of theirs")?;
    let address = theirs.status.clone().unwrap_or_default().pod_ip;
    let host: Option<u8> = address.strip_prefix(network).and_then(|host| host.parse().ok());
    ensure!(host.is_some_and(|host| host > 129), "{address} is not theirs");
    let on_node2 = |script: &str| output(lab.on_node("node2", &["sh", "-c", script])?);
    ensure!(
        on_node2("ls /run/theirs/theirs")?.contains(&address),
        "not of host-local"
    );
    ensure!(
        !on_node2("ip -o link show master theirs0")?.is_empty(),
        "not at their bridge"
    );
    let service = lab.cluster_ip("mixed")?;
    for client in [theirs, &lab.wait_for_pod("client-node1")?] {
        lab.wait_for_answers(client, &["get", &service, "80", "40"], &pods)
            .with_context(|| format!("from {}", client.name()))?;
    }
    for name in ["ours", "theirs"] {
        lab.client.delete("pods", "default", name, None)?;
    }
    lab.wait("the pod of their plugins is gone", Duration::from_secs(60), || {
        Ok(lab.client.get::<Pod>("default", "theirs")?.is_none().then_some(()))
    })?;
    let left = on_node2("ls /run/theirs/theirs; ip -o link show master theirs0")?;
    ensure!(!left.contains(&address) && !left.contains("veth"), "left: {left}");
    on_node2("rm /etc/cni/net.d/05-theirs.conflist").map(drop)
}

/// Whether there is no such process, or only what its parent has not read yet: the machine's first process may take its time.
fn has_ended(pid: &str) -> Result<bool> {
    let status = match fs::read_to_string(Path::new("/proc").join(pid).join("stat")) {
        Ok(status) => status,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Ok(true),
        Err(error) => return Err(error).context("reading the state of the plugin"),
    };
    let state = status
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    Ok(matches!(state, Some("Z" | "X")))
}
