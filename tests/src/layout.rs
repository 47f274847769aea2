//! Where everything of a lab is: folders, names, addresses.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Which engine control stores in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreEngine {
    /// redb, inside the control process.
    Embedded,
    /// A real etcd beside control.
    Etcd,
}

/// What a lab is made of. Written to `lab.json` in its folder, so that later commands find it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Names the lab's cgroup and lock; lower-case letters, digits and dashes.
    pub id: String,
    /// The lab's folder, below `.orlop/lab/` of the repository.
    pub directory: PathBuf,
    /// The repository's `.orlop` folder.
    pub orlop: PathBuf,
    /// Where `orlop-control`, `orlop-node`, ... are.
    pub binaries: PathBuf,
    /// Where those of another version are, when faults replace ours by them.
    #[serde(default)]
    pub other_binaries: Option<PathBuf>,
    /// Where the static programs are: `orlop-pause`, `orlop-fixture`.
    pub static_binaries: PathBuf,
    /// How many nodes, `node1` to `nodeN`.
    pub nodes: u16,
    /// Control's store.
    pub store: StoreEngine,
    /// How many members etcd has, when it is the store: 1 to 9.
    #[serde(default = "one")]
    pub etcd_members: u16,
    /// How large etcd's database may become before it takes no writes, in bytes; 0: etcd's own limit.
    #[serde(default)]
    pub etcd_quota: u64,
    /// How many control replicas: `control`, `control2`, ...; more than one only over etcd.
    #[serde(default = "one")]
    pub controls: u16,
    /// The API's port at 127.0.0.1 of the host; 0: the lab takes a free one and writes it here.
    pub api_port: u16,
    /// Lines that are added to `control.toml` and `node.toml`.
    pub control_extra: String,
    /// See `control_extra`.
    pub node_extra: String,
    /// Whether there is a member with registries of images, see [`crate::registry`].
    #[serde(default)]
    pub registry: bool,
    /// Services ("control/control", "node1/agent") whose wall clock can be stepped, see [`Spec::clock`].
    #[serde(default)]
    pub clocks: Vec<String>,
    /// The folders of the containerd programs that members run, where these are not the machine's.
    #[serde(default)]
    pub containerd: BTreeMap<String, PathBuf>,
}

fn one() -> u16 {
    1
}

/// A direction on a member's cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// What the member sends.
    FromMember,
    /// What the member is sent.
    ToMember,
}

/// A member of the lab: one network namespace, mount namespace and cgroup namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// "control", "node1", ..., or "switch", which has the bridge.
    pub name: String,
    /// Its address on the bridge.
    pub address: Option<Ipv4Addr>,
    /// The process that holds its namespaces.
    pub pid: i32,
}

/// The running lab's members, in `members.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Members {
    /// All of them.
    pub members: Vec<Member>,
    /// The supervisor itself.
    pub supervisor: i32,
    /// The API's port at 127.0.0.1 of the host.
    pub api_port: u16,
}

impl Members {
    /// Reads a lab's members.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("members.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: is the lab up? (cargo xtask up)", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// The member with a name.
    pub fn get(&self, name: &str) -> Result<&Member> {
        self.members.iter().find(|member| member.name == name).with_context(|| {
            let names: Vec<&str> = self.members.iter().map(|member| member.name.as_str()).collect();
            format!("no member {name}; there are {}", names.join(", "))
        })
    }

    /// The unix socket of a control replica, as this machine sees it.
    pub fn control_socket(&self, replica: &str) -> Result<String> {
        Ok(format!("/proc/{}/root/run/orlop/control.sock", self.get(replica)?.pid))
    }
}

/// Control's address on the bridge, and its name in certificates.
pub const CONTROL_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 10);
/// The API's port.
pub const API_PORT: u16 = 6443;

/// The member that etcd runs in, and its address: every control replica reaches it by its cable alone.
pub const ETCD_MEMBER: &str = "etcd";
/// See [`ETCD_MEMBER`].
pub const ETCD_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 4);
/// The port on which etcd's first member serves clients; each further member is ten higher.
pub const ETCD_CLIENTS: u16 = 2379;

/// The most control replicas that a lab can have: their addresses lie below the nodes'.
pub const MAX_CONTROLS: u16 = 5;

/// The name of a control replica; they count from 1.
pub fn control_name(index: u16) -> String {
    match index {
        1 => "control".to_owned(),
        index => format!("control{index}"),
    }
}

/// The service of one of etcd's members, in [`ETCD_MEMBER`]; they count from 1.
pub fn etcd_name(index: u16) -> String {
    match index {
        1 => "etcd".to_owned(),
        index => format!("etcd{index}"),
    }
}

/// A control replica's address on the bridge.
pub fn control_address(index: u16) -> Ipv4Addr {
    let [a, b, c, d] = CONTROL_ADDRESS.octets();
    Ipv4Addr::new(a, b, c, d - u8::try_from(index - 1).unwrap_or(0))
}

/// A node's address on the bridge; nodes count from 1.
pub fn node_address(index: u16) -> Ipv4Addr {
    let host = 11 + index - 1;
    Ipv4Addr::new(
        192,
        168,
        77 + u8::try_from(host / 250).unwrap_or(0),
        u8::try_from(host % 250).unwrap_or(0),
    )
}

impl Spec {
    /// The names of the nodes.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|index| format!("node{index}")).collect()
    }

    /// The names of the control replicas.
    pub fn control_names(&self) -> Vec<String> {
        (1..=self.controls).map(control_name).collect()
    }

    /// etcd's services.
    pub fn etcd_names(&self) -> Vec<String> {
        (1..=self.etcd_members).map(etcd_name).collect()
    }

    /// A member's durable folder.
    pub fn member_directory(&self, member: &str) -> PathBuf {
        self.directory.join(member)
    }

    /// Where a node's agent finds the programs that it starts: links, so that they change with its version.
    pub fn installed(&self, node: &str) -> PathBuf {
        self.member_directory(node).join("bin")
    }

    /// The file that a service's wall clock follows: libfaketime's offset, "+3600" for an hour ahead.
    pub fn clock(&self, service: &str) -> PathBuf {
        self.directory.join(format!("clock-{}", service.replace('/', "-")))
    }

    /// A member's cgroup, relative to the hierarchies' roots.
    pub fn cgroup(&self, member: &str) -> String {
        format!("{}/{}/{member}", crate::cgroup::PARENT, self.id)
    }

    /// Reads `lab.json` from a lab's folder.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("lab.json");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: is the lab up? (cargo xtask up)", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Writes `lab.json`.
    pub fn write(&self) -> Result<()> {
        std::fs::create_dir_all(&self.directory).with_context(|| format!("making {}", self.directory.display()))?;
        let path = self.directory.join("lab.json");
        std::fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("writing {}", path.display()))
    }
}
