//! What befalls a machine as a whole: its clock, its power, its disk, another version of what runs there.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::{Resource, coordination::v1::Lease, core::v1::Pod};
use prost_types::Timestamp;

use super::{CONTROL, Vigil, prey::prey_of, replica_of, replicas};
use crate::{
    client::Client,
    disk::Troubles,
    faults::versions::Turn,
    lab::{Lab, pod_is_ready},
    supervisor::Request,
};

impl Vigil<'_> {
    /// Sets a wall clock, waits until every node's Lease was renewed with it, sets it back and waits again: nobody is taken for
    /// silent, nothing is evicted, nothing restarts.
    pub(super) fn step_clock(&mut self, service: &str, seconds: i64) -> Result<()> {
        let before = self.uids()?;
        // Where there are several, a node may be at another replica, whose clock is right.
        let by_all = replica_of(service).is_some() && self.lab.spec.controls == 1;
        for offset in [seconds, 0] {
            let (settings, leases) = (clock_settings(self.lab, service)?, leases_of(self.lab)?);
            self.lab.step_clock(service, offset)?;
            self.wait("the service has seen its clock being set", |lab| {
                let seen = match replica_of(service) {
                    Some(replica) => goes_by(lab, replica, offset)?,
                    None => clock_settings(lab, service)? > settings,
                };
                Ok(seen.then_some(()))
            })?;
            self.wait("every node has renewed its Lease since a clock was set", |lab| {
                let now = leases_of(lab)?;
                let renewed = |(node, before): (&String, &Lease)| {
                    now.get(node)
                        .is_some_and(|now| now != before && (!by_all || bears(renewed_at(now), offset)))
                };
                Ok(leases.iter().all(renewed).then_some(()))
            })?;
            ensure!(self.uids()? == before, "pods were replaced when a clock was set");
            self.goes_on_at(service)?;
        }
        Ok(())
    }

    /// A pod starts on the node whose clock was set; control's is everybody's.
    fn goes_on_at(&mut self, service: &str) -> Result<()> {
        let node = match service.split_once('/') {
            Some((node, "agent")) => node.to_owned(),
            _ => "node1".to_owned(),
        };
        let took = self.start_probe(&node)?;
        self.measured("a new pod was ready after a clock was set and", took, None);
        self.remove_probe()
    }

    fn uids(&self) -> Result<Vec<String>> {
        let pods: Vec<Pod> = self.lab.client.list("default", "")?;
        let mut uids: Vec<String> = pods.iter().map(|pod| pod.uid().to_owned()).collect();
        uids.sort();
        Ok(uids)
    }

    /// Off and on without control: the node's pods run again, as the same pods, from the ledger alone.
    pub(super) fn reboot(&mut self, node: &str) -> Result<()> {
        let here = prey_of(self.lab, node)?;
        ensure!(!here.is_empty(), "no pod that may be hit is on {node}");
        let controls = replicas::starts(self.lab)?;
        for control in controls.keys() {
            self.lab.request(&Request::Stop(control.clone()))?;
        }
        let outcome = self.lab.reboot(node).and_then(|()| {
            let lab = self.lab;
            lab.wait("a rebooted node runs its pods without control", super::RECOVERY, || {
                let missing = here.iter().filter(|pod| lab.pod_process(node, pod.uid()).is_err());
                Ok((missing.count() == 0).then_some(()))
            })
        });
        for control in controls.keys() {
            self.lab.request(&Request::Start(control.clone()))?;
        }
        outcome?;
        replicas::wait_for_starts(self.lab, &controls)?;
        for pod in here {
            self.wait("a pod of a rebooted node is ready", |lab| {
                let now: Pod = lab.client.get("default", pod.name())?.context("the pod is gone")?;
                ensure!(now.uid() == pod.uid(), "the pod was replaced");
                Ok(pod_is_ready(&now).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Something is wrong with the disk under the store for a while; nobody restarts control for it.
    pub(super) fn trouble_disk(&mut self, troubles: Troubles, time: Duration) -> Result<()> {
        let starts = self.lab.service(CONTROL)?.starts;
        let Some(disk) = &mut self.disk else {
            bail!("this lab's disks cannot be troubled")
        };
        disk.suffer(troubles)?;
        thread::sleep(time);
        disk.heal()?;
        let took = self.recorder.wait_for_writes()?;
        self.measured("writes went on, after the disk was well again, after", took, None);
        ensure!(self.lab.service(CONTROL)?.starts == starts, "control was restarted");
        Ok(())
    }

    /// Stops a control replica and starts another program in its place, on the same store and the same sockets: one of another version,
    /// where there are two.
    pub(super) fn replace_control(&mut self, replica: &str) -> Result<()> {
        let mut controls = replicas::starts(self.lab)?;
        controls.retain(|service, _| replica_of(service) == Some(replica));
        for (service, starts) in &controls {
            let next = Turn::of(self.lab, service)?;
            let copy = next.copied(*starts);
            fs::copy(next.binaries.join("orlop-control"), &copy).context("copying control")?;
            self.lab.request(&Request::Replace(service.clone(), copy))?;
        }
        replicas::wait_for_starts(self.lab, &controls)
    }
}

/// Each node's Lease.
fn leases_of(lab: &Lab) -> Result<BTreeMap<String, Lease>> {
    let leases: Vec<Lease> = lab.client.list("kube-node-lease", "")?;
    Ok(leases
        .into_iter()
        .map(|lease| (lease.name().to_owned(), lease))
        .collect())
}

/// Whether a control replica goes by a clock of this offset: what is made there bears its time.
fn goes_by(lab: &Lab, replica: &str, offset_seconds: i64) -> Result<bool> {
    const MADE: &str =
        "apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {name: made-now, namespace: default}\n";
    let client = Client::connect_to(&lab.members, replica)?;
    client.delete("leases", "default", "made-now", None)?;
    client.apply(MADE)?;
    let lease: Lease = client.get("default", "made-now")?.context("a Lease that was made")?;
    client.delete("leases", "default", "made-now", None)?;
    Ok(bears(lease.meta().creation_timestamp, offset_seconds))
}

fn renewed_at(lease: &Lease) -> Option<Timestamp> {
    lease.spec.as_ref().and_then(|spec| spec.renew_time)
}

/// Whether a time is that of a clock of this offset, now or a moment ago.
fn bears(time: Option<Timestamp>, offset_seconds: i64) -> bool {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let now = i64::try_from(since.as_secs()).unwrap_or(i64::MAX) + offset_seconds;
    time.is_some_and(|time| time.seconds.abs_diff(now) < 300)
}

/// How often an agent has told that its wall clock was set.
fn clock_settings(lab: &Lab, service: &str) -> Result<usize> {
    let log = format!("logs/{}.log", service.replace('/', "-"));
    let text = fs::read_to_string(lab.spec.directory.join(log)).context("reading a log")?;
    Ok(text.matches("the wall clock was set").count())
}
