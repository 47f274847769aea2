//! Node affinity.

use orlop_proto::core::v1::{Affinity, NodeSelectorRequirement, NodeSelectorTerm};

use super::{
    error::{Errors, Path},
    names,
};

/// A pod's affinity.
pub(super) fn validate(errors: &mut Errors, path: &Path<'_>, affinity: &Affinity) {
    let Some(node) = &affinity.node_affinity else { return };
    let path = path.child("nodeAffinity");
    if let Some(required) = &node.required_during_scheduling_ignored_during_execution {
        let path = path.child("requiredDuringSchedulingIgnoredDuringExecution");
        let path = path.child("nodeSelectorTerms");
        if required.node_selector_terms.is_empty() {
            errors.required(&path, "must have at least one node selector term");
        }
        for (index, one) in required.node_selector_terms.iter().enumerate() {
            term(errors, &path.index(index), one);
        }
    }
    let path = path.child("preferredDuringSchedulingIgnoredDuringExecution");
    for (index, preferred) in node
        .preferred_during_scheduling_ignored_during_execution
        .iter()
        .enumerate()
    {
        let path = path.index(index);
        if !(1..=100).contains(&preferred.weight) {
            errors.invalid(&path.child("weight"), &preferred.weight, "must be in the range 1-100");
        }
        match &preferred.preference {
            Some(preference) => term(errors, &path.child("preference"), preference),
            None => errors.required(&path.child("preference"), ""),
        }
    }
}

fn term(errors: &mut Errors, path: &Path<'_>, term: &NodeSelectorTerm) {
    let expressions = path.child("matchExpressions");
    for (index, requirement) in term.match_expressions.iter().enumerate() {
        expression(errors, &expressions.index(index), requirement);
    }
    let fields = path.child("matchFields");
    for (index, requirement) in term.match_fields.iter().enumerate() {
        field(errors, &fields.index(index), requirement);
    }
}

fn expression(errors: &mut Errors, path: &Path<'_>, requirement: &NodeSelectorRequirement) {
    let values = path.child("values");
    let given = requirement.values.as_slice();
    match requirement.operator.as_str() {
        "In" | "NotIn" if given.is_empty() => {
            errors.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
        }
        "Exists" | "DoesNotExist" if !given.is_empty() => {
            errors.forbidden(
                &values,
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            );
        }
        "Gt" | "Lt" if given.len() != 1 => {
            errors.required(
                &values,
                "must be specified single value when `operator` is 'Lt' or 'Gt'",
            );
        }
        "Gt" | "Lt" if given[0].parse::<i64>().is_err() => {
            errors.invalid(
                &values.index(0),
                &given[0],
                "for 'Gt', 'Lt' operators, the value must be an integer",
            );
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        operator => errors.invalid(&path.child("operator"), &operator, "not a valid selector operator"),
    }
    errors.syntax(&path.child("key"), &requirement.key, names::qualified_name);
    if !matches!(requirement.operator.as_str(), "Gt" | "Lt") {
        for (index, value) in given.iter().enumerate() {
            errors.syntax(&values.index(index), value, names::label_value);
        }
    }
}

fn field(errors: &mut Errors, path: &Path<'_>, requirement: &NodeSelectorRequirement) {
    match requirement.operator.as_str() {
        "In" | "NotIn" if requirement.values.len() != 1 => {
            let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.required(&path.child("values"), detail);
        }
        "In" | "NotIn" => {}
        operator => errors.invalid(&path.child("operator"), &operator, "not a valid selector operator"),
    }
    if requirement.key == "metadata.name" {
        let values = path.child("values");
        for (index, value) in requirement.values.iter().enumerate() {
            errors.syntax(&values.index(index), value, names::dns1123_subdomain);
        }
    } else {
        errors.invalid(&path.child("key"), &requirement.key, "not a valid field selector key");
    }
}
