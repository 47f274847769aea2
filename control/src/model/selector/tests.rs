use orlop_proto::{
    core::v1::{Event, Node, ObjectReference, Pod, PodSpec, PodStatus},
    meta::v1::{LabelSelectorRequirement, ObjectMeta},
};
use proptest::prelude::*;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn label_selectors_select_as_kubernetes_does() {
    let web = labels(&[("app", "web"), ("tier", "a"), ("size", "5"), ("empty", "")]);
    for (text, expected) in [
        ("", true),
        ("  ", true),
        ("app=web", true),
        ("app == web", true),
        ("app=db", false),
        ("app!=db", true),
        ("other!=db", true),
        ("app!=web", false),
        ("tier in (a, b)", true),
        ("tier in (b,c)", false),
        ("tier notin (b,c)", true),
        ("other notin (b,c)", true),
        ("app", true),
        ("other", false),
        ("!other", true),
        ("! app", false),
        ("size>4", true),
        ("size < 5", false),
        ("app>1", false),
        ("empty=", true),
        ("empty=,app=web", true),
        ("empty in (,x)", true),
        ("app=web,tier in (a, b),!old", true),
        ("app=web,old", false),
        ("in in (in)", false),
    ] {
        let selector = Selector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(selector.matches(&web), expected, "{text}");
    }
}

#[test]
fn what_is_no_label_selector() {
    for text in [
        ",",
        "=a",
        "a=b,",
        "a=b c",
        "a in",
        "a in b",
        "a in (b",
        "a in ()",
        "a notin (b c)",
        "!",
        "a=b=c",
        "a>x",
        "a>",
        "a/b/c=d",
        "a=b/c",
        "!a=b",
        "(a)",
        "a in (b))",
        "-a=b",
    ] {
        assert!(Selector::parse(text).is_err(), "{text:?}");
    }
    assert!(Selector::parse(&"a".repeat(TEXT_MAX + 1)).is_err());
}

#[test]
fn selectors_in_messages() {
    let expression = |operator: &str, values: &[&str]| LabelSelector {
        match_expressions: vec![LabelSelectorRequirement {
            key: "app".to_owned(),
            operator: operator.to_owned(),
            values: values.iter().map(|value| (*value).to_owned()).collect(),
        }],
        ..LabelSelector::default()
    };
    let web = labels(&[("app", "web")]);
    let matches =
        |message: &LabelSelector| Selector::from_message(Some(message)).map(|selector| selector.matches(&web));
    assert_eq!(matches(&expression("In", &["web"])), Ok(true));
    assert_eq!(matches(&expression("NotIn", &["web"])), Ok(false));
    assert_eq!(matches(&expression("Exists", &[])), Ok(true));
    assert_eq!(matches(&expression("DoesNotExist", &[])), Ok(false));
    assert!(matches(&expression("In", &[])).is_err());
    assert!(matches(&expression("Exists", &["a"])).is_err());
    assert!(matches(&expression("Gt", &["1"])).is_err());
    assert_eq!(matches(&LabelSelector::default()), Ok(true));
    assert!(!Selector::from_message(None).expect("selector").matches(&web));
}

#[test]
fn field_selectors() {
    let pod = Pod {
        metadata: Some(ObjectMeta {
            name: "a".to_owned(),
            namespace: "b".to_owned(),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            node_name: "n".to_owned(),
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            phase: "Running".to_owned(),
            ..PodStatus::default()
        }),
        ..Pod::default()
    };
    for (text, expected) in [
        ("", true),
        ("metadata.name=a", true),
        ("metadata.name==a,metadata.namespace=b", true),
        ("metadata.name!=a", false),
        ("spec.nodeName=n,status.phase!=Pending", true),
        ("spec.nodeName=", false),
        ("status.phase=Running\\,", false),
    ] {
        let selector = FieldSelector::parse::<Pod>(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(selector.matches(&pod), expected, "{text}");
    }
    for text in [
        "a",
        "spec.foo=1",
        "metadata.name=a=b",
        "metadata.name=\\x",
        "=a",
        "involvedObject.name=a",
    ] {
        assert!(FieldSelector::parse::<Pod>(text).is_err(), "{text:?}");
    }
    let selector = FieldSelector::parse::<Pod>("spec.nodeName=n,metadata.name!=x").expect("selector");
    assert_eq!(
        (selector.required("spec.nodeName"), selector.required("metadata.name")),
        (Some("n"), None)
    );
    assert!(FieldSelector::parse::<Node>("spec.nodeName=n").is_err());

    let event = Event {
        involved_object: Some(ObjectReference {
            kind: "Pod".to_owned(),
            ..ObjectReference::default()
        }),
        ..Event::default()
    };
    let selector = FieldSelector::parse::<Event>("involvedObject.kind=Pod,involvedObject.uid=").expect("selector");
    assert!(selector.matches(&event));
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-c=!,()<> \\\\.]{0,24}|\\PC{0,24}") {
        let _ = Selector::parse(&text);
        let _ = FieldSelector::parse::<Pod>(&text);
    }
}
