//! Pods' networks: namespaces, the CNI runtime that wires them, the agent's own CNI configuration, and the routes to the
//! other nodes' pods.
//!
//! [`Network`] is what the reconciler sees. A pod is wired in this order: [`Network::create_namespace`],
//! [`Network::add`], and taken down in the other: [`Network::del`], [`Network::delete_namespace`]. Every call is idempotent:
//! what was cut off half-way is done again by calling the same again.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf};

use async_trait::async_trait;
use orlop_proto::node::v1 as link;

use crate::desired::Routes;

pub use node_network::CniNetwork;
pub use settings::Settings;

#[doc(hidden)]
pub mod addresses;
#[doc(hidden)]
pub mod attachments;
#[doc(hidden)]
pub mod conflist;
mod kernel;
mod namespace;
mod node_network;
mod own_conflist;
mod plugin;
#[doc(hidden)]
pub mod result;
mod routes;
mod settings;
mod trust;

/// What becomes of the agent's routes in the kernel that are not among those it has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stale {
    /// They stay: what the agent has is from its ledger, which may be behind the kernel's routes that pods use.
    Kept,
    /// They are removed: control has told of all nodes.
    Removed,
}

/// The network side of a node.
#[async_trait]
pub trait Network: Send + Sync + 'static {
    /// Makes a network namespace with its loopback interface up, pinned at `run_dir/netns/SANDBOX_ID`, and gives that path.
    /// One that is there already and is sound is kept.
    async fn create_namespace(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError>;

    /// Takes the pin away; the kernel ends the namespace with its last process. A success when there is none.
    async fn delete_namespace(&self, sandbox_id: &str) -> Result<(), NetworkError>;

    /// Wires the sandbox by CNI ADD and gives what came of it. What a failed ADD left is rolled back. A sandbox that was added
    /// before is answered from the cached result.
    async fn add(&self, pod: &PodNetwork) -> Result<NetworkStatus, NetworkError>;

    /// The pod is no more: the addresses that it had are not kept for it any longer. Until then a new sandbox of the pod asks for
    /// those of the one before.
    /// A network that keeps nothing for a pod has nothing to do.
    fn forget(&self, _pod_uid: &str) {}

    /// CNI CHECK against the cached result.
    async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError>;

    /// CNI DEL with the configuration and result of the ADD (cached on disk). A success when it is gone already.
    async fn del(&self, pod: &PodNetwork) -> Result<(), NetworkError>;

    /// What is there, from the pinned namespaces and the cached results: for adoption, and for clearing what nobody wants.
    async fn list(&self) -> Result<Vec<Attachment>, NetworkError>;

    /// Clears what is left of sandboxes that are not in `valid` (sandbox ids): CNI DEL and namespace of what [`Network::list`]
    /// shows, then CNI GC for what is not even listed.
    async fn gc(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError>;

    /// Takes the node's ranges and the other nodes' routes: writes the agent's conflist when the ranges are new, switches
    /// forwarding on, and sets `routes` in the kernel, where `stale` says what becomes of our other routes. To be called at
    /// every change; cheap when nothing changed.
    async fn configure(&self, ranges: &link::Welcome, routes: &Routes, stale: Stale) -> Result<(), NetworkError>;

    /// Whether pods can be wired now; otherwise why not, for the node's condition.
    async fn ready(&self) -> Result<(), String>;
}

/// A pod's sandbox, as CNI gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetwork {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The sandbox: `CNI_CONTAINERID`, and the name of the pinned namespace.
    pub sandbox_id: String,
    /// The pinned namespace, from [`Network::create_namespace`].
    pub netns: PathBuf,
}

/// What a sandbox's wiring came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkStatus {
    /// The pod's addresses, in the plugin's order; the first is the pod's `podIP`. Never empty.
    pub addresses: Vec<IpAddr>,
    /// The gateway of the first address.
    pub gateway: Option<IpAddr>,
    /// The host's end of the pod's veth: its name in the node's namespace; empty where a foreign plugin names none.
    pub host_interface: String,
}

/// A sandbox that [`Network::list`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The sandbox.
    pub sandbox_id: String,
    /// The pinned namespace, if it is there.
    pub netns: Option<PathBuf>,
    /// Whom it was added for, if it was (or if an ADD was begun).
    pub pod: Option<PodNetwork>,
    /// What the ADD came to; `None` when it never ended.
    pub status: Option<NetworkStatus>,
}

/// Why a network call failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No usable CNI configuration.
    #[error("no network configuration: {0}")]
    NotConfigured(String),
    /// A plugin answered with an error.
    #[error("plugin {plugin} {command}: {msg}{} (code {code})", if details.is_empty() { String::new() } else { format!("; {details}") })]
    Plugin {
        /// The plugin's type.
        plugin: String,
        /// `ADD`, `DEL`, ...
        command: &'static str,
        /// The specification's code, or the plugin's own from 100 on.
        code: u32,
        /// What it said.
        msg: String,
        /// More of it.
        details: String,
    },
    /// A plugin could not be run, ran for too long, or answered with what is not CNI.
    #[error("plugin {plugin} {command}: {reason}")]
    Exec {
        /// The plugin's type.
        plugin: String,
        /// `ADD`, `DEL`, ...
        command: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// A namespace could not be made, entered or removed.
    #[error("network namespace {path}: {source}")]
    Namespace {
        /// The pin.
        path: PathBuf,
        /// The kernel's word.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Netlink refused something.
    #[error("netlink: {0}")]
    Netlink(String),
    /// The caller's argument is unusable.
    #[error("{0}")]
    Invalid(String),
    /// Several at once, from a tear-down that goes on after an error.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<NetworkError>),
}
