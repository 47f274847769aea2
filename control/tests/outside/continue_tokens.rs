//! Pages of a list that this control did not begin, or no longer has.

use orlop_control::api::ErrorInfo;
use orlop_proto::api::v1::{ListRequest, objects_client::ObjectsClient};
use tonic::Code;

use crate::{
    harness::Control,
    requests::{create, detail, lease, name},
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
