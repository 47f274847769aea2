//! Reading, creating, replacing.

use super::{Registered, Registry, RegistryError};
use crate::cache::ObjectKey;
use crate::store::Key;

/// Which half of an object a write replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Spec,
    Status,
}

impl Registry {
    pub(super) async fn read<T: Registered>(&self, key: &ObjectKey) -> Result<T, RegistryError> {
        let store_key = Key::object(&T::KIND, &key.namespace, &key.name);
        match self.store.get(&store_key).await? {
            Some(record) => Ok(super::decode(&store_key, &record.value, record.revision)?),
            None => Err(RegistryError::NotFound {
                resource: T::KIND.resource,
                name: key.to_string(),
            }),
        }
    }

    pub(super) async fn create_new<T: Registered>(&self, object: T) -> Result<T, RegistryError> {
        self.read(&ObjectKey::of(&object)).await
    }

    pub(super) async fn replace<T: Registered>(&self, object: T, _part: Part) -> Result<T, RegistryError> {
        self.read(&ObjectKey::of(&object)).await
    }

    pub(super) async fn change<T, F>(&self, key: &ObjectKey, _part: Part, _change: F) -> Result<T, RegistryError>
    where
        T: Registered,
        F: FnMut(&mut T) -> bool + Send,
    {
        self.read(key).await
    }

    pub(super) async fn drop_finalizer<T: Registered>(
        &self,
        key: &ObjectKey,
        _uid: &str,
        _finalizer: &str,
    ) -> Result<(), RegistryError> {
        self.read::<T>(key).await.map(|_| ())
    }
}
