//! The Kubernetes JSON of the object model.
//!
//! The generated types derive serde with attributes that the build script computes from the descriptors; the modules here are what
//! these attributes name. `null` reads as absent, duplicate keys are refused, empty fields are left out unless Kubernetes
//! writes them. Unknown fields are skipped by serde and reported by [`check`], all of them, with their paths.

mod check;
mod fields;
mod text;

pub use check::{JsonError, JsonErrorKind, check, key_path};
pub(crate) use fields::{
    always_message, int_or_string, is_default, is_empty, is_none, map, micro_time, plain, quantity_map, time,
};
pub use text::{TextError, UniqueValue, parse};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use serde_json::Value;

use crate::{Resource, ResourceKind, api::v1::Object, schema::Message};

/// Reads an object of a known kind. All unknown fields and all values of a wrong type are reported at once.
///
/// `apiVersion` and `kind` are not looked at.
pub fn from_value<T: Resource + DeserializeOwned>(value: &Value) -> Result<T, Vec<JsonError>> {
    let errors = check(Message::of(&T::KIND), value);
    if !errors.is_empty() {
        return Err(errors);
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        vec![JsonError {
            path,
            kind: JsonErrorKind::Wrong(error.into_inner().to_string()),
        }]
    })
}

impl Object {
    /// Reads an object of the kind that its `apiVersion` and `kind` name.
    pub fn from_value(value: &Value) -> Result<Self, Vec<JsonError>> {
        let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default();
        let (api_version, kind) = (text("apiVersion"), text("kind"));
        match ResourceKind::by_type(api_version, kind) {
            Some(kind) => Self::from_value_as(kind, value),
            None => Err(vec![JsonError::unknown_kind(api_version, kind)]),
        }
    }
}

impl Serialize for Object {
    /// The JSON of the object inside; an empty object when there is none.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.body {
            Some(body) => crate::with_body!(body, object => object.serialize(serializer)),
            None => serializer.collect_map(std::iter::empty::<(&str, ())>()),
        }
    }
}

impl<'de> Deserialize<'de> for Object {
    /// By `apiVersion` and `kind`; unlike the derived types this refuses unknown fields.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = text::UniqueValue::deserialize(deserializer)?.0;
        Self::from_value(&value).map_err(|errors| {
            let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
            serde::de::Error::custom(text.join("; "))
        })
    }
}
