//! What the messages of the object model look like in JSON and how their lists merge, as data: generated from the descriptors.

use crate::ResourceKind;

/// A message of the object model.
#[derive(Debug)]
pub struct Message {
    /// Its full protobuf name, "orlop.core.v1.Pod".
    pub name: &'static str,
    /// Its fields, in the order of the .proto file.
    pub fields: &'static [Field],
}

/// A field of a message.
#[derive(Debug)]
pub struct Field {
    /// Its name in JSON.
    pub json: &'static str,
    /// Its name in the .proto file.
    pub name: &'static str,
    /// What one value of it is: of a list or a map, what the elements are.
    pub value: Value,
    /// Whether it holds one value or many.
    pub shape: Shape,
    /// Whether its JSON is written even when it is empty.
    pub always: bool,
}

/// The type of a value.
#[derive(Debug, Clone, Copy)]
pub enum Value {
    /// A string.
    String,
    /// A boolean.
    Bool,
    /// An integer of 32 bits.
    Int32,
    /// An integer of 64 bits.
    Int64,
    /// A time as RFC 3339.
    Time,
    /// A Kubernetes quantity: a string or a number.
    Quantity,
    /// An integer of 32 bits or a string.
    IntOrString,
    /// An object of this form.
    Message(&'static Message),
}

/// How many values a field holds.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// One.
    Single,
    /// A list.
    List(ListMerge),
    /// An object with any keys; merges key by key.
    Map,
}

/// How an Apply merges a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListMerge {
    /// Replaced as a whole.
    Atomic,
    /// A set of scalars: single values are added and removed.
    Set,
    /// Element by element; these fields identify an element.
    Keys(&'static [&'static str]),
}

impl Message {
    /// The field with this JSON name.
    pub fn field(&self, json: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.json == json)
    }

    /// The form of a kind.
    pub fn of(kind: &ResourceKind) -> &'static Message {
        let name = |message: &&&'static Message| message.name.rsplit('.').next() == Some(kind.kind);
        MESSAGES.iter().find(name).copied().unwrap_or(&EMPTY)
    }

    /// The field at a path of JSON names from here, with list indices and map keys left out:
    /// `["spec", "containers", "ports"]`.
    pub fn field_at(&self, path: &[&str]) -> Option<&'static Field> {
        let (first, rest) = path.split_first()?;
        let field = self.field(first)?;
        match (rest.is_empty(), field.value) {
            (true, _) => Some(field),
            (false, Value::Message(message)) => message.field_at(rest),
            (false, _) => None,
        }
    }
}

static EMPTY: Message = Message { name: "", fields: &[] };

include!(concat!(env!("OUT_DIR"), "/schema.rs"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_form() {
        for kind in ResourceKind::ALL {
            let message = Message::of(kind);
            assert!(message.field("metadata").is_some(), "{kind:?} -> {}", message.name);
        }
    }

    #[test]
    fn merge_keys_are_those_of_kubernetes() {
        let pod = Message::of(&ResourceKind::by_resource("pods").expect("pods"));
        let shape = |path: &[&str]| pod.field_at(path).expect("field").shape;
        assert!(matches!(
            shape(&["spec", "containers"]),
            Shape::List(ListMerge::Keys(["name"]))
        ));
        assert!(matches!(
            shape(&["spec", "containers", "ports"]),
            Shape::List(ListMerge::Keys(["containerPort", "protocol"]))
        ));
        assert!(matches!(
            shape(&["metadata", "finalizers"]),
            Shape::List(ListMerge::Set)
        ));
        assert!(matches!(
            shape(&["spec", "tolerations"]),
            Shape::List(ListMerge::Atomic)
        ));
        let spread = ["spec", "topologySpreadConstraints"];
        assert!(matches!(
            shape(&spread),
            Shape::List(ListMerge::Keys(["topologyKey", "whenUnsatisfiable"]))
        ));
        assert!(matches!(
            shape(&[spread[0], spread[1], "matchLabelKeys"]),
            Shape::List(ListMerge::Atomic)
        ));
        assert!(matches!(shape(&["metadata", "labels"]), Shape::Map));
    }
}
