//! Patch.

use orlop_proto::api::v1::{GetRequest, Object, PatchRequest, object::Body, patch_request};
use tonic::{Code, Status};

use crate::{
    harness::Control,
    requests::{Client, create, fields, lease, pod, version},
};
use orlop_proto::api::v1::objects_client::ObjectsClient;

fn merge(resource: &str, name: &str, patch: &str) -> PatchRequest {
    PatchRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        patch: Some(patch_request::Patch::Merge(patch.to_owned())),
        ..PatchRequest::default()
    }
}

fn json(resource: &str, name: &str, patch: &str) -> PatchRequest {
    PatchRequest {
        patch: Some(patch_request::Patch::Json(patch.to_owned())),
        ..merge(resource, name, "")
    }
}

async fn patch(client: &mut Client, request: PatchRequest) -> Result<Object, Status> {
    client.patch(request).await.map(tonic::Response::into_inner)
}

fn label<'a>(object: &'a Object, name: &str) -> Option<&'a str> {
    object.meta().expect("metadata").labels.get(name).map(String::as_str)
}

#[tokio::test]
async fn patches_change_what_they_name_and_nothing_else() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let made = create(&mut client, lease("l", "x")).await;
    let text = r#"{"metadata":{"labels":{"app":null,"tier":"front"}},"spec":{"holderIdentity":"me"}}"#;
    let merged = patch(&mut client, merge("leases", "l", text)).await.expect("patches");
    assert_eq!((label(&merged, "app"), label(&merged, "tier")), (None, Some("front")));
    assert!(version(&merged) > version(&made));
    let again = patch(&mut client, merge("leases", "l", text)).await.expect("patches");
    assert_eq!(again, merged, "what changes nothing is not written");

    let operations = r#"[{"op":"test","path":"/spec/holderIdentity","value":"me"},
        {"op":"replace","path":"/spec/holderIdentity","value":"you"},{"op":"add","path":"/metadata/labels/a~1b","value":"1"}]"#;
    let patched = patch(&mut client, json("leases", "l", operations))
        .await
        .expect("patches");
    assert_eq!(label(&patched, "a/b"), Some("1"));
    let status = patch(&mut client, json("leases", "l", operations))
        .await
        .expect_err("the test fails now");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");

    let conditional =
        |version: u64| format!(r#"{{"metadata":{{"resourceVersion":"{version}","labels":{{"c":"1"}}}}}}"#);
    let stale = merge("leases", "l", &conditional(version(&made)));
    assert_eq!(
        patch(&mut client, stale).await.expect_err("is old").code(),
        Code::Aborted
    );
    let current = merge("leases", "l", &conditional(version(&patched)));
    assert_eq!(
        label(&patch(&mut client, current).await.expect("is current"), "c"),
        Some("1")
    );

    for (request, field) in [
        (merge("leases", "l", r#"{"spec":{"typo":1}}"#), "spec.typo"),
        (
            merge("leases", "l", r#"{"metadata":{"labels":{"a":"-"}}}"#),
            "metadata.labels[a]",
        ),
        (merge("leases", "l", r#"{"metadata":{"name":"m"}}"#), "metadata.name"),
        (
            json("leases", "l", r#"[{"op":"remove","path":"/spec/none"}]"#),
            "json[0]",
        ),
        (
            PatchRequest {
                patch: None,
                ..merge("leases", "l", "")
            },
            "patch",
        ),
        (
            PatchRequest {
                subresource: "status".to_owned(),
                ..merge("leases", "l", "{}")
            },
            "subresource",
        ),
        (merge("leases", "../l", "{}"), "name"),
        (merge("lease", "l", "{}"), "resource"),
    ] {
        assert_eq!(fields(&patch(&mut client, request).await.expect_err(field)), [field]);
    }
    let status = patch(&mut client, merge("leases", "none", "{}"))
        .await
        .expect_err("is not there");
    assert_eq!(status.code(), Code::NotFound);
    control.stop().await;
}

#[tokio::test]
async fn the_status_is_patched_apart() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    create(&mut client, pod("p", "x")).await;
    let both = r#"{"metadata":{"labels":{"app":"y"}},"status":{"message":"hello"}}"#;
    let message = |object: &Object| match &object.body {
        Some(Body::Pod(pod)) => pod
            .status
            .as_ref()
            .map(|status| status.message.clone())
            .unwrap_or_default(),
        _ => panic!("a pod"),
    };
    let rest = patch(&mut client, merge("pods", "p", both)).await.expect("patches");
    assert_eq!((label(&rest, "app"), message(&rest).as_str()), (Some("y"), ""));
    let request = PatchRequest {
        subresource: "status".to_owned(),
        ..merge(
            "pods",
            "p",
            r#"{"metadata":{"labels":{"app":"z"}},"status":{"message":"hello"}}"#,
        )
    };
    let status = patch(&mut client, request).await.expect("patches");
    assert_eq!((label(&status, "app"), message(&status).as_str()), (Some("y"), "hello"));
    control.stop().await;
}

#[tokio::test]
async fn patches_at_the_same_time_all_happen() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    create(&mut client, lease("l", "x")).await;
    let patches = (0..32).map(|index| {
        let mut client = client.clone();
        let text = format!(r#"{{"metadata":{{"labels":{{"n{index}":"1"}}}}}}"#);
        async move { patch(&mut client, merge("leases", "l", &text)).await }
    });
    for result in futures::future::join_all(patches).await {
        result.expect("patches");
    }
    let request = GetRequest {
        resource: "leases".to_owned(),
        name: "l".to_owned(),
        ..GetRequest::default()
    };
    let object = client.get(request).await.expect("gets").into_inner();
    assert_eq!(object.meta().expect("metadata").labels.len(), 33);
    control.stop().await;
}
