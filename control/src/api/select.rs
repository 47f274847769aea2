//! Selectors as text: `app=web,tier in (a, b),!old` and `metadata.name=x,spec.nodeName!=`.

use std::collections::BTreeMap;

use orlop_proto::{
    Resource, ResourceKind,
    core::v1::{Event, Pod},
};
use tonic::Status;

use super::errors;

/// No selector is longer.
const MAX_LENGTH: usize = 64 << 10;

/// What a List or a Watch lets through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    namespace: String,
    labels: Vec<LabelRule>,
    fields: Vec<FieldRule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LabelRule {
    key: String,
    test: LabelTest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum LabelTest {
    In(Vec<String>),
    /// Also lets through what does not have the label.
    NotIn(Vec<String>),
    Exists,
    Absent,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldRule {
    field: &'static str,
    equal: bool,
    value: String,
}

impl Selection {
    /// From a request's texts.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for what cannot be parsed, and fields that the kind has not.
    pub fn parse(kind: &ResourceKind, namespace: &str, labels: &str, fields: &str) -> Result<Self, Status> {
        let mut wrong = Vec::new();
        let labels = parse_labels(labels).unwrap_or_else(|message| {
            wrong.push(errors::field("labelSelector", &message));
            Vec::new()
        });
        let fields = parse_fields(kind, fields).unwrap_or_else(|message| {
            wrong.push(errors::field("fieldSelector", &message));
            Vec::new()
        });
        if !wrong.is_empty() {
            return Err(errors::bad_request("request", &wrong));
        }
        let namespace = if kind.namespaced {
            namespace.to_owned()
        } else {
            String::new()
        };
        Ok(Self {
            namespace,
            labels,
            fields,
        })
    }

    /// The namespace that it is limited to; empty: none.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Whether it lets the object through.
    pub fn matches<T: Resource>(&self, object: &T) -> bool {
        (self.namespace.is_empty() || object.namespace() == self.namespace)
            && self.labels.iter().all(|rule| rule.matches(&object.meta().labels))
            && self
                .fields
                .iter()
                .all(|rule| (field_of(object, rule.field) == rule.value) == rule.equal)
    }
}

impl LabelRule {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match &self.test {
            LabelTest::In(values) => value.is_some_and(|value| values.contains(value)),
            LabelTest::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            LabelTest::Exists => value.is_some(),
            LabelTest::Absent => value.is_none(),
        }
    }
}

/// The fields that a kind can be selected by.
fn fields_of(kind: &ResourceKind) -> Vec<&'static str> {
    let mut fields = vec!["metadata.name"];
    if kind.namespaced {
        fields.push("metadata.namespace");
    }
    match kind.resource {
        "pods" => fields.extend(["spec.nodeName", "spec.restartPolicy", "status.phase", "status.podIP"]),
        "events" => fields.extend([
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "reason",
            "type",
        ]),
        _ => {}
    }
    fields
}

fn field_of<'a, T: Resource>(object: &'a T, field: &str) -> &'a str {
    let any: &dyn std::any::Any = object;
    match field {
        "metadata.name" => object.name(),
        "metadata.namespace" => object.namespace(),
        _ => {
            if let Some(pod) = any.downcast_ref::<Pod>() {
                pod_field(pod, field)
            } else if let Some(event) = any.downcast_ref::<Event>() {
                event_field(event, field)
            } else {
                ""
            }
        }
    }
}

fn pod_field<'a>(pod: &'a Pod, field: &str) -> &'a str {
    let value = match field {
        "spec.nodeName" => pod.spec.as_ref().map(|spec| spec.node_name.as_str()),
        "spec.restartPolicy" => pod.spec.as_ref().map(|spec| spec.restart_policy.as_str()),
        "status.phase" => pod.status.as_ref().map(|status| status.phase.as_str()),
        "status.podIP" => pod.status.as_ref().map(|status| status.pod_ip.as_str()),
        _ => None,
    };
    value.unwrap_or_default()
}

fn event_field<'a>(event: &'a Event, field: &str) -> &'a str {
    let involved = event.involved_object.as_ref();
    let value = match field {
        "involvedObject.kind" => involved.map(|object| object.kind.as_str()),
        "involvedObject.namespace" => involved.map(|object| object.namespace.as_str()),
        "involvedObject.name" => involved.map(|object| object.name.as_str()),
        "involvedObject.uid" => involved.map(|object| object.uid.as_str()),
        "reason" => Some(event.reason.as_str()),
        "type" => Some(event.r#type.as_str()),
        _ => None,
    };
    value.unwrap_or_default()
}

fn parse_fields(kind: &ResourceKind, text: &str) -> Result<Vec<FieldRule>, String> {
    if text.len() > MAX_LENGTH {
        return Err("is too long".to_owned());
    }
    let known = fields_of(kind);
    let terms = text.split(',').map(str::trim).filter(|term| !term.is_empty());
    terms
        .map(|term| {
            let (name, equal, value) = if let Some((name, value)) = term.split_once("!=") {
                (name, false, value)
            } else if let Some((name, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
                (name, true, value)
            } else {
                return Err(format!("\"{}\" has no = or !=", shown(term)));
            };
            let field = known
                .iter()
                .copied()
                .find(|field| *field == name.trim())
                .ok_or_else(|| {
                    format!(
                        "{} cannot be selected by \"{}\", only by {}",
                        kind.resource,
                        shown(name),
                        known.join(", ")
                    )
                })?;
            Ok(FieldRule {
                field,
                equal,
                value: value.trim().to_owned(),
            })
        })
        .collect()
}

fn parse_labels(text: &str) -> Result<Vec<LabelRule>, String> {
    if text.len() > MAX_LENGTH {
        return Err("is too long".to_owned());
    }
    let mut rules = Vec::new();
    let mut depth = 0_u32;
    let mut start = 0;
    for (index, character) in text.char_indices().chain([(text.len(), ',')]) {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.checked_sub(1).ok_or("has a ) without a (")?,
            ',' if depth == 0 => {
                let term = text[start..index].trim();
                if !term.is_empty() {
                    rules.push(parse_label(term)?);
                } else if index < text.len() || (start > 0 && index == text.len()) {
                    return Err("has an empty part".to_owned());
                }
                start = index + 1;
            }
            _ => {}
        }
    }
    if depth > 0 {
        return Err("has a ( without a )".to_owned());
    }
    Ok(rules)
}

fn parse_label(term: &str) -> Result<LabelRule, String> {
    let rule = |key: &str, test: LabelTest| {
        let key = key.trim();
        let values: &[String] = match &test {
            LabelTest::In(values) | LabelTest::NotIn(values) => values,
            LabelTest::Exists | LabelTest::Absent => &[],
        };
        if !is_label_key(key) {
            return Err(format!("\"{}\" is not a label's name", shown(key)));
        }
        if let Some(value) = values.iter().find(|value| !is_label_value(value)) {
            return Err(format!("\"{}\" is not a label's value", shown(value)));
        }
        Ok(LabelRule {
            key: key.to_owned(),
            test,
        })
    };
    if let Some(key) = term.strip_prefix('!') {
        return rule(key, LabelTest::Absent);
    }
    if let Some(inner) = term.strip_suffix(')') {
        let (head, values) = inner.split_once('(').ok_or("has a ) without a (")?;
        let values: Vec<String> = values.split(',').map(|value| value.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => rule(key, LabelTest::In(values)),
            (Some(key), Some("notin"), None) => rule(key, LabelTest::NotIn(values)),
            _ => Err(format!("\"{}\" is neither \"in\" nor \"notin\"", shown(term))),
        };
    }
    if let Some((key, value)) = term.split_once("!=") {
        return rule(key, LabelTest::NotIn(vec![value.trim().to_owned()]));
    }
    if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return rule(key, LabelTest::In(vec![value.trim().to_owned()]));
    }
    rule(term, LabelTest::Exists)
}

/// `[prefix/]name`, as Kubernetes has it.
fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key
        .split_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let prefix_fits = prefix.is_none_or(|prefix| {
        !prefix.is_empty()
            && prefix.len() <= 253
            && prefix
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
    });
    prefix_fits && !name.is_empty() && is_label_value(name)
}

fn is_label_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

fn shown(text: &str) -> String {
    text.escape_debug().take(100).collect()
}

#[cfg(test)]
mod tests {
    use orlop_proto::{
        core::v1::{PodSpec, Service},
        meta::v1::ObjectMeta,
    };

    use super::*;

    fn pod(labels: &[(&str, &str)]) -> Pod {
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Pod {
            metadata: Some(ObjectMeta {
                name: "a".to_owned(),
                namespace: "x".to_owned(),
                labels,
                ..Default::default()
            }),
            spec: Some(PodSpec {
                node_name: "n1".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn selection(labels: &str, fields: &str) -> Result<Selection, Status> {
        Selection::parse(&Pod::KIND, "", labels, fields)
    }

    #[test]
    fn labels_as_text() {
        let web = pod(&[("app", "web"), ("tier", "a")]);
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app == web , tier in (a, b)", true),
            ("app!=web", false),
            ("other!=web", true),
            ("tier notin (b,c),app", true),
            ("!old", true),
            ("!app", false),
            ("old", false),
            ("other notin (x)", true),
            ("tier in (b)", false),
            ("orlop.dev/x", false),
            ("app=", false),
        ] {
            assert_eq!(selection(text, "").expect(text).matches(&web), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_selector() {
        for text in [
            "a=b,,c",
            "a in b",
            "a in (b",
            "a) in",
            "=b",
            "a b",
            "a=b,",
            "ä=1",
            "a=-",
            "!",
            "x/y/z",
            "a within (b)",
        ] {
            assert!(selection(text, "").is_err(), "{text}");
        }
        for text in ["spec.foo=1", "metadata.name", "involvedObject.name=x"] {
            assert!(selection("", text).is_err(), "{text}");
        }
        assert!(Selection::parse(&Service::KIND, "", "", "spec.nodeName=x").is_err());
    }

    #[test]
    fn fields_and_namespaces() {
        let pod = pod(&[]);
        for (text, expected) in [
            ("metadata.name=a", true),
            ("metadata.name==a,spec.nodeName=n1", true),
            ("spec.nodeName=", false),
            ("spec.nodeName!=n1", false),
            ("status.phase=", true),
        ] {
            assert_eq!(selection("", text).expect(text).matches(&pod), expected, "{text}");
        }
        assert!(Selection::parse(&Pod::KIND, "x", "", "").expect("parses").matches(&pod));
        assert!(!Selection::parse(&Pod::KIND, "y", "", "").expect("parses").matches(&pod));
    }
}
