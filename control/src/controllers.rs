//! Controllers: what keeps the cluster as its objects say.
//!
//! Each is idempotent, level-triggered and keyed: events put keys into a [`queue::WorkQueue`], a look at a key compares what is in
//! the cache with what should be (a pure `plan`), and writes the difference through the registry. After a write a key waits until the
//! cache has it. Nothing here calls a node.

pub mod api_endpoints;
mod bootstrap;
pub mod endpoint_slices;
mod event_expiry;
mod namespaces;
pub mod node_lifecycle;
mod node_ranges;
mod owner_gc;
mod pod_gc;
pub(crate) mod pod_index;
mod pods;
pub mod queue;
pub mod replicas;
pub mod runner;
mod selectors;
#[cfg(test)]
mod tests;

use std::{future::Future, sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{config::Config, events::Recorder, registry::Registry};

pub use node_lifecycle::LifecycleConfig;

/// The controllers' times and limits.
#[derive(Debug, Clone, Default)]
pub struct ControllerConfig {
    /// Node lifecycle and eviction.
    pub lifecycle: LifecycleConfig,
    /// Garbage collection.
    pub garbage: GarbageConfig,
}

/// What is removed when.
#[derive(Debug, Clone)]
pub struct GarbageConfig {
    /// How often is looked.
    pub period: Duration,
    /// A pod whose node has been gone for so long is removed.
    pub node_quarantine: Duration,
    /// So many ended pods may stay (Kubernetes' figure).
    pub terminated_pods: usize,
    /// Events go after so long (Kubernetes' figure).
    pub event_ttl: Duration,
}

impl Default for GarbageConfig {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(10),
            node_quarantine: Duration::from_secs(20),
            terminated_pods: 12_500,
            event_ttl: Duration::from_secs(3600),
        }
    }
}

impl From<&Config> for ControllerConfig {
    fn from(config: &Config) -> Self {
        let defaults = LifecycleConfig::default();
        let lifecycle = LifecycleConfig {
            monitor_grace: config.node.monitor_grace,
            eviction_delay: config.node.eviction_delay,
            eviction_rate: config.node.eviction_rate,
            outage_eviction_rate: defaults.outage_eviction_rate.min(config.node.eviction_rate),
            ..defaults
        };
        Self {
            lifecycle,
            garbage: GarbageConfig::default(),
        }
    }
}

/// Starts all controllers. They read the registry's cache and end when `cancel` says so.
pub fn spawn(
    registry: &Registry,
    recorder: &Recorder,
    config: &ControllerConfig,
    cancel: &CancellationToken,
) -> Vec<JoinHandle<()>> {
    let start = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let cancel = cancel.clone();
        tokio::spawn(async move {
            // Nothing that a controller does needs to be finished: whatever is left is seen at the next start.
            tokio::select! {
                () = cancel.cancelled() => {}
                () = task => {}
            }
        })
    };
    let pods = Arc::new(pod_index::PodIndex::new(registry.cache().reader()));
    vec![
        start(Box::pin(replicas::run::<orlop_proto::apps::v1::ReplicaSet>(
            registry.clone(),
            recorder.from_component("replicaset-controller"),
            pods.clone(),
            cancel.clone(),
        ))),
        start(Box::pin(replicas::run::<orlop_proto::core::v1::ReplicationController>(
            registry.clone(),
            recorder.from_component("replication-controller"),
            pods.clone(),
            cancel.clone(),
        ))),
        start(Box::pin(endpoint_slices::run(registry.clone(), pods, cancel.clone()))),
        start(Box::pin(node_ranges::run(
            registry.clone(),
            recorder.from_component("node-ranges"),
            cancel.clone(),
        ))),
        start(Box::pin(node_lifecycle::run(
            registry.clone(),
            recorder.from_component("node-controller"),
            config.lifecycle.clone(),
        ))),
        start(Box::pin(pod_gc::run(registry.clone(), config.garbage.clone()))),
        start(Box::pin(owner_gc::run(registry.clone(), cancel.clone()))),
        start(Box::pin(namespaces::run(registry.clone(), cancel.clone()))),
        start(Box::pin(bootstrap::run(registry.clone()))),
        start(Box::pin(event_expiry::run(registry.clone(), config.garbage.clone()))),
    ]
}
