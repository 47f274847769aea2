//! JSON text to a value, without the silent losses that `serde_json::Value` allows.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// Beyond 2^53 a double has no room for all digits; integers of 64 bits are not read as doubles.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// Why a text is not JSON that can be used.
#[derive(Debug)]
pub struct TextError(serde_json::Error);

impl fmt::Display for TextError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl std::error::Error for TextError {}

/// Parses JSON. A key that comes twice in one object and more than 127 levels are refused, as are numbers beyond a double.
pub fn parse(text: &str) -> Result<Value, TextError> {
    serde_json::from_str::<UniqueValue>(text)
        .map(|unique| unique.0)
        .map_err(TextError)
}

/// Any JSON value without duplicate keys.
pub struct UniqueValue(pub Value);

impl<'de> Deserialize<'de> for UniqueValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor).map(UniqueValue)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        if value.abs() >= EXACT_MAX {
            return Err(E::custom(
                "a number that has more digits than can be kept: write it as a string",
            ));
        }
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(UniqueValue(element)) = access.next_element()? {
            elements.push(element);
        }
        Ok(Value::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if entries.contains_key(&key) {
                return Err(A::Error::custom(format!("duplicate field `{}`", key.escape_debug())));
            }
            let UniqueValue(value) = access.next_value()?;
            entries.insert(key, value);
        }
        Ok(Value::Object(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_loses_silently_is_refused() {
        assert!(
            parse(r#"{"a": {"b": 1, "b": 2}}"#)
                .expect_err("twice")
                .to_string()
                .contains("duplicate field `b`")
        );
        assert!(parse(&format!("{}{}", "[".repeat(10_000), "]".repeat(10_000))).is_err());
        assert!(parse(r#"{"a": 1e1000}"#).is_err());
        assert!(parse(r#"{"a": NaN}"#).is_err());
        assert!(parse(r#"{"a": 99999999999999999999}"#).is_err());
        assert_eq!(
            parse(r#"{"a": [1, "x", null]}"#).expect("json"),
            serde_json::json!({"a": [1, "x", null]})
        );
    }
}
