//! The only way to write objects.
//!
//! The registry defaults and validates, gives names, uids and revisions, claims addresses, compares and swaps, and knows what a
//! deletion means. API, controllers and the node link all write through it; nobody else touches the store's objects.
//!
//! Invariant: an object and the claims that it makes (a service's address, a node's pod range) are written and removed in one
//! transaction, so that no address can be held twice or leak.

mod addresses;
mod bootstrap;
mod claims;
#[doc(hidden)]
pub mod codec;
mod delete;
mod dynamic;
mod error;
mod generated;
mod kinds;
mod leadership;
mod pods;
mod ranges;
mod sessions;
#[cfg(test)]
mod tests;
mod write;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use ipnet::Ipv4Net;

use crate::{
    cache::{Cache, ObjectKey},
    store::{Key, Revision, Store},
};

pub(crate) use codec::decode;
pub use delete::{DeleteOptions, FOREGROUND, ORPHAN, Preconditions, Propagation};
pub use error::{FieldError, RegistryError};
pub(crate) use generated::generated_prefix;
pub use kinds::Registered;
pub use leadership::Term;
pub use pods::Binding;

/// The ranges that the registry gives addresses from.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Addresses of services.
    pub service_cidr: Ipv4Net,
    /// Addresses of pods.
    pub pod_cidr: Ipv4Net,
    /// Prefix length of a node's part of `pod_cidr`.
    pub pod_cidr_prefix: u8,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            service_cidr: Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 96, 0, 0), 12),
            pod_cidr: Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 244, 0, 0), 16),
            pod_cidr_prefix: 24,
        }
    }
}

/// A record that must not have changed for a write to happen: a leader's claim, a node's session. Who lost it can no longer write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The record.
    pub key: Key,
    /// Its revision when the claim was made or renewed.
    pub revision: Revision,
}

/// Writes objects. Clones are cheap and share everything but the fence.
#[derive(Clone)]
pub struct Registry {
    store: Arc<dyn Store>,
    cache: Cache,
    config: Arc<RegistryConfig>,
    fence: Option<Fence>,
    /// Writes that a fence refused.
    refused: Arc<AtomicU64>,
    holdings: ranges::Holdings,
    giving: claims::BeingGiven,
}

impl Registry {
    /// Over a store and the cache that follows it.
    pub fn new(store: Arc<dyn Store>, cache: Cache, config: RegistryConfig) -> Self {
        Self {
            store,
            cache,
            config: Arc::new(config),
            fence: None,
            refused: Arc::default(),
            holdings: ranges::Holdings::default(),
            giving: Arc::default(),
        }
    }

    /// The same registry, all of whose writes fail with [`RegistryError::Fenced`] once the fence's record has changed.
    #[must_use]
    pub fn with_fence(&self, fence: Fence) -> Self {
        Self {
            fence: Some(fence),
            ..self.clone()
        }
    }

    /// Writes of this process that were refused because their leader's claim was lost.
    pub fn fenced_writes(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The ranges.
    pub fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// An object as the store has it now (the cache may be a moment behind).
    pub async fn get<T: Registered>(&self, key: &ObjectKey) -> Result<T, RegistryError> {
        self.read(key).await
    }

    /// Writes a new object: defaults and validates it, gives it name (from `generateName`), uid, creationTimestamp and generation.
    /// What users cannot set (status, deletion) is ignored. Returns it as stored.
    pub async fn create<T: Registered>(&self, object: T) -> Result<T, RegistryError> {
        self.create_new(object).await
    }

    /// Replaces everything but status and system fields. With a resourceVersion or uid in the object, only if these are the stored
    /// ones. What changes nothing is not written. Returns the object as stored.
    pub async fn update<T: Registered>(&self, object: T) -> Result<T, RegistryError> {
        self.replace(object, write::Part::Spec).await
    }

    /// Replaces the status alone, under the same conditions.
    pub async fn update_status<T: Registered>(&self, object: T) -> Result<T, RegistryError> {
        self.replace(object, write::Part::Status).await
    }

    /// Reads (cache first), changes everything but the status, writes; again when somebody else wrote in between. `change` returns
    /// whether it changed anything; when not, nothing is written. Returns the object as stored.
    pub async fn modify<T, F>(&self, key: &ObjectKey, change: F) -> Result<T, RegistryError>
    where
        T: Registered,
        F: FnMut(&mut T) -> bool + Send,
    {
        self.change(key, write::Part::Spec, change).await
    }

    /// The same for the status.
    pub async fn modify_status<T, F>(&self, key: &ObjectKey, change: F) -> Result<T, RegistryError>
    where
        T: Registered,
        F: FnMut(&mut T) -> bool + Send,
    {
        self.change(key, write::Part::Status, change).await
    }

    /// Removes a finalizer; the object goes with its last one if its deletion was asked for. `uid` guards against a namesake.
    pub async fn remove_finalizer<T: Registered>(
        &self,
        key: &ObjectKey,
        uid: &str,
        finalizer: &str,
    ) -> Result<(), RegistryError> {
        self.drop_finalizer::<T>(key, uid, finalizer).await
    }
}
