//! Objects as Kubernetes prints them come back equal.

use std::{collections::BTreeSet, fs};

use orlop_proto::{ResourceKind, api::v1::Object, json};
use serde_json::Value;

/// `null` means absent.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(entries) => {
            let entries = entries.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(entries.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(elements) => Value::Array(elements.into_iter().map(without_nulls).collect()),
        value => value,
    }
}

#[test]
fn objects_as_kubernetes_prints_them_come_back_equal() {
    let mut seen = BTreeSet::new();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");
    for entry in fs::read_dir(folder).expect("fixtures") {
        let path = entry.expect("fixture").path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let name = path.display();
        let text = fs::read_to_string(&path).expect("fixture");
        let list = json::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        for value in list["items"].as_array().unwrap_or_else(|| panic!("{name}: no items")) {
            let object = Object::from_value(value).unwrap_or_else(|errors| panic!("{name}: {errors:?}"));
            seen.insert(object.kind().expect("kind").kind);
            assert_eq!(object.to_value().expect("json"), without_nulls(value.clone()), "{name}");
            // The same through serde alone.
            let through_serde: Object = serde_json::from_value(value.clone()).expect("object");
            assert_eq!(through_serde, object, "{name}");
        }
    }
    let all: BTreeSet<&str> = ResourceKind::ALL.iter().map(|kind| kind.kind).collect();
    assert_eq!(seen, all, "there is a fixture of every kind");
}

#[test]
fn what_is_in_no_model_is_named() {
    let text = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "managedFields": []},
        "spec": {"containers": [{"name": "a", "securityContext": {}}], "dnsPolicy": "ClusterFirst"}}"#;
    let errors = Object::from_value(&json::parse(text).expect("json")).expect_err("unknown fields");
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "unknown field metadata.managedFields",
            "unknown field spec.containers[0].securityContext",
            "unknown field spec.dnsPolicy",
        ]
    );
    assert!(serde_json::from_str::<Object>(text).is_err());
    assert!(serde_json::from_str::<Object>(r#"{"apiVersion": "v1", "kind": "Pod", "kind": "Pod"}"#).is_err());
}
