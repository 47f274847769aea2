//! Manifests: YAML or JSON documents to objects, bounded, and with all errors of all documents at once.
//!
//! Nothing is lost silently: unknown fields, duplicate keys, wrong types, numbers that would lose digits are errors. The
//! result keeps each object's own JSON too, which is what an Apply remembers as last applied.

use std::fmt;

use orlop_proto::{
    ResourceKind,
    api::v1::Object,
    json::{JsonError, JsonErrorKind, UniqueValue},
};
use serde_json::Value;

/// What a manifest may cost at most.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of text.
    pub bytes: usize,
    /// Documents, empty ones too.
    pub documents: usize,
    /// Objects, those of lists too.
    pub objects: usize,
    /// Levels of lists and objects inside each other.
    pub depth: usize,
    /// Scalars, lists and objects of the whole text, what aliases repeat included.
    pub nodes: usize,
    /// Uses of YAML aliases.
    pub aliases: usize,
    /// Errors that are reported; the rest is counted.
    pub errors: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 32 << 20,
            documents: 20_000,
            objects: 20_000,
            depth: 64,
            nodes: 2_000_000,
            aliases: 1_000,
            errors: 500,
        }
    }
}

/// An object of a manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct ManifestObject {
    /// The document that it stands in, from 1 (empty documents do not count).
    pub document: usize,
    /// Its kind.
    pub kind: ResourceKind,
    /// The object.
    pub object: Object,
    /// Its JSON as it was given.
    pub value: Value,
}

/// What is wrong at one place of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError {
    /// The document, from 1 (empty documents do not count); 0 for the text as a whole.
    pub document: usize,
    /// Where in the document; empty for the document as a whole.
    pub path: String,
    /// What is wrong there; for an unknown field it names the path itself.
    pub message: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.document > 0 {
            write!(formatter, "document {}: ", self.document)?;
        }
        if self.path.is_empty() || self.message.ends_with(&self.path) {
            formatter.write_str(&self.message)
        } else {
            write!(formatter, "{}: {}", self.path, self.message)
        }
    }
}

impl std::error::Error for ManifestError {}

/// Parses a whole manifest: either all objects, in order, or all that is wrong with it.
pub fn parse(text: &str, limits: &Limits) -> Result<Vec<ManifestObject>, Vec<ManifestError>> {
    let documents = documents(text, limits).map_err(|message| vec![whole(message)])?;
    let mut reader = Reader {
        limits,
        objects: Vec::new(),
        errors: Vec::new(),
        more: 0,
    };
    for (index, document) in documents.into_iter().enumerate() {
        reader.document(index + 1, document);
    }
    reader.finish()
}

/// [`parse`] for bytes that nobody has looked at.
pub fn parse_bytes(bytes: &[u8], limits: &Limits) -> Result<Vec<ManifestObject>, Vec<ManifestError>> {
    if bytes.starts_with(&[0xfe, 0xff]) || bytes.starts_with(&[0xff, 0xfe]) {
        return Err(vec![whole("the manifest is in UTF-16: save it as UTF-8".to_owned())]);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => parse(text, limits),
        Err(error) => Err(vec![whole(format!("the manifest is not UTF-8: {error}"))]),
    }
}

fn whole(message: String) -> ManifestError {
    ManifestError {
        document: 0,
        path: String::new(),
        message,
    }
}

/// The JSON of each document that is not empty.
fn documents(text: &str, limits: &Limits) -> Result<Vec<Value>, String> {
    if text.len() > limits.bytes {
        return Err(format!(
            "the manifest has {} bytes, at most {} are allowed",
            text.len(),
            limits.bytes
        ));
    }
    if text.starts_with('\u{feff}') {
        return Err("the manifest begins with a byte order mark: save it as UTF-8 without one".to_owned());
    }
    if text.contains('\0') {
        return Err("the manifest contains NUL characters: is it UTF-16, or not a text?".to_owned());
    }
    // Every node of JSON needs one of these, so this bounds the memory before anything is read.
    let marks = text.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    // An object takes some hundred bytes, and YAML has at most one for every three of its nodes.
    let objects = text.bytes().filter(|byte| *byte == b'{').count();
    if marks > limits.nodes.saturating_mul(2) || objects > limits.nodes / 3 {
        return Err(format!("the manifest has more than {} values", limits.nodes));
    }
    let documents = if text.trim_start().starts_with('{') {
        json(text)
    } else {
        None
    };
    let documents = match documents {
        Some(documents) => documents,
        None => yaml(text, limits)?,
    };
    if documents.len() > limits.documents {
        return Err(format!("the manifest has more than {} documents", limits.documents));
    }
    Ok(documents)
}

/// The values of a JSON text, one after the other; `None` when it is not JSON (it may be YAML then).
fn json(text: &str) -> Option<Vec<Value>> {
    let values = serde_json::Deserializer::from_str(text).into_iter::<UniqueValue>();
    let values: Result<Vec<Value>, serde_json::Error> = values.map(|value| value.map(|value| value.0)).collect();
    values.ok()
}

fn yaml(text: &str, limits: &Limits) -> Result<Vec<Value>, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: Some(limits.bytes),
            flow_nesting_limit: limits.depth,
            max_events: limits.nodes.saturating_mul(2),
            max_aliases: limits.aliases,
            max_anchors: limits.aliases,
            max_recorded_anchor_events: limits.nodes / 4,
            max_recorded_anchor_bytes: limits.bytes,
            max_depth: limits.depth,
            max_inclusion_depth: 0,
            max_documents: limits.documents,
            max_nodes: limits.nodes,
            max_total_scalar_bytes: limits.bytes,
            max_merge_keys: limits.aliases,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: limits.nodes / 4,
            max_replay_stack_depth: 16,
            max_alias_expansions_per_anchor: limits.aliases,
        },
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let values: Vec<UniqueValue> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.to_string().replace(|c: char| c.is_control() && c != '\n', "?"))?;
    Ok(values.into_iter().map(|value| value.0).collect())
}

struct Reader<'a> {
    limits: &'a Limits,
    objects: Vec<ManifestObject>,
    errors: Vec<ManifestError>,
    /// Errors beyond the limit.
    more: usize,
}

impl Reader<'_> {
    fn document(&mut self, document: usize, value: Value) {
        match value {
            Value::Null => {}
            Value::Object(mut list) if is_list(&list) => {
                for field in list.keys() {
                    if !matches!(field.as_str(), "apiVersion" | "kind" | "metadata" | "items") {
                        let path = orlop_proto::json::key_path("", field);
                        self.error(
                            document,
                            JsonError {
                                path,
                                kind: JsonErrorKind::Unknown,
                            },
                        );
                    }
                }
                match list.remove("items") {
                    None | Some(Value::Null) => {}
                    Some(Value::Array(items)) => {
                        for (index, item) in items.into_iter().enumerate() {
                            self.object(document, &format!("items[{index}]"), item);
                        }
                    }
                    Some(_) => {
                        let kind = JsonErrorKind::Wrong("expected a list".to_owned());
                        self.error(
                            document,
                            JsonError {
                                path: "items".to_owned(),
                                kind,
                            },
                        );
                    }
                }
            }
            value => self.object(document, "", value),
        }
    }

    fn object(&mut self, document: usize, prefix: &str, value: Value) {
        if !value.is_object() {
            let kind = JsonErrorKind::Wrong("expected an object".to_owned());
            return self.error(
                document,
                JsonError {
                    path: prefix.to_owned(),
                    kind,
                },
            );
        }
        match Object::from_value(&value) {
            Ok(mut object) => {
                object.set_type();
                let Some(kind) = object.kind() else { return };
                self.objects.push(ManifestObject {
                    document,
                    kind,
                    object,
                    value,
                });
            }
            Err(errors) => {
                for error in errors {
                    let separator = if prefix.is_empty() || error.path.is_empty() {
                        ""
                    } else {
                        "."
                    };
                    let path = format!("{prefix}{separator}{}", error.path);
                    self.error(document, JsonError { path, ..error });
                }
            }
        }
    }

    fn error(&mut self, document: usize, error: JsonError) {
        if self.errors.len() >= self.limits.errors {
            self.more += 1;
            return;
        }
        let message = match error.kind {
            JsonErrorKind::Unknown => format!("unknown field {}", error.path),
            JsonErrorKind::Wrong(message) => message,
        };
        self.errors.push(ManifestError {
            document,
            path: error.path,
            message,
        });
    }

    fn finish(mut self) -> Result<Vec<ManifestObject>, Vec<ManifestError>> {
        if self.objects.len() > self.limits.objects {
            let message = format!("the manifest has more than {} objects", self.limits.objects);
            self.errors.push(whole(message));
        }
        if self.more > 0 {
            self.errors.push(whole(format!("and {} more errors", self.more)));
        }
        if self.errors.is_empty() {
            Ok(self.objects)
        } else {
            Err(self.errors)
        }
    }
}

fn is_list(value: &serde_json::Map<String, Value>) -> bool {
    value.get("kind").and_then(Value::as_str) == Some("List")
        && value.get("apiVersion").and_then(Value::as_str) == Some("v1")
}

#[cfg(test)]
mod tests;
