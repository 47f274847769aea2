//! Field errors in Kubernetes' own words.

use std::fmt;

use prost_types::Timestamp;

/// How much of a hostile value is repeated in an error.
const VALUE_MAX: usize = 128;

/// A field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Its path as in JSON: `spec.ports[0].port`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl FieldError {
    /// A value that must be given.
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let message = if detail.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {detail}")
        };
        Self {
            field: field.into(),
            message,
        }
    }

    /// A value that is not good; `value` is repeated as it is written.
    pub fn invalid(field: impl Into<String>, value: &impl Shown, detail: &str) -> Self {
        Self {
            field: field.into(),
            message: format!("Invalid value: {}: {detail}", value.shown()),
        }
    }

    /// A value that is not there to choose.
    pub fn unsupported(field: impl Into<String>, value: &str, supported: &[&str]) -> Self {
        let supported: Vec<String> = supported.iter().map(|value| format!("{value:?}")).collect();
        let message = format!(
            "Unsupported value: {}: supported values: {}",
            value.shown(),
            supported.join(", ")
        );
        Self {
            field: field.into(),
            message,
        }
    }

    /// What must not be done.
    pub fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self {
            field: field.into(),
            message: format!("Forbidden: {detail}"),
        }
    }

    /// A value that is there already.
    pub fn duplicate(field: impl Into<String>, value: &impl Shown) -> Self {
        Self {
            field: field.into(),
            message: format!("Duplicate value: {}", value.shown()),
        }
    }

    /// More bytes than `max`.
    pub fn too_long(field: impl Into<String>, max: usize) -> Self {
        Self {
            field: field.into(),
            message: format!("Too long: may not be more than {max} bytes"),
        }
    }

    /// More elements than `max`.
    pub fn too_many(field: impl Into<String>, count: usize, max: usize) -> Self {
        let items = if max == 1 { "item" } else { "items" };
        Self {
            field: field.into(),
            message: format!("Too many: {count}: must have at most {max} {items}"),
        }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.message)
    }
}

/// A value as an error repeats it: strings in quotes, escaped and cut.
pub trait Shown {
    /// Its text.
    fn shown(&self) -> String;
}

impl Shown for str {
    fn shown(&self) -> String {
        let mut text: String = self.chars().take(VALUE_MAX).flat_map(char::escape_debug).collect();
        if self.chars().nth(VALUE_MAX).is_some() {
            text.push_str("...");
        }
        format!("\"{text}\"")
    }
}

impl Shown for &str {
    fn shown(&self) -> String {
        (**self).shown()
    }
}

impl Shown for String {
    fn shown(&self) -> String {
        self.as_str().shown()
    }
}

impl Shown for i32 {
    fn shown(&self) -> String {
        self.to_string()
    }
}

impl Shown for i64 {
    fn shown(&self) -> String {
        self.to_string()
    }
}

/// A value that is shown as its JSON, cut.
pub(super) struct Json<'a, T>(pub &'a T);

impl<T: serde::Serialize> Shown for Json<'_, T> {
    fn shown(&self) -> String {
        let text = serde_json::to_string(self.0).unwrap_or_default();
        if text.chars().nth(VALUE_MAX).is_none() {
            return text;
        }
        text.chars().take(VALUE_MAX).chain("...".chars()).collect()
    }
}

/// The path to a field, made of borrowed parts: its text is only written for an error.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    part: Part<'a>,
}

#[derive(Clone, Copy)]
enum Part<'a> {
    Field(&'a str),
    Index(usize),
    Key(&'a str),
}

impl<'a> Path<'a> {
    /// A field of the object itself.
    pub fn root(name: &'a str) -> Self {
        Self {
            parent: None,
            part: Part::Field(name),
        }
    }

    /// A field of this one.
    pub fn child(&'a self, name: &'a str) -> Self {
        Self {
            parent: Some(self),
            part: Part::Field(name),
        }
    }

    /// An element of this list.
    pub fn index(&'a self, index: usize) -> Self {
        Self {
            parent: Some(self),
            part: Part::Index(index),
        }
    }

    /// An entry of this map.
    pub fn key(&'a self, key: &'a str) -> Self {
        Self {
            parent: Some(self),
            part: Part::Key(key),
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(formatter)?;
        }
        match self.part {
            Part::Field(name) if self.parent.is_none() => formatter.write_str(name),
            Part::Field(name) => write!(formatter, ".{name}"),
            Part::Index(index) => write!(formatter, "[{index}]"),
            Part::Key(key) => {
                let shown = key.shown();
                write!(formatter, "[{}]", &shown[1..shown.len() - 1])
            }
        }
    }
}

/// Collects what is wrong.
#[derive(Default)]
pub(super) struct Errors {
    found: Vec<FieldError>,
}

impl Errors {
    pub fn into_found(self) -> Vec<FieldError> {
        self.found
    }

    pub fn required(&mut self, path: &Path<'_>, detail: &str) {
        self.found.push(FieldError::required(path.to_string(), detail));
    }

    pub fn invalid(&mut self, path: &Path<'_>, value: &impl Shown, detail: &str) {
        self.found.push(FieldError::invalid(path.to_string(), value, detail));
    }

    pub fn unsupported(&mut self, path: &Path<'_>, value: &str, supported: &[&str]) {
        self.found
            .push(FieldError::unsupported(path.to_string(), value, supported));
    }

    pub fn forbidden(&mut self, path: &Path<'_>, detail: &str) {
        self.found.push(FieldError::forbidden(path.to_string(), detail));
    }

    pub fn duplicate(&mut self, path: &Path<'_>, value: &impl Shown) {
        self.found.push(FieldError::duplicate(path.to_string(), value));
    }

    pub fn too_long(&mut self, path: &Path<'_>, max: usize) {
        self.found.push(FieldError::too_long(path.to_string(), max));
    }

    pub fn too_many(&mut self, path: &Path<'_>, count: usize, max: usize) {
        self.found.push(FieldError::too_many(path.to_string(), count, max));
    }

    /// One of these values must be given.
    pub fn one_of(&mut self, path: &Path<'_>, value: &str, supported: &[&str]) {
        if value.is_empty() {
            self.required(path, "");
        } else if !supported.contains(&value) {
            self.unsupported(path, value, supported);
        }
    }

    /// A text with a syntax: `check` says what is wrong with it.
    pub fn syntax(&mut self, path: &Path<'_>, value: &str, check: fn(&str) -> Result<(), String>) {
        if let Err(detail) = check(value) {
            self.invalid(path, &value, &detail);
        }
    }

    /// Not below zero.
    pub fn not_negative(&mut self, path: &Path<'_>, value: i64) {
        if value < 0 {
            self.invalid(path, &value, "must be greater than or equal to 0");
        }
    }

    /// A port's number.
    pub fn port(&mut self, path: &Path<'_>, port: i32) {
        if !(1..=65535).contains(&port) {
            self.invalid(path, &port, "must be between 1 and 65535, inclusive");
        }
    }

    /// A time that RFC 3339 can write.
    pub fn time(&mut self, path: &Path<'_>, time: Option<&Timestamp>) {
        if let Some(time) = time.filter(|time| !orlop_proto::time::is_valid(time)) {
            self.invalid(path, &time.seconds, "must be a time of the years 1 to 9999");
        }
    }

    /// A field that keeps its value.
    pub fn immutable<T: PartialEq + serde::Serialize>(&mut self, path: &Path<'_>, new: &T, old: &T) {
        if new != old {
            self.invalid(path, &Json(new), "field is immutable");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_words_are_those_of_kubernetes() {
        let spec = Path::root("spec");
        let ports = spec.child("ports");
        let port = ports.index(2);
        assert_eq!(port.child("port").to_string(), "spec.ports[2].port");
        assert_eq!(
            spec.child("nodeSelector").key("a.b/c").to_string(),
            "spec.nodeSelector[a.b/c]"
        );
        let error = FieldError::unsupported("spec.type", "NodePort", &["ClusterIP"]);
        assert_eq!(
            error.to_string(),
            "spec.type: Unsupported value: \"NodePort\": supported values: \"ClusterIP\""
        );
        assert_eq!(FieldError::required("a", "b").to_string(), "a: Required value: b");
        let hostile = FieldError::invalid("a", &"\u{1b}[31m\0".to_owned(), "no");
        assert_eq!(hostile.message, "Invalid value: \"\\u{1b}[31m\\0\": no");
    }
}
