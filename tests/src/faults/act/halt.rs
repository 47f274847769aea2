//! What goes on no more for a while: a process that is stopped, a cable that loses packets, an etcd without its quorum. Each is seen
//! to be so.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use orlop_proto::{Resource, core::v1::Node};
use prost_types::Timestamp;

use super::{RECOVERY, Vigil};
use crate::{
    lab::Lab,
    layout::{API_PORT, CONTROL_ADDRESS, ETCD_ADDRESS, ETCD_CLIENTS, Way},
    supervisor::{Request, lost},
};

impl Vigil<'_> {
    /// Stops services for a while. `meanwhile` goes on until they may continue.
    pub(super) fn hang(&mut self, names: &[String], meanwhile: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut stopped = Vec::new();
        for name in names {
            let pid = self.lab.service(name)?.pid;
            stopped.push(Pid::from_raw(pid.with_context(|| format!("{name} does not run"))?));
        }
        self.stopped(&stopped, meanwhile)
    }

    /// Stops processes for a while: SIGSTOP, and SIGCONT in the end.
    pub(super) fn stopped<T>(
        &mut self,
        processes: &[Pid],
        meanwhile: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        for pid in processes {
            kill(*pid, Signal::SIGSTOP).with_context(|| format!("stopping {pid}"))?;
        }
        self.lab.wait("the processes are stopped", RECOVERY, || {
            let running = processes.iter().find_map(|pid| runs(*pid).transpose());
            running.transpose().map(|running| running.is_none().then_some(()))
        })?;
        let outcome = meanwhile(self);
        for pid in processes {
            let woke = runs(*pid)?;
            ensure!(woke.is_none(), "a process that was to hang runs: {woke:?}");
            kill(*pid, Signal::SIGCONT).with_context(|| format!("continuing {pid}"))?;
        }
        outcome
    }

    /// Most of etcd's members stop: no write that begins then is acknowledged before they go on, and no node is given up for it.
    pub(super) fn lose_quorum(&mut self, members: &[String], time: Duration) -> Result<()> {
        let before = ready_since(self.lab)?;
        let mut span = (0, 0);
        self.hang(members, |vigil| {
            span.0 = vigil.recorder.now();
            // The writers may all wait for what they began before.
            vigil.recorder.attempt();
            thread::sleep(time);
            span.1 = vigil.recorder.now();
            Ok(())
        })?;
        let took = self.recorder.wait_for_writes()?;
        self.measured("writes went on, after the quorum was back, after", took, None);
        let acknowledged = self.recorder.acknowledged_within(span.0, span.1);
        ensure!(
            acknowledged.is_empty(),
            "writes were acknowledged without a quorum: {acknowledged:?}"
        );
        self.settle()?;
        let now = ready_since(self.lab)?;
        ensure!(
            now == before,
            "a node was not Ready when etcd had no quorum: {before:?}, now {now:?}"
        );
        Ok(())
    }

    /// The cable of a node or of a control replica loses everything, or what goes one way. `meanwhile` is told when that began.
    pub(super) fn cut(
        &mut self,
        member: &str,
        way: Option<Way>,
        meanwhile: impl FnOnce(&mut Self, Instant) -> Result<()>,
    ) -> Result<()> {
        let cable = |up: bool| match way {
            None => Request::Link(member.to_owned(), up),
            Some(way) => Request::Lose(member.to_owned(), (!up).then_some(way)),
        };
        self.lab
            .wait("a cable that is to be cut leads somewhere", RECOVERY, || {
                Ok(reaches(self.lab, member)?.then_some(()))
            })?;
        let since = Instant::now();
        self.lab.request(&cable(false))?;
        let outcome = is_cut(self.lab, member, way).and_then(|()| meanwhile(self, since));
        self.lab.request(&cable(true))?;
        outcome
    }
}

/// Since when each node is Ready.
pub(super) fn ready_since(lab: &Lab) -> Result<BTreeMap<String, Option<Timestamp>>> {
    let nodes: Vec<Node> = lab.client.list("", "")?;
    let since = |node: &Node| {
        let mut conditions = node.status.iter().flat_map(|status| &status.conditions);
        let ready = conditions.find(|condition| condition.r#type == "Ready");
        ready.and_then(|ready| ready.last_transition_time)
    };
    Ok(nodes.iter().map(|node| (node.name().to_owned(), since(node))).collect())
}

/// A thread of a process that is not stopped, and its state.
fn runs(pid: Pid) -> Result<Option<String>> {
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
        let path = task?.path().join("status");
        let status = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        let state = state.context("a thread has a state")?.trim();
        if !state.starts_with('T') {
            return Ok(Some(format!("{}: {state}", path.display())));
        }
    }
    Ok(None)
}

/// Nothing comes through any more; and what is lost one way is lost on that way.
fn is_cut(lab: &Lab, member: &str, way: Option<Way>) -> Result<()> {
    ensure!(!reaches(lab, member)?, "{member} reaches others over its cut cable");
    match way {
        Some(way) if lost(&lab.members, member)? == 0 => bail!("nothing was lost on the cable of {member}: {way:?}"),
        _ => Ok(()),
    }
}

/// Whether a connection comes about within a second: from a node to control, which need not run, its sockets are the lab's; from a
/// control replica to etcd, which has to.
fn reaches(lab: &Lab, member: &str) -> Result<bool> {
    let (address, port) = if lab.spec.control_names().iter().any(|replica| replica == member) {
        (ETCD_ADDRESS, ETCD_CLIENTS)
    } else {
        (CONTROL_ADDRESS, API_PORT)
    };
    let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
    let mut command = lab.on_node(member, &["timeout", "1", "bash", "-c", &connect])?;
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    Ok(output.status.success())
}
