//! What is particular to a kind.

use orlop_proto::{
    Resource,
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
};

/// A kind that the registry can write. Every kind of the model is one.
pub trait Registered: Resource {}

impl Registered for Namespace {}
impl Registered for Node {}
impl Registered for Pod {}
impl Registered for Service {}
impl Registered for EndpointSlice {}
impl Registered for ReplicationController {}
impl Registered for ReplicaSet {}
impl Registered for Event {}
impl Registered for Lease {}
