//! Pages of a list that this control did not begin, or no longer has.

use orlop_control::api::ErrorInfo;
use orlop_proto::api::v1::{ListRequest, ObjectList, objects_client::ObjectsClient};
use tonic::{Code, Status};

use crate::{
    etcd::Etcd,
    harness::Control,
    requests::{Client, create, detail, lease, name},
};

#[tokio::test]
async fn pages_that_are_no_longer_kept_can_be_gone_on_with_at_another_revision() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    for name in ["a", "c", "d"] {
        create(&mut client, lease(name, "x")).await;
    }
    let mut request = ListRequest {
        resource: "leases".to_owned(),
        namespace: "default".to_owned(),
        limit: 1,
        ..ListRequest::default()
    };
    let first = client.list(request.clone()).await.expect("lists").into_inner();
    assert_eq!(first.items.iter().map(name).collect::<Vec<_>>(), ["a"]);
    create(&mut client, lease("b", "x")).await;

    // Another process over the same store: it has neither the snapshot nor the events since.
    let control = Control::start_in(control.stop().await, "").await;
    let mut client = ObjectsClient::new(control.admin().await);
    request.r#continue.clone_from(&first.r#continue);
    let gone = client.list(request.clone()).await.expect_err("it is not kept");
    assert_eq!(gone.code(), Code::OutOfRange, "{gone}");
    let info: ErrorInfo = detail(&gone);
    assert_eq!(info.reason, "COMPACTED");
    assert!(gone.message().contains(&first.resource_version), "{gone}");
    let resume: u64 = info.metadata["resume_after"].parse().expect("a number");
    assert!(resume > first.resource_version.parse().expect("a number"));

    // Inconsistent, as it says: "b" was not there when the list began. From here on the pages are of one revision.
    request.r#continue.clone_from(&info.metadata["continue"]);
    let mut rest = Vec::new();
    let mut revisions = Vec::new();
    loop {
        let page = client.list(request.clone()).await.expect("goes on").into_inner();
        rest.extend(page.items.iter().map(name));
        revisions.push(page.resource_version);
        if page.r#continue.is_empty() {
            break;
        }
        create(&mut client, lease(&format!("e{}", rest.len()), "x")).await;
        request.r#continue = page.r#continue;
    }
    assert_eq!(rest, ["b", "c", "d"]);
    assert!(revisions.windows(2).all(|pair| pair[0] == pair[1]), "{revisions:?}");

    // The token is bound to its selection as every other.
    request.r#continue.clone_from(&info.metadata["continue"]);
    request.label_selector = "app=x".to_owned();
    let other = client.list(request).await.expect_err("another list");
    assert_eq!(other.code(), Code::InvalidArgument, "{other}");
}

#[tokio::test]
async fn pages_go_on_at_another_replica() {
    let etcd = Etcd::start().await;
    let first = etcd.control(None).await;
    let second = etcd.control(Some(&first)).await;
    let mut at_first = ObjectsClient::new(first.admin().await);
    let mut at_second = ObjectsClient::new(second.admin().await);
    for name in ["a", "c", "d"] {
        create(&mut at_first, lease(name, "x")).await;
    }
    let begun = page(&mut at_first, "").await.expect("lists");
    assert_eq!(names(&begun), ["a"]);
    // It was not there when the list began; that etcd forgets those days is of no matter, replicas have them.
    create(&mut at_second, lease("b", "x")).await;
    etcd.compact().await;
    let next = page(&mut at_second, &begun.r#continue).await.expect("goes on");
    assert_eq!(
        (names(&next), &next.resource_version),
        (vec!["c".to_owned()], &begun.resource_version)
    );
    let last = page(&mut at_first, &next.r#continue).await.expect("goes on");
    assert_eq!(
        (names(&last), &last.resource_version, last.r#continue.as_str()),
        (vec!["d".to_owned()], &begun.resource_version, "")
    );

    // A replica that has begun since has nothing of those days, and etcd neither: it says how to go on, which any replica does.
    let second = etcd.control_in(second.stop().await).await;
    let mut at_second = ObjectsClient::new(second.admin().await);
    let gone = page(&mut at_second, &begun.r#continue).await.expect_err("not kept");
    assert_eq!(gone.code(), Code::OutOfRange, "{gone}");
    let info: ErrorInfo = detail(&gone);
    assert_eq!(info.reason, "COMPACTED");
    let present = page(&mut at_first, &info.metadata["continue"]).await.expect("goes on");
    assert_eq!(names(&present), ["b"]);
    let rest = page(&mut at_second, &present.r#continue).await.expect("goes on");
    assert_eq!(
        (names(&rest), &rest.resource_version),
        (vec!["c".to_owned()], &present.resource_version)
    );
    // Where the list began it is kept on.
    let kept = page(&mut at_first, &begun.r#continue).await.expect("kept");
    assert_eq!(
        (names(&kept), kept.resource_version),
        (vec!["c".to_owned()], begun.resource_version)
    );
}

/// One object of the list of leases.
async fn page(client: &mut Client, token: &str) -> Result<ObjectList, Status> {
    let request = ListRequest {
        resource: "leases".to_owned(),
        namespace: "default".to_owned(),
        limit: 1,
        r#continue: token.to_owned(),
        ..ListRequest::default()
    };
    client.list(request).await.map(tonic::Response::into_inner)
}

fn names(list: &ObjectList) -> Vec<String> {
    list.items.iter().map(name).collect()
}
