//! Control's end of the node link: `orlop.node.v1.NodeLink`.
//!
//! One task, the [`hub`], follows the cache and owns what nodes are told: compact service records, routes, pods by node. What all
//! nodes are told is encoded once and stands on a [`board`]; a session knows which board its node has been told, and sends the
//! difference. What one node is told of its pods is folded in its session's mailbox. A slow node costs no queue.
//!
//! Invariant: a session's snapshot holds everything that the store had when the session began; the node deletes what it does not name.
//! Invariant: what a node reported is not written after what it reported later, in whichever replica: a session's writes depend on its being
//! the node's latest.
//! Invariant: a node writes only its own Node, Lease and events, and the status of pods that are bound to it.

mod board;
mod codec;
mod events;
mod hub;
mod lease;
mod mailbox;
mod pending;
mod reports;
mod services;
mod session;
#[cfg(test)]
mod tests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use crate::{events::Recorder, metrics::NodeMetricsStore, registry::Registry};

pub use codec::NodeLinkService;
#[doc(hidden)]
pub use events::taken_over;
pub use services::{ServiceIndex, build_record};
#[doc(hidden)]
pub use session::own_labels;

/// The protocol version that this control speaks.
pub const PROTOCOL: u32 = 1;

/// Times of the link.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// `leaseDurationSeconds` of the nodes' Leases.
    pub lease_duration: Duration,
    /// A node's Lease is written at most this often.
    pub lease_interval: Duration,
    /// Control says something at least this often.
    pub ping: Duration,
    /// A session in which the node says nothing for this long is closed.
    pub silence: Duration,
    /// So many Updates may be unacknowledged before changes are held back and folded.
    pub window: u64,
    /// A session in which changes are held back, or not read, for this long is closed: what is kept for it would only grow.
    pub patience: Duration,
}

/// A node's Lease is renewed this often; a node is not given up for anything shorter.
pub const LEASE_INTERVAL: Duration = Duration::from_secs(10);

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(40),
            lease_interval: LEASE_INTERVAL,
            ping: Duration::from_secs(5),
            silence: Duration::from_secs(15),
            window: 32,
            patience: Duration::from_secs(300),
        }
    }
}

/// What the link has done; only grows, but for `sessions`.
#[derive(Debug, Default)]
pub struct LinkCounters {
    sessions: AtomicU64,
    sessions_begun: AtomicU64,
    changes_sent: AtomicU64,
    bytes_sent: AtomicU64,
    records_built: AtomicU64,
    refused: AtomicU64,
}

impl LinkCounters {
    /// Changes that were put into Updates, over all nodes.
    pub fn changes_sent(&self) -> u64 {
        self.changes_sent.load(Ordering::Relaxed)
    }

    /// Their encoded size.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }

    /// Service records that were built because a service or a slice changed.
    pub fn records_built(&self) -> u64 {
        self.records_built.load(Ordering::Relaxed)
    }

    /// Reports of nodes that did not concern them.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Open sessions.
    pub fn sessions(&self) -> u64 {
        self.sessions.load(Ordering::Relaxed)
    }
}

/// The link's control side. Clones share it.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    metrics: NodeMetricsStore,
    config: LinkConfig,
    hub: hub::HubHandle,
    counters: Arc<LinkCounters>,
    /// Writes the nodes' events: its own, so that they do not crowd out control's.
    recorder: Recorder,
    stop: CancellationToken,
}

impl Link {
    /// Starts to follow the registry's cache. Until `stop`, which ends all sessions too.
    pub fn start(registry: Registry, metrics: NodeMetricsStore, config: LinkConfig, stop: CancellationToken) -> Self {
        let counters = Arc::new(LinkCounters::default());
        let recorder = Recorder::start(registry.clone(), stop.clone()).from_component("orlop-node");
        let hub = hub::start(registry.cache().clone(), Arc::clone(&counters), stop.clone());
        Self {
            inner: Arc::new(Inner {
                registry,
                metrics,
                config,
                hub,
                counters,
                recorder,
                stop,
            }),
        }
    }

    /// The gRPC service.
    pub fn service(&self) -> NodeLinkService {
        NodeLinkService::new(Arc::clone(&self.inner))
    }

    /// What it has done.
    pub fn counters(&self) -> &LinkCounters {
        &self.inner.counters
    }

    /// The counters as Prometheus text.
    pub fn prometheus(&self) -> String {
        let counters = &self.inner.counters;
        let mut text = String::new();
        let mut line = |name: &str, kind: &str, help: &str, value: &AtomicU64| {
            let value = value.load(Ordering::Relaxed);
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"));
        };
        line(
            "orlop_link_sessions",
            "gauge",
            "Open node sessions.",
            &counters.sessions,
        );
        line(
            "orlop_link_sessions_begun_total",
            "counter",
            "Node sessions begun.",
            &counters.sessions_begun,
        );
        line(
            "orlop_link_changes_sent_total",
            "counter",
            "Changes sent to nodes.",
            &counters.changes_sent,
        );
        line(
            "orlop_link_bytes_sent_total",
            "counter",
            "Encoded size of changes sent to nodes.",
            &counters.bytes_sent,
        );
        line(
            "orlop_link_records_built_total",
            "counter",
            "Service records built.",
            &counters.records_built,
        );
        line(
            "orlop_link_refused_total",
            "counter",
            "Reports that did not concern their node.",
            &counters.refused,
        );
        text
    }
}
