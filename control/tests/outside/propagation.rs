//! The propagation policies of Delete: what becomes of what the deleted object owns.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use orlop_proto::{
    api::v1::{DeleteRequest, GetRequest, ListRequest, Object, objects_client::ObjectsClient},
    meta::v1::ObjectMeta,
};
use tonic::Code;

use crate::{
    harness::Control,
    requests::{Client, apply, create, fields, lease},
};

/// How often is looked, a hundredth of a second apart.
const LOOKS: usize = 3000;
const PODS: usize = 2;

fn request(resource: &str, name: &str, policy: &str) -> DeleteRequest {
    DeleteRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        propagation_policy: policy.to_owned(),
        ..DeleteRequest::default()
    }
}

async fn is_there(client: &mut Client, resource: &str, name: &str) -> bool {
    let request = GetRequest {
        resource: resource.to_owned(),
        name: name.to_owned(),
        ..GetRequest::default()
    };
    match client.get(request).await {
        Err(status) if status.code() == Code::NotFound => false,
        other => other.map(|_| true).expect("gets"),
    }
}

async fn wait_until_gone(client: &mut Client, resource: &str, name: &str) {
    for _ in 0..LOOKS {
        if !is_there(client, resource, name).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{resource}/{name} is still there");
}

/// All pods by uid.
async fn pods(client: &mut Client) -> BTreeMap<String, ObjectMeta> {
    let request = ListRequest {
        resource: "pods".to_owned(),
        ..ListRequest::default()
    };
    let list = client.list(request).await.expect("lists").into_inner();
    let meta = |pod: Object| pod.meta().expect("metadata").clone();
    let items = list.items.into_iter().map(meta);
    items.map(|meta| (meta.uid.clone(), meta)).collect()
}

/// A ReplicaSet whose pods are there; they wait for a node.
async fn owner(client: &mut Client) -> BTreeMap<String, ObjectMeta> {
    let manifest = format!(
        "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {{name: web, namespace: default}}\nspec:\n  replicas: {PODS}\n\
         \x20 selector: {{matchLabels: {{app: web}}}}\n  template:\n    metadata: {{labels: {{app: web}}}}\n\
         \x20   spec: {{containers: [{{name: main, image: \"main:1\"}}]}}\n"
    );
    apply(client, &manifest).await.expect("applies");
    for _ in 0..LOOKS {
        let made = pods(client).await;
        if made.len() == PODS {
            assert!(made.values().all(|pod| pod.owner_references.len() == 1), "{made:?}");
            return made;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the pods were not made");
}

#[tokio::test]
async fn a_policy_is_one_of_three() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    create(&mut client, lease("l", "x")).await;
    for wrong in ["foreground", "orphan", "ORPHAN", "Background "] {
        let status = client.delete(request("leases", "l", wrong)).await.expect_err(wrong);
        assert_eq!(fields(&status), ["propagationPolicy"]);
    }
    assert!(is_there(&mut client, "leases", "l").await);
    client
        .delete(request("leases", "l", "Background"))
        .await
        .expect("deletes");
    wait_until_gone(&mut client, "leases", "l").await;
    control.stop().await;
}

#[tokio::test]
async fn with_foreground_the_owner_goes_last() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    owner(&mut client).await;
    let answer = client.delete(request("replicasets", "web", "Foreground")).await;
    let going = answer.expect("deletes").into_inner();
    let meta = going.meta().expect("metadata");
    assert!(meta.deletion_timestamp.is_some() && meta.finalizers == ["foregroundDeletion"]);
    wait_until_gone(&mut client, "replicasets", "web").await;
    assert_eq!(pods(&mut client).await, BTreeMap::new(), "its pods went before it");
    control.stop().await;
}

#[tokio::test]
async fn with_orphan_what_it_owned_stays() {
    let control = Control::start().await;
    let mut client = ObjectsClient::new(control.admin().await);
    let before = owner(&mut client).await;
    let answer = client.delete(request("replicasets", "web", "Orphan")).await;
    let going = answer.expect("deletes").into_inner();
    let meta = going.meta().expect("metadata");
    assert!(meta.deletion_timestamp.is_some() && meta.finalizers == ["orphan"]);
    wait_until_gone(&mut client, "replicasets", "web").await;
    let after = pods(&mut client).await;
    assert_eq!(
        after.keys().collect::<BTreeSet<_>>(),
        before.keys().collect::<BTreeSet<_>>()
    );
    let is_free = |pod: &ObjectMeta| pod.owner_references.is_empty() && pod.deletion_timestamp.is_none();
    assert!(after.values().all(is_free), "{after:?}");
    control.stop().await;
}
