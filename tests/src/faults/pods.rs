//! What holds of pods: none restarts needlessly, no address is handed out twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result};
use orlop_proto::{Resource, core::v1::Pod};

use crate::lab::Lab;

/// Everything about running containers that no restart of anything else may change: pid -> start time in clock ticks.
pub type Processes = BTreeMap<i32, String>;

/// The processes of pods, read from their cgroups.
pub fn processes(lab: &Lab, pods: &[Pod]) -> Result<Processes> {
    let mut found = BTreeMap::new();
    let root = &crate::cgroup::hierarchies()?[0].mount;
    for pod in pods {
        let folder = root.join(lab.pod_cgroup(node_of(pod), pod.uid()));
        for entry in fs::read_dir(folder)?.flatten() {
            if entry.file_name() == "exec" || !entry.path().is_dir() {
                continue;
            }
            for pid in fs::read_to_string(entry.path().join("cgroup.procs"))?.lines() {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
                let start = stat
                    .rsplit(") ")
                    .next()
                    .and_then(|rest| rest.split(' ').nth(19))
                    .context("a start time")?;
                found.insert(pid.parse()?, start.to_owned());
            }
        }
    }
    Ok(found)
}

/// The node that a pod is bound to; empty when it is not.
pub fn node_of(pod: &Pod) -> &str {
    pod.spec
        .as_ref()
        .map(|spec| spec.node_name.as_str())
        .unwrap_or_default()
}

/// Who has which address, from what is told of pods one after the other.
#[derive(Debug, Default)]
pub struct Addresses {
    holders: BTreeMap<String, String>,
    /// Every address with two holders that was met: what, and who.
    pub twice: BTreeSet<String>,
}

impl Addresses {
    /// All pods that there are. Who is not among them, or has ended, has given its address back.
    pub fn observe(&mut self, pods: &[Pod]) {
        let mut holders: BTreeMap<String, String> = BTreeMap::new();
        for pod in pods {
            let Some(status) = &pod.status else { continue };
            let ended = matches!(status.phase.as_str(), "Succeeded" | "Failed");
            if status.pod_ip.is_empty() || status.pod_ip == status.host_ip || ended {
                continue;
            }
            if let Some(other) = holders.insert(status.pod_ip.clone(), pod.uid().to_owned()) {
                self.twice
                    .insert(format!("{} is that of {other} and of {}", status.pod_ip, pod.uid()));
            }
        }
        self.holders = holders;
    }

    /// How many pods have an address now.
    pub fn held(&self) -> usize {
        self.holders.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::core::v1::PodStatus;

    fn pod(uid: &str, address: &str, phase: &str) -> Pod {
        let mut pod = Pod {
            status: Some(PodStatus {
                pod_ip: address.to_owned(),
                phase: phase.to_owned(),
                ..PodStatus::default()
            }),
            ..Pod::default()
        };
        uid.clone_into(&mut pod.meta_mut().uid);
        pod
    }

    #[test]
    fn two_pods_with_one_address_are_found() {
        let mut addresses = Addresses::default();
        addresses.observe(&[
            pod("a", "10.244.0.2", "Running"),
            pod("b", "10.244.0.3", "Running"),
            pod("c", "", "Pending"),
        ]);
        addresses.observe(&[pod("a", "10.244.0.2", "Failed"), pod("d", "10.244.0.2", "Running")]);
        assert!(
            addresses.twice.is_empty(),
            "who has ended holds nothing: {:?}",
            addresses.twice
        );
        addresses.observe(&[pod("d", "10.244.0.2", "Running"), pod("e", "10.244.0.2", "Running")]);
        assert_eq!(addresses.twice.len(), 1);
        assert_eq!(addresses.held(), 1);
    }
}
