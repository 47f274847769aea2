//! Containers: the [`Runtime`] trait that the reconciler drives, and what it observes.
//!
//! [`containerd`] implements it. The trait is level-triggered: [`Runtime::observe`] is authoritative, [`Runtime::changed`] only
//! wakes. What a later life of the agent must know about a container travels in its labels, so `observe` after a restart says the
//! same as before it.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::Notify;

pub mod archives;
pub mod cgroup;
pub mod containerd;
#[doc(hidden)]
pub mod files;
pub mod garbage;
pub mod image_source;
mod pause_image;
pub mod reference;
pub mod registry;
mod spec;
#[doc(hidden)]
pub mod stop_signal;

/// The containers of this node. All calls are idempotent and have their own deadline; those for different pods run at once.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Everything that exists, by pod.
    async fn observe(&self) -> Result<Observed, RuntimeError>;

    /// Notified when something may have changed: observe again.
    fn changed(&self) -> Arc<Notify>;

    /// Makes the image ready to run on this node.
    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError>;

    /// Whether the image, as a pod names it, is there already.
    async fn has_image(&self, reference: &str) -> Result<bool, RuntimeError> {
        let _ = reference;
        Ok(true)
    }

    /// Creates and starts the pod's sandbox: state directory, lease, pause container in the given network namespace.
    /// Whatever was made is removed again when it fails.
    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError>;

    /// Creates and starts a container in its running sandbox. A container that was created but could not be started
    /// remains, observed as exited with the reason `StartError`; when it could not be created, nothing remains.
    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError>;

    /// Sends a signal to the container's (or sandbox's) first process; a container that does not run any more is a success.
    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError>;

    /// Asks a container's first process to end: with its image's StopSignal, or SIGTERM. One that does not run any more is a
    /// success.
    async fn terminate(&self, id: &str) -> Result<(), RuntimeError> {
        self.signal(id, libc::SIGTERM).await
    }

    /// Removes a container: kills what runs of it, deletes task, record, snapshot, cgroup and log.
    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError>;

    /// Removes a sandbox's pause container. Its containers must be gone or exited; the network is the caller's.
    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError>;

    /// Removes what else there is of a pod: logs, cgroups, lease, state directory. After this the pod is not observed.
    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError>;

    /// The bytes in each container's writable layer, by container id. Containers that cannot be measured are left out.
    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError>;

    /// The images that are there and the disk that they are on; `None`: this runtime has none to be removed.
    async fn images(&self) -> Result<Option<garbage::ImageStore>, RuntimeError> {
        Ok(None)
    }

    /// Removes an image and what only it holds, unless a container was made from it, it is being pulled, or `unwanted` says
    /// no when nobody can begin to use it any more. Says whether it did.
    async fn remove_image(&self, name: &str, unwanted: garbage::Unwanted<'_>) -> Result<bool, RuntimeError> {
        let _ = (name, unwanted);
        Ok(false)
    }

    /// "containerd://1.6.20", for the node's status; an error when the runtime cannot run pods.
    async fn version(&self) -> Result<String, RuntimeError>;
}

/// Which pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodId {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What exists on the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// By pod uid.
    pub pods: BTreeMap<String, ObservedPod>,
}

/// What exists of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedPod {
    /// Which pod.
    pub id: PodId,
    /// Its sandboxes, oldest first: one, or more while a dead one is being replaced.
    pub sandboxes: Vec<ObservedSandbox>,
    /// Its containers, by name and then restart count.
    pub containers: Vec<ObservedContainer>,
    /// The sandbox ids that networks are still attached or namespaces pinned for (filled in by the reconciler).
    pub networks: Vec<String>,
    /// A state directory or lease is there.
    pub remains: bool,
}

/// A pod's pause container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedSandbox {
    /// containerd's id of it.
    pub id: String,
    /// How many sandboxes the pod had before.
    pub attempt: u32,
    /// Its process.
    pub state: ProcessState,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The host's end of the pod's veth pair.
    pub host_interface: String,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedContainer {
    /// containerd's id of it.
    pub id: String,
    /// The sandbox that it was started in.
    pub sandbox_id: String,
    /// Its name in the pod.
    pub name: String,
    /// Which start of it this is: 0, 1, ...
    pub restart_count: u32,
    /// The back-off, in milliseconds, that went before this start; `None` for the first.
    pub backoff_ms: Option<u64>,
    /// The image as the status shows it.
    pub image: String,
    /// The image's digest as the status shows it.
    pub image_id: String,
    /// The pod's terminationGracePeriodSeconds when it was started.
    pub grace_seconds: u64,
    /// Its process.
    pub state: ProcessState,
}

/// The process of a container or sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessState {
    /// It was made, but never started; unless a start is under way nobody will.
    Created,
    /// It runs.
    Running {
        /// Its pid as the agent sees it.
        pid: u32,
        /// Since when.
        started_at: Timestamp,
    },
    /// It ended, or never began.
    Exited(Exit),
    /// The runtime did not say (a hung shim, a start under way): nothing may be concluded.
    Unknown,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The exit code; 128 + signal for a signal.
    pub code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError` or `ContainerStatusUnknown`.
    pub reason: String,
    /// More about it.
    pub message: String,
    /// When it was started.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
}

/// When an image may be looked for outside containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Each start asks the archives, then the registry, which image it is now; only what is missing is pulled.
    Always,
    /// Only when containerd has none.
    IfNotPresent,
    /// Never.
    Never,
}

/// Which image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRequest {
    /// As the pod names it.
    pub reference: String,
    /// When to look for it.
    pub policy: PullPolicy,
}

/// An image that is ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The normalised reference: "docker.io/library/web:v1".
    pub name: String,
    /// The digest of its configuration: "sha256:...".
    pub id: String,
    /// The manifest's digest: "sha256:...".
    pub digest: String,
    /// The snapshot that its layers unpack to.
    pub chain_id: String,
    /// What its configuration says.
    pub config: ImageConfig,
}

/// The part of an image's configuration that a container is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// Entrypoint.
    pub entrypoint: Vec<String>,
    /// Cmd.
    pub cmd: Vec<String>,
    /// Env, `NAME=VALUE`.
    pub env: Vec<String>,
    /// WorkingDir.
    pub working_dir: String,
    /// User: `uid`, `uid:gid`, `name`, `name:group`.
    pub user: String,
    /// StopSignal; empty: SIGTERM.
    pub stop_signal: String,
}

/// A sandbox to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxSpec {
    /// Whose.
    pub pod: PodId,
    /// The id to give it, fresh.
    pub id: String,
    /// How many sandboxes the pod had before.
    pub attempt: u32,
    /// The pod's host name.
    pub hostname: String,
    /// The pinned network namespace.
    pub netns: PathBuf,
    /// The pod's addresses, for its hosts file and for later lives of the agent.
    pub addresses: Vec<IpAddr>,
    /// The host's end of the pod's veth pair, for later lives of the agent.
    pub host_interface: String,
}

/// A container to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Whose.
    pub pod: PodId,
    /// The sandbox to start it in.
    pub sandbox_id: String,
    /// The id to give it, fresh.
    pub id: String,
    /// Its name in the pod.
    pub name: String,
    /// The pod's host name.
    pub hostname: String,
    /// Which start of it this is.
    pub restart_count: u32,
    /// The back-off, in milliseconds, that went before this start.
    pub backoff_ms: Option<u64>,
    /// The image, as `ensure_image` returned it.
    pub image: Image,
    /// The image as the pod names it.
    pub image_reference: String,
    /// Replaces the image's entrypoint (and its cmd); `$(VAR)` is expanded already.
    pub command: Vec<String>,
    /// Replaces the image's cmd; `$(VAR)` is expanded already.
    pub args: Vec<String>,
    /// Replaces the image's working directory.
    pub working_dir: String,
    /// Added to the image's environment, in this order; later ones win.
    pub env: Vec<(String, String)>,
    /// Limits.
    pub resources: Resources,
    /// The pod's terminationGracePeriodSeconds.
    pub grace_seconds: u64,
}

/// What a container may use, as the kernel is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// cpu.shares (v1 scale, at least 2).
    pub cpu_shares: u64,
    /// Microseconds of CPU time each 100 ms; `None`: no limit.
    pub cpu_quota: Option<i64>,
    /// Bytes; `None`: no limit.
    pub memory_limit: Option<i64>,
    /// oom_score_adj of its processes.
    pub oom_score_adj: i32,
}

/// Why the runtime could not do it. `reason` gives the word that a status shows.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The reference is none.
    #[error("couldn't parse image name {reference:?}: {why}")]
    InvalidImageName {
        /// As given.
        reference: String,
        /// What is wrong with it.
        why: String,
    },
    /// The policy is Never and containerd has no such image.
    #[error("container image {reference:?} is not present with pull policy of Never")]
    ImageNeverPull {
        /// As given.
        reference: String,
    },
    /// No source has the image.
    #[error("image {reference:?} was not found: {why}")]
    ImageNotFound {
        /// Normalised.
        reference: String,
        /// Where it was looked for.
        why: String,
    },
    /// An image that breaks the format, or lies about its digests.
    #[error("image {reference:?} cannot be used: {why}")]
    BadImage {
        /// Normalised.
        reference: String,
        /// What is wrong.
        why: String,
    },
    /// No registry gave the image.
    #[error("image {reference:?} cannot be pulled: {why}")]
    ImagePull {
        /// Normalised.
        reference: String,
        /// What each registry said.
        why: String,
    },
    /// One pull failed for all that waited for it.
    #[error("{0}")]
    Shared(Arc<RuntimeError>),
    /// containerd refused, or could not be reached.
    #[error("{doing}: {source}")]
    Containerd {
        /// What was being done.
        doing: String,
        /// Its answer.
        #[source]
        source: Box<tonic::Status>,
    },
    /// The container cannot be made as specified.
    #[error("{0}")]
    InvalidSpec(String),
    /// A file could not be read or written.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl RuntimeError {
    /// The waiting reason that a container's status shows for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidImageName { .. } => "InvalidImageName",
            Self::ImageNeverPull { .. } => "ErrImageNeverPull",
            Self::ImageNotFound { .. } | Self::BadImage { .. } | Self::ImagePull { .. } => "ErrImagePull",
            Self::Shared(error) => error.reason(),
            Self::InvalidSpec(_) => "CreateContainerConfigError",
            Self::Containerd { .. } | Self::Io { .. } => "CreateContainerError",
        }
    }
}
