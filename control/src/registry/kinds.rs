//! What is particular to a kind.

use orlop_proto::{
    Resource as _,
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
};

use crate::{
    model::{Model, topology_spread},
    store::Key,
};

/// The finalizer in a namespace's spec that the namespace controller works off.
pub(super) const KUBERNETES: &str = "kubernetes";

/// A kind that the registry can write. Every kind of the model is one.
///
/// The provided methods are those of a kind without particulars.
pub trait Registered: Model {
    /// Whether `metadata.generation` counts changes of the spec.
    #[doc(hidden)]
    const GENERATIONS: bool = true;

    /// Takes the status half of another.
    #[doc(hidden)]
    fn take_status(&mut self, from: &Self) {
        let _ = from;
    }

    /// Writes into a new object what the server decides once, at its creation.
    #[doc(hidden)]
    fn complete(&mut self) {}

    /// Takes from the stored object what the server gave it and an update left out.
    #[doc(hidden)]
    fn keep_given(&mut self, old: &Self) {
        let _ = old;
    }

    /// Records that exist as long as the object does, and that no other object can have.
    #[doc(hidden)]
    fn claims(&self) -> Vec<Key> {
        Vec::new()
    }

    /// Records that are removed with the object.
    #[doc(hidden)]
    fn belongings(&self) -> Vec<Key> {
        Vec::new()
    }

    /// Seconds that a deletion waits for somebody's confirmation.
    #[doc(hidden)]
    fn grace(&self, asked: Option<i64>) -> i64 {
        let _ = asked;
        0
    }

    /// Whether something but finalizers keeps a deleted object.
    #[doc(hidden)]
    fn is_held(&self) -> bool {
        false
    }

    /// What a deletion that does not remove the object writes into it.
    #[doc(hidden)]
    fn begin_deletion(&mut self) {}

    /// The service, when it is one.
    #[doc(hidden)]
    fn as_service(&mut self) -> Option<&mut Service> {
        None
    }
}

/// Whether two objects are the same but for metadata and status.
pub(super) fn same_spec<T: Registered>(one: &T, other: &T) -> bool {
    let mut other = other.clone();
    other.take_status(one);
    *other.meta_mut() = one.meta().clone();
    let mut one = one.clone();
    one.meta_mut();
    one.set_type();
    other.set_type();
    one == other
}

impl Registered for Namespace {
    const GENERATIONS: bool = false;

    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
    fn keep_given(&mut self, old: &Self) {
        // Finalizers of the spec are worked off by the controller alone.
        self.spec.clone_from(&old.spec);
    }
    fn is_held(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| !spec.finalizers.is_empty())
    }
    fn begin_deletion(&mut self) {
        self.status.get_or_insert_default().phase = "Terminating".to_owned();
    }
}

impl Registered for Node {
    const GENERATIONS: bool = false;

    // An agent registers its node with its status: it is kept.
    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
    fn keep_given(&mut self, old: &Self) {
        let old = old.spec.clone().unwrap_or_default();
        if old.pod_cidr.is_empty() {
            return;
        }
        let spec = self.spec.get_or_insert_default();
        if spec.pod_cidr.is_empty() {
            spec.pod_cidr = old.pod_cidr;
        }
        if spec.pod_cidrs.is_empty() {
            spec.pod_cidrs = old.pod_cidrs;
        }
    }
    fn claims(&self) -> Vec<Key> {
        let ranges = self.spec.iter().flat_map(|spec| &spec.pod_cidrs);
        ranges.map(|range| super::claims::pod_cidr_key(range)).collect()
    }
    fn belongings(&self) -> Vec<Key> {
        vec![super::sessions::session_key(self.name())]
    }
}

impl Registered for Pod {
    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
    fn complete(&mut self) {
        topology_spread::complete(self);
    }
    fn keep_given(&mut self, old: &Self) {
        let old = old.spec.iter().flat_map(|spec| &spec.topology_spread_constraints);
        let old: Vec<_> = old.cloned().collect();
        if let Some(spec) = &mut self.spec
            && topology_spread::same_as_created(&spec.topology_spread_constraints, &old)
        {
            spec.topology_spread_constraints = old;
        }
    }
    fn grace(&self, asked: Option<i64>) -> i64 {
        super::pods::grace(self, asked)
    }
}

impl Registered for Service {
    const GENERATIONS: bool = false;

    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
    fn keep_given(&mut self, old: &Self) {
        let old = old.spec.clone().unwrap_or_default();
        let spec = self.spec.get_or_insert_default();
        if spec.cluster_ip.is_empty() && spec.cluster_ips.is_empty() {
            spec.cluster_ip = old.cluster_ip;
            spec.cluster_ips = old.cluster_ips;
        }
    }
    fn claims(&self) -> Vec<Key> {
        let addresses = self.spec.iter().flat_map(|spec| &spec.cluster_ips);
        addresses
            .filter(|address| *address != "None")
            .map(|address| super::claims::cluster_ip_key(address))
            .collect()
    }
    fn as_service(&mut self) -> Option<&mut Service> {
        Some(self)
    }
}

impl Registered for EndpointSlice {}

impl Registered for ReplicationController {
    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
}

impl Registered for ReplicaSet {
    fn take_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }
}

impl Registered for Event {
    const GENERATIONS: bool = false;
}

impl Registered for Lease {
    const GENERATIONS: bool = false;
}
