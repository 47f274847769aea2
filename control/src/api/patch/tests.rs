use orlop_proto::{Resource, apps::v1::ReplicaSet, core::v1};
use serde_json::json;
use tonic::Code;

use super::*;

const SERVICE: ResourceKind = <v1::Service as Resource>::KIND;

fn live() -> Object {
    let value = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "web", "namespace": "default", "uid": "u", "resourceVersion": "7", "labels": {"a": "1", "b": "2"},
        },
        "spec": {"ports": [{"port": 80}], "selector": {"app": "web"}},
    });
    Object::from_value(&value).expect("a service")
}

fn merge(text: &str) -> patch_request::Patch {
    patch_request::Patch::Merge(text.to_owned())
}

fn json(operations: &Value) -> patch_request::Patch {
    patch_request::Patch::Json(operations.to_string())
}

fn run(given: patch_request::Patch) -> Result<Value, Status> {
    let patch = Patch::parse(&SERVICE, Some(given))?;
    let object = patched(&SERVICE, &ObjectKey::new("default", "web"), &live(), &patch)?;
    Ok(object.to_value().expect("json"))
}

fn refusal(given: patch_request::Patch) -> (Code, String) {
    let status = run(given).expect_err("is refused");
    (status.code(), status.message().to_owned())
}

#[test]
fn a_merge_patch_sets_takes_away_and_replaces_lists() {
    let text = r#"{"metadata":{"labels":{"a":null,"c":"3"}},"spec":{"ports":[{"port":443}],"selector":null}}"#;
    let result = run(merge(text)).expect("patches");
    assert_eq!(result["metadata"]["labels"], json!({"b": "2", "c": "3"}));
    assert_eq!(result["spec"]["ports"], json!([{"port": 443}]));
    assert_eq!(result["spec"].get("selector"), None);
    assert_eq!(result["metadata"]["resourceVersion"], "7");
}

#[test]
fn every_operation_of_a_json_patch() {
    let result = run(json(&json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": "7"},
        {"op": "add", "path": "/spec/ports/-", "value": {"port": 443, "name": "tls"}},
        {"op": "add", "path": "/metadata/annotations", "value": {"x.dev/~y": "1"}},
        {"op": "replace", "path": "/metadata/annotations/x.dev~1~0y", "value": "2"},
        {"op": "copy", "from": "/metadata/labels/a", "path": "/metadata/labels/c"},
        {"op": "move", "from": "/metadata/labels/b", "path": "/metadata/labels/d"},
        {"op": "remove", "path": "/spec/ports/0"},
    ])))
    .expect("patches");
    assert_eq!(result["metadata"]["labels"], json!({"a": "1", "c": "1", "d": "2"}));
    assert_eq!(result["metadata"]["annotations"], json!({"x.dev/~y": "2"}));
    assert_eq!(result["spec"]["ports"], json!([{"port": 443, "name": "tls"}]));
}

#[test]
fn another_version_or_uid_is_a_conflict_and_a_failed_test_a_precondition() {
    for given in [
        merge(r#"{"metadata":{"resourceVersion":"6"}}"#),
        merge(r#"{"metadata":{"uid":"v"}}"#),
        json(&json!([{"op": "replace", "path": "/metadata/resourceVersion", "value": "6"}])),
    ] {
        assert_eq!(refusal(given).0, Code::Aborted);
    }
    run(merge(r#"{"metadata":{"resourceVersion":"7","uid":"u"}}"#)).expect("is this one");
    run(merge(r#"{"metadata":{"resourceVersion":null}}"#)).expect("is without condition");
    let (code, message) = refusal(json(&json!([
        {"op": "add", "path": "/metadata/labels/c", "value": "3"},
        {"op": "test", "path": "/metadata/labels/a", "value": "2"},
    ])));
    assert_eq!(code, Code::FailedPrecondition);
    assert!(
        message.contains("json[1]") && message.contains("/metadata/labels/a"),
        "{message}"
    );
}

#[test]
fn what_is_wrong_is_told_by_its_path() {
    for (given, path) in [
        (merge(r#"{"spec":{"typo":1}}"#), "spec.typo"),
        (merge(r#"{"spec":{"typo":null}}"#), "spec.typo"),
        (merge(r#"{"spec":{"ports":[{"port":"x"}]}}"#), "spec.ports[0].port"),
        (merge(r#"{"metadata":{"name":"other"}}"#), "metadata.name"),
        (merge(r#"{"metadata":{"namespace":"other"}}"#), "metadata.namespace"),
        (merge(r#"{"kind":"Pod"}"#), "kind"),
        (merge(r#"{"spec":{},"spec":{}}"#), "merge"),
        (merge("[1]"), "expected an object"),
        (merge("{"), "merge"),
        (patch_request::Patch::Json("{}".to_owned()), "json"),
        (
            json(&json!([{"op": "add", "path": "/spec/typo", "value": 1}])),
            "spec.typo",
        ),
        (json(&json!([{"op": "remove", "path": "/spec/nothing"}])), "json[0]"),
        (
            json(&json!([{"op": "test", "path": "", "value": 1}, {"op": "jump"}])),
            "json[1]",
        ),
        (json(&json!([{"op": "add", "path": "spec"}])), "json[0]"),
        (
            json(&json!([{"op": "replace", "path": "", "value": []}])),
            "expected an object",
        ),
        (
            json(&json!([{"op": "replace", "path": "/metadata/name", "value": "x"}])),
            "metadata.name",
        ),
    ] {
        let (code, message) = refusal(given);
        assert_eq!(code, Code::InvalidArgument, "{path}: {message}");
        assert!(message.contains(path), "{path} is not in {message}");
    }
}

#[test]
fn hostile_patches_meet_limits() {
    let long = merge(&format!(
        "{{\"metadata\":{{\"labels\":{{\"a\":\"{}\"}}}}}}",
        "x".repeat(MAX_BYTES)
    ));
    let deep = merge(&format!(
        "{}{}",
        "{\"spec\":".repeat(70),
        "1".to_owned() + &"}".repeat(70)
    ));
    let many = json(&Value::Array(vec![
        json!({"op": "test", "path": "/kind", "value": "Service"});
        MAX_OPERATIONS + 1
    ]));
    let mut doubling = vec![json!({"op": "add", "path": "/spec/ports", "value": [["x".repeat(1000)]]})];
    doubling.extend((0..900).map(|_| json!({"op": "copy", "from": "/spec/ports", "path": "/spec/ports/-"})));
    let nesting = json!([
        {"op": "add", "path": "/spec/x", "value": {"a": {}}}, {"op": "move", "from": "/spec/x", "path": "/spec/x/a"},
    ]);
    let mut burying = vec![json!({"op": "add", "path": "/spec", "value": {}})];
    burying.extend(
        (1..200).map(|level| json!({"op": "add", "path": format!("/spec{}", "/a".repeat(level)), "value": {}})),
    );
    for (given, word) in [
        (long, "bytes"),
        (deep, "levels"),
        (many, "operations"),
        (json(&Value::Array(doubling)), "json["),
        (json(&nesting), "json[1]"),
        (json(&Value::Array(burying)), "levels"),
    ] {
        let (code, message) = refusal(given);
        assert_eq!(code, Code::InvalidArgument, "{word}: {message}");
        assert!(message.contains(word), "{word} is not in {message}");
        assert!(message.len() < 4096);
    }
}

#[test]
fn only_kinds_with_a_status_have_one_to_patch() {
    assert!(Half::of(&ReplicaSet::KIND, "status").is_ok());
    for (kind, subresource) in [
        (v1::Event::KIND, "status"),
        (ReplicaSet::KIND, "scale"),
        (ReplicaSet::KIND, "\u{1b}"),
    ] {
        let status = Half::of(&kind, subresource).err().expect("is refused");
        assert!(status.message().contains("subresource"), "{status:?}");
    }
}
