//! What the server counts about itself.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Labels of a gRPC method.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Method {
    /// "orlop.api.v1.Objects/Get".
    pub method: String,
}

/// Labels of a reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// Why a connection was turned away.
    pub reason: &'static str,
}

/// Counters of the server.
#[derive(Debug, Clone, Default)]
pub struct ServerMetrics {
    /// gRPC calls that were let through.
    pub calls: Family<Method, Counter>,
    /// gRPC calls that were refused for who called.
    pub refused: Counter,
    /// Connections that are open.
    pub connections: Gauge,
    /// Connections that were turned away.
    pub turned_away: Family<Reason, Counter>,
}

impl ServerMetrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "orlop_control_calls",
            "gRPC calls that were let through",
            self.calls.clone(),
        );
        registry.register(
            "orlop_control_calls_refused",
            "gRPC calls refused for who called",
            self.refused.clone(),
        );
        registry.register(
            "orlop_control_connections",
            "Open connections",
            self.connections.clone(),
        );
        registry.register(
            "orlop_control_connections_turned_away",
            "Connections that were turned away, by reason",
            self.turned_away.clone(),
        );
    }

    pub(super) fn turn_away(&self, reason: &'static str) {
        self.turned_away.get_or_create(&Reason { reason }).inc();
    }
}
