//! What holds for every kind.

use orlop_proto::{ResourceKind, schema::Message};
use proptest::prelude::*;

use super::{generate::Generator, *};

/// Mostly right words for most fields, so that some objects are valid and all errors are met.
const ANY: Generator = Generator {
    words: &[
        "a",
        "b",
        "web",
        "10.0.0.1",
        "None",
        "Always",
        "TCP",
        "IPv4",
        "In",
        "Exists",
        "NoExecute",
        "ClusterIP",
        "True",
        "",
        "1",
        "A b",
        "../x",
        "kubernetes",
        "Cluster",
        "SingleStack",
    ],
    without: &[],
    present: 0.5,
};

fn any_object() -> impl Strategy<Value = Object> {
    (0..ResourceKind::ALL.len()).prop_flat_map(|index| {
        let kind = ResourceKind::ALL[index];
        ANY.message(Message::of(&kind))
            .prop_map(move |value| Object::from_value_as(kind, &value).expect("object"))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn defaults_are_idempotent(mut object in any_object()) {
        default_object(&mut object);
        let mut again = object.clone();
        default_object(&mut again);
        prop_assert_eq!(again, object);
    }

    /// Validation never panics, its paths are those of fields, and an object may always become itself.
    #[test]
    fn validation_is_total(mut object in any_object(), mut other in any_object()) {
        default_object(&mut object);
        default_object(&mut other);
        let form = Message::of(&object.kind().expect("kind"));
        for error in validate_create(&object) {
            let path: Vec<&str> = error.field.split('.').map(|part| part.split('[').next().unwrap_or(part)).collect();
            prop_assert!(error.field.contains('[') || form.field_at(&path).is_some(), "{}", error);
        }
        let immutable = validate_update(&object, &object).into_iter().find(|error| error.message.contains("immutable"));
        prop_assert_eq!(immutable, None);
        validate_update(&object, &other);
        validate_status_update(&object, &other);
    }
}

#[test]
fn an_object_without_a_body_is_refused() {
    let (none, pod) = (Object::default(), orlop_proto::core::v1::Pod::default().into_object());
    assert_eq!(validate_create(&none).len(), 1);
    assert_eq!(validate_update(&none, &pod).len(), 1);
    assert_eq!(validate_update(&pod, &none)[0].field, "kind");
}
