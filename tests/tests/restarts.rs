//! What dies comes back, and what need not be disturbed is not: containers, pods, the agent, control.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Event, Pod},
};
use orlop_tests::{
    faults::pods::processes,
    lab::{Lab, Options, output, pod_is_ready},
    layout::StoreEngine,
    supervisor::Request,
    workload::{client, finish, web},
};

const SIGKILL: i32 = 9;

/// The ids of the programs that are pinned on a node.
fn program_ids(lab: &Lab, node: &str) -> Result<Vec<String>> {
    let script =
        format!("for link in /sys/fs/bpf/orlop/{node}/*; do bpftool -j link show pinned $link 2>/dev/null; done; true");
    let lines = output(lab.on_node(node, &["sh", "-c", &script])?)?;
    let mut ids = Vec::new();
    for line in lines.lines() {
        let value: serde_json::Value = serde_json::from_str(line).with_context(|| format!("bpftool printed {line}"))?;
        if let Some(id) = value.get("prog_id") {
            ids.push(format!("{} {id}", value["attach_type"]));
        }
    }
    ids.sort();
    Ok(ids)
}

#[test]
fn the_agent_stops_and_is_killed_and_nothing_is_disturbed() -> Result<()> {
    let lab = Lab::start(
        "agent",
        &Options {
            nodes: 2,
            ..Options::default()
        },
    )?;
    lab.client.apply(&(web("web", 4) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 4)?;
    let client = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(&client, &["get", &address, "80", "40"], &pods)?;
    let (processes_before, programs_before) = (processes(&lab, &pods)?, program_ids(&lab, "node1")?);
    ensure!(
        processes_before.len() >= 8,
        "a pod has a pause and a web server: {processes_before:?}"
    );
    ensure!(
        programs_before.len() >= 6,
        "the socket programs are pinned: {programs_before:?}"
    );

    let held = lab.begin(&client, &["hold", &address, "80", "14"])?;
    let load = lab.begin(&client, &["load", &address, "80", "50", "12"])?;
    thread::sleep(Duration::from_secs(1));
    lab.request(&Request::Stop("node1/agent".to_owned()))?;
    lab.ask(&client, &["get", &address, "80", "10"])
        .context("requests while the agent is stopped")?;
    lab.request(&Request::Start("node1/agent".to_owned()))?;
    thread::sleep(Duration::from_secs(3));
    for _ in 0..2 {
        let starts = lab.service("node1/agent")?.starts;
        lab.request(&Request::Signal("node1/agent".to_owned(), SIGKILL))?;
        lab.wait("the agent is started again", Duration::from_secs(10), || {
            Ok((lab.service("node1/agent")?.starts > starts).then_some(()))
        })?;
        thread::sleep(Duration::from_secs(2));
    }
    ensure!(finish(held).context("the open connection")?.starts_with("requests "));
    let load = finish(load)?;
    ensure!(load.trim() == "sent 600 lost 0", "requests were lost: {load}");

    ensure!(processes(&lab, &pods)? == processes_before, "containers were restarted");
    ensure!(
        program_ids(&lab, "node1")? == programs_before,
        "programs were replaced by the same build"
    );
    logs_go_on(&lab)?;
    // The agent that came back does its work: a change reaches the kernel.
    lab.client.apply(&web("web", 2))?;
    let pods = lab.wait_for_pods("app=web", 2)?;
    lab.wait_for_answers(&client, &["get", &address, "80", "20"], &pods)?;
    lab.wait_for_nodes()?;
    lab.finish()
}

/// A container that writes while the agent is stopped has its lines in the log, in the CRI format.
fn logs_go_on(lab: &Lab) -> Result<()> {
    lab.client
        .apply(&orlop_tests::workload::pod("ticker", "node1", &["tick", "100"]))?;
    let ticker = lab.wait_for_pod("ticker")?;
    lab.request(&Request::Stop("node1/agent".to_owned()))?;
    let name = format!("default_ticker_{}", ticker.uid());
    let log = lab
        .spec
        .member_directory("node1")
        .join("log")
        .join(name)
        .join("main/0.log");
    let lines = || {
        fs::read_to_string(&log)
            .with_context(|| log.display().to_string())
            .map(|text| text.lines().count())
    };
    let before = lines()?;
    lab.wait("the log grows without the agent", Duration::from_secs(10), || {
        Ok((lines()? >= before + 10).then_some(()))
    })?;
    lab.request(&Request::Start("node1/agent".to_owned()))?;
    let text = fs::read_to_string(&log)?;
    for (number, line) in text.lines().enumerate() {
        ensure!(
            line.ends_with(&format!(" stdout F tick {number}")),
            "line {number} of the log: {line}"
        );
    }
    lab.client.delete("pods", "default", "ticker", Some(0))
}

#[test]
fn killed_containers_restart_and_deleted_pods_are_replaced() -> Result<()> {
    let lab = Lab::start(
        "containers",
        &Options {
            nodes: 2,
            ..Options::default()
        },
    )?;
    lab.client.apply(&(web("web", 3) + &client("client", "node2")))?;
    let pods = lab.wait_for_pods("app=web", 3)?;
    let client = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;

    let victim = &pods[0];
    let node = victim
        .spec
        .as_ref()
        .map(|spec| spec.node_name.clone())
        .unwrap_or_default();
    let root = orlop_tests::cgroup::hierarchies()?[0]
        .mount
        .join(lab.pod_cgroup(&node, victim.uid()));
    let mut killed = 0;
    for pid in processes(&lab, std::slice::from_ref(victim))?.into_keys() {
        if fs::read_to_string(format!("/proc/{pid}/cmdline"))?.contains("web") {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
            killed += 1;
        }
    }
    ensure!(killed == 1, "{} has one web server, found {killed}", root.display());
    let restarted = lab.wait("the container is restarted", Duration::from_secs(30), || {
        let pod = lab
            .client
            .get::<Pod>("default", victim.name())?
            .context("the pod is gone")?;
        let restarts = pod
            .status
            .as_ref()
            .map_or(0, |status| status.container_statuses[0].restart_count);
        Ok((restarts == 1 && pod_is_ready(&pod)).then_some(pod))
    })?;
    let status = &restarted.status.as_ref().context("a status")?.container_statuses[0];
    let ended = status
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref())
        .context("the last state is told")?;
    ensure!(
        ended.exit_code == 137 && ended.reason == "Error",
        "it ended with {ended:?}"
    );
    ensure!(restarted.uid() == victim.uid(), "the pod itself stays");
    lab.wait_for_answers(&client, &["get", &address, "80", "30"], &pods)?;
    lab.wait("both starts are told of", Duration::from_secs(30), || {
        Ok((told(&lab, victim, "Started")? == 2).then_some(()))
    })?;

    lab.client.delete("pods", "default", pods[1].name(), None)?;
    let replaced = lab.wait("another pod takes its place", Duration::from_secs(60), || {
        let now: Vec<Pod> = lab.client.list("default", "app=web")?;
        let settled = now.len() == 3 && now.iter().all(|pod| pod_is_ready(pod) && !pod.is_deleting());
        Ok((settled && now.iter().all(|pod| pod.uid() != pods[1].uid())).then_some(now))
    })?;
    lab.wait_for_answers(&client, &["get", &address, "80", "30"], &replaced)?;
    ensure!(
        told(&lab, &pods[1], "Killing")? >= 1,
        "nobody was told that a pod's container was stopped"
    );
    lab.finish()
}

/// How often this was told of a pod.
fn told(lab: &Lab, pod: &Pod, reason: &str) -> Result<i32> {
    let events: Vec<Event> = lab.client.list(pod.namespace(), "")?;
    let of_it = |event: &&Event| {
        event
            .involved_object
            .as_ref()
            .is_some_and(|about| about.uid == pod.uid())
    };
    Ok(events
        .iter()
        .filter(|event| event.reason == reason)
        .filter(of_it)
        .map(|event| event.count)
        .sum())
}

#[test]
fn a_node_that_is_cut_off_is_replaced_and_cleared_when_it_returns() -> Result<()> {
    let options = Options {
        control_extra: "[node]\neviction_delay = \"2s\"\n".to_owned(),
        ..Options::default()
    };
    let lab = Lab::start("cut", &options)?;
    lab.client.apply(&(web("web", 6) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 6)?;
    let client = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    let on_three: Vec<&Pod> = pods
        .iter()
        .filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name == "node3"))
        .collect();
    ensure!(!on_three.is_empty(), "node3 has pods");

    lab.request(&Request::Link("node3".to_owned(), false))?;
    let elsewhere = lab.wait("six pods are ready on the other nodes", Duration::from_secs(90), || {
        let now: Vec<Pod> = lab.client.list("default", "app=web")?;
        let well: Vec<Pod> = now
            .into_iter()
            .filter(|pod| pod_is_ready(pod) && !pod.is_deleting())
            .filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name != "node3"))
            .collect();
        Ok((well.len() == 6).then_some(well))
    })?;
    lab.wait_for_answers(&client, &["get", &address, "80", "60"], &elsewhere)?;
    for pod in &on_three {
        ensure!(
            lab.pod_process("node3", pod.uid()).is_ok(),
            "a node that is cut off goes on by itself"
        );
    }

    lab.request(&Request::Link("node3".to_owned(), true))?;
    lab.wait("the old pods are stopped and gone", Duration::from_secs(60), || {
        let now: Vec<Pod> = lab.client.list("default", "app=web")?;
        let left = now.iter().any(|pod| on_three.iter().any(|old| old.uid() == pod.uid()));
        let running = on_three.iter().any(|pod| lab.pod_process("node3", pod.uid()).is_ok());
        Ok((!left && !running && now.len() == 6).then_some(()))
    })?;
    lab.wait_for_nodes()?;
    lab.finish()
}

fn control_is_killed(name: &str, store: StoreEngine) -> Result<()> {
    let lab = Lab::start(
        name,
        &Options {
            nodes: 2,
            store,
            ..Options::default()
        },
    )?;
    lab.client.apply(&(web("web", 4) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 4)?;
    let client = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    let before = processes(&lab, &pods)?;
    let load = lab.begin(&client, &["load", &address, "80", "50", "8"])?;
    for round in 0..3 {
        // Acknowledged just before the blow: it has to be there afterwards.
        let late = format!("late{round}");
        lab.client.apply(&web(&late, 1))?;
        let starts = lab.service("control/control")?.starts;
        lab.request(&Request::Signal("control/control".to_owned(), SIGKILL))?;
        lab.wait("control is started again", Duration::from_secs(20), || {
            Ok((lab.service("control/control")?.starts > starts && lab.client.ready().is_ok()).then_some(()))
        })?;
        lab.wait_for_pods(&format!("app={late}"), 1)?;
    }
    ensure!(finish(load)?.trim() == "sent 400 lost 0", "requests were lost");
    ensure!(processes(&lab, &pods)? == before, "containers were restarted");
    lab.wait_for_nodes()?;
    // Watches resumed: what changes now still reaches the nodes.
    lab.client.apply(&web("web", 1))?;
    let pods = lab.wait_for_pods("app=web", 1)?;
    lab.wait_for_answers(&client, &["get", &address, "80", "10"], &pods)?;
    lab.finish()
}

#[test]
fn control_is_killed_and_loses_nothing() -> Result<()> {
    control_is_killed("control", StoreEngine::Embedded)
}

#[test]
fn control_over_etcd_is_killed_and_loses_nothing() -> Result<()> {
    control_is_killed("etcd", StoreEngine::Etcd)
}
