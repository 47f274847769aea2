//! ReplicaSets and ReplicationControllers.

use std::{borrow::Cow, collections::BTreeMap};

use orlop_proto::{
    apps::v1::{ReplicaSet, ReplicaSetSpec, ReplicaSetStatus},
    core::v1::{PodTemplateSpec, ReplicationController, ReplicationControllerSpec, ReplicationControllerStatus},
    meta::v1::LabelSelector,
};

use super::{
    FieldError, Model,
    error::{Errors, Json, Path},
    meta, names, pod,
    selector::Selector,
};

impl Model for ReplicaSet {
    fn set_defaults(&mut self) {
        let spec = self.spec.get_or_insert_default();
        spec.replicas.get_or_insert(1);
        if let Some(template) = &mut spec.template {
            pod::set_template_defaults(template);
        }
    }

    fn reset_status(&mut self) {
        self.status = Some(ReplicaSetStatus::default());
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        replica_set_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        replica_set_spec(&mut errors, self.spec.as_ref());
        let selector =
            |set: &Self| -> Option<LabelSelector> { set.spec.as_ref().and_then(|spec| spec.selector.clone()) };
        errors.immutable(&Path::root("spec").child("selector"), &selector(self), &selector(old));
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        self.counts().check(&mut errors);
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        match name {
            "status.replicas" => Some(self.counts().replicas.to_string().into()),
            _ => super::selectable_meta(self, name),
        }
    }
}

fn replica_set_spec(errors: &mut Errors, spec: Option<&ReplicaSetSpec>) {
    let path = Path::root("spec");
    let Some(spec) = spec else {
        return errors.required(&path, "");
    };
    sizes(errors, &path, spec.replicas, spec.min_ready_seconds);
    let selector_path = path.child("selector");
    let mut selects = None;
    match &spec.selector {
        None => errors.required(&selector_path, ""),
        Some(selector) if *selector == LabelSelector::default() => {
            errors.invalid(
                &selector_path,
                &Json(selector),
                "empty selector is invalid for deployment",
            );
        }
        Some(selector) => {
            meta::label_selector(errors, &selector_path, selector);
            selects = Selector::from_message(Some(selector)).ok();
        }
    }
    template(
        errors,
        &path.child("template"),
        spec.template.as_ref(),
        selects.as_ref(),
    );
}

impl Model for ReplicationController {
    fn set_defaults(&mut self) {
        let spec = self.spec.get_or_insert_default();
        spec.replicas.get_or_insert(1);
        let Some(template) = &mut spec.template else { return };
        pod::set_template_defaults(template);
        let labels = template
            .metadata
            .as_ref()
            .map(|meta| meta.labels.clone())
            .unwrap_or_default();
        if spec.selector.is_empty() {
            spec.selector.clone_from(&labels);
        }
        let own = self.metadata.get_or_insert_default();
        if own.labels.is_empty() {
            own.labels = labels;
        }
    }

    fn reset_status(&mut self) {
        self.status = Some(ReplicationControllerStatus::default());
    }

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        controller_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        controller_spec(&mut errors, self.spec.as_ref());
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        self.counts().check(&mut errors);
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        match name {
            "status.replicas" => Some(self.counts().replicas.to_string().into()),
            _ => super::selectable_meta(self, name),
        }
    }
}

fn controller_spec(errors: &mut Errors, spec: Option<&ReplicationControllerSpec>) {
    let path = Path::root("spec");
    let Some(spec) = spec else {
        return errors.required(&path, "");
    };
    sizes(errors, &path, spec.replicas, spec.min_ready_seconds);
    let selector = path.child("selector");
    if spec.selector.is_empty() {
        errors.required(&selector, "");
    }
    meta::labels(errors, &selector, &spec.selector);
    let selects = (!spec.selector.is_empty()).then(|| Selector::from_labels(&spec.selector));
    template(
        errors,
        &path.child("template"),
        spec.template.as_ref(),
        selects.as_ref(),
    );
}

fn sizes(errors: &mut Errors, spec: &Path<'_>, replicas: Option<i32>, min_ready_seconds: i32) {
    errors.not_negative(&spec.child("replicas"), replicas.unwrap_or(1).into());
    errors.not_negative(&spec.child("minReadySeconds"), min_ready_seconds.into());
}

fn template(errors: &mut Errors, path: &Path<'_>, template: Option<&PodTemplateSpec>, selector: Option<&Selector>) {
    let Some(template) = template else {
        return errors.required(path, "");
    };
    let none = BTreeMap::new();
    let labels = template.metadata.as_ref().map_or(&none, |meta| &meta.labels);
    if selector.is_some_and(|selector| !selector.matches(labels)) {
        let detail = "`selector` does not match template `labels`";
        errors.invalid(&path.child("metadata").child("labels"), &Json(labels), detail);
    }
    pod::validate_template(errors, path, template);
}

/// What both kinds count in their status.
struct Counts {
    replicas: i32,
    fully_labeled: i32,
    ready: i32,
    available: i32,
    observed_generation: i64,
}

trait Counted {
    fn counts(&self) -> Counts;
}

macro_rules! counted {
    ($($kind:ty),*) => {$(
        impl Counted for $kind {
            fn counts(&self) -> Counts {
                let status = self.status.clone().unwrap_or_default();
                Counts {
                    replicas: status.replicas,
                    fully_labeled: status.fully_labeled_replicas,
                    ready: status.ready_replicas,
                    available: status.available_replicas,
                    observed_generation: status.observed_generation,
                }
            }
        }
    )*};
}

counted!(ReplicaSet, ReplicationController);

impl Counts {
    fn check(&self, errors: &mut Errors) {
        let path = Path::root("status");
        errors.not_negative(&path.child("replicas"), self.replicas.into());
        for (field, count) in [
            ("fullyLabeledReplicas", self.fully_labeled),
            ("readyReplicas", self.ready),
            ("availableReplicas", self.available),
        ] {
            errors.not_negative(&path.child(field), count.into());
            if count > self.replicas {
                errors.invalid(&path.child(field), &count, "cannot be greater than status.replicas");
            }
        }
        if self.available > self.ready {
            errors.invalid(
                &path.child("availableReplicas"),
                &self.available,
                "cannot be greater than readyReplicas",
            );
        }
        errors.not_negative(&path.child("observedGeneration"), self.observed_generation);
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::json::from_value;
    use serde_json::{Value, json};

    use super::*;

    fn template() -> Value {
        json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "a", "image": "a:1"}]}})
    }

    fn set(spec: Value) -> ReplicaSet {
        let mut set: ReplicaSet =
            from_value(&json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec})).expect("set");
        set.set_defaults();
        set
    }

    fn texts(errors: &[FieldError]) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn selectors_match_templates() {
        let good = set(json!({"selector": {"matchLabels": {"app": "web"}}, "template": template()}));
        assert_eq!(good.validate_create(), []);
        assert_eq!(good.spec.as_ref().and_then(|spec| spec.replicas), Some(1));
        let other = set(json!({"selector": {"matchLabels": {"app": "db"}}, "template": template()}));
        assert_eq!(
            texts(&other.validate_create()),
            [
                "spec.template.metadata.labels: Invalid value: {\"app\":\"web\"}: `selector` does not match template `labels`"
            ]
        );
        assert_eq!(texts(&other.validate_update(&good)).len(), 2);
        let empty = set(json!({"selector": {}, "replicas": -1}));
        assert_eq!(
            texts(&empty.validate_create()),
            [
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
                "spec.selector: Invalid value: {}: empty selector is invalid for deployment",
                "spec.template: Required value",
            ]
        );
        let mut once = good.clone();
        let spec = once
            .spec
            .as_mut()
            .and_then(|spec| spec.template.as_mut())
            .and_then(|one| one.spec.as_mut());
        "Never".clone_into(&mut spec.expect("spec").restart_policy);
        assert_eq!(
            texts(&once.validate_create()),
            ["spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\""]
        );
    }

    #[test]
    fn controllers_take_their_labels_from_the_template() {
        let mut controller: ReplicationController =
            from_value(&json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {"template": template()}}))
                .expect("controller");
        controller.set_defaults();
        assert_eq!(controller.validate_create(), []);
        assert_eq!(controller.metadata.as_ref().map(|meta| meta.labels.len()), Some(1));
        assert_eq!(
            controller.spec.as_ref().map(|spec| spec.selector["app"].as_str()),
            Some("web")
        );
    }

    #[test]
    fn counts_fit() {
        let mut new = set(json!({"selector": {"matchLabels": {"app": "web"}}, "template": template()}));
        let old = new.clone();
        new.status = Some(ReplicaSetStatus {
            replicas: 1,
            ready_replicas: 2,
            available_replicas: -1,
            ..Default::default()
        });
        assert_eq!(
            texts(&new.validate_status_update(&old)),
            [
                "status.readyReplicas: Invalid value: 2: cannot be greater than status.replicas",
                "status.availableReplicas: Invalid value: -1: must be greater than or equal to 0",
            ]
        );
    }
}
