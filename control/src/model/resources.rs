//! Resource requests, limits and capacities.

use std::collections::BTreeMap;

use orlop_proto::{core::v1::ResourceRequirements, quantity::Quantity};

use super::{
    error::{Errors, Path},
    names,
};

/// What a container can ask for: the resources that the scheduler counts and the agent enforces.
const CONTAINER_RESOURCES: [&str; 3] = ["cpu", "ephemeral-storage", "memory"];

/// A quantity that is not below zero; `None` after an error.
fn quantity(errors: &mut Errors, path: &Path<'_>, text: &str) -> Option<Quantity> {
    match text.parse::<Quantity>() {
        Err(error) => errors.invalid(path, &text, &error.to_string()),
        Ok(quantity) if quantity.is_negative() => {
            errors.invalid(path, &text, "must be greater than or equal to 0");
        }
        Ok(quantity) => return Some(quantity),
    }
    None
}

/// A container's requests and limits.
pub(super) fn requirements(errors: &mut Errors, path: &Path<'_>, resources: &ResourceRequirements) {
    let mut check = |field: &str, map: &BTreeMap<String, String>| -> BTreeMap<String, Quantity> {
        let path = path.child(field);
        let mut parsed = BTreeMap::new();
        for (name, text) in map {
            let path = path.key(name);
            if !CONTAINER_RESOURCES.contains(&name.as_str()) {
                errors.unsupported(&path, name, &CONTAINER_RESOURCES);
            } else if let Some(quantity) = quantity(errors, &path, text) {
                parsed.insert(name.clone(), quantity);
            }
        }
        parsed
    };
    let limits = check("limits", &resources.limits);
    let requests = check("requests", &resources.requests);
    let path = path.child("requests");
    for (name, request) in requests {
        if let Some(limit) = limits.get(&name).filter(|limit| request > **limit) {
            let detail = format!("must be less than or equal to {name} limit of {limit}");
            errors.invalid(&path.key(&name), &resources.requests[&name], &detail);
        }
    }
}

/// A node's capacity: any resource, no negative amounts.
pub(super) fn capacity(errors: &mut Errors, path: &Path<'_>, capacity: &BTreeMap<String, String>) {
    for (name, text) in capacity {
        let path = path.key(name);
        errors.syntax(&path, name, names::qualified_name);
        quantity(errors, &path, text);
    }
}

/// A limit without a request is also the request.
pub(super) fn set_defaults(resources: &mut ResourceRequirements) {
    for (name, limit) in &resources.limits {
        if !resources.requests.contains_key(name) {
            resources.requests.insert(name.clone(), limit.clone());
        }
    }
}
