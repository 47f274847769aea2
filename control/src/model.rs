//! Kubernetes' own defaults and validation for every field of the model, and its selectors: pure functions over messages.
//!
//! Defaults come first: validation expects a defaulted object. Errors are all of them, with their paths and Kubernetes' words.

mod endpoint_slice;
mod error;
mod event;
#[cfg(test)]
pub(crate) mod generate;
mod lease;
mod meta;
pub mod names;
mod namespace;
mod node;
mod node_affinity;
pub mod pod;
mod pod_update;
mod resources;
pub mod selector;
mod service;
mod taints;
pub mod topology_spread;
mod workload;

use std::borrow::Cow;

pub use endpoint_slice::{endpoint_address, unicast_address};
pub use error::FieldError;
use orlop_proto::{Resource, api::v1::Object, with_body};

/// What the model knows of a kind.
pub trait Model: Resource {
    /// Fills what the user left out, as Kubernetes does. Idempotent.
    fn set_defaults(&mut self);

    /// Gives a new object the status that it begins with; what the user wrote there is dropped (nodes keep theirs).
    fn reset_status(&mut self);

    /// All that is wrong with a new object. The name may be empty when there is a generateName.
    fn validate_create(&self) -> Vec<FieldError>;

    /// All that is wrong with an object that is to replace `old`: its own faults and what must not change.
    fn validate_update(&self, old: &Self) -> Vec<FieldError>;

    /// All that is wrong with the status that is to replace the one of `old`.
    fn validate_status_update(&self, old: &Self) -> Vec<FieldError>;

    /// The value of a field that field selectors know for this kind; `None` when they do not know it.
    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>>;
}

/// [`Model::set_defaults`] and the type for an object of any kind.
pub fn default_object(object: &mut Object) {
    object.set_type();
    if let Some(body) = &mut object.body {
        with_body!(body, object => object.set_defaults());
    }
}

/// [`Model::validate_create`] for an object of any kind.
pub fn validate_create(object: &Object) -> Vec<FieldError> {
    match &object.body {
        Some(body) => with_body!(body, object => object.validate_create()),
        None => vec![FieldError::required("", "an object of one of the kinds")],
    }
}

/// [`Model::validate_update`] for objects of any kind.
pub fn validate_update(new: &Object, old: &Object) -> Vec<FieldError> {
    with_old(new, old, Update::Spec)
}

/// [`Model::validate_status_update`] for objects of any kind.
pub fn validate_status_update(new: &Object, old: &Object) -> Vec<FieldError> {
    with_old(new, old, Update::Status)
}

#[derive(Clone, Copy)]
enum Update {
    Spec,
    Status,
}

fn with_old(new: &Object, old: &Object, update: Update) -> Vec<FieldError> {
    fn typed<T: Model>(new: &T, old: &Object, update: Update) -> Vec<FieldError> {
        match (T::from_object(old.clone()), update) {
            (Some(old), Update::Spec) => new.validate_update(&old),
            (Some(old), Update::Status) => new.validate_status_update(&old),
            (None, _) => vec![FieldError::forbidden("kind", "an object cannot change its kind")],
        }
    }
    match &new.body {
        Some(body) => with_body!(body, new => typed(new, old, update)),
        None => vec![FieldError::required("", "an object of one of the kinds")],
    }
}

/// The value of a field that every kind has.
fn selectable_meta<'a>(object: &'a impl Resource, name: &str) -> Option<Cow<'a, str>> {
    match name {
        "metadata.name" => Some(object.name().into()),
        "metadata.namespace" => Some(object.namespace().into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
