//! intstr.IntOrString, which travels as a `google.protobuf.Value`.

use std::fmt;

use prost_types::{Value, value::Kind};

/// An integer of 32 bits or a string: a port's number or its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum IntOrString {
    /// A number.
    Int(i32),
    /// A name.
    String(String),
}

impl IntOrString {
    /// From a message's field; `None` when it holds anything else.
    pub fn from_value(value: &Value) -> Option<Self> {
        match value.kind.as_ref()? {
            Kind::StringValue(text) => Some(Self::String(text.clone())),
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the next line holds whether anything was lost"
            )]
            Kind::NumberValue(number) => {
                let integer = *number as i32;
                (f64::from(integer) == *number).then_some(Self::Int(integer))
            }
            _ => None,
        }
    }
}

impl From<IntOrString> for Value {
    fn from(value: IntOrString) -> Self {
        let kind = match value {
            IntOrString::Int(number) => Kind::NumberValue(number.into()),
            IntOrString::String(text) => Kind::StringValue(text),
        };
        Value { kind: Some(kind) }
    }
}

impl fmt::Display for IntOrString {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(number) => number.fmt(formatter),
            Self::String(text) => text.fmt(formatter),
        }
    }
}
