//! What comes back, and what is not collected.

use std::time::Duration;

use orlop_proto::{
    Resource as _,
    core::v1::{Event, Namespace, Node, Service, ServicePort, ServiceSpec},
    discovery::v1::EndpointSlice,
    meta::v1::OwnerReference,
};

use super::{
    key,
    world::{World, labels},
};
use crate::{cache::ObjectKey, registry::DeleteOptions};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_every_cluster_has_comes_back() {
    let world = World::start().await;
    let (leases, service) = (ObjectKey::new("", "kube-node-lease"), key("kubernetes"));
    let namespace: Namespace = world.registry.get(&leases).await.unwrap();
    let options = DeleteOptions::default;
    world.registry.delete::<Namespace>(&leases, options()).await.unwrap();
    let deleted: Service = world.registry.delete(&service, options()).await.unwrap();
    world
        .until("others of the same names are there", |world| {
            let cache = world.cache();
            let other = cache.reader::<Namespace>().get("", "kube-node-lease");
            let again = cache.reader::<Service>().get("default", "kubernetes");
            other.is_some_and(|other| other.uid() != namespace.uid() && !other.is_deleting())
                && again.is_some_and(|again| again.uid() != deleted.uid() && again.spec == deleted.spec)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_names_a_pod_as_its_owner_stays() {
    let world = World::start().await;
    let owner = |kind: &str, name: &str| OwnerReference {
        api_version: "v1".into(),
        kind: kind.into(),
        name: name.into(),
        uid: "nobody".into(),
        ..OwnerReference::default()
    };
    let mut node = Node::default();
    node.meta_mut().name = "n1".into();
    node.meta_mut().owner_references = vec![owner("Pod", "p")];
    world.registry.create(node.clone()).await.unwrap();
    // Created after it, and its owner can be looked for: when this one is collected, the first has been looked at too.
    node.meta_mut().name = "n2".into();
    node.meta_mut().owner_references = vec![owner("Node", "n3")];
    world.registry.create(node).await.unwrap();
    world
        .until("the node whose owner is gone is collected", |world| {
            world.cache().reader::<Node>().get("", "n2").is_none()
        })
        .await;
    world.registry.get::<Node>(&ObjectKey::new("", "n1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_with_the_longest_name_has_one_slice() {
    let world = World::start().await;
    for name in ["s".repeat(63), "after".to_owned()] {
        let mut service = Service {
            spec: Some(ServiceSpec {
                selector: labels("web"),
                ports: vec![ServicePort {
                    port: 80,
                    ..ServicePort::default()
                }],
                ..ServiceSpec::default()
            }),
            ..Service::default()
        };
        service.meta_mut().name = name;
        service.meta_mut().namespace = "default".into();
        world.registry.create(service).await.unwrap();
    }
    let slices = |world: &World, service: &str| {
        let all = world.cache().reader::<EndpointSlice>().snapshot();
        all.objects.keys().filter(|key| key.name.starts_with(service)).count()
    };
    world.until("both have one", |world| slices(world, "after") == 1).await;
    world.until("both have one", |world| slices(world, "sss") > 0).await;
    // Whoever does not find what he has made makes another at every look.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(slices(&world, "sss"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_ready_takes_pods_without_a_look_at_all() {
    let mut config = World::config();
    // One look at the beginning, before there is a node.
    config.lifecycle.period = Duration::from_secs(3600);
    let world = World::start_with(config).await;
    // Waits until the node is ready and has no taint.
    world.node("n1").await;
    world
        .until("people are told", |world| {
            let events = world.cache().reader::<Event>().snapshot();
            let about = |event: &Event| event.involved_object.as_ref().is_some_and(|object| object.name == "n1");
            events
                .objects
                .values()
                .any(|event| event.reason == "NodeReady" && about(&event))
        })
        .await;
}
