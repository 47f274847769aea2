//! Acting a planned fault out, and waiting until its end. Makes no choices but that of the pod whose shim is hit: its node's first.

mod halt;
mod machines;
mod prey;
pub(super) mod replicas;

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod},
};

use super::{
    plan::{Fault, Part},
    pods::{node_of, processes},
    versions::Turn,
    vigil::{PREY, PREY_COUNT, RECOVERY, Vigil},
};
use crate::{
    lab::{node_is_ready, output, pod_is_ready},
    supervisor::{Request, configuration::install_programs},
    workload,
};

/// A dead node is NotReady within this time, and its pods run elsewhere within the other.
const NOT_READY: Duration = Duration::from_secs(20);
/// See [`NOT_READY`].
const ELSEWHERE: Duration = Duration::from_secs(60);
/// What stands before the id of the agent's kernel programs, in its binary: `node-agent/src/dataplane/object.rs`.
const PROGRAMS_ID: &[u8] = b"orlop-ebpf ";

/// The service that is control, or the first of its replicas.
pub(super) const CONTROL: &str = "control/control";

impl Vigil<'_> {
    /// Acts a fault out and waits until the lab is well again.
    pub fn suffer(&mut self, fault: &Fault) -> Result<()> {
        let spared = self.aim(fault).with_context(|| format!("before {fault:?}"))?;
        match fault {
            Fault::Kill(Part::Service(name)) => self.kill_service(name),
            Fault::Kill(Part::Shim(node)) => self.kill_shim(node),
            Fault::Hang(Part::Service(name), time) => self.hang(std::slice::from_ref(name), |_| sleep(*time)),
            Fault::Hang(Part::Shim(node), time) => self.hang_shim(node, *time),
            Fault::Cut(node, way, time) => self.cut(node, *way, |_, _| sleep(*time)),
            Fault::CutUntilReplaced(node, way) => {
                let node = node.clone();
                self.cut(&node, *way, |vigil, since| vigil.wait_until_replaced(&node, since))
            }
            Fault::LoseQuorum(members, time) => self.lose_quorum(members, *time),
            Fault::LoseLeader(loss) => self.lose_leader(loss),
            Fault::Replace(name) => match replica_of(name) {
                Some(replica) => self.replace_control(replica),
                None => self.replace(name),
            },
            Fault::StepClock(service, seconds) => self.step_clock(service, *seconds),
            Fault::Reboot(node) => self.reboot(node),
            Fault::Disk(troubles, time) => self.trouble_disk(*troubles, *time),
        }
        .and_then(|()| self.goes_on(fault))
        .and_then(|()| self.settle())
        .and_then(|()| spared.check(self.lab))
        .with_context(|| format!("after {fault:?}"))
    }

    /// The node whose agent or containerd was hit starts a pod again.
    fn goes_on(&mut self, fault: &Fault) -> Result<()> {
        let (Fault::Kill(Part::Service(name)) | Fault::Hang(Part::Service(name), _) | Fault::Replace(name)) = fault
        else {
            return Ok(());
        };
        match name.split_once('/') {
            Some((node, "agent" | "containerd")) => {
                let took = self.start_probe(node)?;
                self.measured("a new pod there was ready after", took, None);
                self.remove_probe()
            }
            _ => Ok(()),
        }
    }

    /// Starts one more pod on a node; how long that took.
    fn start_probe(&mut self, node: &str) -> Result<Duration> {
        let since = Instant::now();
        self.wait("a new pod is accepted", |lab| {
            lab.client.apply(&workload::client("probe", node)).map(Some)
        })?;
        self.wait("a new pod is ready", |lab| {
            Ok(lab.client.get::<Pod>("default", "probe")?.filter(pod_is_ready))
        })?;
        Ok(since.elapsed())
    }

    fn remove_probe(&mut self) -> Result<()> {
        self.lab.client.delete("pods", "default", "probe", Some(1))?;
        self.wait("the probe is gone", |lab| {
            Ok(lab.client.get::<Pod>("default", "probe")?.is_none().then_some(()))
        })
    }

    fn kill_service(&mut self, name: &str) -> Result<()> {
        let starts = self.lab.service(name)?.starts;
        self.lab
            .request(&Request::Signal(name.to_owned(), Signal::SIGKILL as i32))?;
        self.lab.wait("it is started again", RECOVERY, || {
            let now = self.lab.service(name)?;
            Ok((now.starts > starts && now.pid.is_some()).then_some(()))
        })
    }

    /// A pod that may be hit on a node, and the pid of its shim: the parent of its pause.
    fn shim(&mut self, node: &str) -> Result<(Pod, Pid)> {
        let pod = self.prey_on(node)?;
        let pid = self.lab.pod_process(node, pod.uid())?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))
            .context("a parent")?;
        let shim = Pid::from_raw(parent.trim().parse()?);
        let command = fs::read_to_string(format!("/proc/{shim}/cmdline"))?;
        ensure!(
            command.contains("containerd-shim"),
            "process {shim} is no shim: {command:?}"
        );
        Ok((pod, shim))
    }

    /// That pod alone restarts: it stays the same pod.
    fn kill_shim(&mut self, node: &str) -> Result<()> {
        let (pod, shim) = self.shim(node)?;
        let own = processes(self.lab, std::slice::from_ref(&pod))?;
        kill(shim, Signal::SIGKILL)?;
        let since = Instant::now();
        self.wait("the pod of a killed shim runs anew", |lab| {
            let now: Pod = lab.client.get("default", pod.name())?.context("the pod is gone")?;
            ensure!(now.uid() == pod.uid(), "the pod was replaced");
            let processes = processes(lab, std::slice::from_ref(&now))?;
            let anew = processes.len() >= own.len() && processes.keys().all(|pid| !own.contains_key(pid));
            Ok((anew && pod_is_ready(&now)).then_some(()))
        })?;
        self.measured("the pod of a killed shim ran anew after", since.elapsed(), None);
        Ok(())
    }

    /// While a shim hangs, its node goes on with all other pods.
    fn hang_shim(&mut self, node: &str, time: Duration) -> Result<()> {
        let (_, shim) = self.shim(node)?;
        let took = self.stopped(&[shim], |vigil| {
            let started = vigil.start_probe(node);
            thread::sleep(time);
            started.context("a pod beside one whose shim hangs")
        })?;
        self.measured("a pod beside a hung shim was ready after", took, None);
        self.remove_probe()
    }

    fn wait_until_replaced(&mut self, node: &str, since: Instant) -> Result<()> {
        self.wait("a node that is cut off is NotReady", |lab| {
            let found: Node = lab.client.get("", node)?.context("the node's object is gone")?;
            Ok((!node_is_ready(&found)).then_some(()))
        })?;
        self.measured(
            "a node that is cut off was NotReady after",
            since.elapsed(),
            Some(NOT_READY),
        );
        self.wait("its pods run elsewhere", |lab| {
            let pods: Vec<Pod> = lab.client.list("default", PREY)?;
            let elsewhere = |pod: &&Pod| pod_is_ready(pod) && !pod.is_deleting() && node_of(pod) != node;
            Ok((pods.iter().filter(elsewhere).count() == PREY_COUNT).then_some(()))
        })?;
        self.measured("its pods ran elsewhere after", since.elapsed(), Some(ELSEWHERE));
        Ok(())
    }

    /// Stops the agent and starts another version of it. Where there is none, it is the same program. Its kernel programs count as
    /// others in any case, so that they are replaced under the traffic as by an upgrade.
    fn replace(&mut self, name: &str) -> Result<()> {
        let node = name.split('/').next().unwrap_or_default();
        let folder = format!("/sys/fs/bpf/orlop/{node}/programs");
        let programs = || output(self.lab.on_node(node, &["ls", &folder])?);
        let (starts, before) = (self.lab.service(name)?.starts, programs()?);
        let next = Turn::of(self.lab, name)?;
        let copy = next.copied(starts);
        with_programs_of_its_own(&next.binaries.join("orlop-node"), &copy, starts)?;
        install_programs(&self.lab.spec, node, &next.binaries)?;
        self.lab.request(&Request::Replace(name.to_owned(), copy))?;
        self.lab.wait(
            "another version has put its programs in the place of the old ones",
            RECOVERY,
            || {
                let now = programs()?;
                Ok((now != before && now.lines().count() == 1).then_some(()))
            },
        )
    }
}

/// The control replica that a service is.
fn replica_of(service: &str) -> Option<&str> {
    service.strip_suffix("/control")
}

fn sleep(time: Duration) -> Result<()> {
    thread::sleep(time);
    Ok(())
}

/// Copies the agent with another id of its kernel programs.
fn with_programs_of_its_own(agent: &Path, copy: &Path, id: u32) -> Result<()> {
    let mut bytes = fs::read(agent).with_context(|| format!("reading {}", agent.display()))?;
    let id = format!("{id:016x}");
    let places: Vec<usize> = bytes
        .windows(PROGRAMS_ID.len() + id.len())
        .enumerate()
        .filter(|(_, window)| {
            let (mark, id) = window.split_at(PROGRAMS_ID.len());
            mark == PROGRAMS_ID && id.iter().all(u8::is_ascii_hexdigit)
        })
        .map(|(place, _)| place + PROGRAMS_ID.len())
        .collect();
    ensure!(
        !places.is_empty(),
        "{} does not tell the id of its programs",
        agent.display()
    );
    for place in places {
        bytes[place..place + id.len()].copy_from_slice(id.as_bytes());
    }
    fs::write(copy, bytes).with_context(|| format!("writing {}", copy.display()))?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    Ok(fs::set_permissions(copy, executable)?)
}
