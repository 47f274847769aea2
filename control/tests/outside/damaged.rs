//! A store with values that nobody wrote: control puts them aside, counts them, and goes on with the rest.

use std::{path::Path, time::Duration};

use orlop_control::api::ErrorInfo;
use orlop_proto::{
    api::v1::{
        CreateRequest, GetRequest, ListRequest, Object, WatchRequest, object::Body, objects_client::ObjectsClient,
    },
    core::v1::{Service, ServicePort, ServiceSpec},
    meta::v1::ObjectMeta,
};
use rcgen::KeyPair;
use redb::{Database, ReadableTable as _, TableDefinition};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use tonic::Code;

use crate::{
    etcd::Etcd,
    harness::Control,
    join::{join, token},
    requests::{Client, create, detail, fields, lease, name, pod, version},
};

const RECORDS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("records_v1");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log_v1");

/// What is done to a value.
type Harm = fn(&[u8]) -> Vec<u8>;
const GARBAGE: Harm = |_| b"garbage".to_vec();
const CUT: Harm = |value| value[..value.len() - 1].to_vec();
const EMPTY: Harm = |_| Vec::new();
/// Framed as it was, but what is inside is none of ours.
const INSIDE: Harm = |value| {
    let mut value = value.to_vec();
    value[9..].fill(0xff);
    value
};

/// Spoils records, and the change of one revision.
fn spoil(store: &Path, records: &[(&str, Harm)], change: u64) -> Result<(), redb::Error> {
    let transaction = Database::open(store)?.begin_write()?;
    {
        let mut table = transaction.open_table(RECORDS)?;
        for (key, harm) in records {
            let key = format!("/orlop/v1/{key}");
            let found = table
                .get(key.as_str())?
                .map(|guard| (guard.value().0, harm(guard.value().1)));
            let (revision, value) = found.unwrap_or_else(|| panic!("no {key}"));
            table.insert(key.as_str(), (revision, value.as_slice()))?;
        }
        let mut log = transaction.open_table(LOG)?;
        assert!(
            log.insert(change, [0xff; 3].as_slice())?.is_some(),
            "no change {change}"
        );
    }
    Ok(transaction.commit()?)
}

fn service(name: &str, address: &str) -> Object {
    let port = ServicePort {
        port: 80,
        ..ServicePort::default()
    };
    let metadata = ObjectMeta {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        ..ObjectMeta::default()
    };
    let spec = ServiceSpec {
        ports: vec![port],
        cluster_ip: address.to_owned(),
        ..ServiceSpec::default()
    };
    Object {
        body: Some(Body::Service(Service {
            metadata: Some(metadata),
            spec: Some(spec),
            ..Service::default()
        })),
    }
}

async fn names(client: &mut Client, resource: &str) -> Vec<String> {
    let request = ListRequest {
        resource: resource.to_owned(),
        namespace: "default".to_owned(),
        ..ListRequest::default()
    };
    let list = client.list(request).await.expect("lists").into_inner();
    list.items.iter().map(name).collect()
}

/// How many damaged values control says that it has found.
async fn counted(control: &Control) -> u64 {
    let mut stream = UnixStream::connect(&control.socket).await.expect("connects");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: control\r\nConnection: close\r\n\r\n")
        .await
        .expect("asks");
    let mut page = String::new();
    stream.read_to_string(&mut page).await.expect("answers");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix("orlop_store_damaged_values_total "));
    line.and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no figure: {page}"))
}

#[tokio::test]
async fn values_that_nobody_wrote_are_put_aside_and_counted() {
    let control = Control::program("").await;
    let mut client = ObjectsClient::new(control.unix().await);
    assert_eq!(counted(&control).await, 0);
    for pod_name in ["cut", "empty", "garbage", "good", "inside"] {
        create(&mut client, pod(pod_name, "x")).await;
    }
    create(&mut client, service("claims", "10.96.0.20")).await;
    let first = version(&create(&mut client, lease("first", "x")).await);
    let spoilt = version(&create(&mut client, lease("spoilt", "x")).await);
    let last = version(&create(&mut client, lease("last", "x")).await);
    let (good, bad) = (token(&control, 0, 600).await, token(&control, 0, 600).await);
    let (odd, key) = (token(&control, 0, 600).await, KeyPair::generate().expect("key"));
    join(&control, &good, "bound", &key).await.expect("joins");
    drop(client);
    let directory = control.stop().await;

    let record = |token: &str| format!("tokens/{}", token.split('.').nth(1).expect("an id"));
    let damage: [(&str, Harm); 11] = [
        ("pods/default/cut", CUT),
        ("pods/default/empty", EMPTY),
        ("pods/default/garbage", GARBAGE),
        ("pods/default/inside", INSIDE),
        (&record(&bad), GARBAGE),
        (&record(&odd), INSIDE),
        ("nodekeys/bound", INSIDE),
        ("clusterips/10.96.0.20", GARBAGE),
        // What control needs itself.
        ("namespaces/kube-system", CUT),
        ("services/default/kubernetes", GARBAGE),
        ("clusterips/10.96.0.1", INSIDE),
    ];
    spoil(&directory.path().join("data/store.redb"), &damage, spoilt).expect("spoils");

    let control = Control::program_in(directory, "").await;
    let mut client = ObjectsClient::new(control.unix().await);
    assert_eq!(names(&mut client, "pods").await, ["good"]);
    assert_eq!(
        names(&mut client, "services").await,
        ["claims", "kubernetes"],
        "what every cluster has is written anew"
    );
    // Each at least once; those inside of a frame are found when they are asked for.
    let found = counted(&control).await;
    assert!(found >= 8, "{found}");
    for damaged in ["cut", "empty", "garbage", "inside"] {
        let request = GetRequest {
            resource: "pods".to_owned(),
            namespace: "default".to_owned(),
            name: damaged.to_owned(),
        };
        let status = client.get(request).await.expect_err(damaged);
        assert_eq!(status.code(), Code::DataLoss, "{damaged}: {status:?}");
        assert!(
            status.message().contains(&format!("pods/default/{damaged}")),
            "{status:?}"
        );
    }
    assert!(counted(&control).await >= found + 4);

    // A claim is one, whatever is written in it.
    let request = CreateRequest {
        object: Some(service("thief", "10.96.0.20")),
    };
    let status = client.create(request).await.expect_err("taken");
    assert_eq!(fields(&status), ["spec.clusterIP"], "{status:?}");
    create(&mut client, service("other", "")).await;
    for (token, expected) in [(&bad, Code::Unauthenticated), (&odd, Code::Unauthenticated)] {
        let status = join(&control, token, "n1", &key).await.expect_err("a damaged token");
        assert_eq!(status.code(), expected, "{status:?}");
    }
    // A name whose key cannot be read is nobody else's.
    let status = join(&control, &good, "bound", &key).await.expect_err("a damaged key");
    assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
    join(&control, &good, "n1", &key).await.expect("the rest goes on");

    // Watches: from behind the damaged change, and what comes from now on.
    let watch = |after: u64| WatchRequest {
        resource: "leases".to_owned(),
        namespace: "default".to_owned(),
        resource_version: after.to_string(),
        ..WatchRequest::default()
    };
    let gone = match client.watch(watch(first)).await {
        Err(status) => status,
        Ok(answer) => answer.into_inner().message().await.expect_err("it is forgotten"),
    };
    assert_eq!(gone.code(), Code::OutOfRange, "{gone}");
    let info: ErrorInfo = detail(&gone);
    assert_eq!(info.reason, "COMPACTED");
    let resume: u64 = info.metadata["resume_after"].parse().expect("a number");
    assert!((spoilt..=last).contains(&resume), "{spoilt} <= {resume} <= {last}");
    let mut events = client.watch(watch(resume)).await.expect("resumes").into_inner();
    create(&mut client, lease("new", "x")).await;
    let mut told = Vec::new();
    while told.last().is_none_or(|name| name != "new") {
        let event = tokio::time::timeout(Duration::from_secs(20), events.message());
        let event = event.await.expect("in time").expect("no error").expect("goes on");
        told.extend(event.object.as_ref().map(name));
    }
    let expected: &[&str] = if resume < last { &["last", "new"] } else { &["new"] };
    assert_eq!(told, expected);
    control.stop().await;
}

#[tokio::test]
async fn somebody_leads_though_the_claim_to_it_is_damaged() {
    let etcd = Etcd::start().await;
    let control = etcd.control(None).await;
    let holder = leader(&control).await;
    let directory = control.stop().await;
    etcd.damage("leases/kube-system/orlop-control", b"garbage").await;
    etcd.damage("leaders/orlop-control", b"orlp").await;
    let control = etcd.control_in(directory).await;
    assert_eq!(leader(&control).await, holder);
    control.stop().await;
}

/// Who leads, as soon as somebody does.
async fn leader(control: &Control) -> String {
    let mut client = ObjectsClient::new(control.unix().await);
    for _ in 0..3_000 {
        let request = GetRequest {
            resource: "leases".to_owned(),
            namespace: "kube-system".to_owned(),
            name: "orlop-control".to_owned(),
        };
        if let Ok(answer) = client.get(request).await
            && let Some(Body::Lease(lease)) = answer.into_inner().body
            && let Some(holder) = lease
                .spec
                .map(|spec| spec.holder_identity)
                .filter(|holder| !holder.is_empty())
        {
            return holder;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("nobody leads");
}
