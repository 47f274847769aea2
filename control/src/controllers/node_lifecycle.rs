//! Node lifecycle: who is not heard of becomes NotReady, is tainted, and loses its pods after a while.
//!
//! Silence is measured with our own monotonic clock, from the moment that we saw a lease change: clocks of nodes and steps of ours do not
//! matter. Time during which we were stopped, or could not read the store, is nobody's silence: no lease could be renewed then.

mod act;
mod evict;
mod marks;
mod monitor;
mod plan;
mod ready;

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use crate::{events::Recorder, registry::Registry};

pub use evict::{Evictions, toleration_time};
pub use monitor::Monitor;
pub use plan::{Disruption, EvictionLimiter, plan_conditions, plan_taints};

/// Times and limits of node lifecycle and eviction. The figures of the rates are Kubernetes'.
#[derive(Debug, Clone)]
pub struct LifecycleConfig {
    /// A node that is not heard of for so long is NotReady.
    pub monitor_grace: Duration,
    /// How long pods that say nothing else bear a node that is not ready or cannot be reached.
    pub eviction_delay: Duration,
    /// How often is looked.
    pub period: Duration,
    /// So many nodes a second get the taint that evicts.
    pub eviction_rate: f64,
    /// The same in a large cluster in which most nodes are not ready; in a small one none is.
    pub outage_eviction_rate: f64,
    /// A cluster with more nodes is large.
    pub large_cluster: usize,
    /// From so many percent on "most" nodes are not ready.
    pub outage_percent: usize,
}

impl Default for LifecycleConfig {
    fn default() -> Self {
        Self {
            monitor_grace: Duration::from_secs(16),
            eviction_delay: Duration::from_secs(20),
            period: Duration::from_secs(1),
            eviction_rate: 0.1,
            outage_eviction_rate: 0.01,
            large_cluster: 50,
            outage_percent: 55,
        }
    }
}

/// Runs until it is dropped.
pub async fn run(registry: Registry, recorder: Recorder, config: LifecycleConfig) {
    let mut ticks = tokio::time::interval(config.period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lifecycle = act::Lifecycle::new(registry.clone(), recorder.clone(), config);
    let looks = async {
        loop {
            ticks.tick().await;
            lifecycle.look(Instant::now()).await;
        }
    };
    tokio::join!(looks, ready::run(registry, recorder));
}
