//! Create, Get, List, Update, UpdateStatus, Delete.

use orlop_proto::{
    api::v1::{
        CreateRequest, DeleteRequest, GetRequest, ListRequest, Object, Preconditions, UpdateRequest, object::Body,
        objects_client::ObjectsClient,
    },
    coordination::v1::LeaseSpec,
    core::v1::PodStatus,
};
use tonic::Code;

use crate::{
    harness::Control,
    requests::{create, fields, lease, name, pod, remove, version},
};

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
