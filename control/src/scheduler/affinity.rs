//! Which nodes a pod's `nodeSelector` and node affinity allow or prefer.

use std::hash::{Hash, Hasher};

use orlop_proto::core::v1::{Affinity, NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm, PodSpec};
use prost::Message as _;

use super::named::Named;

/// A pod's `nodeSelector` and required node affinity. Equal ones are one key.
#[derive(Debug)]
pub struct RequiredAffinity {
    spec: PodSpec,
    /// Encoded: what is compared and hashed.
    identity: Vec<u8>,
}

impl RequiredAffinity {
    /// Of a pod; `None`: all nodes will do.
    pub fn of(spec: &PodSpec) -> Option<Self> {
        let required = node_affinity(spec)
            .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.clone());
        if spec.node_selector.is_empty() && required.is_none() {
            return None;
        }
        let node_affinity = NodeAffinity {
            required_during_scheduling_ignored_during_execution: required,
            ..NodeAffinity::default()
        };
        let spec = PodSpec {
            node_selector: spec.node_selector.clone(),
            affinity: Some(Affinity {
                node_affinity: Some(node_affinity),
            }),
            ..PodSpec::default()
        };
        let identity = spec.encode_to_vec();
        Some(Self { spec, identity })
    }

    /// Whether the node satisfies it.
    pub fn allows(&self, node: &Named) -> bool {
        allows(&self.spec, node)
    }
}

impl PartialEq for RequiredAffinity {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for RequiredAffinity {}

impl Hash for RequiredAffinity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity.hash(state);
    }
}

/// Whether the node satisfies the pod's `nodeSelector` and required node affinity.
pub fn allows(spec: &PodSpec, node: &Named) -> bool {
    if !spec
        .node_selector
        .iter()
        .all(|(key, value)| node.label(key) == Some(value))
    {
        return false;
    }
    match node_affinity(spec).and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref())
    {
        Some(required) => required.node_selector_terms.iter().any(|term| term_matches(term, node)),
        None => true,
    }
}

/// The sum of the weights of the preferences that the node satisfies.
pub fn preference(spec: &PodSpec, node: &Named) -> i64 {
    let Some(affinity) = node_affinity(spec) else { return 0 };
    affinity
        .preferred_during_scheduling_ignored_during_execution
        .iter()
        .filter(|preferred| {
            preferred
                .preference
                .as_ref()
                .is_some_and(|term| term_matches(term, node))
        })
        .map(|preferred| i64::from(preferred.weight))
        .sum()
}

fn node_affinity(spec: &PodSpec) -> Option<&NodeAffinity> {
    spec.affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
}

fn term_matches(term: &NodeSelectorTerm, node: &Named) -> bool {
    if term.match_expressions.is_empty() && term.match_fields.is_empty() {
        return false;
    }
    term.match_expressions
        .iter()
        .all(|requirement| label_matches(requirement, node))
        && term
            .match_fields
            .iter()
            .all(|requirement| field_matches(requirement, node))
}

fn label_matches(requirement: &NodeSelectorRequirement, node: &Named) -> bool {
    let found = node.label(&requirement.key);
    let is_among = |value: &str| requirement.values.iter().any(|one| one == value);
    match requirement.operator.as_str() {
        "In" => found.is_some_and(is_among),
        "NotIn" => !found.is_some_and(is_among),
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => compare(requirement, found, |left, right| left > right),
        "Lt" => compare(requirement, found, |left, right| left < right),
        _ => false,
    }
}

fn compare(requirement: &NodeSelectorRequirement, found: Option<&str>, holds: impl Fn(i64, i64) -> bool) -> bool {
    let left = found.and_then(|value| value.parse::<i64>().ok());
    let right = requirement.values.first().and_then(|value| value.parse::<i64>().ok());
    left.zip(right).is_some_and(|(left, right)| holds(left, right))
}

fn field_matches(requirement: &NodeSelectorRequirement, node: &Named) -> bool {
    if requirement.key != "metadata.name" {
        return false;
    }
    let named = requirement.values.iter().any(|value| **value == *node.name);
    match requirement.operator.as_str() {
        "In" => named,
        "NotIn" => !named,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::{
        Resource as _,
        core::v1::{Node, NodeSelector, PreferredSchedulingTerm},
    };

    fn node(labels: &[(&str, &str)]) -> Named {
        let mut node = Node::default();
        node.meta_mut().name = "n1".into();
        node.meta_mut().labels = labels
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect();
        Named::of(&node)
    }

    fn requirement(key: &str, operator: &str, values: &[&str]) -> NodeSelectorRequirement {
        NodeSelectorRequirement {
            key: key.into(),
            operator: operator.into(),
            values: values.iter().map(|value| (*value).into()).collect(),
        }
    }

    fn required(terms: Vec<NodeSelectorTerm>) -> PodSpec {
        PodSpec {
            affinity: Some(Affinity {
                node_affinity: Some(NodeAffinity {
                    required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                        node_selector_terms: terms,
                    }),
                    preferred_during_scheduling_ignored_during_execution: Vec::new(),
                }),
            }),
            ..PodSpec::default()
        }
    }

    fn expressions(list: Vec<NodeSelectorRequirement>) -> NodeSelectorTerm {
        NodeSelectorTerm {
            match_expressions: list,
            match_fields: Vec::new(),
        }
    }

    #[test]
    fn operators() {
        let node = node(&[("zone", "a"), ("cores", "8")]);
        let cases = [
            (requirement("zone", "In", &["a", "b"]), true),
            (requirement("zone", "In", &["b"]), false),
            (requirement("none", "In", &["b"]), false),
            (requirement("zone", "NotIn", &["a"]), false),
            (requirement("none", "NotIn", &["a"]), true),
            (requirement("zone", "Exists", &[]), true),
            (requirement("zone", "DoesNotExist", &[]), false),
            (requirement("cores", "Gt", &["7"]), true),
            (requirement("cores", "Gt", &["8"]), false),
            (requirement("cores", "Lt", &["9"]), true),
            (requirement("zone", "Lt", &["9"]), false),
        ];
        for (requirement, expected) in cases {
            assert_eq!(
                allows(&required(vec![expressions(vec![requirement.clone()])]), &node),
                expected,
                "{requirement:?}"
            );
        }
    }

    #[test]
    fn terms_are_alternatives_and_an_empty_one_matches_nothing() {
        let node = node(&[("zone", "a")]);
        let no = expressions(vec![requirement("zone", "In", &["b"])]);
        let yes = expressions(vec![requirement("zone", "In", &["a"])]);
        assert!(allows(&required(vec![no.clone(), yes]), &node));
        assert!(!allows(&required(vec![no, NodeSelectorTerm::default()]), &node));
        assert!(!allows(&required(Vec::new()), &node));
    }

    #[test]
    fn fields_know_the_name_only() {
        let node = node(&[]);
        let term = |requirement| NodeSelectorTerm {
            match_expressions: Vec::new(),
            match_fields: vec![requirement],
        };
        assert!(allows(
            &required(vec![term(requirement("metadata.name", "In", &["n1"]))]),
            &node
        ));
        assert!(!allows(
            &required(vec![term(requirement("metadata.name", "NotIn", &["n1"]))]),
            &node
        ));
        assert!(!allows(
            &required(vec![term(requirement("metadata.uid", "In", &["n1"]))]),
            &node
        ));
    }

    #[test]
    fn weights_add_up() {
        let mut spec = required(vec![expressions(vec![requirement("zone", "Exists", &[])])]);
        let affinity = spec
            .affinity
            .as_mut()
            .and_then(|affinity| affinity.node_affinity.as_mut())
            .unwrap();
        for (weight, value) in [(10, "a"), (5, "b"), (3, "a")] {
            affinity
                .preferred_during_scheduling_ignored_during_execution
                .push(PreferredSchedulingTerm {
                    weight,
                    preference: Some(expressions(vec![requirement("zone", "In", &[value])])),
                });
        }
        assert_eq!(preference(&spec, &node(&[("zone", "a")])), 13);
        assert_eq!(preference(&spec, &node(&[("zone", "c")])), 0);
    }
}
