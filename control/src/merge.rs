//! Apply's three-way merge, as `kubectl apply` does it: pure, over the objects' JSON.
//!
//! What is given wins; what was given last time and is not any more goes; everything else (defaults, allocated addresses, what
//! controllers and other people wrote) stays. Lists merge by the keys that the .proto files declare, or are replaced as a
//! whole. What was given last time is kept where kubectl keeps it, in an annotation of the object itself.
//!
//! Invariant: applying the same again to the result gives the result.

use std::collections::{BTreeSet, HashMap, HashSet};

use orlop_proto::{
    ResourceKind,
    schema::{self, Field, ListMerge, Message, Shape},
};
use serde_json::{Map, Value};

/// kubectl's annotation for what was applied last.
pub const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Fields of `metadata` that only the server writes. A manifest that leaves them out, or has `null`, changes nothing.
const SYSTEM_FIELDS: [&str; 6] = [
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "resourceVersion",
    "uid",
];

/// Fields that are given once, by the user or by the server: taking them out of a manifest takes them from no object.
const ALLOCATED: [(&str, &str); 5] = [
    ("services", "clusterIP"),
    ("services", "clusterIPs"),
    ("pods", "nodeName"),
    ("nodes", "podCIDR"),
    ("nodes", "podCIDRs"),
];

/// The object that an Apply of `given` makes of `live` (`None`: there is none yet), remembering what was given.
///
/// The result is to be defaulted and validated before it is compared with the live object or written. Its status is the live one's.
pub fn apply(kind: &ResourceKind, given: &Value, live: Option<&Value>) -> Value {
    let mut result = match live {
        None => without_nulls(given),
        Some(live) => merge(kind, last_applied(live).as_ref(), given, live),
    };
    remember(&mut result, given);
    result
}

/// The three-way merge alone.
pub fn merge(kind: &ResourceKind, last: Option<&Value>, given: &Value, live: &Value) -> Value {
    let mut result = object(Message::of(kind), last, given, live);
    if let (Some(result), Some(live)) = (result.as_object_mut(), live.as_object()) {
        keep(result, live, "status");
        for (_, field) in ALLOCATED.iter().filter(|(resource, _)| *resource == kind.resource) {
            let lost = result.get("spec").is_none_or(|spec| spec.get(field).is_none());
            if let Some(value) = live.get("spec").and_then(|spec| spec.get(field)).filter(|_| lost) {
                let spec = result.entry("spec").or_insert_with(|| Value::Object(Map::new()));
                spec.as_object_mut()
                    .map(|spec| spec.insert((*field).to_owned(), value.clone()));
            }
        }
    }
    if let (Some(result), Some(live)) = (metadata(&mut result), live.get("metadata").and_then(Value::as_object)) {
        for field in SYSTEM_FIELDS
            .into_iter()
            .filter(|field| !live_value_is_replaced(given, field))
        {
            keep(result, live, field);
        }
    }
    result
}

/// What was applied last to an object; `None` when nothing was, or when somebody spoilt the annotation.
pub fn last_applied(live: &Value) -> Option<Value> {
    let text = live.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?.as_str()?;
    orlop_proto::json::parse(text).ok().filter(Value::is_object)
}

/// Writes the annotation: the given object, without the annotation itself, in one line with sorted keys.
fn remember(result: &mut Value, given: &Value) {
    let mut given = given.clone();
    if let Some(meta) = metadata(&mut given) {
        let annotations = meta.entry("annotations").or_insert_with(|| Value::Object(Map::new()));
        match annotations {
            Value::Object(annotations) => drop(annotations.remove(LAST_APPLIED)),
            other => *other = Value::Object(Map::new()),
        }
    }
    let mut text = given.to_string();
    text.push('\n');
    if let Some(meta) = metadata(result) {
        let annotations = meta.entry("annotations").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(annotations) = annotations {
            annotations.insert(LAST_APPLIED.to_owned(), Value::String(text));
        }
    }
}

fn metadata(object: &mut Value) -> Option<&mut Map<String, Value>> {
    object
        .as_object_mut()?
        .entry("metadata")
        .or_insert_with(|| Value::Object(Map::new()))
        .as_object_mut()
}

fn live_value_is_replaced(given: &Value, field: &str) -> bool {
    given
        .get("metadata")
        .and_then(|meta| meta.get(field))
        .is_some_and(|value| !value.is_null())
}

/// The field as the live object has it, present or absent.
fn keep(result: &mut Map<String, Value>, live: &Map<String, Value>, field: &str) {
    match live.get(field) {
        Some(value) => drop(result.insert(field.to_owned(), value.clone())),
        None => drop(result.remove(field)),
    }
}

/// `null` means absent: a value without such fields.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(entries) => {
            let entries = entries.iter().filter(|(_, value)| !value.is_null());
            Value::Object(
                entries
                    .map(|(key, value)| (key.clone(), without_nulls(value)))
                    .collect(),
            )
        }
        Value::Array(elements) => Value::Array(elements.iter().map(without_nulls).collect()),
        value => value.clone(),
    }
}

/// Merges the fields of a message.
fn object(message: &Message, last: Option<&Value>, given: &Value, live: &Value) -> Value {
    let (Some(given), Some(live)) = (given.as_object(), live.as_object()) else {
        return without_nulls(given);
    };
    let last = last.and_then(Value::as_object);
    let mut result = live.clone();
    for key in last
        .into_iter()
        .flat_map(Map::keys)
        .filter(|key| given.get(*key).is_none_or(Value::is_null))
    {
        let field = message.field(key);
        // Other people's labels and annotations stay, even when the manifest has none at all any more.
        if message.name == "orlop.meta.v1.ObjectMeta" && field.is_some_and(|field| matches!(field.shape, Shape::Map)) {
            let rest = map(last.and_then(|last| last.get(key)), &Map::new(), live.get(key));
            if rest.as_object().is_some_and(|rest| !rest.is_empty()) {
                result.insert(key.clone(), rest);
                continue;
            }
        }
        result.remove(key);
    }
    for (key, value) in given {
        if value.is_null() {
            let others = message.name == "orlop.meta.v1.ObjectMeta" && last.is_some_and(|last| last.contains_key(key));
            if !others {
                result.remove(key);
            }
            continue;
        }
        let last = last.and_then(|last| last.get(key));
        let merged = match message.field(key) {
            Some(known) => field(known, last, value, live.get(key)),
            None => value.clone(),
        };
        result.insert(key.clone(), merged);
    }
    Value::Object(result)
}

/// Merges one field that is given.
fn field(field: &Field, last: Option<&Value>, given: &Value, live: Option<&Value>) -> Value {
    match (field.shape, field.value, given, live) {
        (Shape::Single, schema::Value::Message(message), _, Some(live)) => object(message, last, given, live),
        (Shape::Map, _, Value::Object(given), live) => map(last, given, live),
        (Shape::List(ListMerge::Set), _, Value::Array(given), Some(Value::Array(live))) => set(last, given, live),
        (
            Shape::List(ListMerge::Keys(keys)),
            schema::Value::Message(message),
            Value::Array(given),
            Some(Value::Array(live)),
        ) => list(message, keys, last, given, live),
        _ => without_nulls(given),
    }
}

fn map(last: Option<&Value>, given: &Map<String, Value>, live: Option<&Value>) -> Value {
    let mut result = live.and_then(Value::as_object).cloned().unwrap_or_default();
    for key in last.and_then(Value::as_object).into_iter().flat_map(Map::keys) {
        result.remove(key);
    }
    for (key, value) in given {
        match value {
            Value::Null => drop(result.remove(key)),
            value => drop(result.insert(key.clone(), value.clone())),
        }
    }
    Value::Object(result)
}

/// A list of scalars as a set: the live order, new values at the end.
fn set(last: Option<&Value>, given: &[Value], live: &[Value]) -> Value {
    // Lists may be as long as a manifest may: no search in one for every element of another.
    let of = |values: &[Value]| -> HashSet<Value> { values.iter().cloned().collect() };
    let (last, wanted) = (of(elements(last)), of(given));
    let stays = |value: &&Value| wanted.contains(*value) || !last.contains(*value);
    let mut result: Vec<Value> = live.iter().filter(stays).cloned().collect();
    let mut there = of(&result);
    for value in given {
        if there.insert(value.clone()) {
            result.push(value.clone());
        }
    }
    Value::Array(result)
}

/// A list of messages, element by element.
///
/// When the live list has all given elements in the given order, its order stays; else the given ones come first.
fn list(message: &Message, keys: &[&str], last: Option<&Value>, given: &[Value], live: &[Value]) -> Value {
    let (Some(given_keys), Some(live_keys)) = (identities(keys, given), identities(keys, live)) else {
        // Elements that cannot be told apart: validation will say so.
        return Value::Array(given.iter().map(without_nulls).collect());
    };
    let mut last_of: HashMap<String, &Value> = HashMap::new();
    for element in elements(last) {
        if let Some(key) = identity(keys, element) {
            // Of several with one identity the first counts.
            last_of.entry(key).or_insert(element);
        }
    }
    let live_of: HashMap<&String, &Value> = live_keys.iter().zip(live).collect();
    let is_given: HashSet<&String> = given_keys.iter().collect();

    let merged = |index: usize| {
        let key = &given_keys[index];
        match live_of.get(key) {
            Some(live) => object(message, last_of.get(key).copied(), &given[index], live),
            None => without_nulls(&given[index]),
        }
    };
    let kept = |key: &String| !is_given.contains(key) && !last_of.contains_key(key);

    let in_live: Vec<&String> = live_keys.iter().filter(|key| is_given.contains(key)).collect();
    if in_live.iter().copied().eq(given_keys.iter()) {
        let mut next = 0;
        let result = live.iter().zip(&live_keys).filter_map(|(element, key)| {
            if is_given.contains(key) {
                next += 1;
                Some(merged(next - 1))
            } else {
                kept(key).then(|| element.clone())
            }
        });
        return Value::Array(result.collect());
    }
    let others = live
        .iter()
        .zip(&live_keys)
        .filter(|(_, key)| kept(key))
        .map(|(element, _)| element.clone());
    Value::Array((0..given.len()).map(merged).chain(others).collect())
}

fn elements(list: Option<&Value>) -> &[Value] {
    list.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The identities of all elements; `None` when one has none or two have the same.
fn identities(keys: &[&str], elements: &[Value]) -> Option<Vec<String>> {
    let identities: Vec<String> = elements
        .iter()
        .map(|element| identity(keys, element))
        .collect::<Option<_>>()?;
    let distinct: BTreeSet<&String> = identities.iter().collect();
    (distinct.len() == identities.len()).then_some(identities)
}

/// What tells an element from the others; a protocol that is left out, or empty, is TCP.
fn identity(keys: &[&str], element: &Value) -> Option<String> {
    let mut identity = String::new();
    for key in keys {
        let value = match element.get(key) {
            None | Some(Value::Null) if *key == "protocol" => "\"TCP\"".to_owned(),
            Some(Value::String(empty)) if empty.is_empty() && *key == "protocol" => "\"TCP\"".to_owned(),
            None | Some(Value::Null) => return None,
            Some(value) => value.to_string(),
        };
        identity.push_str(&value);
        identity.push(',');
    }
    Some(identity)
}

#[cfg(test)]
mod tests;
