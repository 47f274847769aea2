//! Everything that is wrong with the form of a JSON object, at once.

use std::fmt;

use serde_json::Value;

use crate::{
    schema::{self, Field, Message, Shape},
    time,
};

/// How much of a hostile name is repeated in an error.
const NAME_MAX: usize = 80;

/// What is wrong at one place of a JSON object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonError {
    /// Where: `spec.containers[0].ports[1].containerPort`.
    pub path: String,
    /// What.
    pub kind: JsonErrorKind,
}

/// What can be wrong with the form of a JSON object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JsonErrorKind {
    /// The model has no such field.
    Unknown,
    /// The value is not of the field's type.
    Wrong(String),
}

impl JsonError {
    /// No kind of the model has this type.
    pub fn unknown_kind(api_version: &str, kind: &str) -> Self {
        let (api_version, kind) = (printable(api_version), printable(kind));
        let message = match (api_version.is_empty(), kind.is_empty()) {
            (_, true) => "Required value: the kind of the object".to_owned(),
            (true, false) => format!("no apiVersion with kind \"{kind}\""),
            (false, false) => format!("no kind \"{kind}\" in apiVersion \"{api_version}\""),
        };
        let path = if api_version.is_empty() && !kind.is_empty() {
            "apiVersion"
        } else {
            "kind"
        };
        Self {
            path: path.to_owned(),
            kind: JsonErrorKind::Wrong(message),
        }
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            JsonErrorKind::Unknown => write!(formatter, "unknown field {}", self.path),
            JsonErrorKind::Wrong(message) if self.path.is_empty() => formatter.write_str(message),
            JsonErrorKind::Wrong(message) => write!(formatter, "{}: {message}", self.path),
        }
    }
}

impl std::error::Error for JsonError {}

/// All unknown fields and values of a wrong type in the JSON of a message.
pub fn check(message: &Message, value: &Value) -> Vec<JsonError> {
    let mut checker = Checker { errors: Vec::new() };
    checker.message(message, value, "");
    checker.errors
}

/// `parent.key`, with a hostile key made harmless.
pub fn key_path(parent: &str, key: &str) -> String {
    let key = printable(key);
    if parent.is_empty() {
        key
    } else {
        format!("{parent}.{key}")
    }
}

fn printable(key: &str) -> String {
    let mut text: String = key.chars().take(NAME_MAX).flat_map(char::escape_debug).collect();
    if key.chars().nth(NAME_MAX).is_some() {
        text.push_str("...");
    }
    text
}

struct Checker {
    errors: Vec<JsonError>,
}

impl Checker {
    fn message(&mut self, message: &Message, value: &Value, path: &str) {
        let Value::Object(entries) = value else {
            return self.wrong(path, "an object", value);
        };
        for (key, value) in entries {
            let path = key_path(path, key);
            match message.field(key) {
                Some(field) => self.field(field, value, &path),
                None => self.errors.push(JsonError {
                    path,
                    kind: JsonErrorKind::Unknown,
                }),
            }
        }
    }

    fn field(&mut self, field: &Field, value: &Value, path: &str) {
        match (field.shape, value) {
            (_, Value::Null) => {}
            (Shape::Single, _) => self.value(field.value, value, path),
            (Shape::List(_), Value::Array(elements)) => {
                for (index, element) in elements.iter().enumerate() {
                    self.value(field.value, element, &format!("{path}[{index}]"));
                }
            }
            (Shape::List(_), _) => self.wrong(path, "a list", value),
            (Shape::Map, Value::Object(entries)) => {
                // An entry that is null is absent, as a field is.
                for (key, value) in entries.iter().filter(|(_, value)| !value.is_null()) {
                    self.value(field.value, value, &format!("{path}[{}]", printable(key)));
                }
            }
            (Shape::Map, _) => self.wrong(path, "an object", value),
        }
    }

    fn value(&mut self, expected: schema::Value, value: &Value, path: &str) {
        let int32 = || value.as_i64().is_some_and(|number| i32::try_from(number).is_ok());
        let (right, name) = match expected {
            schema::Value::Message(message) => return self.message(message, value, path),
            schema::Value::String => (value.is_string(), "a string"),
            schema::Value::Bool => (value.is_boolean(), "a boolean"),
            schema::Value::Int32 => (int32(), "an integer of 32 bits"),
            schema::Value::Int64 => (value.is_i64(), "an integer of 64 bits"),
            schema::Value::Quantity => (value.is_string() || value.is_number(), "a quantity"),
            schema::Value::IntOrString => (value.is_string() || int32(), "an integer of 32 bits or a string"),
            schema::Value::Time => {
                let right = value.as_str().is_some_and(|text| time::parse(text).is_ok());
                (right, "a time such as \"2006-01-02T15:04:05Z\"")
            }
        };
        if !right {
            self.wrong(path, name, value);
        }
    }

    fn wrong(&mut self, path: &str, expected: &str, found: &Value) {
        let found = match found {
            Value::Null => "null".to_owned(),
            Value::Bool(found) => found.to_string(),
            Value::Number(found) => found.to_string(),
            Value::String(found) => format!("\"{}\"", printable(found)),
            Value::Array(_) => "a list".to_owned(),
            Value::Object(_) => "an object".to_owned(),
        };
        let message = format!("expected {expected}, found {found}");
        self.errors.push(JsonError {
            path: path.to_owned(),
            kind: JsonErrorKind::Wrong(message),
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{core::v1::Pod, json::from_value};

    #[test]
    fn all_errors_have_their_paths() {
        let pod = json!({
            "metadata": {"name": 7, "labels": {"a.b/c": true, "absent": null}, "creationTimestamp": "yesterday"},
            "spec": {
                "foo": 1,
                "containers": [
                    {"name": "a", "ports": [{"containerPort": 4294967296_i64}, null], "bar": null},
                    "b",
                ],
                "terminationGracePeriodSeconds": 1.5,
                "nodeSelector": null,
            },
        });
        let errors = from_value::<Pod>(&pod).expect_err("wrong");
        let mut texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        texts.sort();
        assert_eq!(
            texts,
            [
                "metadata.creationTimestamp: expected a time such as \"2006-01-02T15:04:05Z\", found \"yesterday\"",
                "metadata.labels[a.b/c]: expected a string, found true",
                "metadata.name: expected a string, found 7",
                "spec.containers[0].ports[0].containerPort: expected an integer of 32 bits, found 4294967296",
                "spec.containers[0].ports[1]: expected an object, found null",
                "spec.containers[1]: expected an object, found \"b\"",
                "spec.terminationGracePeriodSeconds: expected an integer of 64 bits, found 1.5",
                "unknown field spec.containers[0].bar",
                "unknown field spec.foo",
            ]
        );
    }

    #[test]
    fn hostile_names_are_printed_harmlessly() {
        let key = format!("\u{1b}[31m{}", "x".repeat(1000));
        let errors = check(Message::of(&crate::ResourceKind::ALL[0]), &json!({ key: 1 }));
        assert!(errors[0].path.starts_with("\\u{1b}[31mxxx"));
        assert!(errors[0].path.len() < 120);
    }
}
