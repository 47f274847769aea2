//! ObjectMeta and label selectors: k8s.io/apimachinery/pkg/api/validation.

use std::collections::BTreeMap;

use orlop_proto::{
    Resource,
    meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
};

use super::{
    error::{Errors, Json, Path},
    names,
};

/// Bytes of all keys and values of the annotations together.
const ANNOTATIONS_MAX: usize = 256 * 1024;
/// Finalizers that need no domain.
const STANDARD_FINALIZERS: [&str; 3] = ["foregroundDeletion", "kubernetes", "orphan"];

/// Checks the metadata of a new object.
pub(super) fn validate(errors: &mut Errors, object: &impl Resource, name: fn(&str) -> Result<(), String>) {
    let (path, meta) = (Path::root("metadata"), object.meta());
    if !meta.generate_name.is_empty()
        && let Err(detail) = names::prefix_of(&meta.generate_name, name)
    {
        errors.invalid(&path.child("generateName"), &meta.generate_name, &detail);
    }
    match (meta.name.is_empty(), meta.generate_name.is_empty()) {
        (true, true) => errors.required(&path.child("name"), "name or generateName is required"),
        (true, false) => {}
        (false, _) => errors.syntax(&path.child("name"), &meta.name, name),
    }
    namespace(errors, &path, object);
    common(errors, &path, meta);
}

fn namespace<T: Resource>(errors: &mut Errors, path: &Path<'_>, object: &T) {
    let (path, namespace) = (path.child("namespace"), object.namespace());
    match (T::KIND.namespaced, namespace.is_empty()) {
        (true, true) => errors.required(&path, ""),
        (true, false) => errors.syntax(&path, namespace, names::dns1123_label),
        (false, false) => errors.forbidden(&path, "not allowed on this type"),
        (false, true) => {}
    }
}

fn common(errors: &mut Errors, path: &Path<'_>, meta: &ObjectMeta) {
    errors.not_negative(&path.child("generation"), meta.generation);
    if let Some(seconds) = meta.deletion_grace_period_seconds {
        errors.not_negative(&path.child("deletionGracePeriodSeconds"), seconds);
    }
    errors.time(&path.child("creationTimestamp"), meta.creation_timestamp.as_ref());
    errors.time(&path.child("deletionTimestamp"), meta.deletion_timestamp.as_ref());
    labels(errors, &path.child("labels"), &meta.labels);
    annotations(errors, &path.child("annotations"), &meta.annotations);
    owners(errors, &path.child("ownerReferences"), &meta.owner_references);
    finalizers(errors, &path.child("finalizers"), &meta.finalizers);
}

/// Keys are qualified names, values are label values.
pub(super) fn labels(errors: &mut Errors, path: &Path<'_>, labels: &BTreeMap<String, String>) {
    for (key, value) in labels {
        errors.syntax(path, key, names::qualified_name);
        errors.syntax(&path.key(key), value, names::label_value);
    }
}

/// Keys are qualified names of any case; there is a bound on the whole.
pub(super) fn annotations(errors: &mut Errors, path: &Path<'_>, annotations: &BTreeMap<String, String>) {
    let mut size = 0;
    for (key, value) in annotations {
        if let Err(detail) = names::qualified_name(&key.to_lowercase()) {
            errors.invalid(path, key, &detail);
        }
        size += key.len() + value.len();
    }
    if size > ANNOTATIONS_MAX {
        errors.too_long(path, ANNOTATIONS_MAX);
    }
}

fn owners(errors: &mut Errors, path: &Path<'_>, owners: &[OwnerReference]) {
    let mut controller: Option<&OwnerReference> = None;
    for (index, owner) in owners.iter().enumerate() {
        let path = path.index(index);
        if owner.api_version.is_empty() {
            errors.invalid(
                &path.child("apiVersion"),
                &owner.api_version,
                "version must not be empty",
            );
        }
        for (field, value) in [("kind", &owner.kind), ("name", &owner.name), ("uid", &owner.uid)] {
            if value.is_empty() {
                errors.invalid(&path.child(field), value, "must not be empty");
            }
        }
        if owner.api_version == "v1" && owner.kind == "Event" {
            errors.invalid(&path, &Json(owner), "/v1, Kind=Event is disallowed from being an owner");
        }
        if owner.controller == Some(true) {
            if let Some(first) = controller {
                let detail = format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {} and {}",
                    first.name, owner.name
                );
                errors.invalid(&path, &Json(owner), &detail);
            }
            controller = Some(owner);
        }
    }
}

/// Qualified names, with a domain unless they are Kubernetes' own.
pub(super) fn finalizers(errors: &mut Errors, path: &Path<'_>, finalizers: &[String]) {
    for (index, finalizer) in finalizers.iter().enumerate() {
        let path = path.index(index);
        errors.syntax(&path, finalizer, names::qualified_name);
        if !finalizer.contains('/') && !STANDARD_FINALIZERS.contains(&finalizer.as_str()) {
            errors.invalid(
                &path,
                finalizer,
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
    let has = |name: &str| finalizers.iter().any(|finalizer| finalizer == name);
    if has("orphan") && has("foregroundDeletion") {
        let detail = "finalizer foregroundDeletion and finalizer orphan cannot both be set";
        errors.invalid(path, &Json(&finalizers), detail);
    }
}

/// Checks the metadata that is to replace another. System fields that the new one leaves out count as kept.
pub(super) fn validate_update<T: Resource>(errors: &mut Errors, new: &T, old: &T) {
    let path = Path::root("metadata");
    let (new_meta, old_meta) = (new.meta(), old.meta());
    errors.immutable(&path.child("name"), &new_meta.name, &old_meta.name);
    errors.immutable(&path.child("namespace"), &new_meta.namespace, &old_meta.namespace);
    if !new_meta.uid.is_empty() {
        errors.immutable(&path.child("uid"), &new_meta.uid, &old_meta.uid);
    }
    for (field, new_time, old_time) in [
        (
            "creationTimestamp",
            &new_meta.creation_timestamp,
            &old_meta.creation_timestamp,
        ),
        (
            "deletionTimestamp",
            &new_meta.deletion_timestamp,
            &old_meta.deletion_timestamp,
        ),
    ] {
        let text = |time: &Option<prost_types::Timestamp>| time.as_ref().map(orlop_proto::time::format_seconds);
        if new_time.is_some() {
            errors.immutable(&path.child(field), &text(new_time), &text(old_time));
        }
    }
    if new_meta.deletion_grace_period_seconds.is_some() {
        let (new_seconds, old_seconds) = (
            new_meta.deletion_grace_period_seconds,
            old_meta.deletion_grace_period_seconds,
        );
        errors.immutable(&path.child("deletionGracePeriodSeconds"), &new_seconds, &old_seconds);
    }
    if old.is_deleting() {
        let is_new = |finalizer: &&String| !old_meta.finalizers.contains(finalizer);
        let added: Vec<&String> = new_meta.finalizers.iter().filter(is_new).collect();
        if !added.is_empty() {
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers {}",
                super::error::Shown::shown(&Json(&added))
            );
            errors.forbidden(&path.child("finalizers"), &detail);
        }
    }
    common(errors, &path, new_meta);
}

/// metav1.LabelSelector.
pub(super) fn label_selector(errors: &mut Errors, path: &Path<'_>, selector: &LabelSelector) {
    labels(errors, &path.child("matchLabels"), &selector.match_labels);
    let path = path.child("matchExpressions");
    for (index, expression) in selector.match_expressions.iter().enumerate() {
        let path = path.index(index);
        let values = path.child("values");
        match (expression.operator.as_str(), expression.values.is_empty()) {
            ("In" | "NotIn", true) => {
                errors.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
            }
            ("Exists" | "DoesNotExist", false) => {
                errors.forbidden(
                    &values,
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            ("In" | "NotIn" | "Exists" | "DoesNotExist", _) => {}
            (operator, _) => errors.invalid(&path.child("operator"), &operator, "not a valid selector operator"),
        }
        errors.syntax(&path.child("key"), &expression.key, names::qualified_name);
        for (index, value) in expression.values.iter().enumerate() {
            errors.syntax(&values.index(index), value, names::label_value);
        }
    }
}

/// A condition's type and status.
pub(super) fn condition(errors: &mut Errors, path: &Path<'_>, type_: &str, status: &str) {
    if type_.is_empty() {
        errors.required(&path.child("type"), "");
    } else {
        errors.syntax(&path.child("type"), type_, names::qualified_name);
    }
    errors.one_of(&path.child("status"), status, &["True", "False", "Unknown"]);
}

#[cfg(test)]
mod tests {
    use orlop_proto::core::v1::{Node, Pod};

    use super::*;

    fn check(meta: ObjectMeta) -> Vec<String> {
        let mut errors = Errors::default();
        let pod = Pod {
            metadata: Some(meta),
            ..Pod::default()
        };
        validate(&mut errors, &pod, names::dns1123_subdomain);
        errors.into_found().iter().map(ToString::to_string).collect()
    }

    fn good() -> ObjectMeta {
        ObjectMeta {
            name: "a".to_owned(),
            namespace: "default".to_owned(),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn names_and_namespaces() {
        assert_eq!(check(good()), Vec::<String>::new());
        assert_eq!(
            check(ObjectMeta::default()),
            [
                "metadata.name: Required value: name or generateName is required",
                "metadata.namespace: Required value"
            ]
        );
        let generated = ObjectMeta {
            name: String::new(),
            generate_name: "web-".to_owned(),
            ..good()
        };
        assert_eq!(check(generated), Vec::<String>::new());
        let node = Node {
            metadata: Some(good()),
            ..Node::default()
        };
        let mut errors = Errors::default();
        validate(&mut errors, &node, names::dns1123_subdomain);
        assert_eq!(
            errors.into_found()[0].to_string(),
            "metadata.namespace: Forbidden: not allowed on this type"
        );
    }

    #[test]
    fn everything_else() {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
            controller: Some(true),
            ..OwnerReference::default()
        };
        let bad = ObjectMeta {
            labels: [("a b".to_owned(), "ok".to_owned()), ("c".to_owned(), "-".to_owned())].into(),
            annotations: [("big".to_owned(), "x".repeat(ANNOTATIONS_MAX))].into(),
            owner_references: vec![
                owner.clone(),
                OwnerReference {
                    uid: String::new(),
                    ..owner
                },
            ],
            finalizers: vec!["mine".to_owned(), "orphan".to_owned(), "foregroundDeletion".to_owned()],
            creation_timestamp: Some(prost_types::Timestamp {
                seconds: i64::MAX,
                nanos: 0,
            }),
            ..good()
        };
        let errors = check(bad);
        let fields: Vec<&str> = errors
            .iter()
            .map(|error| error.split(": ").next().unwrap_or_default())
            .collect();
        assert_eq!(
            fields,
            [
                "metadata.creationTimestamp",
                "metadata.labels",
                "metadata.labels[c]",
                "metadata.annotations",
                "metadata.ownerReferences[1].uid",
                "metadata.ownerReferences[1]",
                "metadata.finalizers[0]",
                "metadata.finalizers",
            ]
        );
    }

    #[test]
    fn what_an_update_keeps() {
        let deleting = ObjectMeta {
            deletion_timestamp: Some(prost_types::Timestamp::default()),
            ..good()
        };
        let old = Pod {
            metadata: Some(deleting),
            ..Pod::default()
        };
        let renamed = ObjectMeta {
            name: "b".to_owned(),
            uid: "u".to_owned(),
            finalizers: vec!["a/b".to_owned()],
            ..good()
        };
        let new = Pod {
            metadata: Some(renamed),
            ..Pod::default()
        };
        let mut errors = Errors::default();
        validate_update(&mut errors, &new, &old);
        let texts: Vec<String> = errors.into_found().iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "metadata.name: Invalid value: \"b\": field is immutable",
                "metadata.uid: Invalid value: \"u\": field is immutable",
                "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new \
                 finalizers [\"a/b\"]",
            ]
        );
    }
}
