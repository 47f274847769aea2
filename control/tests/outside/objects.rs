//! The verbs of `orlop.api.v1.Objects`.

use orlop_control::api::{BadRequest, ErrorInfo, RpcStatus};
use orlop_proto::{
    api::v1::{
        ApplyRequest, ApplyResult, CreateRequest, DeleteRequest, GetRequest, ListRequest, Object, Preconditions,
        UpdateRequest, WatchEvent, WatchRequest, apply_request::Input, object::Body, objects_client::ObjectsClient,
    },
    coordination::v1::{Lease, LeaseSpec},
    core::v1::{Container, Pod, PodSpec, PodStatus},
    meta::v1::ObjectMeta,
};
use prost::Message;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::harness::Control;

type Client = ObjectsClient<Channel>;

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

fn pod(name: &str, app: &str) -> Object {
    let labels = [("app".to_owned(), app.to_owned())].into();
    let metadata = Some(ObjectMeta {
        name: name.to_owned(),
        labels,
        ..ObjectMeta::default()
    });
    let container = Container {
        name: "main".to_owned(),
        image: "main:1".to_owned(),
        ..Container::default()
    };
    let spec = Some(PodSpec {
        containers: vec![container],
        ..PodSpec::default()
    });
    Object {
        body: Some(Body::Pod(Pod {
            metadata,
            spec,
            ..Pod::default()
        })),
    }
}

/// Of a kind that no controller touches.
fn lease(name: &str, app: &str) -> Object {
    let labels = [("app".to_owned(), app.to_owned())].into();
    let metadata = Some(ObjectMeta {
        name: name.to_owned(),
        labels,
        ..ObjectMeta::default()
    });
    Object {
        body: Some(Body::Lease(Lease {
            metadata,
            ..Lease::default()
        })),
    }
}

fn name(object: &Object) -> String {
    object.meta().expect("metadata").name.clone()
}

fn version(object: &Object) -> u64 {
    object
        .meta()
        .expect("metadata")
        .resource_version
        .parse()
        .expect("a number")
}

async fn create(client: &mut Client, object: Object) -> Object {
    client
        .create(CreateRequest { object: Some(object) })
        .await
        .expect("creates")
        .into_inner()
}

async fn remove(client: &mut Client, resource: &str, name: &str) {
    let request = DeleteRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        grace_period_seconds: Some(0),
        ..DeleteRequest::default()
    };
    client.delete(request).await.expect("deletes");
}

async fn apply(client: &mut Client, manifest: &str) -> Result<Vec<ApplyResult>, Status> {
    let request = ApplyRequest {
        input: Some(Input::Manifest(manifest.to_owned())),
        namespace: String::new(),
    };
    let mut stream = client.apply(request).await?.into_inner();
    let mut results = Vec::new();
    while let Some(result) = stream.message().await? {
        results.push(result);
    }
    Ok(results)
}

fn actions(results: &[ApplyResult]) -> Vec<&str> {
    results.iter().map(|result| result.action.as_str()).collect()
}

fn detail<T: Message + Default>(status: &Status) -> T {
    let details = RpcStatus::decode(status.details()).expect("google.rpc.Status");
    assert_eq!(details.code, status.code() as i32);
    T::decode(details.details[0].value.as_slice()).expect("the detail")
}

fn fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    detail::<BadRequest>(status)
        .field_violations
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

async fn watch(client: &mut Client, request: WatchRequest) -> Result<Streaming<WatchEvent>, Status> {
    client.watch(request).await.map(tonic::Response::into_inner)
}

async fn next(stream: &mut Streaming<WatchEvent>) -> (String, String, u64) {
    let event = tokio::time::timeout(std::time::Duration::from_secs(20), stream.message());
    let event = event.await.expect("in time").expect("no error").expect("goes on");
    let object = event.object.as_ref().map(name).unwrap_or_default();
    (event.r#type, object, event.resource_version.parse().expect("a number"))
}

#[tokio::test]
async fn create_get_update_delete() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let made = create(&mut client, lease("n1", "x")).await;
    let request = GetRequest {
        resource: "leases".to_owned(),
        name: "n1".to_owned(),
        ..GetRequest::default()
    };
    assert_eq!(client.get(request.clone()).await.expect("gets").into_inner(), made);

    let again = client
        .create(CreateRequest {
            object: Some(lease("n1", "x")),
        })
        .await
        .expect_err("exists");
    assert_eq!(again.code(), Code::AlreadyExists);
    let none = GetRequest {
        name: "other".to_owned(),
        ..request.clone()
    };
    assert_eq!(client.get(none).await.expect_err("is not there").code(), Code::NotFound);

    let mut changed = made.clone();
    let Some(Body::Lease(inner)) = &mut changed.body else {
        panic!("a lease")
    };
    inner.spec = Some(LeaseSpec {
        holder_identity: "somebody".to_owned(),
        ..LeaseSpec::default()
    });
    let updated = client
        .update(UpdateRequest {
            object: Some(changed.clone()),
        })
        .await
        .expect("updates")
        .into_inner();
    assert!(version(&updated) > version(&made));
    let stale = client
        .update(UpdateRequest {
            object: Some(made.clone()),
        })
        .await
        .expect_err("is old");
    assert_eq!(stale.code(), Code::Aborted, "{stale:?}");

    let uid = Preconditions {
        uid: "another".to_owned(),
        ..Preconditions::default()
    };
    let mut delete = DeleteRequest {
        resource: "leases".to_owned(),
        name: "n1".to_owned(),
        preconditions: Some(uid),
        ..Default::default()
    };
    let status = client.delete(delete.clone()).await.expect_err("another uid");
    assert!(
        matches!(status.code(), Code::FailedPrecondition | Code::Aborted),
        "{status:?}"
    );
    delete.preconditions = None;
    client.delete(delete.clone()).await.expect("deletes");
    assert_eq!(client.get(request).await.expect_err("is gone").code(), Code::NotFound);
    assert_eq!(client.delete(delete).await.expect_err("is gone").code(), Code::NotFound);
    control.stop().await;
}

#[tokio::test]
async fn status_and_the_rest_are_written_apart() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let mut object = create(&mut client, pod("a", "x")).await;
    assert_eq!(object.meta().expect("metadata").namespace, "default");
    let Some(Body::Pod(inner)) = &mut object.body else {
        panic!("a pod")
    };
    inner.status = Some(PodStatus {
        phase: "Running".to_owned(),
        ..PodStatus::default()
    });
    let meta = inner.metadata.get_or_insert_default();
    // The scheduler writes to pods too.
    meta.resource_version.clear();
    meta.labels.insert("new".to_owned(), "label".to_owned());
    let stored = client
        .update_status(UpdateRequest {
            object: Some(object.clone()),
        })
        .await
        .expect("updates")
        .into_inner();
    let Some(Body::Pod(inner)) = stored.body else {
        panic!("a pod")
    };
    assert_eq!(inner.status.expect("status").phase, "Running");
    assert!(!inner.metadata.expect("metadata").labels.contains_key("new"));
    control.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_told_by_fields() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let status = client
        .create(CreateRequest { object: None })
        .await
        .expect_err("no object");
    assert_eq!(fields(&status), ["object"]);
    let status = client
        .create(CreateRequest {
            object: Some(Object { body: None }),
        })
        .await
        .expect_err("no body");
    assert_eq!(fields(&status), ["object"]);
    let list = |change: fn(&mut ListRequest)| {
        let mut request = ListRequest {
            resource: "pods".to_owned(),
            ..ListRequest::default()
        };
        change(&mut request);
        request
    };
    for (request, field) in [
        (list(|request| request.resource = "foos".to_owned()), "resource"),
        (
            list(|request| request.label_selector = "a in b".to_owned()),
            "labelSelector",
        ),
        (
            list(|request| request.field_selector = "spec.x=1".to_owned()),
            "fieldSelector",
        ),
        (list(|request| request.limit = -1), "limit"),
        (list(|request| request.r#continue = "garbage".to_owned()), "continue"),
    ] {
        assert_eq!(fields(&client.list(request).await.expect_err(field)), [field]);
    }
    for bad in ["", "../x", "a/b", "..", "a\u{0}b"] {
        let request = GetRequest {
            resource: "pods".to_owned(),
            name: bad.to_owned(),
            ..GetRequest::default()
        };
        assert_eq!(fields(&client.get(request).await.expect_err(bad)), ["name"]);
    }
    let mut broken = pod("Bad_Name", "x");
    let Some(Body::Pod(inner)) = &mut broken.body else {
        panic!("a pod")
    };
    inner.spec.as_mut().expect("spec").containers[0].image.clear();
    let status = client
        .create(CreateRequest { object: Some(broken) })
        .await
        .expect_err("two faults");
    assert_eq!(fields(&status), ["metadata.name", "spec.containers[0].image"]);
    control.stop().await;
}

#[tokio::test]
async fn lists_by_selectors_and_in_pages() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    for index in 0..7 {
        create(
            &mut client,
            pod(&format!("p{index}"), if index % 2 == 0 { "even" } else { "odd" }),
        )
        .await;
    }
    let all = ListRequest {
        resource: "pods".to_owned(),
        ..ListRequest::default()
    };
    let by = |labels: &str, fields: &str| ListRequest {
        label_selector: labels.to_owned(),
        field_selector: fields.to_owned(),
        ..all.clone()
    };
    for (request, expected) in [
        (all.clone(), 7),
        (by("app=even", ""), 4),
        (by("app!=even,app", ""), 3),
        (by("", "metadata.name=p3"), 1),
        (by("", "spec.nodeName="), 7),
        (by("app in (odd)", "metadata.name!=p1"), 2),
        (
            ListRequest {
                namespace: "other".to_owned(),
                ..all.clone()
            },
            0,
        ),
    ] {
        let list = client.list(request.clone()).await.expect("lists").into_inner();
        assert_eq!(list.items.len(), expected, "{request:?}");
    }

    let mut request = ListRequest {
        limit: 3,
        ..all.clone()
    };
    let first = client.list(request.clone()).await.expect("lists").into_inner();
    // What happens now is in no later page: all pages are of one revision.
    create(&mut client, pod("p9", "late")).await;
    remove(&mut client, "pods", "p5").await;
    let mut names: Vec<String> = first.items.iter().map(name).collect();
    request.r#continue.clone_from(&first.r#continue);
    loop {
        let page = client.list(request.clone()).await.expect("lists").into_inner();
        assert_eq!(page.resource_version, first.resource_version);
        names.extend(page.items.iter().map(name));
        if page.r#continue.is_empty() {
            break;
        }
        request.r#continue = page.r#continue;
    }
    assert_eq!(names, ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]);
    let other = ListRequest {
        label_selector: "app=odd".to_owned(),
        ..request
    };
    assert_eq!(
        fields(&client.list(other).await.expect_err("another list's")),
        ["continue"]
    );
    control.stop().await;
}

#[tokio::test]
async fn a_watch_begins_with_what_is_there_and_resumes_where_it_was() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    create(&mut client, lease("a", "x")).await;
    let request = WatchRequest {
        resource: "leases".to_owned(),
        ..WatchRequest::default()
    };
    let mut events = watch(&mut client, request.clone()).await.expect("watches");
    let (kind, object, _) = next(&mut events).await;
    assert_eq!((kind.as_str(), object.as_str()), ("ADDED", "a"));
    let (kind, _, begun) = next(&mut events).await;
    assert_eq!(kind, "BOOKMARK");

    let b = create(&mut client, lease("b", "x")).await;
    remove(&mut client, "leases", "a").await;
    assert_eq!(
        next(&mut events).await,
        ("ADDED".to_owned(), "b".to_owned(), version(&b))
    );
    let (kind, object, at) = next(&mut events).await;
    assert_eq!((kind.as_str(), object.as_str()), ("DELETED", "a"));
    drop(events);

    let resume = |after: u64| WatchRequest {
        resource_version: after.to_string(),
        ..request.clone()
    };
    let mut again = watch(&mut client, resume(begun)).await.expect("resumes");
    assert_eq!(next(&mut again).await.1, "b");
    assert_eq!(next(&mut again).await, ("DELETED".to_owned(), "a".to_owned(), at));
    create(&mut client, lease("c", "x")).await;
    assert_eq!(next(&mut again).await.1, "c");
    let mut later = watch(&mut client, resume(at)).await.expect("resumes");
    assert_eq!(next(&mut later).await.1, "c");

    let future = watch(&mut client, resume(1_000_000)).await.expect_err("the future");
    assert_eq!(future.code(), Code::FailedPrecondition);
    for bad in ["-1", "x", "1.5", "99999999999999999999999"] {
        let request = WatchRequest {
            resource_version: bad.to_owned(),
            ..request.clone()
        };
        assert_eq!(
            fields(&watch(&mut client, request).await.expect_err(bad)),
            ["resourceVersion"]
        );
    }
    control.stop().await;
}

#[tokio::test]
async fn a_watch_sees_objects_come_into_and_leave_its_selection() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let request = WatchRequest {
        resource: "leases".to_owned(),
        label_selector: "app=x".to_owned(),
        ..WatchRequest::default()
    };
    let mut events = watch(&mut client, request).await.expect("watches");
    assert_eq!(next(&mut events).await.0, "BOOKMARK");
    let mut object = create(&mut client, lease("a", "y")).await;
    for (app, expected) in [("x", "ADDED"), ("x", "MODIFIED"), ("y", "DELETED")] {
        let Some(Body::Lease(inner)) = &mut object.body else {
            panic!("a lease")
        };
        let meta = inner.metadata.as_mut().expect("metadata");
        meta.labels.insert("app".to_owned(), app.to_owned());
        meta.labels.insert("step".to_owned(), expected.to_owned());
        object = client
            .update(UpdateRequest { object: Some(object) })
            .await
            .expect("updates")
            .into_inner();
        assert_eq!(
            next(&mut events).await,
            (expected.to_owned(), "a".to_owned(), version(&object))
        );
    }
    remove(&mut client, "leases", "a").await;
    create(&mut client, lease("b", "x")).await;
    assert_eq!(next(&mut events).await.1, "b", "what was outside leaves unseen");
    control.stop().await;
}

#[tokio::test]
async fn a_quiet_watch_gets_bookmarks() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.unix().await);
    let request = WatchRequest {
        resource: "events".to_owned(),
        allow_watch_bookmarks: true,
        ..WatchRequest::default()
    };
    let mut events = watch(&mut client, request).await.expect("watches");
    assert_eq!(next(&mut events).await.0, "BOOKMARK", "what is there");
    let written = version(&create(&mut client, lease("n1", "x")).await);
    let (kind, _, at) = next(&mut events).await;
    assert_eq!(kind, "BOOKMARK");
    assert!(at >= written, "other kinds' writes move it too");
    control.stop().await;
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
async fn a_watcher_that_does_not_read_is_told_where_to_resume() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let request = WatchRequest {
        resource: "events".to_owned(),
        ..WatchRequest::default()
    };
    let mut events = watch(&mut client, request).await.expect("watches");
    assert_eq!(next(&mut events).await.0, "BOOKMARK");
    // Enough to fill HTTP/2's windows and then the cache's window of events behind them.
    let padding = "x".repeat(800);
    for round in 0..24 {
        let manifest: String = (0..500)
            .map(|index| {
                format!(
                    "---\napiVersion: v1\nkind: Event\nmetadata: {{name: e{round}-{index}}}\ninvolvedObject: {{kind: Pod, name: p, namespace: default}}\nreason: Test\ntype: Normal\nmessage: {padding}\n"
                )
            })
            .collect();
        let mut writer = ObjectsClient::new(control.unix().await);
        let results = apply(&mut writer, &manifest).await.expect("applies");
        assert!(
            results.iter().all(|result| result.action == "created"),
            "{:?}",
            results[0]
        );
    }
    let mut seen = 0;
    let status = loop {
        match events.message().await {
            Ok(Some(event)) => {
                seen += 1;
                assert_eq!(event.r#type, "ADDED");
            }
            Ok(None) => panic!("ended without a word after {seen}"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    let info: ErrorInfo = detail(&status);
    assert_eq!(info.reason, "SLOW_WATCHER");
    let after = info.metadata["resume_after"].clone();
    let resume = WatchRequest {
        resource: "events".to_owned(),
        resource_version: after,
        ..WatchRequest::default()
    };
    let mut rest = watch(&mut client, resume).await.expect("resumes");
    while seen < 12_000 {
        assert_eq!(next(&mut rest).await.0, "ADDED");
        seen += 1;
    }
    control.stop().await;
}
