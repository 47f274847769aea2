//! From a kind's name to its type: what lets one generic function serve requests that name a kind as text.

use orlop_proto::{
    Resource, ResourceKind,
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
};

use crate::registry::Registered;

/// A generic computation, to be run for one kind.
pub trait KindVisitor {
    /// What it gives.
    type Output;

    /// Runs it for `T`.
    fn visit<T: Registered>(self) -> Self::Output;
}

/// Runs the visitor for a kind of the model; `None` when there is no such kind.
pub fn visit_kind<V: KindVisitor>(kind: &ResourceKind, visitor: V) -> Option<V::Output> {
    macro_rules! visit {
        ($($message:ident),*) => {
            $(if kind.resource == <$message as Resource>::KIND.resource { return Some(visitor.visit::<$message>()); })*
        };
    }
    visit!(
        Namespace,
        Node,
        Pod,
        Service,
        EndpointSlice,
        ReplicationController,
        ReplicaSet,
        Event,
        Lease
    );
    None
}
