//! Reads cgroup files (version 1 and 2), `/proc` and folders.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use orlop_proto::metrics::v1::{Filesystem, Memory};

use super::{ContainerReading, NodeReading, Paths, PodReading, Readings};
use crate::{
    dataplane::Counters,
    node_status::meminfo,
    runtime::{Observed, ObservedContainer, ObservedPod, ProcessState, cgroup::Cgroups},
};

/// The kernel's unit of CPU time in `/proc/stat`, in nanoseconds.
const TICK: u64 = 10_000_000;

/// Reads the node's files.
#[derive(Debug, Clone)]
pub struct Reader {
    cgroups: Cgroups,
    paths: Paths,
}

impl Reader {
    /// Over the hierarchies of this mount namespace.
    pub fn new(cgroups: Cgroups, paths: Paths) -> Self {
        Self { cgroups, paths }
    }

    /// Joins what runs with its counters and files. What ended meanwhile is left out.
    pub fn read(
        &self,
        observed: &Observed,
        mut counters: Counters,
        disks: &BTreeMap<String, u64>,
    ) -> io::Result<Readings> {
        let pods = observed.pods.values().map(|pod| PodReading {
            id: pod.id.clone(),
            containers: self.containers(pod, &counters, disks),
            network: counters.network_by_pod.get(&pod.id.uid).copied(),
        });
        let pods = pods.collect();
        let mut services: Vec<_> = counters.services.drain().collect();
        services.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Readings {
            node: self.node()?,
            pods,
            services,
        })
    }

    fn containers(
        &self,
        pod: &ObservedPod,
        counters: &Counters,
        disks: &BTreeMap<String, u64>,
    ) -> Vec<ContainerReading> {
        let running = pod
            .containers
            .iter()
            .filter(|container| matches!(container.state, ProcessState::Running { .. }));
        running
            .map(|container| {
                let cgroup = format!("{}/{}/{}", self.paths.cgroup_parent, pod.id.uid, container.id);
                let cgroup_id = self.cgroup_id(&cgroup).unwrap_or(0);
                ContainerReading {
                    name: container.name.clone(),
                    cgroup_id,
                    cpu: counters.cpu_by_cgroup.get(&cgroup_id).copied(),
                    memory: self.memory(&cgroup),
                    rootfs: disks.get(&container.id).copied(),
                    logs: folder_size(&self.log_dir(pod, container)).ok(),
                }
            })
            .collect()
    }

    /// The kernel's id of a cgroup is its inode in cgroup2.
    fn cgroup_id(&self, cgroup: &str) -> Option<u64> {
        let mount = self.cgroups.unified.as_ref()?;
        fs::metadata(below(mount, cgroup)).ok().map(|metadata| metadata.ino())
    }

    fn memory(&self, cgroup: &str) -> Option<Memory> {
        let legacy = self
            .cgroups
            .legacy
            .iter()
            .find(|(_, controllers)| controllers.iter().any(|name| name == "memory"));
        let (dir, usage, inactive, rss) = match (legacy, &self.cgroups.unified) {
            (Some((mount, _)), _) => (
                below(mount, cgroup),
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_rss",
            ),
            (None, Some(mount)) => (below(mount, cgroup), "memory.current", "inactive_file", "anon"),
            (None, None) => return None,
        };
        let usage: u64 = fs::read_to_string(dir.join(usage)).ok()?.trim().parse().ok()?;
        let stat = fs::read_to_string(dir.join("memory.stat")).ok()?;
        Some(Memory {
            usage_bytes: usage,
            working_set_bytes: usage.saturating_sub(figure(&stat, inactive)),
            rss_bytes: figure(&stat, rss),
        })
    }

    fn log_dir(&self, pod: &ObservedPod, container: &ObservedContainer) -> PathBuf {
        let pod_dir = format!("{}_{}_{}", pod.id.namespace, pod.id.name, pod.id.uid);
        self.paths.log_dir.join(pod_dir).join(&container.name)
    }

    fn node(&self) -> io::Result<NodeReading> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        let disk = rustix::fs::statvfs(&self.paths.data_dir)?;
        let total = meminfo(&memory, "MemTotal");
        let capacity_bytes = disk.f_blocks * disk.f_frsize;
        Ok(NodeReading {
            cpu: busy_time(&fs::read_to_string("/proc/stat")?),
            memory: Memory {
                usage_bytes: total.saturating_sub(meminfo(&memory, "MemFree")),
                working_set_bytes: total.saturating_sub(meminfo(&memory, "MemAvailable")),
                rss_bytes: meminfo(&memory, "AnonPages"),
            },
            filesystem: Filesystem {
                used_bytes: capacity_bytes.saturating_sub(disk.f_bfree * disk.f_frsize),
                capacity_bytes,
            },
        })
    }
}

fn below(mount: &Path, cgroup: &str) -> PathBuf {
    mount.join(cgroup.trim_start_matches('/'))
}

/// A figure of `memory.stat`; 0 when it is not there.
pub fn figure(stat: &str, key: &str) -> u64 {
    let value = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Nanoseconds of all CPUs in user, nice, system, irq, softirq and steal.
pub fn busy_time(stat: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let fields: Vec<u64> = line
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index));
    busy.fold(0, |sum: u64, ticks| sum.saturating_add(*ticks))
        .saturating_mul(TICK)
}

/// Bytes of the files in a folder (not below).
fn folder_size(dir: &Path) -> io::Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(dir)? {
        // A file may be rotated away meanwhile.
        size += entry?.metadata().map_or(0, |metadata| metadata.len());
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{dataplane::NetworkCounters, runtime::PodId};

    fn observed(id: &str) -> Observed {
        let container = ObservedContainer {
            id: id.into(),
            sandbox_id: "s".into(),
            name: "app".into(),
            restart_count: 0,
            backoff_ms: None,
            image: String::new(),
            image_id: String::new(),
            grace_seconds: 30,
            state: ProcessState::Running {
                pid: 1,
                started_at: jiff::Timestamp::UNIX_EPOCH,
            },
        };
        let pod = ObservedPod {
            id: PodId {
                namespace: "default".into(),
                name: "web".into(),
                uid: "uid".into(),
            },
            sandboxes: Vec::new(),
            containers: vec![container],
            networks: Vec::new(),
            remains: true,
        };
        Observed {
            pods: [("uid".to_owned(), pod)].into(),
        }
    }

    fn read(dir: &Path, cgroups: Cgroups) -> ContainerReading {
        let paths = Paths {
            log_dir: dir.join("log"),
            data_dir: dir.to_owned(),
            cgroup_parent: "/orlop/n1".to_owned(),
        };
        let unified = cgroups.unified.clone().unwrap().join("orlop/n1/uid/cid");
        let cgroup_id = fs::metadata(unified).unwrap().ino();
        let counters = Counters {
            cpu_by_cgroup: HashMap::from([(cgroup_id, 123)]),
            network_by_pod: HashMap::from([(
                "uid".to_owned(),
                NetworkCounters {
                    rx_bytes: 9,
                    ..Default::default()
                },
            )]),
            services: HashMap::new(),
        };
        let disks = BTreeMap::from([("cid".to_owned(), 77)]);
        let readings = Reader::new(cgroups, paths)
            .read(&observed("cid"), counters, &disks)
            .unwrap();
        assert_eq!(readings.pods[0].network.unwrap().rx_bytes, 9);
        assert!(readings.node.cpu > 0 && readings.node.filesystem.capacity_bytes > 0);
        readings.pods[0].containers[0].clone()
    }

    #[test]
    fn reads_cgroup2_files() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = dir.path().join("cg/orlop/n1/uid/cid");
        fs::create_dir_all(&cgroup).unwrap();
        fs::write(cgroup.join("memory.current"), "1000\n").unwrap();
        fs::write(cgroup.join("memory.stat"), "anon 300\nfile 600\ninactive_file 400\n").unwrap();
        let logs = dir.path().join("log/default_web_uid/app");
        fs::create_dir_all(&logs).unwrap();
        fs::write(logs.join("0.log"), "12345").unwrap();
        let cgroups = Cgroups {
            unified: Some(dir.path().join("cg")),
            legacy: Vec::new(),
        };
        let container = read(dir.path(), cgroups);
        assert_eq!(container.cpu, Some(123));
        assert_eq!(
            container.memory.unwrap(),
            Memory {
                usage_bytes: 1000,
                working_set_bytes: 600,
                rss_bytes: 300
            }
        );
        assert_eq!((container.rootfs, container.logs), (Some(77), Some(5)));
    }

    #[test]
    fn reads_hybrid_hierarchies() {
        let dir = tempfile::tempdir().unwrap();
        let (unified, legacy) = (dir.path().join("unified"), dir.path().join("memory"));
        for mount in [&unified, &legacy] {
            fs::create_dir_all(mount.join("orlop/n1/uid/cid")).unwrap();
        }
        let cgroup = legacy.join("orlop/n1/uid/cid");
        fs::write(cgroup.join("memory.usage_in_bytes"), "1000").unwrap();
        fs::write(
            cgroup.join("memory.stat"),
            "inactive_file 1\ntotal_inactive_file 100\ntotal_rss 50\n",
        )
        .unwrap();
        let cgroups = Cgroups {
            unified: Some(unified),
            legacy: vec![(legacy, vec!["memory".to_owned()])],
        };
        let container = read(dir.path(), cgroups);
        assert_eq!(
            container.memory.unwrap(),
            Memory {
                usage_bytes: 1000,
                working_set_bytes: 900,
                rss_bytes: 50
            }
        );
        assert_eq!(container.logs, None);
    }

    #[test]
    fn busy_time_leaves_idle_and_iowait_out() {
        assert_eq!(busy_time("cpu  1 2 3 1000 1000 4 5 6 7 8\ncpu0 1\n"), 21 * TICK);
    }
}
