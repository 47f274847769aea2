use orlop_proto::Resource;
use proptest::prelude::*;

use super::*;

const GOOD: &str = r#"
# A comment before the first document.
---
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: &labels {app: web}
spec:
  selector: *labels
  ports:
  - port: 80
    targetPort: http
---
# Nothing here.
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: null
      containers:
      - name: web
        image: web:1
        resources: {requests: {cpu: 0.5, memory: 64Mi}}
        ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: a}}
- {apiVersion: v1, kind: Namespace, metadata: {name: b}}
"#;

fn texts(text: &str) -> Vec<String> {
    parse(text, &Limits::default())
        .expect_err(text)
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn pod(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {spec}\n")
}

#[test]
fn documents_become_objects() {
    let objects = parse(GOOD, &Limits::default()).expect("manifest");
    let found: Vec<(usize, &str, &str)> = objects
        .iter()
        .map(|one| {
            (
                one.document,
                one.kind.resource,
                one.object.meta().map_or("", |meta| meta.name.as_str()),
            )
        })
        .collect();
    let expected = [
        (1, "services", "web"),
        (2, "replicasets", "web"),
        (3, "namespaces", "a"),
        (3, "namespaces", "b"),
    ];
    assert_eq!(found, expected);
    assert_eq!(objects[0].value["spec"]["selector"]["app"], "web");
    let set = orlop_proto::apps::v1::ReplicaSet::from_object(objects[1].object.clone()).expect("set");
    let template = set
        .spec
        .and_then(|spec| spec.template)
        .and_then(|template| template.spec)
        .expect("template");
    let requests = template.containers[0]
        .resources
        .as_ref()
        .map(|resources| resources.requests.clone());
    assert_eq!(requests.expect("requests")["cpu"], "0.5");
}

#[test]
fn json_is_read_too() {
    let one = r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}"#;
    assert_eq!(parse(one, &Limits::default()).expect("json").len(), 1);
    assert_eq!(
        parse(&format!("{one}\n{one}"), &Limits::default()).expect("json").len(),
        2
    );
    assert_eq!(
        parse(&format!("{one}\n---\n{one}"), &Limits::default())
            .expect("json")
            .len(),
        2
    );
    let list = format!(r#"{{"apiVersion": "v1", "kind": "List", "items": [{one}]}}"#);
    assert_eq!(parse(&list, &Limits::default()).expect("json").len(), 1);
    assert_eq!(parse("", &Limits::default()), Ok(Vec::new()));
    assert_eq!(parse("---\n# nothing\n---\n", &Limits::default()), Ok(Vec::new()));
}

#[test]
fn all_errors_of_all_documents_come_at_once() {
    let text = format!(
        "{}---\n{}---\napiVersion: v1\nkind: Deployment\n---\nkind: Pod\n---\n- a\n---\napiVersion: v1\nkind: List\nextra: 1\n\
         items: [{{apiVersion: v1, kind: Pod, spec: {{bar: 1}}}}, 7]\n",
        pod("{containers: [{name: a, image: a}]}"),
        pod("{foo: 1, containers: [{name: a, imag: a, ports: [{containerPort: 99999999999}]}], restartPolicy: yes}")
    );
    assert_eq!(
        texts(&text),
        [
            "document 2: unknown field spec.containers[0].imag",
            "document 2: spec.containers[0].ports[0].containerPort: expected an integer of 32 bits, found 99999999999",
            "document 2: unknown field spec.foo",
            "document 2: spec.restartPolicy: expected a string, found true",
            "document 3: kind: no kind \"Deployment\" in apiVersion \"v1\"",
            "document 4: apiVersion: no apiVersion with kind \"Pod\"",
            "document 5: expected an object",
            "document 6: unknown field extra",
            "document 6: unknown field items[0].spec.bar",
            "document 6: items[1]: expected an object",
        ]
    );
}

#[test]
fn hostile_texts_are_refused() {
    let bomb = {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let previous = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
        }
        text
    };
    let deep = format!("a: {}{}", "[".repeat(10_000), "]".repeat(10_000));
    let deep_json = format!("{{\"a\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let block: String = (0..10_000)
        .map(|level| format!("{}a:\n", " ".repeat(level % 2000)))
        .collect();
    let documents = "---\na: 1\n".repeat(20_001);
    let many = format!("{{\"a\": [{}0]}}", "[],".repeat(5_000_000));
    let big = format!("a: {}", "x".repeat(33 << 20));
    for (name, text) in [
        ("bomb", bomb.as_str()),
        ("deep", &deep),
        ("deep json", &deep_json),
        ("block", &block),
        ("many", &many),
        ("documents", &documents),
        ("big", &big),
        ("bom", "\u{feff}apiVersion: v1\nkind: Pod\n"),
        ("nul", "apiVersion: v1\0"),
        ("malformed", "a: [b\nc: }"),
        ("tab", "a:\n\t- b"),
        ("duplicate", "apiVersion: v1\nkind: Pod\nkind: Pod\n"),
        (
            "duplicate in json",
            r#"{"apiVersion": "v1", "kind": "Pod", "kind": "Pod"}"#,
        ),
        (
            "duplicate label",
            "apiVersion: v1\nkind: Pod\nmetadata: {labels: {a: b, a: c}}\n",
        ),
        ("unknown alias", "a: *b"),
        ("tag", "a: !ruby/object:Gem {}"),
    ] {
        let errors = parse(text, &Limits::default()).expect_err(name);
        assert!(!errors.is_empty() && errors.len() < 502, "{name}");
        assert!(
            errors.iter().all(|error| error.to_string().len() < 2_000),
            "{name}: {}",
            errors[0]
        );
    }
    let utf16: Vec<u8> = "apiVersion: v1".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(
        parse_bytes(&utf16, &Limits::default()).expect_err("utf-16")[0]
            .message
            .contains("UTF-16")
    );
    assert!(
        parse_bytes(&[0xff, 0xfe, 0x61, 0], &Limits::default()).expect_err("utf-16")[0]
            .message
            .contains("UTF-16")
    );
    assert!(
        parse_bytes(&[0x61, 0xff], &Limits::default()).expect_err("bytes")[0]
            .message
            .contains("not UTF-8")
    );
}

#[test]
fn numbers_that_would_lose_digits_are_refused() {
    let grace = |number: &str| pod(&format!("{{containers: [], terminationGracePeriodSeconds: {number}}}"));
    for number in [
        "1e1000",
        ".nan",
        "NaN",
        ".inf",
        "9223372036854775808",
        "99999999999999999999",
        "1.5",
        "\"1\"",
        "1e3",
    ] {
        assert!(parse(&grace(number), &Limits::default()).is_err(), "{number}");
    }
    for number in ["-1", "9223372036854775807", "0"] {
        assert!(parse(&grace(number), &Limits::default()).is_ok(), "{number}");
    }
    let memory = |number: &str| {
        pod(&format!(
            "{{containers: [{{name: a, resources: {{limits: {{memory: {number}}}}}}}]}}"
        ))
    };
    for number in ["1073741824", "1.5", "128Mi"] {
        let objects = parse(&memory(number), &Limits::default()).expect(number);
        let json = objects[0].object.to_value().expect("json");
        assert_eq!(json["spec"]["containers"][0]["resources"]["limits"]["memory"], number);
    }
    for number in ["1e30", "99999999999999999999"] {
        assert!(parse(&memory(number), &Limits::default()).is_err(), "{number}");
    }
}

#[test]
fn ten_thousand_objects_pass() {
    let text: String = (0..10_000)
        .map(|index| format!("---\n{}", pod(&format!("{{nodeName: n{index}}}"))))
        .collect();
    assert_eq!(parse(&text, &Limits::default()).expect("manifest").len(), 10_000);
    let wrong: String = (0..1_000).map(|_| format!("---\n{}", pod("{a: 1, b: 2}"))).collect();
    let errors = parse(&wrong, &Limits::default()).expect_err("wrong");
    assert_eq!(
        (errors.len(), errors[500].to_string()),
        (501, "and 1500 more errors".to_owned())
    );
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}|[-a:{}\\[\\],&*!|>'\"%@`#?<\\n ]{0,200}") {
        let _ = parse(&text, &Limits::default());
    }

    #[test]
    fn no_mutation_panics(position in 0..GOOD.len(), replacement in "\\PC{0,3}|[-:{}\\[\\],&*!\\n ]{0,4}") {
        prop_assume!(GOOD.is_char_boundary(position));
        let text = format!("{}{}{}", &GOOD[..position], replacement, &GOOD[position..]);
        let _ = parse(&text, &Limits::default());
    }
}
