//! The same verbs over objects whose kind is known only when they come.

use orlop_proto::{ResourceKind, api::v1::Object};

use super::{Registry, RegistryError};
use crate::cache::ObjectKey;

impl Registry {
    /// [`Registry::create`] for an object of any kind.
    pub async fn create_object(&self, object: Object) -> Result<Object, RegistryError> {
        Err(RegistryError::Precondition(format!(
            "{:?}",
            object.meta().map(|meta| &meta.name)
        )))
    }

    /// [`Registry::update`] for an object of any kind.
    pub async fn update_object(&self, object: Object) -> Result<Object, RegistryError> {
        self.create_object(object).await
    }

    /// [`Registry::update_status`] for an object of any kind.
    pub async fn update_object_status(&self, object: Object) -> Result<Object, RegistryError> {
        self.create_object(object).await
    }

    /// [`Registry::get`] for a kind by name.
    pub async fn get_object(&self, kind: &ResourceKind, key: &ObjectKey) -> Result<Object, RegistryError> {
        Err(RegistryError::NotFound {
            resource: kind.resource,
            name: key.to_string(),
        })
    }
}
