//! Namespaces.

use std::borrow::Cow;

use orlop_proto::{
    Resource,
    core::v1::{Namespace, NamespaceStatus},
};

use super::{
    FieldError, Model,
    error::{Errors, Path},
    meta, names,
};

/// The finalizer that keeps a namespace until its objects are gone.
const FINALIZER: &str = "kubernetes";
/// The label that every namespace has, so that selectors can name it.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

impl Model for Namespace {
    fn set_defaults(&mut self) {
        self.spec.get_or_insert_default();
        let meta = self.metadata.get_or_insert_default();
        if !meta.name.is_empty() {
            meta.labels.insert(NAME_LABEL.to_owned(), meta.name.clone());
        }
    }

    fn reset_status(&mut self) {
        let spec = self.spec.get_or_insert_default();
        if !spec.finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
            spec.finalizers.push(FINALIZER.to_owned());
        }
        self.status = Some(NamespaceStatus {
            phase: "Active".to_owned(),
        });
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_label);
        validate_finalizers(&mut errors, self);
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_finalizers(&mut errors, self);
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        let phase = self.status.as_ref().map_or("", |status| status.phase.as_str());
        let path = Path::root("status");
        match (self.is_deleting(), phase) {
            (true, "Terminating") | (false, "" | "Active") => {}
            (true, _) => {
                let detail = "must be 'Terminating' if `deletionTimestamp` is not empty";
                errors.invalid(&path.child("phase"), &phase, detail);
            }
            (false, _) => {
                errors.invalid(
                    &path.child("phase"),
                    &phase,
                    "must be 'Active' if `deletionTimestamp` is empty",
                );
            }
        }
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        match name {
            "status.phase" => Some(self.status.as_ref().map_or("", |status| status.phase.as_str()).into()),
            _ => super::selectable_meta(self, name),
        }
    }
}

fn validate_finalizers(errors: &mut Errors, namespace: &Namespace) {
    let finalizers = namespace.spec.as_ref().map_or(&[][..], |spec| &spec.finalizers);
    meta::finalizers(errors, &Path::root("spec").child("finalizers"), finalizers);
}
