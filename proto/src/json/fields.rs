//! How single fields are read and written: the modules that the generated `#[serde(with = ...)]` attributes name.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Whether a list or map is left out.
pub(crate) fn is_empty<C>(collection: &C) -> bool
where
    for<'a> &'a C: IntoIterator,
{
    collection.into_iter().next().is_none()
}

/// Whether an optional value is left out.
pub(crate) fn is_none<T>(value: &Option<T>) -> bool {
    value.is_none()
}

/// Whether a plain value is left out.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Values as serde has them; `null` is the default.
pub(crate) mod plain {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<T: Serialize, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: Deserialize<'de> + Default,
        D: Deserializer<'de>,
    {
        Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
    }
}

/// A message that is written as `{}` when it is absent.
pub(crate) mod always_message {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<T, S>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        T: Serialize,
        S: Serializer,
    {
        match value {
            Some(value) => value.serialize(serializer),
            None => serializer.collect_map(std::iter::empty::<(&str, ())>()),
        }
    }

    pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Option::<T>::deserialize(deserializer)
    }
}

/// Maps of strings; a key that comes twice is refused, an entry that is `null` is absent.
pub(crate) mod map {
    use std::{collections::BTreeMap, fmt};

    use serde::de::{Error as _, MapAccess, Visitor};

    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &BTreeMap<String, String>, serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
    where
        D: Deserializer<'de>,
    {
        deserialize_values::<D, String>(deserializer)
    }

    pub(super) fn deserialize_values<'de, D, V>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
    where
        D: Deserializer<'de>,
        V: Deserialize<'de> + Into<String>,
    {
        Ok(Option::<Unique<V>>::deserialize(deserializer)?
            .map(|unique| unique.0)
            .unwrap_or_default())
    }

    struct Unique<V>(BTreeMap<String, String>, std::marker::PhantomData<V>);

    impl<'de, V: Deserialize<'de> + Into<String>> Deserialize<'de> for Unique<V> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_map(UniqueVisitor(std::marker::PhantomData))
        }
    }

    struct UniqueVisitor<V>(std::marker::PhantomData<V>);

    impl<'de, V: Deserialize<'de> + Into<String>> Visitor<'de> for UniqueVisitor<V> {
        type Value = Unique<V>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique<V>, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = access.next_entry::<String, Option<V>>()? {
                if map.contains_key(&key) {
                    return Err(A::Error::custom(format!("duplicate field `{key}`")));
                }
                if let Some(value) = value {
                    map.insert(key, value.into());
                }
            }
            Ok(Unique(map, std::marker::PhantomData))
        }
    }
}

/// Maps of quantities: strings kept as they are written; a number is accepted and becomes its decimal text.
pub(crate) mod quantity_map {
    use std::{collections::BTreeMap, fmt};

    use serde::de::Visitor;

    pub(crate) use super::map::serialize;
    use super::{Deserialize, Deserializer};

    pub(crate) fn deserialize<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
    where
        D: Deserializer<'de>,
    {
        super::map::deserialize_values::<D, Text>(deserializer)
    }

    struct Text(String);

    impl From<Text> for String {
        fn from(text: Text) -> String {
            text.0
        }
    }

    impl<'de> Deserialize<'de> for Text {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(TextVisitor)
        }
    }

    struct TextVisitor;

    impl Visitor<'_> for TextVisitor {
        type Value = Text;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a quantity")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Text, E> {
            Ok(Text(text.to_owned()))
        }

        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Text, E> {
            Ok(Text(number.to_string()))
        }

        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Text, E> {
            Ok(Text(number.to_string()))
        }

        fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Text, E> {
            if number.is_finite() {
                Ok(Text(number.to_string()))
            } else {
                Err(E::custom("not a finite number"))
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use crate::core::v1::ResourceRequirements;

        #[test]
        fn numbers_become_strings() {
            let json = r#"{"limits": {"cpu": 0.5, "memory": 1024, "x": "1.50Gi"}}"#;
            let read: ResourceRequirements = serde_json::from_str(json).expect("resources");
            let limits: Vec<&str> = read.limits.values().map(String::as_str).collect();
            assert_eq!(limits, ["0.5", "1024", "1.50Gi"]);
            assert!(serde_json::from_str::<ResourceRequirements>(r#"{"limits": {"cpu": true}}"#).is_err());
        }
    }
}

/// metav1.Time: whole seconds in UTC.
pub(crate) mod time {
    use prost_types::Timestamp;
    use serde::de::Error as _;

    use super::{Deserialize, Deserializer, Serializer};
    use crate::time;

    pub(crate) fn serialize<S: Serializer>(value: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_str(&time::format_seconds(value)),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D>(deserializer: D) -> Result<Option<Timestamp>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let Some(text) = Option::<String>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let parsed = time::parse(&text).map_err(D::Error::custom)?;
        Ok(Some(Timestamp { nanos: 0, ..parsed }))
    }
}

/// metav1.MicroTime: six digits of the second, in UTC.
pub(crate) mod micro_time {
    use prost_types::Timestamp;
    use serde::de::Error as _;

    use super::{Deserialize, Deserializer, Serializer};
    use crate::time;

    pub(crate) fn serialize<S: Serializer>(value: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.serialize_str(&time::format_micros(value)),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D>(deserializer: D) -> Result<Option<Timestamp>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let Some(text) = Option::<String>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let parsed = time::parse(&text).map_err(D::Error::custom)?;
        Ok(Some(Timestamp {
            nanos: parsed.nanos / 1000 * 1000,
            ..parsed
        }))
    }
}

/// intstr.IntOrString: an integer of 32 bits or a string.
pub(crate) mod int_or_string {
    use std::fmt;

    use prost_types::{Value, value::Kind};
    use serde::{de::Visitor, ser::Error as _};

    use super::{Deserialize, Deserializer, Serializer};
    use crate::IntOrString;

    pub(crate) fn serialize<S: Serializer>(value: &Option<Value>, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(value) = value else {
            return serializer.serialize_none();
        };
        match (IntOrString::from_value(value), &value.kind) {
            (Some(IntOrString::Int(number)), _) => serializer.serialize_i32(number),
            (Some(IntOrString::String(text)), _) => serializer.serialize_str(&text),
            (None, None | Some(Kind::NullValue(_))) => serializer.serialize_none(),
            (None, Some(_)) => Err(S::Error::custom("neither an integer of 32 bits nor a string")),
        }
    }

    pub(crate) fn deserialize<'de, D>(deserializer: D) -> Result<Option<Value>, D::Error>
    where
        D: Deserializer<'de>,
    {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|wrapped| wrapped.0.into()))
    }

    struct Wrapped(IntOrString);

    impl<'de> Deserialize<'de> for Wrapped {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(WrappedVisitor)
        }
    }

    struct WrappedVisitor;

    impl Visitor<'_> for WrappedVisitor {
        type Value = Wrapped;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an integer of 32 bits or a string")
        }

        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Wrapped, E> {
            let number =
                i32::try_from(number).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(number), &self))?;
            Ok(Wrapped(IntOrString::Int(number)))
        }

        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Wrapped, E> {
            let number =
                i32::try_from(number).map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(number), &self))?;
            Ok(Wrapped(IntOrString::Int(number)))
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Wrapped, E> {
            Ok(Wrapped(IntOrString::String(text.to_owned())))
        }
    }
}
