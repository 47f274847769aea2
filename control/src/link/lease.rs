//! A node's heartbeats, written to its Lease.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use orlop_proto::{
    Resource,
    coordination::v1::{Lease, LeaseSpec},
    core::v1::Node,
    meta::v1::{ObjectMeta, OwnerReference},
};
use tokio::time::Instant;

use super::{Inner, reports::now};
use crate::{cache::ObjectKey, registry::RegistryError};

/// The namespace of the nodes' Leases.
const LEASES: &str = "kube-node-lease";

/// Renews a node's Lease, behind its heartbeats.
pub(super) struct LeaseWriter {
    inner: Arc<Inner>,
    node: Arc<str>,
    node_uid: String,
    last: Option<Instant>,
    writing: Arc<AtomicBool>,
}

impl LeaseWriter {
    pub fn new(inner: Arc<Inner>, node: Arc<str>, node_uid: String) -> Self {
        Self {
            inner,
            node,
            node_uid,
            last: None,
            writing: Arc::default(),
        }
    }

    /// A heartbeat came: writes the Lease unless that was done a moment ago, or is under way.
    pub fn renew(&mut self) {
        // A heartbeat may come a little early: a tenth of the interval does not matter.
        let fresh =
            |last: Instant| last.elapsed() + self.inner.config.lease_interval / 10 < self.inner.config.lease_interval;
        if self.last.is_some_and(fresh) || self.writing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.last = Some(Instant::now());
        let (inner, node, uid) = (Arc::clone(&self.inner), Arc::clone(&self.node), self.node_uid.clone());
        let writing = Arc::clone(&self.writing);
        tokio::spawn(async move {
            if let Err(error) = write_lease(&inner, &node, &uid).await {
                tracing::warn!(node = &*node, %error, "the node's lease could not be renewed");
            }
            writing.store(false, Ordering::Release);
        });
    }
}

async fn write_lease(inner: &Inner, node: &str, node_uid: &str) -> Result<(), RegistryError> {
    let now = now();
    let seconds = i32::try_from(inner.config.lease_duration.as_secs()).unwrap_or(i32::MAX);
    let renew = |lease: &mut Lease| {
        let spec = lease.spec.get_or_insert_default();
        node.clone_into(&mut spec.holder_identity);
        spec.lease_duration_seconds = Some(seconds);
        spec.renew_time = Some(now);
        true
    };
    match inner
        .registry
        .modify::<Lease, _>(&ObjectKey::new(LEASES, node), renew)
        .await
    {
        Err(error) if error.is_not_found() => {}
        written => return written.map(drop),
    }
    let owner = OwnerReference {
        api_version: Node::KIND.api_version.to_owned(),
        kind: Node::KIND.kind.to_owned(),
        name: node.to_owned(),
        uid: node_uid.to_owned(),
        ..OwnerReference::default()
    };
    let metadata = ObjectMeta {
        name: node.to_owned(),
        namespace: LEASES.to_owned(),
        owner_references: vec![owner],
        ..ObjectMeta::default()
    };
    let mut lease = Lease {
        metadata: Some(metadata),
        spec: Some(LeaseSpec::default()),
        ..Lease::default()
    };
    renew(&mut lease);
    match inner.registry.create(lease).await {
        Err(error) if error.is_already_exists() => Ok(()),
        written => written.map(drop),
    }
}
