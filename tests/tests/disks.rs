//! Disks that fill up, under control's store and under the agent's ledger. Each is a small tmpfs in the member's mount namespace.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Namespace, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output},
    supervisor::Request,
    workload::{client, finish, pod, web},
};

const PATIENCE: Duration = Duration::from_secs(120);
const SIGKILL: i32 = 9;

/// Moves a folder of a member onto a disk of its own.
fn small_disk(lab: &Lab, member: &str, service: &str, folder: &str) -> Result<String> {
    let data = lab.spec.member_directory(member).join(folder).display().to_string();
    lab.request(&Request::Stop(service.to_owned()))?;
    let script = format!(
        "set -e; cp -a {data} /run/moved; mount -t tmpfs -o size=48m,mode=700 tmpfs {data}; cp -a /run/moved/. {data}/; \
         rm -r /run/moved"
    );
    output(lab.on_node(member, &["sh", "-c", &script])?)?;
    lab.resume(service)?;
    Ok(data)
}

fn fill(lab: &Lab, member: &str, data: &str) -> Result<()> {
    // It ends when nothing fits any more.
    let script = format!("dd if=/dev/zero of={data}/ballast bs=4k 2>/dev/null; df --output=avail {data} | tail -1");
    let left = output(lab.on_node(member, &["sh", "-c", &script])?)?;
    ensure!(left.trim() == "0", "{left} KiB are left");
    Ok(())
}

fn heal(lab: &Lab, member: &str, data: &str) -> Result<()> {
    output(lab.on_node(member, &["rm", &format!("{data}/ballast")])?).map(drop)
}

/// A namespace that takes some pages in the store.
fn namespace(name: &str) -> String {
    let text = "x".repeat(60_000);
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, annotations: {{filler: {text}}}}}\n")
}

/// When Ready last changed.
fn ready_since(lab: &Lab) -> Result<String> {
    let ready = lab.condition("node1", "Ready")?;
    ensure!(ready.status == "True", "node1 is not Ready: {ready:?}");
    Ok(format!("{:?}", ready.last_transition_time))
}

#[test]
fn control_on_a_full_disk_says_so_serves_reads_and_recovers() -> Result<()> {
    let options = Options {
        nodes: 1,
        ..Options::default()
    };
    let lab = Lab::start("full-store", &options)?;
    let data = small_disk(&lab, "control", "control/control", "data")?;
    lab.wait("control answers", PATIENCE, || Ok(lab.client.ready().ok()))?;
    lab.wait_for_nodes()?;
    let (since, starts) = (ready_since(&lab)?, lab.service("control/control")?.starts);
    fill(&lab, "control", &data)?;

    let mut acknowledged = BTreeSet::new();
    let mut number = 0;
    let error = loop {
        let name = format!("filler-{number}");
        number += 1;
        match lab.client.apply(&namespace(&name)) {
            Ok(_) => acknowledged.insert(name),
            Err(error) => break format!("{error:#}"),
        };
        if number > 2000 {
            bail!("a full disk takes everything");
        }
    };
    ensure!(
        error.contains("store.redb") && error.contains("No space left"),
        "{error}"
    );
    lab.wait("the pages tell of it", PATIENCE, || {
        // The store tries again by itself, so a page tells of it only in between.
        let _refused = lab.client.apply(&namespace("refused"));
        let (health, ready) = (lab.page("/healthz")?, lab.page("/readyz")?);
        let told = |page: &str| page.ends_with(" 503") && page.contains("store.redb");
        Ok((told(&health) || told(&ready)).then_some(()))
    })?;
    ensure!(lab.page("/livez")?.ends_with(" 200"), "a restart heals no disk");
    let names = |lab: &Lab| -> Result<BTreeSet<String>> {
        let all = lab.client.list::<Namespace>("", "")?;
        Ok(all.iter().map(|namespace| namespace.name().to_owned()).collect())
    };
    ensure!(names(&lab)?.is_superset(&acknowledged), "reads go on");

    heal(&lab, "control", &data)?;
    lab.wait("writes are taken again", PATIENCE, || {
        Ok(lab.client.apply(&namespace("healed")).ok().map(drop))
    })?;
    acknowledged.insert("healed".to_owned());
    ensure!(lab.page("/healthz")?.ends_with(" 200"), "it is healthy again");
    ensure!(
        lab.service("control/control")?.starts == starts,
        "control was restarted"
    );
    ensure!(ready_since(&lab)? == since, "the disk was taken for the node's silence");
    lab.request(&Request::Signal("control/control".to_owned(), SIGKILL))?;
    lab.wait("control is started again", PATIENCE, || {
        Ok((lab.service("control/control")?.starts > starts && lab.client.ready().is_ok()).then_some(()))
    })?;
    ensure!(names(&lab)?.is_superset(&acknowledged), "an acknowledged write is lost");
    lab.finish()
}

#[test]
fn an_agent_on_a_full_disk_disturbs_nothing_and_recovers() -> Result<()> {
    let options = Options {
        nodes: 1,
        ..Options::default()
    };
    let lab = Lab::start("full-ledger", &options)?;
    lab.client.apply(&(web("web", 2) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 2)?;
    let asks = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(&asks, &["get", &address, "80", "20"], &pods)?;
    let data = small_disk(&lab, "node1", "node1/agent", "data")?;
    lab.wait_for_nodes()?;
    let starts = lab.service("node1/agent")?.starts;
    let pids = |lab: &Lab| -> Result<Vec<i32>> { pods.iter().map(|pod| lab.pod_process("node1", pod.uid())).collect() };
    let before = pids(&lab)?;

    fill(&lab, "node1", &data)?;
    let load = lab.begin(&asks, &["load", &address, "80", "50", "stdin"])?;
    lab.client.apply(&pod("late", "node1", &["sleep"]))?;
    let pressure = lab.wait("the node tells that its ledger cannot be written", PATIENCE, || {
        Ok(Some(lab.condition("node1", "DiskPressure")?).filter(|pressure| pressure.reason == "LedgerNotWritten"))
    })?;
    ensure!(
        pressure.message.contains("/ledger/") && pressure.message.contains("No space left"),
        "{}",
        pressure.message
    );
    let late: Pod = lab.client.get("default", "late")?.context("the pod")?;
    ensure!(
        lab.pod_process("node1", late.uid()).is_err(),
        "a pod runs that the ledger does not have"
    );
    ensure!(pids(&lab)? == before, "running pods were restarted");

    heal(&lab, "node1", &data)?;
    lab.wait_for_pod("late")?;
    lab.wait("the pressure is over", PATIENCE, || {
        Ok((lab.condition("node1", "DiskPressure")?.reason != "LedgerNotWritten").then_some(()))
    })?;
    let told = finish(load)?;
    ensure!(told.trim().ends_with(" lost 0"), "requests were lost: {told}");
    ensure!(pids(&lab)? == before, "running pods were restarted");
    ensure!(lab.service("node1/agent")?.starts == starts, "the agent was restarted");
    lab.finish()
}
