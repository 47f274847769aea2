//! Topology spread constraints of pods.

use std::collections::HashSet;

use orlop_proto::{
    Resource as _,
    core::v1::{Pod, TopologySpreadConstraint},
    meta::v1::{LabelSelector, LabelSelectorRequirement},
};

use super::{
    error::{Errors, Path},
    meta, names,
};

/// The pod waits until a node satisfies the constraint.
pub const DO_NOT_SCHEDULE: &str = "DoNotSchedule";
/// Nodes that satisfy the constraint better are preferred.
pub const SCHEDULE_ANYWAY: &str = "ScheduleAnyway";
/// Nodes that a scheduling rule excludes are left out.
pub const HONOR: &str = "Honor";
/// Nodes that a scheduling rule excludes are let in.
pub const IGNORE: &str = "Ignore";

/// More of them in one pod are refused: each costs the scheduler a look at every node.
const MOST: usize = 64;

/// A pod's constraints.
pub(super) fn validate(errors: &mut Errors, path: &Path<'_>, constraints: &[TopologySpreadConstraint]) {
    if constraints.len() > MOST {
        return errors.too_many(path, constraints.len(), MOST);
    }
    for (index, one) in constraints.iter().enumerate() {
        constraint(errors, &path.index(index), one, &constraints[index + 1..]);
    }
}

fn constraint(
    errors: &mut Errors,
    path: &Path<'_>,
    one: &TopologySpreadConstraint,
    following: &[TopologySpreadConstraint],
) {
    positive(errors, &path.child("maxSkew"), one.max_skew);
    if one.topology_key.is_empty() {
        errors.required(&path.child("topologyKey"), "can not be empty");
    }
    let action = one.when_unsatisfiable.as_str();
    if ![DO_NOT_SCHEDULE, SCHEDULE_ANYWAY].contains(&action) {
        let path = path.child("whenUnsatisfiable");
        errors.unsupported(&path, action, &[DO_NOT_SCHEDULE, SCHEDULE_ANYWAY]);
    }
    if following.iter().any(|other| identity(other) == identity(one)) {
        let pair = format!("{{{}, {action}}}", one.topology_key);
        errors.duplicate(&path.child("{topologyKey, whenUnsatisfiable}"), &pair);
    }
    if let Some(domains) = one.min_domains {
        let path = path.child("minDomains");
        positive(errors, &path, domains);
        if action != DO_NOT_SCHEDULE {
            let detail = format!("can only use minDomains if whenUnsatisfiable={DO_NOT_SCHEDULE}, not {action}");
            errors.invalid(&path, &domains, &detail);
        }
    }
    for (field, policy) in [
        ("nodeAffinityPolicy", &one.node_affinity_policy),
        ("nodeTaintsPolicy", &one.node_taints_policy),
    ] {
        if !policy.is_empty() && policy != HONOR && policy != IGNORE {
            errors.unsupported(&path.child(field), policy, &[HONOR, IGNORE]);
        }
    }
    let keys = path.child("matchLabelKeys");
    label_keys(errors, &keys, &one.match_label_keys, one.label_selector.as_ref());
    if let Some(selector) = &one.label_selector {
        meta::label_selector(errors, &path.child("labelSelector"), selector);
    }
}

fn positive(errors: &mut Errors, path: &Path<'_>, value: i32) {
    if value <= 0 {
        errors.invalid(path, &value, "must be greater than zero");
    }
}

/// What tells one of a pod's constraints from the others.
fn identity(one: &TopologySpreadConstraint) -> (&str, &str) {
    (&one.topology_key, &one.when_unsatisfiable)
}

/// The keys are labels' names that the selector does not speak of, but for what [`complete`] writes into it.
fn label_keys(errors: &mut Errors, path: &Path<'_>, keys: &[String], selector: Option<&LabelSelector>) {
    let Some(selector) = selector else {
        if !keys.is_empty() {
            errors.forbidden(path, "must not be specified when labelSelector is not set");
        }
        return;
    };
    let (mut once, mut several) = (HashSet::new(), HashSet::new());
    for expression in &selector.match_expressions {
        let is_completed = expression.operator == "In" && expression.values.len() == 1;
        if !once.insert(expression.key.as_str()) || !is_completed {
            several.insert(expression.key.as_str());
        }
    }
    for (index, key) in keys.iter().enumerate() {
        let path = path.index(index);
        errors.syntax(&path, key, names::qualified_name);
        if selector.match_labels.contains_key(key) || several.contains(key.as_str()) {
            errors.invalid(&path, key, "exists in both matchLabelKeys and labelSelector");
        }
    }
}

/// Adds the values of the labels that `matchLabelKeys` names to the selectors of a new pod, as Kubernetes' API server does: they stay
/// what they were when the pod was made.
pub fn complete(pod: &mut Pod) {
    let is_plain = |one: &TopologySpreadConstraint| one.match_label_keys.is_empty();
    let constraints = pod.spec.iter().flat_map(|spec| &spec.topology_spread_constraints);
    if constraints.clone().all(is_plain) {
        return;
    }
    let labels = pod.meta().labels.clone();
    let constraints = pod
        .spec
        .iter_mut()
        .flat_map(|spec| &mut spec.topology_spread_constraints);
    for one in constraints {
        let Some(selector) = &mut one.label_selector else {
            continue;
        };
        let mut there: HashSet<(String, String)> = selector.match_expressions.iter().filter_map(completed).collect();
        for key in &one.match_label_keys {
            let Some(value) = labels.get(key) else { continue };
            if there.insert((key.clone(), value.clone())) {
                selector.match_expressions.push(LabelSelectorRequirement {
                    key: key.clone(),
                    operator: "In".to_owned(),
                    values: vec![value.clone()],
                });
            }
        }
    }
}

/// Key and value of an expression that is as [`complete`] writes them.
fn completed(expression: &LabelSelectorRequirement) -> Option<(String, String)> {
    match expression.values.as_slice() {
        [value] if expression.operator == "In" => Some((expression.key.clone(), value.clone())),
        _ => None,
    }
}

/// Whether constraints are those of a pod but for what [`complete`] wrote: who applies a pod's manifest again leaves that out.
pub fn same_as_created(given: &[TopologySpreadConstraint], stored: &[TopologySpreadConstraint]) -> bool {
    let bare = |one: &TopologySpreadConstraint| {
        let mut one = one.clone();
        let keys: HashSet<&String> = one.match_label_keys.iter().collect();
        if let Some(selector) = &mut one.label_selector {
            selector
                .match_expressions
                .retain(|expression| !(keys.contains(&expression.key) && completed(expression).is_some()));
        }
        one
    };
    given.len() == stored.len()
        && given
            .iter()
            .zip(stored)
            .all(|(given, stored)| *given == *stored || *given == bare(stored))
}

#[cfg(test)]
mod tests {
    use orlop_proto::json::from_value;
    use serde_json::{Value, json};

    use super::*;
    use crate::model::Model as _;

    fn pod(constraints: &Value) -> Pod {
        let mut pod: Pod = from_value(&json!({
            "metadata": {"name": "web", "namespace": "default", "labels": {"app": "web", "hash": "1"}},
            "spec": {"containers": [{"name": "a", "image": "a:1"}], "topologySpreadConstraints": constraints},
        }))
        .expect("pod");
        pod.set_defaults();
        pod
    }

    fn errors(constraints: &Value) -> Vec<String> {
        pod(constraints)
            .validate_create()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn errors_are_those_of_kubernetes() {
        let zone = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"});
        let soft = json!({"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"});
        assert_eq!(errors(&json!([zone, soft])), Vec::<String>::new());
        let path = "spec.topologySpreadConstraints[0]";
        assert_eq!(
            errors(&json!([{"minDomains": 0, "nodeAffinityPolicy": "Sometimes", "nodeTaintsPolicy": "No"}])),
            [
                format!("{path}.maxSkew: Invalid value: 0: must be greater than zero"),
                format!("{path}.topologyKey: Required value: can not be empty"),
                format!(
                    "{path}.whenUnsatisfiable: Unsupported value: \"\": supported values: \"DoNotSchedule\", \"ScheduleAnyway\""
                ),
                format!("{path}.minDomains: Invalid value: 0: must be greater than zero"),
                format!(
                    "{path}.minDomains: Invalid value: 0: can only use minDomains if whenUnsatisfiable=DoNotSchedule, not "
                ),
                format!(
                    "{path}.nodeAffinityPolicy: Unsupported value: \"Sometimes\": supported values: \"Honor\", \"Ignore\""
                ),
                format!("{path}.nodeTaintsPolicy: Unsupported value: \"No\": supported values: \"Honor\", \"Ignore\""),
            ]
        );
        assert_eq!(
            errors(&json!([zone, soft, zone])),
            [format!(
                "{path}.{{topologyKey, whenUnsatisfiable}}: Duplicate value: \"{{zone, DoNotSchedule}}\""
            )]
        );
        let many: Vec<Value> = (0..65)
            .map(|index| json!({"maxSkew": 1, "topologyKey": format!("k{index}"), "whenUnsatisfiable": "ScheduleAnyway"}))
            .collect();
        assert_eq!(
            errors(&json!(many)),
            ["spec.topologySpreadConstraints: Too many: 65: must have at most 64 items"]
        );
    }

    #[test]
    fn label_keys_and_selectors_are_checked() {
        let with = |selector: Value, keys: Value| {
            errors(
                &json!([{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": selector, "matchLabelKeys": keys}]),
            )
        };
        let path = "spec.topologySpreadConstraints[0]";
        let both = |index: usize, key: &str| {
            format!(
                "{path}.matchLabelKeys[{index}]: Invalid value: \"{key}\": exists in both matchLabelKeys and labelSelector"
            )
        };
        assert_eq!(
            with(json!({"matchLabels": {"app": "web"}}), json!(["hash"])),
            Vec::<String>::new()
        );
        assert_eq!(
            with(Value::Null, json!(["hash"])),
            [format!(
                "{path}.matchLabelKeys: Forbidden: must not be specified when labelSelector is not set"
            )]
        );
        assert_eq!(
            with(
                json!({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "x", "operator": "Exists"}]}),
                json!(["app", "x"])
            ),
            [both(0, "app"), both(1, "x")]
        );
        let found = with(
            json!({"matchExpressions": [{"key": "a b", "operator": "Near"}]}),
            json!(["/x"]),
        );
        let fields: Vec<&str> = found
            .iter()
            .map(|error| error.split(": ").next().unwrap_or(""))
            .collect();
        assert_eq!(
            fields,
            [
                format!("{path}.matchLabelKeys[0]"),
                format!("{path}.labelSelector.matchExpressions[0].operator"),
                format!("{path}.labelSelector.matchExpressions[0].key"),
            ]
        );
    }

    #[test]
    fn label_keys_are_looked_up_once() {
        let given = pod(&json!([{
            "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "matchLabelKeys": ["hash", "none"],
            "labelSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
        }]));
        let mut stored = given.clone();
        complete(&mut stored);
        let expressions = |pod: &Pod| {
            let one = &pod.spec.as_ref().expect("spec").topology_spread_constraints[0];
            serde_json::to_value(&one.label_selector.as_ref().expect("selector").match_expressions).expect("json")
        };
        assert_eq!(
            expressions(&stored),
            json!([{"key": "app", "operator": "Exists"}, {"key": "hash", "operator": "In", "values": ["1"]}])
        );
        assert_eq!(stored.validate_create(), []);
        let mut again = stored.clone();
        complete(&mut again);
        assert_eq!(again, stored, "what was read can be created again");
        assert_eq!(
            given.validate_update(&stored),
            [],
            "the manifest that it was made of fits it"
        );
        let mut other = given.clone();
        other
            .spec
            .get_or_insert_default()
            .topology_spread_constraints
            .iter_mut()
            .for_each(|one| one.max_skew = 2);
        assert_eq!(other.validate_update(&stored)[0].field, "spec");
        let mut relabelled = stored.clone();
        relabelled.meta_mut().labels.insert("hash".into(), "2".into());
        assert_eq!(relabelled.validate_update(&stored), []);
    }
}
