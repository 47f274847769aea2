//! Watch.

use orlop_control::api::ErrorInfo;
use orlop_proto::api::v1::{UpdateRequest, WatchEvent, WatchRequest, object::Body, objects_client::ObjectsClient};
use tonic::{Code, Status, Streaming};

use crate::{
    harness::Control,
    requests::{Client, apply, create, detail, fields, lease, name, remove, version},
};

async fn watch(client: &mut Client, request: WatchRequest) -> Result<Streaming<WatchEvent>, Status> {
    client.watch(request).await.map(tonic::Response::into_inner)
}

async fn next(stream: &mut Streaming<WatchEvent>) -> (String, String, u64) {
    let event = tokio::time::timeout(std::time::Duration::from_secs(20), stream.message());
    let event = event.await.expect("in time").expect("no error").expect("goes on");
    let object = event.object.as_ref().map(name).unwrap_or_default();
    let version = match event.resource_version.as_str() {
        // What was there at the beginning.
        "" => 0,
        version => version.parse().expect("a number"),
    };
    (event.r#type, object, version)
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
async fn a_watch_that_breaks_in_its_beginning_misses_nothing() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    // Told in the order of names, written in another.
    for object in ["b", "a"] {
        create(&mut client, lease(object, "x")).await;
    }
    let mut request = WatchRequest {
        resource: "leases".to_owned(),
        namespace: "default".to_owned(),
        ..WatchRequest::default()
    };
    let mut events = watch(&mut client, request.clone()).await.expect("watches");
    let first = events.message().await.expect("no error").expect("an event");
    assert_eq!(first.object.as_ref().map(name).as_deref(), Some("a"));
    drop(events);
    request.resource_version = first.resource_version;
    let mut again = watch(&mut client, request).await.expect("resumes");
    create(&mut client, lease("c", "x")).await;
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last| last != "c") {
        seen.push(next(&mut again).await.1);
    }
    assert!(seen.iter().any(|seen| seen == "b"), "{seen:?}");
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
