//! Manifests that are wrong, broken or meant to harm: each is refused as a whole, with words for it.

use orlop_proto::api::v1::{
    CreateRequest, GetRequest, ListRequest, UpdateRequest, object::Body, objects_client::ObjectsClient,
};
use tonic::{Code, Status};

use crate::{
    harness::Control,
    requests::{Client, apply, fields, name},
};

/// What would be written if the second document did not stop it.
const FIRST: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

async fn refused(client: &mut Client, what: &str, text: &str) -> Status {
    let status = apply(client, text).await.expect_err(what);
    assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
    let message = status.message();
    assert!(
        !message.is_empty() && message.len() < 8 << 10,
        "{what}: {} bytes",
        message.len()
    );
    assert!(
        message.chars().all(|c| c == '\n' || !c.is_control()),
        "{what}: an error that writes to terminals: {message:?}"
    );
    status
}

async fn nothing_is_written(client: &mut Client) {
    let request = ListRequest {
        resource: "namespaces".to_owned(),
        ..ListRequest::default()
    };
    let namespaces = client.list(request).await.expect("lists").into_inner();
    let names: Vec<String> = namespaces.items.iter().map(name).collect();
    assert!(!names.iter().any(|name| name == "shop"), "{names:?}");
}

fn named(name: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: i}}]}}\n")
}

fn pod(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nspec: {spec}\n")
}

#[tokio::test]
async fn names_that_are_none() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let long = "a".repeat(254);
    for bad in [
        "..",
        "../../etc/passwd",
        "a/b",
        "/",
        "\"a\\0b\"",
        "\"a\\u0000b\"",
        "\"\\e[31mred\\e[0m\"",
        "\"a\\u009b2J\"",
        "\"a\\nb\"",
        "\"a\\u202eb\"",
        "\"a\\ufeffb\"",
        "a%2fb",
        "A",
        "\u{e4}",
        &long,
    ] {
        let text = format!("{FIRST}---\n{}", named(bad));
        let status = refused(&mut client, bad, &text).await;
        assert_eq!(fields(&status), ["metadata.name"], "{bad}: {status:?}");
        let text = format!(
            "{FIRST}---\n{}",
            named("a").replace("name: a", &format!("name: a, namespace: {bad}"))
        );
        let status = refused(&mut client, bad, &text).await;
        assert_eq!(fields(&status), ["metadata.namespace"], "{bad}: {status:?}");
        for (field, place) in [
            ("metadata.labels", format!("labels: {{{bad}: x}}")),
            ("metadata.annotations", format!("annotations: {{{bad}: x}}")),
            ("metadata.finalizers[0]", format!("finalizers: [{bad}]")),
        ] {
            // These may hold capitals and a domain.
            if matches!(bad, "A" | "a/b") {
                continue;
            }
            let text = format!(
                "{FIRST}---\n{}",
                named("a").replace("name: a", &format!("name: a, {place}"))
            );
            let status = refused(&mut client, bad, &text).await;
            let found = fields(&status);
            assert!(
                found.iter().all(|found| found == field),
                "{bad}: {found:?}, not {field}"
            );
        }
    }
    nothing_is_written(&mut client).await;
    control.stop().await;
}

/// Numbers that JSON has no room for, or that cannot be kept to the last digit: they are refused as the text is read, by their line, before
/// anybody knows the field.
const BEYOND_JSON: [&str; 6] = [
    "1e1000",
    "1e30",
    "99999999999999999999",
    "-9223372036854775809",
    ".nan",
    ".inf",
];

fn is_refused_at(status: &Status, number: &str, field: &str) {
    let found = fields(status);
    if BEYOND_JSON.contains(&number) {
        assert_eq!(found, ["manifest"], "{number}: {status:?}");
        assert!(status.message().contains("line "), "{number}: {status:?}");
    } else {
        // What is given for a port is the default of `targetPort`.
        let (first, rest) = found.split_first().expect("a field");
        assert_eq!(first, field, "{number}: {status:?}");
        assert!(
            rest.iter().all(|other| other.ends_with(".targetPort")),
            "{number}: {status:?}"
        );
    }
}

#[tokio::test]
async fn numbers_that_are_none() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    for number in [
        "1e1000",
        "-1",
        "0",
        "65536",
        "NaN",
        ".nan",
        ".inf",
        "9223372036854775808",
        "4294967376",
        "80.5",
        "\"80\"",
        "0x50000",
        "true",
        "[80]",
    ] {
        for (field, text) in [
            (
                "spec.containers[0].ports[0].containerPort",
                pod(&format!(
                    "{{containers: [{{name: c, image: i, ports: [{{containerPort: {number}}}]}}]}}"
                )),
            ),
            (
                "spec.ports[0].port",
                format!(
                    "apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{ports: [{{port: {number}}}]}}\n"
                ),
            ),
        ] {
            let status = refused(&mut client, number, &format!("{FIRST}---\n{text}")).await;
            is_refused_at(&status, number, field);
        }
    }
    for number in [
        "-1",
        "9223372036854775808",
        "1e1000",
        "-9223372036854775809",
        "2147483648",
    ] {
        let text = format!(
            "{FIRST}---\napiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {{name: r}}\nspec: {{replicas: {number}, selector: {{matchLabels: {{a: b}}}}, \
             template: {{metadata: {{labels: {{a: b}}}}, spec: {{containers: [{{name: c, image: i}}]}}}}}}\n"
        );
        is_refused_at(&refused(&mut client, number, &text).await, number, "spec.replicas");
    }
    for quantity in [
        "-1",
        "1e1000",
        "NaN",
        "1e30",
        "99999999999999999999",
        "1Zi",
        "\"0x10\"",
        "\" 1\"",
        "\"1 Mi\"",
    ] {
        let text = pod(&format!(
            "{{containers: [{{name: c, image: i, resources: {{limits: {{memory: {quantity}}}}}}}]}}"
        ));
        let status = refused(&mut client, quantity, &format!("{FIRST}---\n{text}")).await;
        let found = fields(&status);
        let known = found.iter().all(|field| field.contains(".resources."));
        assert_eq!(known, !BEYOND_JSON.contains(&quantity), "{quantity}: {found:?}");
    }
    nothing_is_written(&mut client).await;
    control.stop().await;
}

#[tokio::test]
async fn endpoints_that_mean_the_sender() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    for address in [
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "fe80::1",
        "::ffff:127.0.0.1",
        "10.0.0.01",
        "localhost",
    ] {
        let text = format!(
            "{FIRST}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: e}}\naddressType: IPv4\nendpoints: [{{addresses: [\"{address}\"]}}]\nports: [{{port: 80}}]\n"
        );
        let status = refused(&mut client, address, &text).await;
        assert_eq!(fields(&status), ["endpoints[0].addresses[0]"], "{address}");
    }
    nothing_is_written(&mut client).await;
    control.stop().await;
}

#[tokio::test]
async fn endpoints_at_nodes() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let node = |name: &str, address: &str| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n"
        )
    };
    let slice = |name: &str, address: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}}}\naddressType: IPv4\n\
             endpoints: [{{addresses: [\"192.0.2.9\"]}}, {{addresses: [\"{address}\"]}}]\nports: [{{port: 80}}]\n"
        )
    };
    for text in [
        // An address of the cluster's own ranges is no node's, whatever the node says.
        node("liar", "10.244.200.7"),
        node("n1", "192.0.2.1"),
        slice("pods", "10.244.200.7"),
        slice("others", "192.0.2.2"),
    ] {
        apply(&mut client, &text).await.expect("applies");
    }
    let status = refused(
        &mut client,
        "a node",
        &format!("{FIRST}---\n{}", slice("e", "192.0.2.1")),
    )
    .await;
    assert_eq!(fields(&status), ["endpoints[1].addresses[0]"]);
    assert!(status.message().contains("nodes/n1"), "{status:?}");
    let text = slice("others", "192.0.2.1");
    assert_eq!(
        fields(&refused(&mut client, "an update", &text).await),
        ["endpoints[1].addresses[0]"]
    );

    // By the other verbs, too.
    let request = GetRequest {
        resource: "endpointslices".to_owned(),
        namespace: "default".to_owned(),
        name: "others".to_owned(),
    };
    let mut object = client.get(request).await.expect("gets").into_inner();
    if let Some(Body::EndpointSlice(slice)) = &mut object.body {
        slice.endpoints[1].addresses[0] = "192.0.2.1".to_owned();
    }
    let update = UpdateRequest {
        object: Some(object.clone()),
    };
    let status = client.update(update).await.expect_err("an update");
    assert_eq!(fields(&status), ["endpoints[1].addresses[0]"]);
    if let Some(meta) = object.meta_mut() {
        meta.name = "new".to_owned();
        meta.resource_version = String::new();
    }
    let create = CreateRequest { object: Some(object) };
    let status = client.create(create).await.expect_err("a creation");
    assert_eq!(fields(&status), ["endpoints[1].addresses[0]"]);

    // What is there when a node comes to that address may stay, and the rest of it may change.
    apply(&mut client, &node("n2", "192.0.2.2")).await.expect("a node");
    let text = slice("others", "192.0.2.2").replace("port: 80", "port: 81");
    let results = apply(&mut client, &text).await.expect("applies");
    assert_eq!(results[0].action, "configured", "{results:?}");
    nothing_is_written(&mut client).await;
    control.stop().await;
}

#[tokio::test]
async fn ranges_that_cannot_be() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let node = |name: &str, range: &str| {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: \"{range}\"}}\n")
    };
    for (name, range) in [("wide", "10.244.64.0/18"), ("six", "fd44:0:0:100::/56")] {
        let results = apply(&mut client, &node(name, range)).await.expect("applies");
        assert_eq!(results[0].action, "created", "{results:?}");
    }
    for (range, word) in [
        ("10.96.0.0/12", "service_cidr"),
        ("10.97.3.0/24", "service_cidr"),
        ("0.0.0.0/0", "service_cidr"),
        ("10.0.0.0/8", "service_cidr"),
        ("10.245.0.0/24", "pod_cidr"),
        ("192.168.0.0/24", "pod_cidr"),
        ("127.0.0.0/8", "pod_cidr"),
        ("10.244.64.0/18", "nodes/wide"),
        ("10.244.65.0/24", "nodes/wide"),
        ("10.244.0.0/16", "nodes/wide"),
        ("fd44:0:0:100::/56", "nodes/six"),
        ("FD44::100:0:0:0:0/56", "nodes/six"),
        ("fd44:0:0:1ff::/64", "nodes/six"),
        ("fd44::/16", "nodes/six"),
        ("::/0", "fc00::/7"),
        ("fe80::/64", "fc00::/7"),
        ("ff00::/8", "fc00::/7"),
        ("::ffff:10.244.0.0/112", "fc00::/7"),
    ] {
        let status = refused(&mut client, range, &format!("{FIRST}---\n{}", node("new", range))).await;
        assert_eq!(fields(&status), ["spec.podCIDRs"], "{range}");
        assert!(status.message().contains(word), "{range}: {status:?}");
    }
    nothing_is_written(&mut client).await;
    control.stop().await;
}

/// What each is, and its text.
pub fn texts() -> Vec<(&'static str, String)> {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let previous = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
    }
    let levels = 10_000;
    let nested: String = (0..levels).map(|level| format!("{}a:\n", " ".repeat(level))).collect();
    let wide = utf16_as_text();
    vec![
        ("alias bomb", bomb),
        ("an alias of itself", "a: &a [*a]\n".to_owned()),
        (
            "merged maps",
            format!(
                "a: &a {{b: 1}}\n{}",
                (0..2_000)
                    .map(|index| format!("c{index}: {{<<: *a}}\n"))
                    .collect::<String>()
            ),
        ),
        (
            "levels in flow",
            format!("a: {}{}", "[".repeat(levels), "]".repeat(levels)),
        ),
        (
            "levels of maps",
            format!("{}1{}", "{a: ".repeat(levels), "}".repeat(levels)),
        ),
        (
            "levels in JSON",
            format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels)),
        ),
        ("levels in blocks", nested),
        ("levels of lists", format!("{}a", "- ".repeat(levels))),
        (
            "duplicate key",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\nmetadata: {name: b}\n".to_owned(),
        ),
        (
            "duplicate key in JSON",
            r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a","name":"b"}}"#.to_owned(),
        ),
        (
            "an escaped duplicate",
            r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"a","\u006eame":"b"}}"#.to_owned(),
        ),
        ("a byte order mark", format!("\u{feff}{FIRST}")),
        ("UTF-16", wide),
        ("NUL", format!("{FIRST}\0")),
        ("a tab", "apiVersion: v1\n\tkind: Pod\n".to_owned()),
        ("an open list", "apiVersion: v1\nkind: Pod\nmetadata: [\n".to_owned()),
        ("an open string", "apiVersion: \"v1\nkind: Pod\n".to_owned()),
        (
            "a tag",
            "apiVersion: v1\nkind: !!python/object/apply:os.system [ls]\n".to_owned(),
        ),
        (
            "half of a surrogate",
            r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"\ud800"}}"#.to_owned(),
        ),
        ("a number as a document", "1e1000\n".to_owned()),
        (
            "values without number",
            format!("{{\"a\":[{}0]}}", "0,".repeat(5_000_000)),
        ),
        ("objects without number", format!("[{}0]", "{\"\":0},".repeat(700_000))),
        ("documents without number", "---\na: 1\n".repeat(20_001)),
        ("a control sequence as a field", format!("{FIRST}\"\\e[2J\": 1\n")),
    ]
}

#[tokio::test]
async fn texts_that_are_no_manifests() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    for (what, text) in texts() {
        refused(&mut client, what, &text).await;
        // Behind a good document they stop that one, too.
        if !what.contains("JSON") && !matches!(what, "half of a surrogate") {
            refused(&mut client, what, &format!("{FIRST}---\n{text}")).await;
        }
    }
    let large = format!("{FIRST}---\n# {}\n", "x".repeat(33 << 20));
    let status = refused(&mut client, "too large", &large).await;
    assert!(status.message().contains("bytes"), "{status:?}");
    let larger = format!("{FIRST}---\n# {}\n", "x".repeat(65 << 20));
    let status = apply(&mut client, &larger).await.expect_err("larger than a message");
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    nothing_is_written(&mut client).await;
    control.stop().await;
}

/// A manifest in UTF-16, as somebody who took it for UTF-8 would send it.
fn utf16_as_text() -> String {
    FIRST
        .encode_utf16()
        .flat_map(|unit| unit.to_le_bytes().map(char::from))
        .collect()
}
