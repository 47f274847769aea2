//! Apply.

use orlop_proto::api::v1::{
    ApplyRequest, ApplyResult, ListRequest, apply_request::Input, object::Body, objects_client::ObjectsClient,
};
use tonic::Code;

use crate::{
    harness::Control,
    requests::{apply, fields, name, pod},
};

const MANIFEST: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: 'web:1'}]
";

fn actions(results: &[ApplyResult]) -> Vec<&str> {
    results.iter().map(|result| result.action.as_str()).collect()
}

#[tokio::test]
async fn applying_twice_writes_nothing() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let first = apply(&mut client, MANIFEST).await.expect("applies");
    assert_eq!(actions(&first), ["created"; 3], "{first:?}");
    assert_eq!(first.iter().map(|result| result.index).collect::<Vec<_>>(), [0, 1, 2]);
    let again = apply(&mut client, MANIFEST).await.expect("applies");
    assert_eq!(actions(&again), ["unchanged"; 3], "{again:?}");

    let scaled = MANIFEST
        .replace("replicas: 2", "replicas: 3")
        .replace("port: 80", "port: 81");
    let third = apply(&mut client, &scaled).await.expect("applies");
    assert_eq!(actions(&third), ["unchanged", "configured", "configured"], "{third:?}");
    let Some(Body::Service(service)) = third[1].object.clone().and_then(|object| object.body) else {
        panic!("a service")
    };
    let Some(Body::Service(before)) = first[1].object.clone().and_then(|object| object.body) else {
        panic!("a service")
    };
    let (service, before) = (service.spec.expect("spec"), before.spec.expect("spec"));
    assert!(!before.cluster_ip.is_empty());
    assert_eq!(service.cluster_ip, before.cluster_ip, "what was allocated survives");
    assert_eq!(service.ports.iter().map(|port| port.port).collect::<Vec<_>>(), [81]);
    control.stop().await;
}

#[tokio::test]
async fn a_manifest_with_faults_writes_nothing_and_names_them_all() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let faulty = MANIFEST
        .replace("port: 80,", "port: 80, colour: red,")
        .replace("replicas: 2", "replicas: many\n  strategy: x");
    let status = apply(&mut client, &faulty).await.expect_err("refused");
    let mut found = fields(&status);
    found.sort_unstable();
    assert_eq!(found, ["spec.ports[0].colour", "spec.replicas", "spec.strategy"]);

    let invalid = MANIFEST
        .replace("port: 80,", "port: 70000,")
        .replacen("name: web,", "name: We_b,", 1);
    let status = apply(&mut client, &invalid).await.expect_err("refused");
    assert_eq!(fields(&status), ["metadata.name", "spec.ports[0].port"]);

    for broken in [
        "a: [",
        "kind: Pod\napiVersion: v1\nkind: Pod",
        "\u{0}",
        "- 1",
        "apiVersion: v2\nkind: Pod",
    ] {
        let status = apply(&mut client, broken).await.expect_err(broken);
        assert_eq!(status.code(), Code::InvalidArgument, "{broken}: {status:?}");
    }
    let twice = format!("{MANIFEST}---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop}}\n");
    assert_eq!(
        fields(&apply(&mut client, &twice).await.expect_err("twice")),
        ["metadata.name"]
    );

    let list = ListRequest {
        resource: "namespaces".to_owned(),
        ..ListRequest::default()
    };
    let namespaces = client.list(list).await.expect("lists").into_inner();
    assert!(
        namespaces.items.iter().all(|object| name(object) != "shop"),
        "nothing was written"
    );
    control.stop().await;
}

#[tokio::test]
async fn each_object_has_its_own_result() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let manifest = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: nowhere}\nspec: {containers: [{name: c, image: i}]}\n---\n\
                    apiVersion: v1\nkind: Pod\nmetadata: {name: b}\nspec: {containers: [{name: c, image: i}]}\n";
    let results = apply(&mut client, manifest).await.expect("applies");
    assert_eq!(actions(&results), ["failed", "created"], "{results:?}");
    assert_eq!(results[0].code, Code::NotFound as i32);
    assert_eq!(
        (results[1].namespace.as_str(), results[1].name.as_str()),
        ("default", "b")
    );
    control.stop().await;
}

#[tokio::test]
async fn a_single_object_is_applied_too() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    for expected in ["created", "unchanged"] {
        let request = ApplyRequest {
            input: Some(Input::Object(pod("a", "x"))),
            namespace: "default".to_owned(),
        };
        let mut stream = client.apply(request).await.expect("applies").into_inner();
        assert_eq!(
            stream.message().await.expect("answers").expect("a result").action,
            expected
        );
        assert!(stream.message().await.expect("ends").is_none());
    }
    let status = client.apply(ApplyRequest::default()).await.expect_err("nothing");
    assert_eq!(fields(&status), ["manifest"]);
    control.stop().await;
}

#[tokio::test]
async fn ten_thousand_objects_pass() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let manifest: String = (0..10_000)
        .map(|index| {
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{index}}}\nspec: {{ports: [{{port: 80}}], clusterIP: None}}\n"
            )
        })
        .collect();
    let results = apply(&mut client, &manifest).await.expect("applies");
    assert_eq!(results.len(), 10_000);
    assert!(
        results
            .iter()
            .enumerate()
            .all(|(index, result)| result.index as usize == index)
    );
    let failed = results.iter().find(|result| result.action != "created");
    assert!(failed.is_none(), "{failed:?}");
    control.stop().await;
}

#[tokio::test]
async fn an_address_outside_of_the_range_stops_the_whole_manifest() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let manifest = MANIFEST.replace("selector: {app: web}\n  ports", "clusterIP: 192.0.2.1\n  ports");
    assert_ne!(manifest, MANIFEST);
    let refused = apply(&mut client, &manifest).await.expect_err("out of the range");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(fields(&refused), ["spec.clusterIP"]);
    let request = ListRequest {
        resource: "namespaces".to_owned(),
        field_selector: "metadata.name=shop".to_owned(),
        ..ListRequest::default()
    };
    let found = client.list(request).await.expect("lists").into_inner();
    assert!(found.items.is_empty(), "nothing was written");
}

#[tokio::test]
async fn what_the_server_wrote_into_a_spread_is_nobodys_change() {
    let manifest = r"
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web, hash: '1'}}
spec:
  containers: [{name: web, image: 'web:1'}]
  topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: DoNotSchedule
    labelSelector: {matchExpressions: [{key: app, operator: In, values: [web]}]}
    matchLabelKeys: [hash]
";
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let first = apply(&mut client, manifest).await.expect("applies");
    assert_eq!(actions(&first), ["created"], "{first:?}");
    let Some(Body::Pod(pod)) = first[0].object.clone().and_then(|object| object.body) else {
        panic!("a pod")
    };
    let constraints = pod.spec.unwrap_or_default().topology_spread_constraints;
    let selector = constraints[0].label_selector.clone().unwrap_or_default();
    let keys: Vec<&str> = selector.match_expressions.iter().map(|one| one.key.as_str()).collect();
    assert_eq!(keys, ["app", "hash"]);
    let again = apply(&mut client, manifest).await.expect("applies");
    assert_eq!(actions(&again), ["unchanged"], "{again:?}");
    let other = apply(&mut client, &manifest.replace("maxSkew: 1", "maxSkew: 2")).await;
    let status = other.expect_err("it cannot be changed");
    assert_eq!(fields(&status), ["spec"], "{status:?}");
    control.stop().await;
}
