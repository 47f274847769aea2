use orlop_proto::{Resource, api::v1::Object, core::v1, json};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::model::generate::Generator;

const SERVICE: ResourceKind = <v1::Service as Resource>::KIND;
const POD: ResourceKind = <v1::Pod as Resource>::KIND;

fn service(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}, "spec": spec})
}

/// The result without the annotation, and without the maps that it may have left empty.
fn plain(mut value: Value) -> Value {
    if let Some(meta) = metadata(&mut value) {
        if let Some(annotations) = meta.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
        meta.retain(|_, value| *value != json!({}));
    }
    value
}

/// As long as a manifest may make them: who looks through one list for every element of the other takes minutes.
#[test]
fn long_lists_are_merged_at_once() {
    let count = 100_000;
    let ports: Vec<Value> = (0..count).map(|port| json!({"containerPort": port})).collect();
    let finalizers: Vec<Value> = (0..count).map(|number| json!(format!("x.dev/{number}"))).collect();
    let given = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "default", "finalizers": finalizers},
        "spec": {"containers": [{"name": "web", "image": "web", "ports": ports}]},
    });
    let live = apply(&POD, &given, None);
    assert_eq!(apply(&POD, &given, Some(&live)), live);
    let mut less = given;
    for list in ["/metadata/finalizers", "/spec/containers/0/ports"] {
        less.pointer_mut(list)
            .and_then(Value::as_array_mut)
            .expect("a list")
            .truncate(count / 2);
    }
    let result = apply(&POD, &less, Some(&live));
    assert_eq!(result["metadata"]["finalizers"], less["metadata"]["finalizers"]);
    assert_eq!(result["spec"], less["spec"]);
}

#[test]
fn what_the_server_wrote_survives() {
    let first = service(json!({"selector": {"app": "web"}, "ports": [{"port": 80}, {"port": 443}]}));
    let mut live = apply(&SERVICE, &first, None);
    live["metadata"]["uid"] = json!("u");
    live["metadata"]["resourceVersion"] = json!("7");
    live["metadata"]["labels"] = json!({"other": "x"});
    live["spec"]["clusterIP"] = json!("10.96.0.7");
    live["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
    live["spec"]["type"] = json!("ClusterIP");
    live["spec"]["ports"] = json!([
        {"port": 80, "protocol": "TCP", "targetPort": 80}, {"port": 443, "protocol": "TCP", "targetPort": 443},
        {"port": 53, "protocol": "UDP"},
    ]);
    live["status"] = json!({"loadBalancer": {}});
    assert_eq!(apply(&SERVICE, &first, Some(&live)), live);

    let mut second =
        service(json!({"selector": {"app": "web", "tier": "a"}, "ports": [{"port": 80, "targetPort": "http"}]}));
    second["status"] = json!({"loadBalancer": null});
    second["metadata"]["creationTimestamp"] = Value::Null;
    let result = apply(&SERVICE, &second, Some(&live));
    assert_eq!(
        plain(result.clone()),
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "uid": "u", "resourceVersion": "7", "labels": {"other": "x"}},
            "spec": {
                "selector": {"app": "web", "tier": "a"}, "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "type": "ClusterIP",
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": "http"}, {"port": 53, "protocol": "UDP"}],
            },
            "status": {"loadBalancer": {}},
        })
    );
    assert_eq!(apply(&SERVICE, &second, Some(&result)), result);
}

#[test]
fn what_is_taken_out_goes() {
    let first =
        service(json!({"selector": {"a": "1", "b": "2"}, "clusterIP": "10.96.0.7", "publishNotReadyAddresses": true}));
    let mut first = first;
    first["metadata"]["labels"] = json!({"mine": "1"});
    first["metadata"]["finalizers"] = json!(["a/mine", "a/both"]);
    let mut live = apply(&SERVICE, &first, None);
    live["metadata"]["labels"]["other"] = json!("2");
    live["metadata"]["finalizers"] = json!(["a/other", "a/mine", "a/both"]);
    let mut second = service(json!({"selector": {"b": "2"}}));
    second["metadata"]["finalizers"] = json!(["a/both", "a/new"]);
    let result = plain(apply(&SERVICE, &second, Some(&live)));
    assert_eq!(
        result["spec"],
        json!({"selector": {"b": "2"}, "clusterIP": "10.96.0.7"})
    );
    assert_eq!(result["metadata"]["labels"], json!({"other": "2"}));
    assert_eq!(result["metadata"]["finalizers"], json!(["a/other", "a/both", "a/new"]));
}

#[test]
fn null_takes_out_what_others_wrote() {
    let mut live =
        service(json!({"publishNotReadyAddresses": true, "ports": [{"port": 80, "protocol": "TCP", "name": "a"}]}));
    live["metadata"]["resourceVersion"] = json!("7");
    live["metadata"]["labels"] = json!({"old": "1", "other": "2"});
    let mut given = service(json!({"publishNotReadyAddresses": null, "ports": [{"port": 80, "name": null}]}));
    given["metadata"]["labels"] = json!({"old": null, "never": null, "new": "3"});
    let result = plain(apply(&SERVICE, &given, Some(&live)));
    assert_eq!(result["metadata"]["labels"], json!({"other": "2", "new": "3"}));
    assert_eq!(
        plain(apply(&SERVICE, &given, None))["metadata"]["labels"],
        json!({"new": "3"})
    );
    assert_eq!(result["spec"], json!({"ports": [{"port": 80, "protocol": "TCP"}]}));
}

#[test]
fn false_is_not_absent() {
    let live = service(json!({"publishNotReadyAddresses": true}));
    let given = service(json!({"publishNotReadyAddresses": false}));
    assert_eq!(
        apply(&SERVICE, &given, Some(&live))["spec"]["publishNotReadyAddresses"],
        json!(false)
    );
}

#[test]
fn orders_of_lists() {
    let pod = |env: &[&str]| {
        let env: Vec<Value> = env.iter().map(|name| json!({"name": name, "value": "1"})).collect();
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", "env": env}]}})
    };
    let names = |value: &Value| -> Vec<String> {
        let env = value["spec"]["containers"][0]["env"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        env.iter()
            .map(|one| one["name"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    let live = pod(&["x", "a", "y", "b"]);
    assert_eq!(
        names(&apply(&POD, &pod(&["a", "b"]), Some(&live))),
        ["x", "a", "y", "b"]
    );
    assert_eq!(
        names(&apply(&POD, &pod(&["b", "a"]), Some(&live))),
        ["b", "a", "x", "y"]
    );
    assert_eq!(
        names(&apply(&POD, &pod(&["n", "b"]), Some(&live))),
        ["n", "b", "x", "a", "y"]
    );
    assert_eq!(names(&apply(&POD, &pod(&["a", "a"]), Some(&live))), ["a", "a"]);
}

#[test]
fn the_annotation_is_kubectls() {
    let given = service(json!({"ports": [{"port": 80}]}));
    let result = apply(&SERVICE, &given, None);
    let text = result["metadata"]["annotations"][LAST_APPLIED]
        .as_str()
        .expect("annotation");
    assert_eq!(
        text,
        "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"annotations\":{},\"name\":\"web\",\"namespace\":\"default\"},\
         \"spec\":{\"ports\":[{\"port\":80}]}}\n"
    );
    // Applying what was read back does not nest the annotation.
    let again = apply(&SERVICE, &result, Some(&result));
    assert_eq!(again["metadata"]["annotations"][LAST_APPLIED].as_str(), Some(text));
    for spoilt in ["", "{", "[]", "7"] {
        let mut live = result.clone();
        live["metadata"]["annotations"][LAST_APPLIED] = json!(spoilt);
        assert_eq!(apply(&SERVICE, &given, Some(&live)), result);
    }
}

const ANY: Generator = Generator {
    words: &["a", "b", "TCP", ""],
    without: &[
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "generation",
        "resourceVersion",
        "uid",
        "clusterIP",
        "clusterIPs",
        "nodeName",
        "podCIDR",
        "podCIDRs",
    ],
    present: 0.4,
};

fn any_object() -> impl Strategy<Value = (ResourceKind, Value, Value)> {
    (0..ResourceKind::ALL.len()).prop_flat_map(|index| {
        let kind = ResourceKind::ALL[index];
        let object = || {
            ANY.message(Message::of(&kind)).prop_map(|mut value| {
                metadata(&mut value);
                value.as_object_mut().map(|object| object.remove("status"));
                value
            })
        };
        (Just(kind), object(), object())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Applying the same again changes nothing, whatever is there.
    #[test]
    fn applying_twice_is_applying_once((kind, given, live) in any_object()) {
        let once = apply(&kind, &given, Some(&live));
        prop_assert_eq!(apply(&kind, &given, Some(&once)), once);
    }

    /// When nobody else writes, the object is what was given last.
    #[test]
    fn nothing_stays_of_what_was_taken_out((kind, first, second) in any_object()) {
        let live = apply(&kind, &first, None);
        let result = apply(&kind, &second, Some(&live));
        let sorted = |value: Value| {
            let mut value = plain(value);
            let set = metadata(&mut value).and_then(|meta| meta.get_mut("finalizers")).and_then(Value::as_array_mut);
            if let Some(set) = set {
                set.sort_by_key(ToString::to_string);
            }
            value
        };
        prop_assert_eq!(sorted(result), sorted(apply(&kind, &second, None)));
    }

    /// What is given is there, and the result has the form of the kind.
    #[test]
    fn the_result_has_its_kinds_form((kind, given, live) in any_object()) {
        let result = apply(&kind, &given, Some(&live));
        prop_assert_eq!(json::check(Message::of(&kind), &result), Vec::new());
        for (field, value) in given["metadata"]["labels"].as_object().into_iter().flatten() {
            prop_assert_eq!(&result["metadata"]["labels"][field], value);
        }
    }

    /// The same through typed objects and their defaults, as the API does it: applying twice writes nothing.
    #[test]
    fn applying_twice_writes_nothing((kind, given, _) in any_object(), other in any::<bool>()) {
        let typed = |value: &Value| {
            let mut object = Object::from_value_as(kind, value).expect("object");
            crate::model::default_object(&mut object);
            object
        };
        let mut first = typed(&apply(&kind, &given, None));
        if other {
            let meta = first.meta_mut().expect("meta");
            meta.labels.insert("other".to_owned(), "label".to_owned());
            meta.resource_version = "7".to_owned();
        }
        let second = typed(&apply(&kind, &given, Some(&first.to_value().expect("json"))));
        prop_assert_eq!(second, first);
    }
}
