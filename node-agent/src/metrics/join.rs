//! From readings to the report: pure, but for what the last reading was.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use orlop_proto::metrics::v1::{
    BackendMetrics, ContainerMetrics, Cpu, Filesystem, Memory, Network, NodeMetrics, NodeReport, PodMetrics,
    ServiceMetrics,
};

use crate::{
    dataplane::{NetworkCounters, ServiceCounters, ServiceId},
    runtime::PodId,
};

/// All that was read at one moment.
#[derive(Debug, Clone, Default)]
pub struct Readings {
    /// The machine.
    pub node: NodeReading,
    /// Its pods.
    pub pods: Vec<PodReading>,
    /// Connections by service.
    pub services: Vec<(ServiceId, ServiceCounters)>,
}

/// The machine's totals.
#[derive(Debug, Clone, Copy, Default)]
pub struct NodeReading {
    /// Nanoseconds of all CPUs that were not idle.
    pub cpu: u64,
    /// Its memory.
    pub memory: Memory,
    /// Its disk.
    pub filesystem: Filesystem,
}

/// One pod.
#[derive(Debug, Clone)]
pub struct PodReading {
    /// Which.
    pub id: PodId,
    /// Its running containers.
    pub containers: Vec<ContainerReading>,
    /// Its traffic, if it is counted.
    pub network: Option<NetworkCounters>,
}

/// One container.
#[derive(Debug, Clone, Default)]
pub struct ContainerReading {
    /// Its name in the pod.
    pub name: String,
    /// The id of its cgroup: tells one start of it from the next.
    pub cgroup_id: u64,
    /// Nanoseconds, from the program.
    pub cpu: Option<u64>,
    /// From its cgroup's files.
    pub memory: Option<Memory>,
    /// Bytes of its writable layer.
    pub rootfs: Option<u64>,
    /// Bytes of its logs.
    pub logs: Option<u64>,
}

/// Makes reports, with rates over the time since the last one.
#[derive(Debug)]
pub struct Joiner {
    node: String,
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    at: SystemTime,
    node_cpu: u64,
    /// By cgroup id.
    cpu: HashMap<u64, u64>,
}

impl Joiner {
    /// For the node of this name.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            last: None,
        }
    }

    /// The report on these readings.
    pub fn join(&mut self, readings: &Readings, now: SystemTime) -> NodeReport {
        let window = self
            .last
            .as_ref()
            .and_then(|last| now.duration_since(last.at).ok())
            .unwrap_or_default();
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(0);
        let report = NodeReport {
            node: Some(NodeMetrics {
                name: self.node.clone(),
                timestamp: Some(now.into()),
                window_ms,
                cpu: Some(cpu(
                    readings.node.cpu,
                    self.last.as_ref().map(|last| last.node_cpu),
                    window,
                )),
                memory: Some(readings.node.memory),
                filesystem: Some(readings.node.filesystem),
            }),
            pods: readings.pods.iter().map(|pod| self.pod(pod, now, window)).collect(),
            services: readings.services.iter().map(service).collect(),
        };
        let containers = readings.pods.iter().flat_map(|pod| &pod.containers);
        self.last = Some(Last {
            at: now,
            node_cpu: readings.node.cpu,
            cpu: containers
                .filter_map(|container| Some((container.cgroup_id, container.cpu?)))
                .collect(),
        });
        report
    }

    fn pod(&self, pod: &PodReading, now: SystemTime, window: Duration) -> PodMetrics {
        let containers = pod.containers.iter().map(|container| {
            let before = self
                .last
                .as_ref()
                .and_then(|last| last.cpu.get(&container.cgroup_id).copied());
            let filesystem = |used_bytes| Filesystem {
                used_bytes,
                capacity_bytes: 0,
            };
            ContainerMetrics {
                name: container.name.clone(),
                cpu: container.cpu.map(|total| cpu(total, before, window)),
                memory: container.memory,
                rootfs: container.rootfs.map(filesystem),
                logs: container.logs.map(filesystem),
            }
        });
        PodMetrics {
            namespace: pod.id.namespace.clone(),
            name: pod.id.name.clone(),
            uid: pod.id.uid.clone(),
            node_name: self.node.clone(),
            timestamp: Some(now.into()),
            window_ms: u64::try_from(window.as_millis()).unwrap_or(0),
            containers: containers.collect(),
            network: pod.network.map(|network| Network {
                rx_bytes: network.rx_bytes,
                rx_packets: network.rx_packets,
                tx_bytes: network.tx_bytes,
                tx_packets: network.tx_packets,
            }),
        }
    }
}

/// A counter with its rate; what was not read before has none yet.
fn cpu(total: u64, before: Option<u64>, window: Duration) -> Cpu {
    let used = before.map_or(0, |before| u128::from(total.saturating_sub(before)));
    let rate = (used * 1_000_000_000).checked_div(window.as_nanos()).unwrap_or(0);
    Cpu {
        usage_core_nanoseconds: total,
        usage_nanocores: u64::try_from(rate).unwrap_or(u64::MAX),
    }
}

fn service((id, counters): &(ServiceId, ServiceCounters)) -> ServiceMetrics {
    let backends = counters.backends.iter().map(|backend| BackendMetrics {
        address: backend.address.to_string(),
        protocol: if backend.protocol == 17 { "udp" } else { "tcp" }.to_owned(),
        connections: backend.connections,
    });
    ServiceMetrics {
        namespace: id.0.clone(),
        name: id.1.clone(),
        connections: counters.connections,
        refused: counters.refused,
        backends: backends.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(cgroup_id: u64, cpu: u64, node_cpu: u64) -> Readings {
        let id = PodId {
            namespace: "default".into(),
            name: "web".into(),
            uid: "u".into(),
        };
        let container = ContainerReading {
            name: "c".into(),
            cgroup_id,
            cpu: Some(cpu),
            ..Default::default()
        };
        Readings {
            node: NodeReading {
                cpu: node_cpu,
                ..Default::default()
            },
            pods: vec![PodReading {
                id,
                containers: vec![container],
                network: None,
            }],
            services: Vec::new(),
        }
    }

    fn container_cpu(report: &NodeReport) -> Cpu {
        report.pods[0].containers[0].cpu.unwrap()
    }

    #[test]
    fn rates_are_over_the_window() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut joiner = Joiner::new("n1");
        let first = joiner.join(&readings(7, 1_000_000_000, 10), start);
        assert_eq!(first.node.as_ref().unwrap().window_ms, 0);
        assert_eq!(
            container_cpu(&first),
            Cpu {
                usage_core_nanoseconds: 1_000_000_000,
                usage_nanocores: 0
            }
        );
        let second = joiner.join(
            &readings(7, 2_000_000_000, 4_000_000_010),
            start + Duration::from_secs(2),
        );
        assert_eq!(second.pods[0].window_ms, 2000);
        assert_eq!(container_cpu(&second).usage_nanocores, 500_000_000);
        assert_eq!(second.node.unwrap().cpu.unwrap().usage_nanocores, 2_000_000_000);
    }

    #[test]
    fn a_restarted_container_and_a_clock_that_went_back_give_no_rate() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut joiner = Joiner::new("n1");
        joiner.join(&readings(7, 1_000_000_000, 10), start);
        let restarted = joiner.join(&readings(8, 5_000_000, 10), start + Duration::from_secs(5));
        assert_eq!(container_cpu(&restarted).usage_nanocores, 0);
        let back = joiner.join(&readings(8, 9_000_000, 10), start);
        assert_eq!(container_cpu(&back).usage_nanocores, 0);
    }
}
