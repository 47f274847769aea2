//! Selectors as text: `app=web,tier in (a, b),!old` and `metadata.name=x,spec.nodeName!=`.

use std::collections::BTreeMap;

use orlop_proto::ResourceKind;
use tonic::Status;

use super::errors;
use crate::{
    kinds::{KindVisitor, visit_kind},
    model::{
        Model,
        selector::{FieldSelector, SelectorError},
    },
    registry::Registered,
};

/// No selector is longer.
const MAX_LENGTH: usize = 64 << 10;

/// What a List or a Watch lets through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    namespace: String,
    labels: Vec<LabelRule>,
    fields: FieldSelector,
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
            FieldSelector::default()
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

    /// Whether it lets objects of this namespace through, if all else matches.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespace.is_empty() || namespace == self.namespace
    }

    /// Whether it asks for nothing but the namespace.
    pub fn is_by_namespace(&self) -> bool {
        self.labels.is_empty() && self.fields == FieldSelector::default()
    }

    /// Whether it lets the object through.
    pub fn matches<T: Model>(&self, object: &T) -> bool {
        self.has_namespace(object.namespace())
            && self.labels.iter().all(|rule| rule.matches(&object.meta().labels))
            && self.fields.matches(object)
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

/// Which fields a kind can be selected by is the model's to say.
fn parse_fields(kind: &ResourceKind, text: &str) -> Result<FieldSelector, String> {
    struct Parse<'a>(&'a str);
    impl KindVisitor for Parse<'_> {
        type Output = Result<FieldSelector, SelectorError>;
        fn visit<T: Registered>(self) -> Self::Output {
            FieldSelector::parse::<T>(self.0)
        }
    }
    let parsed = visit_kind(kind, Parse(text)).unwrap_or_else(|| Ok(FieldSelector::default()));
    parsed.map_err(|error| error.to_string())
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
        Resource as _,
        core::v1::{Event, Pod, PodSpec, Service},
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
        Selection::parse(&Service::KIND, "", "", "spec.clusterIP=10.96.0.1").expect("the model has it");
        Selection::parse(&Event::KIND, "", "", "reportingComponent=x,source!=y").expect("the model has them");
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
