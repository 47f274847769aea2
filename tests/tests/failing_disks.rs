//! Disks that are slow and fail, under control's store and under the agent's ledger: a FUSE file system that is told what goes wrong. A
//! sync that fails loses what was written since the last one.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use orlop_proto::{Resource, core::v1::Pod};
use orlop_tests::{
    disk::{DiskError, FaultyDisk, Troubles},
    faults::{history::check, recorder::Recorder},
    lab::{Lab, Options},
    supervisor::Request,
    workload::{client, finish, pod, web},
};

const PATIENCE: Duration = Duration::from_secs(120);
const SIGKILL: i32 = 9;
const NAMESPACE: &str = "history";

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

/// What goes wrong, how long a healed disk may be waited for, and what control says of it.
const STORE: [(&str, Troubles, &str); 3] = [
    (
        "sync",
        Troubles {
            sync: Some(DiskError::Io),
            ..NOTHING
        },
        "Input/output error",
    ),
    (
        "write",
        Troubles {
            write: Some(DiskError::Io),
            ..NOTHING
        },
        "Input/output error",
    ),
    (
        "space",
        Troubles {
            write: Some(DiskError::NoSpace),
            ..NOTHING
        },
        "No space left",
    ),
];
const NOTHING: Troubles = Troubles {
    read: false,
    write: None,
    sync: None,
    sync_delay_ms: 0,
    power_cut: false,
};

#[test]
fn control_loses_no_write_on_a_failing_disk() -> Result<()> {
    let lab = Lab::start(
        "failing-store",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    let data = lab.spec.member_directory("control").join("data");
    let mut disk = FaultyDisk::put_under(&lab, "control", &data, "control/control")?;
    lab.wait("control answers", PATIENCE, || Ok(lab.client.ready().ok()))?;
    lab.wait_for_nodes()?;
    lab.client.apply(&namespace(NAMESPACE))?;
    let recorder = Recorder::begin(&lab.members, &["control".to_owned()], NAMESPACE, 7)?;
    let starts = lab.service("control/control")?.starts;

    for (name, troubles, reason) in STORE {
        disk.suffer(troubles)?;
        let error = lab.wait("a write is refused", PATIENCE, || {
            let refused = lab.client.apply(&namespace(&format!("refused-{name}")));
            Ok(refused.err().map(|error| format!("{error:#}")))
        })?;
        ensure!(
            error.contains("store.redb") && error.contains(reason),
            "{name}: {error}"
        );
        lab.wait("the pages tell of it", PATIENCE, || {
            // The store tries again by itself, so a page tells of it only in between.
            let _refused = lab.client.apply(&namespace("refused"));
            let health = lab.page("/healthz")?;
            Ok((health.ends_with(" 503") && health.contains("store.redb")).then_some(()))
        })?;
        ensure!(lab.page("/livez")?.ends_with(" 200"), "a restart heals no disk");
        lab.client.list::<Pod>("default", "").context("lists go on")?;
        disk.heal()?;
        recorder.wait_for_writes()?;
    }
    // Each sync takes 0.4 s: writers wait, and nobody is told of trouble that there is not.
    disk.suffer(Troubles {
        sync_delay_ms: 400,
        ..NOTHING
    })?;
    for _ in 0..5 {
        recorder.wait_for_writes()?;
    }
    ensure!(lab.page("/healthz")?.ends_with(" 200"), "a slow disk is no broken one");
    disk.heal()?;
    ensure!(
        lab.condition("node1", "Ready")?.status == "True",
        "the disk was taken for the node's silence"
    );
    ensure!(
        lab.service("control/control")?.starts == starts,
        "control was restarted"
    );

    // The machine loses its power in the middle of writes: what was acknowledged was synced.
    lab.request(&Request::Signal("control/control".to_owned(), SIGKILL))?;
    disk.suffer(Troubles {
        power_cut: true,
        ..NOTHING
    })?;
    disk.heal()?;
    recorder.wait_for_writes()?;
    ensure!(
        lab.service("control/control")?.starts > starts,
        "control was started again"
    );
    let found = check(&recorder.finish()?);
    ensure!(found.is_empty(), "{found:?}");
    // The disk outlives what uses it.
    let ended = lab.finish();
    drop(disk);
    ended
}

/// A service whose only endpoint is this pod.
fn moved_to(pod: &Pod) -> Result<String> {
    let address = &pod.status.as_ref().context("a pod that runs")?.pod_ip;
    Ok(format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: moves, namespace: default}}\nspec: {{ports: [{{port: 80, targetPort: 8080}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: moves-1, namespace: default, labels: {{kubernetes.io/service-name: moves}}}}\n\
         endpoints: [{{addresses: [{address}], conditions: {{ready: true}}}}]\nports: [{{port: 8080}}]\n"
    ))
}

fn processes(lab: &Lab, pods: &[Pod]) -> Result<BTreeMap<String, i32>> {
    pods.iter()
        .map(|pod| Ok((pod.name().to_owned(), lab.pod_process("node1", pod.uid())?)))
        .collect()
}

#[test]
fn an_agent_on_a_failing_disk_disturbs_nothing_and_recovers() -> Result<()> {
    let lab = Lab::start(
        "failing-ledger",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    lab.client.apply(&(web("web", 2) + &client("client", "node1")))?;
    let pods = lab.wait_for_pods("app=web", 2)?;
    let asks = lab.wait_for_pod("client")?;
    let address = lab.cluster_ip("web")?;
    lab.wait_for_answers(&asks, &["get", &address, "80", "20"], &pods)?;
    let data = lab.spec.member_directory("node1").join("data");
    let mut disk = FaultyDisk::put_under(&lab, "node1", &data, "node1/agent")?;
    lab.wait_for_nodes()?;
    let (before, mut starts) = (processes(&lab, &pods)?, lab.service("node1/agent")?.starts);
    let load = lab.begin(&asks, &["load", &address, "80", "40", "stdin"])?;

    for (name, troubles, reason) in STORE {
        disk.suffer(troubles)?;
        let late = format!("late-{name}");
        lab.client.apply(&pod(&late, "node1", &["sleep"]))?;
        lab.wait("the node tells that its ledger cannot be written", PATIENCE, || {
            let pressure = lab.condition("node1", "DiskPressure")?;
            let told = pressure.reason == "LedgerNotWritten" && pressure.message.contains("/ledger/");
            Ok((told && pressure.message.contains(reason)).then_some(()))
        })?;
        let waits: Pod = lab.client.get("default", &late)?.context("the pod")?;
        let runs = lab.pod_process("node1", waits.uid());
        ensure!(runs.is_err(), "a pod runs that the ledger does not have");
        disk.heal()?;
        lab.wait_for_pod(&late)?;
        lab.wait("the pressure is over", PATIENCE, || {
            Ok((lab.condition("node1", "DiskPressure")?.reason != "LedgerNotWritten").then_some(()))
        })?;
    }
    lab.client.apply(&moved_to(&pods[0])?)?;
    let moves = lab.cluster_ip("moves")?;
    let ask = ["get", &moves, "80", "5"];
    lab.wait_for_answers(&asks, &ask, &pods[..1])?;
    disk.suffer(Troubles {
        sync_delay_ms: 5000,
        ..NOTHING
    })?;
    lab.client.apply(&pod("late-slow", "node1", &["sleep"]))?;
    let waits = lab.wait("the pod has its node", PATIENCE, || {
        let pod: Option<Pod> = lab.client.get("default", "late-slow")?;
        Ok(pod.filter(|pod| pod.spec.as_ref().is_some_and(|spec| !spec.node_name.is_empty())))
    })?;
    // Services wait for no disk: the other endpoint answers while the pod is not durable yet.
    lab.client.apply(&moved_to(&pods[1])?)?;
    lab.wait_for_answers(&asks, &ask, &pods[1..2])?;
    let runs = lab.pod_process("node1", waits.uid());
    ensure!(runs.is_err(), "the ledger was written before the endpoint answered");
    lab.wait_for_pod("late-slow")?;
    ensure!(
        lab.condition("node1", "Ready")?.status == "True",
        "a slow disk is no dead node"
    );
    disk.heal()?;
    ensure!(lab.service("node1/agent")?.starts == starts, "the agent was restarted");

    // What cannot be read is not taken for damaged: the agent is started until it can be, and the pods go on.
    disk.suffer(Troubles { read: true, ..NOTHING })?;
    lab.request(&Request::Signal("node1/agent".to_owned(), SIGKILL))?;
    starts += 3;
    lab.wait("the agent is started again and again", PATIENCE, || {
        Ok((lab.service("node1/agent")?.starts > starts).then_some(()))
    })?;
    disk.heal()?;
    lab.client.apply(&pod("late-read", "node1", &["sleep"]))?;
    lab.wait_for_pod("late-read")?;
    let aside = std::fs::read_dir(data.join("ledger/damaged"))?.count();
    ensure!(aside == 0, "{aside} files of the ledger were put aside");
    lab.wait_for_nodes()?;

    let told = finish(load)?;
    ensure!(told.trim().ends_with(" lost 0"), "requests were lost: {told}");
    ensure!(processes(&lab, &pods)? == before, "running pods were restarted");
    // The disk outlives what uses it.
    let ended = lab.finish();
    drop(disk);
    ended
}
