//! The watch cache: what everybody reads.
//!
//! One task a kind follows the store and owns the kind's index as a persistent map, so that a snapshot costs a pointer.

use std::sync::Arc;

use orlop_proto::Resource;

use crate::store::Revision;

/// `namespace` (empty for cluster-wide kinds) and `name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Empty for cluster-wide kinds.
    pub namespace: Arc<str>,
    /// The object's name.
    pub name: Arc<str>,
}

/// All objects of a kind at one revision.
#[derive(Debug, Clone)]
pub struct Snapshot<T> {
    /// Everything up to here is in it.
    pub revision: Revision,
    /// In the order of namespace, then name.
    pub objects: imbl::OrdMap<ObjectKey, Arc<T>>,
}

/// What happened to one object.
#[derive(Debug, Clone)]
pub enum Event<T> {
    /// It is new, or was there when the reader began.
    Added(Arc<T>),
    /// It changed.
    Modified {
        /// Before.
        old: Arc<T>,
        /// After.
        new: Arc<T>,
    },
    /// It is gone; this was its last state.
    Deleted(Arc<T>),
}

impl<T: Resource> Event<T> {
    /// The object as it is now, or was last.
    pub fn object(&self) -> &Arc<T> {
        match self {
            Event::Added(object) | Event::Modified { new: object, .. } | Event::Deleted(object) => object,
        }
    }
}
