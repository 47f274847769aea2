//! The lab itself: it leaves nothing, also when its supervisor is killed.

use std::{collections::BTreeSet, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use orlop_tests::{
    cgroup,
    lab::{Lab, Options, output},
    supervisor::sweep,
    workload::web,
};

/// What of a lab could stay on the machine: mounts, links, cgroups, namespaces' names, sockets, processes.
fn surroundings() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for line in fs::read_to_string("/proc/self/mounts")?.lines() {
        found.insert(format!("mount {line}"));
    }
    let mut links = Command::new("ip");
    links.args(["-o", "link"]);
    for line in output(links)?.lines() {
        found.insert(format!("link {}", line.split(':').nth(1).unwrap_or_default().trim()));
    }
    for hierarchy in cgroup::hierarchies()? {
        for entry in fs::read_dir(&hierarchy.mount)?
            .flatten()
            .filter(|entry| entry.path().is_dir())
        {
            found.insert(format!("cgroup {}", entry.path().display()));
        }
    }
    for folder in [
        "/run",
        "/run/netns",
        "/sys/fs/bpf",
        "/etc/cni",
        "/opt/cni",
        "/var/log/pods",
        "/var/lib/cni",
        "/var/lib/orlop",
    ] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            found.insert(format!("file {}", entry.path().display()));
        }
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        let line = fs::read_to_string(entry.path().join("cmdline"))
            .unwrap_or_default()
            .replace('\0', " ");
        let ours = [
            "orlop-control",
            "orlop-node",
            "orlop-lab",
            "orlop-logger",
            "containerd",
            "fixture",
            "pause",
        ];
        let first = Path::new(line.split(' ').next().unwrap_or_default())
            .file_name()
            .unwrap_or_default()
            .to_owned();
        if ours.iter().any(|name| first.to_string_lossy().starts_with(name)) {
            found.insert(format!("process {line}"));
        }
    }
    Ok(found)
}

#[test]
fn a_lab_leaves_nothing_when_it_is_dropped_or_killed() -> Result<()> {
    sweep()?;
    let before = surroundings()?;
    let options = Options {
        nodes: 1,
        ..Options::default()
    };
    {
        let lab = Lab::start("dropped", &options)?;
        lab.client.apply(&web("web", 1))?;
        lab.wait_for_pods("app=web", 1)?;
        ensure!(surroundings()? != before, "a lab can be seen");
        lab.finish()?;
    }
    let left: Vec<String> = surroundings()?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "a dropped lab left {left:#?}");

    let lab = Lab::start("killed", &options)?;
    lab.client.apply(&web("web", 1))?;
    lab.wait_for_pods("app=web", 1)?;
    kill(Pid::from_raw(lab.members.supervisor), Signal::SIGKILL)?;
    let id = lab.spec.id.clone();
    let removed = lab.wait("what it left can be removed", Duration::from_secs(20), || {
        let removed = sweep()?;
        Ok(removed.contains(&id).then_some(removed))
    })?;
    ensure!(removed == vec![id], "{removed:?}");
    lab.finish()?;
    let left: Vec<String> = surroundings()?.difference(&before).cloned().collect();
    ensure!(left.is_empty(), "a killed lab left {left:#?}");
    Ok(())
}

#[test]
fn a_living_lab_is_not_swept() -> Result<()> {
    let lab = Lab::start(
        "living",
        &Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    ensure!(!sweep()?.contains(&lab.spec.id), "a living lab was swept");
    lab.client.ready().context("the lab still works")?;
    let second = Command::new(lab.spec.binaries.join("orlop-lab"))
        .args(["supervise", "--tied"])
        .arg(&lab.spec.directory)
        .output()?;
    ensure!(!second.status.success(), "two supervisors have one lab");
    lab.finish()
}
