//! Taints and tolerations.

use std::collections::HashSet;

use orlop_proto::core::v1::{Taint, Toleration};

use super::{
    error::{Errors, Path},
    names,
};

const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// A node's taints.
pub(super) fn taints(errors: &mut Errors, path: &Path<'_>, taints: &[Taint]) {
    let mut known = HashSet::new();
    for (index, taint) in taints.iter().enumerate() {
        let path = path.index(index);
        errors.syntax(&path.child("key"), &taint.key, names::qualified_name);
        errors.syntax(&path.child("value"), &taint.value, names::label_value);
        errors.one_of(&path.child("effect"), &taint.effect, &EFFECTS);
        errors.time(&path.child("timeAdded"), taint.time_added.as_ref());
        if !known.insert((&taint.key, &taint.effect)) {
            errors.duplicate(&path, &format!("{}:{}", taint.key, taint.effect));
        }
    }
}

/// A pod's tolerations.
pub(super) fn tolerations(errors: &mut Errors, path: &Path<'_>, tolerations: &[Toleration]) {
    for (index, toleration) in tolerations.iter().enumerate() {
        let path = path.index(index);
        let operator = path.child("operator");
        if !toleration.key.is_empty() {
            errors.syntax(&path.child("key"), &toleration.key, names::qualified_name);
        } else if toleration.operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.invalid(&operator, &toleration.operator, detail);
        }
        if toleration.toleration_seconds.is_some() && toleration.effect != "NoExecute" {
            let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.invalid(&path.child("effect"), &toleration.effect, detail);
        }
        match toleration.operator.as_str() {
            "" | "Equal" => errors.syntax(&path.child("value"), &toleration.value, names::label_value),
            "Exists" if toleration.value.is_empty() => {}
            "Exists" => {
                errors.invalid(
                    &operator,
                    &toleration.operator,
                    "value must be empty when `operator` is 'Exists'",
                );
            }
            other => errors.unsupported(&operator, other, &["Equal", "Exists"]),
        }
        if !toleration.effect.is_empty() {
            errors.one_of(&path.child("effect"), &toleration.effect, &EFFECTS);
        }
    }
}
