//! Disks that fill up, under control's store and under the agent's ledger: each is a small tmpfs in the member's mount namespace. An etcd that
//! has reached its quota.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{
    Resource,
    core::v1::{Namespace, Pod},
};
use orlop_tests::{
    lab::{Lab, Options, output},
    layout::{ETCD_CLIENTS, ETCD_MEMBER, StoreEngine},
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

/// Longer than a silent node counts as Ready, and than a leader's claim holds: neither lease can be renewed meanwhile.
const FULL_FOR: Duration = Duration::from_secs(25);

#[test]
fn control_over_a_full_etcd_says_so_serves_reads_and_recovers() -> Result<()> {
    let options = Options {
        nodes: 1,
        store: StoreEngine::Etcd,
        etcd_quota: 24 << 20,
        ..Options::default()
    };
    let lab = Lab::start("full-etcd", &options)?;
    lab.client.apply(&(web("web", 2) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 2)?;
    let asks = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(&asks, &["get", &address, "80", "20"], &pods)?;
    let pids = |lab: &Lab| -> Result<Vec<i32>> { pods.iter().map(|pod| lab.pod_process("node1", pod.uid())).collect() };
    let before = (ready_since(&lab)?, lab.service("control/control")?.starts, pids(&lab)?);
    let begun = lab.client.revision()?;

    // The past of one object, until there is no room for more.
    let filler = |text: &str| {
        let metadata = format!(
            "name: filler, labels: {{version: \"{text}\"}}, annotations: {{filler: {}}}",
            "x".repeat(60_000)
        );
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{{metadata}}}\n")
    };
    let mut version = 0;
    let error = loop {
        match lab.client.apply(&filler(&version.to_string())) {
            Ok(_) => version += 1,
            Err(error) => break format!("{error:#}"),
        }
        ensure!(version < 2000, "an etcd with a quota takes everything");
    };
    let full = Instant::now();
    ensure!(
        error.contains("database space exceeded") && error.contains("etcdctl alarm disarm"),
        "{error}"
    );
    let load = lab.begin(&asks, &["load", &address, "80", "50", "stdin"])?;
    lab.wait("the pages tell of it", PATIENCE, || {
        let _refused = lab.client.apply(&filler("refused"));
        let (health, ready) = (lab.page("/healthz")?, lab.page("/readyz")?);
        let told = |page: &str| page.ends_with(" 503") && page.contains("etcd takes no writes");
        Ok((told(&health) && told(&ready)).then_some(()))
    })?;
    ensure!(lab.page("/livez")?.ends_with(" 200"), "a restart makes no room");
    let found = |lab: &Lab| -> Result<String> {
        let filler: Namespace = lab.client.get("", "filler")?.context("the namespace")?;
        Ok(filler.meta().labels["version"].clone())
    };
    // The write that crosses the quota is written and refused all the same.
    let last = found(&lab)?;
    let written = if last == version.to_string() {
        version + 1
    } else {
        version
    };
    ensure!(
        last == (written - 1).to_string(),
        "version {last} is read, and {version} were acknowledged"
    );
    // Who resumes a watch is told of the past, too.
    let now = lab.client.revision()?;
    let told = lab.client.history("namespaces", begun, now)?;
    ensure!(
        told.iter().filter(|(_, name, _)| name == "filler").count() == written,
        "{} of {written} versions are told",
        told.len()
    );
    lab.wait("nobody can lead", PATIENCE, || {
        Ok((lab.metric("control", "orlop_control_leader")? == 0).then_some(()))
    })?;
    std::thread::sleep(FULL_FOR.saturating_sub(full.elapsed()));
    lab.request(&Request::Signal("control/control".to_owned(), SIGKILL))?;
    lab.wait("control is started again, and reads are served", PATIENCE, || {
        let again = lab.service("control/control")?.starts > before.1;
        Ok((again && found(&lab).ok().as_ref() == Some(&last)).then_some(()))
    })?;

    let endpoint = format!("--endpoints=http://127.0.0.1:{ETCD_CLIENTS}");
    let etcdctl = |words: &[&str]| output(lab.on_node(ETCD_MEMBER, &[&["etcdctl", &endpoint], words].concat())?);
    etcdctl(&["compact", "--physical", &now.to_string()])?;
    etcdctl(&["defrag"])?;
    etcdctl(&["alarm", "disarm"])?;
    lab.wait("writes are taken again", PATIENCE, || {
        Ok(lab.client.apply(&filler("healed")).ok().map(drop))
    })?;
    ensure!(found(&lab)? == "healed", "what was written then is read");
    lab.client.apply(&pod("late", "node1", &["sleep"]))?;
    lab.wait_for_pod("late")?;
    lab.wait("it is healthy again", PATIENCE, || {
        Ok(lab.page("/healthz")?.ends_with(" 200").then_some(()))
    })?;
    let told = finish(load)?;
    ensure!(told.trim().ends_with(" lost 0"), "requests were lost: {told}");
    // By now a node that was taken for silent would be not Ready.
    let after = (
        ready_since(&lab)?,
        lab.service("control/control")?.starts - 1,
        pids(&lab)?,
    );
    ensure!(
        after == before,
        "a node was given up, control ended by itself, or a pod was restarted: {before:?}, then {after:?}"
    );
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
