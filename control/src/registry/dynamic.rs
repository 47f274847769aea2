//! The same verbs over objects whose kind is known only when they come.

use futures::future::BoxFuture;
use orlop_proto::{ResourceKind, api::v1::Object, object_kind};

use super::{DeleteOptions, Registered, Registry, RegistryError};
use crate::{
    cache::ObjectKey,
    kinds::{KindVisitor, visit_kind},
};

type Outcome<'a> = BoxFuture<'a, Result<Object, RegistryError>>;

impl Registry {
    /// [`Registry::create`] for an object of any kind.
    pub async fn create_object(&self, object: Object) -> Result<Object, RegistryError> {
        self.with_object(object, Verb::Create).await
    }

    /// [`Registry::update`] for an object of any kind.
    pub async fn update_object(&self, object: Object) -> Result<Object, RegistryError> {
        self.with_object(object, Verb::Update).await
    }

    /// [`Registry::update_status`] for an object of any kind.
    pub async fn update_object_status(&self, object: Object) -> Result<Object, RegistryError> {
        self.with_object(object, Verb::UpdateStatus).await
    }

    /// [`Registry::get`] for a kind by name.
    pub async fn get_object(&self, kind: &ResourceKind, key: &ObjectKey) -> Result<Object, RegistryError> {
        struct Get<'a>(&'a Registry, &'a ObjectKey);
        impl<'a> KindVisitor for Get<'a> {
            type Output = Outcome<'a>;
            fn visit<T: Registered>(self) -> Outcome<'a> {
                Box::pin(async move { Ok(self.0.get::<T>(self.1).await?.into_object()) })
            }
        }
        visit_kind(kind, Get(self, key))
            .ok_or_else(|| unknown(kind.resource))?
            .await
    }

    /// [`Registry::delete`] for a kind by name.
    pub async fn delete_object(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        options: DeleteOptions,
    ) -> Result<Object, RegistryError> {
        struct Delete<'a>(&'a Registry, &'a ObjectKey, DeleteOptions);
        impl<'a> KindVisitor for Delete<'a> {
            type Output = Outcome<'a>;
            fn visit<T: Registered>(self) -> Outcome<'a> {
                Box::pin(async move { Ok(self.0.delete::<T>(self.1, self.2).await?.into_object()) })
            }
        }
        visit_kind(kind, Delete(self, key, options))
            .ok_or_else(|| unknown(kind.resource))?
            .await
    }

    /// [`Registry::remove_finalizer`] for a kind by name.
    pub async fn remove_object_finalizer(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        uid: &str,
        finalizer: &str,
    ) -> Result<(), RegistryError> {
        struct Remove<'a>(&'a Registry, &'a ObjectKey, &'a str, &'a str);
        impl<'a> KindVisitor for Remove<'a> {
            type Output = BoxFuture<'a, Result<(), RegistryError>>;
            fn visit<T: Registered>(self) -> Self::Output {
                Box::pin(self.0.remove_finalizer::<T>(self.1, self.2, self.3))
            }
        }
        visit_kind(kind, Remove(self, key, uid, finalizer))
            .ok_or_else(|| unknown(kind.resource))?
            .await
    }

    async fn with_object(&self, object: Object, verb: Verb) -> Result<Object, RegistryError> {
        let kind = object_kind(&object).ok_or_else(|| unknown(""))?;
        if !matches!(verb, Verb::UpdateStatus) {
            self.check_written(&object)?;
        }
        let visitor = Run {
            registry: self,
            object,
            verb,
        };
        visit_kind(&kind, visitor).ok_or_else(|| unknown(kind.resource))?.await
    }
}

#[derive(Clone, Copy)]
enum Verb {
    Create,
    Update,
    UpdateStatus,
}

struct Run<'a> {
    registry: &'a Registry,
    object: Object,
    verb: Verb,
}

impl<'a> KindVisitor for Run<'a> {
    type Output = Outcome<'a>;

    fn visit<T: Registered>(self) -> Outcome<'a> {
        Box::pin(async move {
            let object = T::from_object(self.object).ok_or_else(|| unknown(T::KIND.resource))?;
            let stored = match self.verb {
                Verb::Create => self.registry.create(object).await?,
                Verb::Update => self.registry.update(object).await?,
                Verb::UpdateStatus => self.registry.update_status(object).await?,
            };
            Ok(stored.into_object())
        })
    }
}

fn unknown(resource: &str) -> RegistryError {
    RegistryError::Precondition(format!("no such kind: \"{resource}\""))
}
