//! A watch from a revision that the store has given up, over both engines.

use std::{path::Path, time::Duration};

use orlop_control::api::ErrorInfo;
use orlop_proto::api::v1::{WatchRequest, objects_client::ObjectsClient};
use redb::{Database, ReadableTable as _, TableDefinition};
use tonic::Code;

use crate::{
    etcd::Etcd,
    harness::Control,
    requests::{create, detail, lease, name, version},
};

/// What the embedded store notes of itself, and of that which changes it has and which it has given up.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters_v1");

/// As age does it, and size: all changes are given up.
fn forget_changes(store: &Path) -> Result<(), redb::Error> {
    let transaction = Database::open(store)?.begin_write()?;
    {
        let mut counters = transaction.open_table(COUNTERS)?;
        let last = counters.get("revision")?.map_or(0, |guard| guard.value());
        counters.insert("compacted", last)?;
    }
    Ok(transaction.commit()?)
}

/// The watch is refused; the revision that it names is one to go on from, and what comes after it is told.
async fn the_past_is_refused(control: &Control, past: u64, last: u64) {
    let mut client = ObjectsClient::new(control.admin().await);
    let request = |after: u64| WatchRequest {
        resource: "leases".to_owned(),
        // Not that of the leader, which is in another one.
        namespace: "default".to_owned(),
        resource_version: after.to_string(),
        ..WatchRequest::default()
    };
    let gone = client.watch(request(past)).await;
    let gone = match gone {
        Err(status) => status,
        Ok(answer) => answer.into_inner().message().await.expect_err("it is compacted"),
    };
    assert_eq!(gone.code(), Code::OutOfRange, "{gone}");
    let info: ErrorInfo = detail(&gone);
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("COMPACTED", "orlop.dev"));
    let resume: u64 = info.metadata["resume_after"].parse().expect("a number");
    assert!(past < resume && resume >= last, "{past} < {resume} >= {last}");

    let mut events = client.watch(request(resume)).await.expect("resumes").into_inner();
    let new = create(&mut client, lease("new", "x")).await;
    let event = tokio::time::timeout(Duration::from_secs(20), events.message());
    let event = event.await.expect("in time").expect("no error").expect("goes on");
    assert_eq!(event.object.as_ref().map(name).as_deref(), Some("new"));
    assert_eq!(event.resource_version, version(&new).to_string());
}

#[tokio::test]
async fn a_watch_from_before_what_the_embedded_store_keeps() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let first = create(&mut client, lease("a", "x")).await;
    let last = create(&mut client, lease("b", "x")).await;
    drop(client);
    let directory = control.stop().await;
    forget_changes(&directory.path().join("data/store.redb")).expect("forgets");
    let control = Control::start_in(directory, "").await;
    the_past_is_refused(&control, version(&first), version(&last)).await;
    control.stop().await;
}

#[tokio::test]
async fn a_watch_from_before_what_etcd_keeps() {
    let etcd = Etcd::start().await;
    let control = etcd.control(None).await;
    let mut client = ObjectsClient::new(control.admin().await);
    let first = create(&mut client, lease("a", "x")).await;
    let last = create(&mut client, lease("b", "x")).await;
    drop(client);
    let directory = control.stop().await;
    etcd.compact().await;
    let control = etcd.control_in(directory).await;
    the_past_is_refused(&control, version(&first), version(&last)).await;
    control.stop().await;
}
