//! The loop that makes the node's pods what control wants them to be: observe, plan, execute, report.

use std::{net::IpAddr, sync::Arc, time::Duration};

use orlop_proto::core::v1::PodStatus;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{dataplane::Dataplane, desired::Desired, network::Network, runtime::Runtime};

/// What the reconciler works with.
pub struct Inputs {
    /// What control wants.
    pub desired: watch::Receiver<Arc<Desired>>,
    /// The containers.
    pub runtime: Arc<dyn Runtime>,
    /// The pods' network.
    pub network: Arc<dyn Network>,
    /// Counts the pods' traffic.
    pub dataplane: Arc<dyn Dataplane>,
    /// Where statuses go. For each pod the latest wins; an update is sent again only when it differs.
    pub updates: mpsc::Sender<PodUpdate>,
    /// Times and addresses.
    pub settings: Settings,
}

/// Times and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The node's own addresses, for `hostIP`.
    pub host_addresses: Vec<IpAddr>,
    /// The wait before a crashed container's second restart; doubles with each (default 10 s).
    pub backoff_initial: Duration,
    /// The longest such wait (default 5 min).
    pub backoff_max: Duration,
    /// A container that ran for this long starts with no back-off again (default 10 min).
    pub backoff_reset: Duration,
    /// Everything is looked at again after this time even when nothing woke the loop (default 10 s).
    pub resync: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host_addresses: Vec::new(),
            backoff_initial: Duration::from_secs(10),
            backoff_max: Duration::from_secs(300),
            backoff_reset: Duration::from_secs(600),
            resync: Duration::from_secs(10),
        }
    }
}

/// A pod's status has changed, or the pod is gone.
#[derive(Debug, Clone, PartialEq)]
pub struct PodUpdate {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// Its status.
    pub status: PodStatus,
    /// It was to be deleted, and nothing of it is left on the node.
    pub gone: bool,
}

/// Runs until `stop` is cancelled. Pods go on running afterwards.
pub async fn run(inputs: Inputs, stop: CancellationToken) {
    let _ = inputs;
    stop.cancelled().await;
}
