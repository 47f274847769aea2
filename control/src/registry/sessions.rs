//! Which session speaks for a node.
//!
//! A node may have left a replica of control that does not know of it yet, being cut off from it or from the store. What such a replica
//! still has to write is old: the node has told another since. So every session begins with a write of its node's record, and what
//! it writes depends on that.

use super::{
    Fence, Registry, RegistryError,
    write::{Committed, conflict},
};
use crate::{
    cache::ObjectKey,
    store::{Expected, Key, Operation, Write},
};
use orlop_proto::core::v1::Node;

/// The record of a node's latest session. It goes with its node.
pub(super) fn session_key(node: &str) -> Key {
    Key::internal("nodesessions", node)
}

impl Registry {
    /// Begins a session of a node: from this commit on, nothing that an earlier one writes is taken, in whichever replica it is.
    /// Gives the registry to write with, whose writes fail with [`RegistryError::Fenced`] once another session has begun, or the
    /// node was deleted.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn take_session(&self, node: &str) -> Result<Self, RegistryError> {
        let key = session_key(node);
        let begin = Operation {
            key: key.clone(),
            expected: Expected::Any,
            write: Write::Put(uuid::Uuid::new_v4().to_string().into()),
        };
        match self.commit(vec![begin]).await? {
            Committed::At(revision) => Ok(Self {
                fence: Some(Fence { key, revision }),
                // What a session may no longer write is not counted with what a leader may not.
                refused: std::sync::Arc::default(),
                ..self.clone()
            }),
            Committed::Failed(_) => Err(conflict::<Node>(&ObjectKey::new("", node), "its session did not begin")),
        }
    }
}
