//! Generated JSON of the object model, for properties.

use orlop_proto::schema::{self, ListMerge, Message, Shape};
use proptest::prelude::*;
use serde_json::{Value, json};

/// What generated messages are made of.
#[derive(Clone, Copy)]
pub(crate) struct Generator {
    /// Strings are one of these.
    pub words: &'static [&'static str],
    /// Fields that are never there.
    pub without: &'static [&'static str],
    /// How likely a field is there.
    pub present: f64,
}

impl Generator {
    /// Any JSON that a message can have, of few names and values, so that parts meet.
    pub fn message(self, message: &'static Message) -> BoxedStrategy<Value> {
        let fields: Vec<_> = message
            .fields
            .iter()
            .filter(|field| !self.without.contains(&field.json))
            .map(|field| {
                let one = self.value(field.value);
                let value = match field.shape {
                    Shape::Single => one,
                    Shape::List(ListMerge::Set) => prop::collection::btree_set(prop::sample::select(self.words), 0..4)
                        .prop_map(|set| set.into_iter().map(Value::from).collect())
                        .boxed(),
                    Shape::List(_) => prop::collection::vec(one, 0..4).prop_map(Value::Array).boxed(),
                    Shape::Map => {
                        let key = prop::sample::select(self.words).prop_map(str::to_owned);
                        prop::collection::btree_map(key, one, 0..3)
                            .prop_map(|map| Value::Object(map.into_iter().collect()))
                            .boxed()
                    }
                };
                prop::option::weighted(self.present, value).prop_map(|value| (field.json, value))
            })
            .collect();
        fields
            .prop_map(|fields| {
                let present = fields
                    .into_iter()
                    .filter_map(|(name, value)| value.map(|value| (name.to_owned(), value)));
                Value::Object(present.collect())
            })
            .boxed()
    }

    fn value(self, value: schema::Value) -> BoxedStrategy<Value> {
        match value {
            schema::Value::Message(message) => self.message(message),
            schema::Value::Bool => any::<bool>().prop_map(Value::from).boxed(),
            schema::Value::Int32 | schema::Value::Int64 => (0..3).prop_map(Value::from).boxed(),
            schema::Value::Time => Just(json!("2024-01-01T00:00:00Z")).boxed(),
            schema::Value::Quantity | schema::Value::String | schema::Value::IntOrString => {
                prop::sample::select(self.words).prop_map(Value::from).boxed()
            }
        }
    }
}
