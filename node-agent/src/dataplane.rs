//! The service dataplane: what keeps the kernel's maps as control wants them, and reads its counters.

pub mod arena;
pub mod bpf;
pub mod btf;
mod clsact;
mod counters;
mod ebpf;
pub mod kernel;
pub mod layout;
mod logs;
pub mod object;
pub mod planner;
#[doc(hidden)]
pub mod tables;
pub mod verify;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use orlop_proto::node::v1 as link;

pub use ebpf::EbpfDataplane;
pub use verify::Report;

/// `namespace` and `name` of a service.
pub type ServiceId = (String, String);

/// Changes to services, to be written to the maps together.
#[derive(Debug, Clone, Default)]
pub struct ServiceChanges {
    /// Services that are new or differ, whole.
    pub upserts: Vec<Arc<link::Service>>,
    /// Services that are gone.
    pub removals: Vec<ServiceId>,
    /// `upserts` names every service there is: what the maps hold beyond them is swept, after all of `upserts` is written.
    /// Until the first complete change nothing that was found in pinned maps may be removed for being unknown.
    pub complete: bool,
}

/// What the programs counted. All figures only grow while their subject lives.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// CPU time in nanoseconds by cgroup id (the inode of the container's cgroup2 directory), the running task's time included.
    pub cpu_by_cgroup: HashMap<u64, u64>,
    /// Traffic at the pod's interface, as the pod sees it, by pod uid.
    pub network_by_pod: HashMap<String, NetworkCounters>,
    /// Connections by service, of those that had any.
    pub services: HashMap<ServiceId, ServiceCounters>,
}

/// Bytes and packets of one pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetworkCounters {
    /// Received by the pod.
    pub rx_bytes: u64,
    /// Received by the pod.
    pub rx_packets: u64,
    /// Sent by the pod.
    pub tx_bytes: u64,
    /// Sent by the pod.
    pub tx_packets: u64,
}

/// Connections of one service on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Given a backend.
    pub connections: u64,
    /// Refused because no endpoint was ready.
    pub refused: u64,
    /// By backend, of those that were given any.
    pub backends: Vec<BackendCounters>,
}

/// Connections to one backend of a service on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendCounters {
    /// Where it is.
    pub address: SocketAddr,
    /// IPPROTO_TCP 6, IPPROTO_UDP 17.
    pub protocol: u8,
    /// Given to it.
    pub connections: u64,
}

/// A pod's end of the network, for the programs that count and guard its traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInterface {
    /// The pod's uid.
    pub pod_uid: String,
    /// The name of the host's end of the pod's veth pair.
    pub host_interface: String,
}

/// Why the dataplane could not do it.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The maps cannot hold more of this.
    #[error("{map} is full")]
    Full {
        /// The map's name.
        map: String,
    },
    /// Anything else: a system call, a program that does not load, a pinned map of another layout.
    #[error("{doing}: {source}")]
    Failed {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The kernel's side of services and metrics. Implemented with eBPF, and by `simulated` for tests of scale.
#[async_trait]
pub trait Dataplane: Send + Sync + 'static {
    /// Writes the changes to the maps; they are in effect when it returns. The caller never calls it concurrently. After an
    /// error the caller calls again with everything (`complete`), so a partly applied change does no lasting harm.
    async fn apply(&self, changes: ServiceChanges) -> Result<(), DataplaneError>;

    /// Begins to count (and guard) the traffic of a pod's interface. Idempotent, also across restarts of the agent.
    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError>;

    /// Forgets a pod and its counters. Idempotent; the interface may be gone already.
    async fn detach_pod(&self, pod_uid: &str) -> Result<(), DataplaneError>;

    /// Looks whether what was attached still is. The node's own programs are attached again here; the pods whose interface lacks
    /// one are named by their uids, for the caller to attach them again.
    async fn repair(&self) -> Result<Vec<String>, DataplaneError> {
        Ok(Vec::new())
    }

    /// Reads all counters.
    async fn read_counters(&self) -> Result<Counters, DataplaneError>;

    /// Whether any service is in force, be it from an earlier life of the agent.
    fn serves(&self) -> bool;

    /// `Ok` when programs are loaded and attached, otherwise what is wrong, in words for the node's Ready condition.
    fn health(&self) -> Result<(), String>;
}

/// Where the eBPF dataplane lives and how much it can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The bpffs mount point; pins are in `orlop/INSTANCE` below it.
    pub bpffs: PathBuf,
    /// The node's name with dots as `_`.
    pub instance: String,
    /// Root of the cgroup2 mount that the programs are attached to; `None`: found in /proc/self/mountinfo.
    pub cgroup_root: Option<PathBuf>,
    /// How much fits.
    pub sizes: Sizes,
}

/// How a program is attached to a pod's interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// By a pinned tcx link: Linux 6.6.
    Tcx,
    /// By a filter of the clsact qdisc.
    Clsact,
}

impl Attachment {
    /// What this kernel has.
    #[must_use]
    pub fn best() -> Self {
        if clsact::kernel_has_tcx() {
            Self::Tcx
        } else {
            Self::Clsact
        }
    }
}

/// How much the maps hold. A larger size is a migration at the next start: entries are copied, connections go on. Maps are
/// never made smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sizes {
    /// Service ports with an address. Each costs 104 bytes, and 16 a CPU for its counters, used or not.
    pub frontends: u32,
    /// Backend slots: 16 bytes each, and 8 a CPU for counters, used or not. A changed service needs its new slots beside
    /// the old ones for a moment.
    pub slots: u32,
    /// Pods with an interface on this node.
    pub pods: u32,
    /// Containers on this node whose CPU time is counted.
    pub containers: u32,
    /// Connections through services whose open sockets have a place in a table; rounded up to a power of two. The others cost
    /// more to open, and the fuller the table, the more of them there are. A place costs 24 bytes, used or not.
    pub sockets: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            frontends: 131_072,
            slots: 262_144,
            pods: 4096,
            containers: 4096,
            sockets: 131_072,
        }
    }
}

/// What an `apply` wrote: proportional to what changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Frontend entries written.
    pub frontends_written: u64,
    /// Frontend entries deleted.
    pub frontends_deleted: u64,
    /// Arena slots filled.
    pub slots_written: u64,
}

impl Applied {
    fn plus(self, other: Self) -> Self {
        Self {
            frontends_written: self.frontends_written + other.frontends_written,
            frontends_deleted: self.frontends_deleted + other.frontends_deleted,
            slots_written: self.slots_written + other.slots_written,
        }
    }
}

/// The id by which [`Counters::cpu_by_cgroup`] names a cgroup: the inode of its cgroup2 directory.
///
/// # Errors
/// The directory is not there.
pub fn cgroup_id(cgroup2_directory: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(std::fs::metadata(cgroup2_directory)?.ino())
}

fn failed(doing: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DataplaneError {
    DataplaneError::Failed {
        doing: doing.into(),
        source: source.into(),
    }
}
