//! Events.

use std::borrow::Cow;

use orlop_proto::core::v1::{Event, ObjectReference};

use super::{
    FieldError, Model,
    error::{Errors, Path},
    meta, names,
};

/// Bytes of a reason, as in events.k8s.io.
const REASON_MAX: usize = 128;
/// Bytes of a message. Kubernetes bounds only its newer events (1 kB); a scheduler's reasons for many nodes are longer.
const MESSAGE_MAX: usize = 8 * 1024;

impl Model for Event {
    fn set_defaults(&mut self) {
        self.metadata.get_or_insert_default();
        self.involved_object.get_or_insert_default();
    }

    fn reset_status(&mut self) {}

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        validate_body(&mut errors, self);
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_body(&mut errors, self);
        errors.immutable(
            &Path::root("involvedObject"),
            &self.involved_object,
            &old.involved_object,
        );
        errors.into_found()
    }

    fn validate_status_update(&self, _old: &Self) -> Vec<FieldError> {
        vec![FieldError::forbidden("status", "this kind has no status")]
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        let involved = |field: fn(&ObjectReference) -> &String| {
            Some(self.involved_object.as_ref().map_or("", |object| field(object)).into())
        };
        match name {
            "involvedObject.kind" => involved(|object| &object.kind),
            "involvedObject.namespace" => involved(|object| &object.namespace),
            "involvedObject.name" => involved(|object| &object.name),
            "involvedObject.uid" => involved(|object| &object.uid),
            "involvedObject.apiVersion" => involved(|object| &object.api_version),
            "involvedObject.resourceVersion" => involved(|object| &object.resource_version),
            "involvedObject.fieldPath" => involved(|object| &object.field_path),
            "reason" => Some(self.reason.as_str().into()),
            "reportingComponent" => Some(self.reporting_component.as_str().into()),
            "source" => Some(
                self.source
                    .as_ref()
                    .map_or("", |source| source.component.as_str())
                    .into(),
            ),
            "type" => Some(self.r#type.as_str().into()),
            _ => super::selectable_meta(self, name),
        }
    }
}

fn validate_body(errors: &mut Errors, event: &Event) {
    let namespace = event.metadata.as_ref().map_or("", |meta| meta.namespace.as_str());
    let involved = event
        .involved_object
        .as_ref()
        .map_or("", |object| object.namespace.as_str());
    let matches = if involved.is_empty() {
        matches!(namespace, "" | "default")
    } else {
        involved == namespace
    };
    if !matches {
        let path = Path::root("involvedObject");
        errors.invalid(&path.child("namespace"), &involved, "does not match event.namespace");
    }
    if event.reason.len() > REASON_MAX {
        errors.too_long(&Path::root("reason"), REASON_MAX);
    }
    if event.message.len() > MESSAGE_MAX {
        errors.too_long(&Path::root("message"), MESSAGE_MAX);
    }
    if !event.r#type.is_empty() {
        errors.one_of(&Path::root("type"), &event.r#type, &["Normal", "Warning"]);
    }
    errors.not_negative(&Path::root("count"), event.count.into());
    errors.time(&Path::root("firstTimestamp"), event.first_timestamp.as_ref());
    errors.time(&Path::root("lastTimestamp"), event.last_timestamp.as_ref());
    errors.time(&Path::root("eventTime"), event.event_time.as_ref());
}
