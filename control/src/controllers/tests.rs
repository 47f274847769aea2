//! The controllers and the scheduler over a real store. The nodes are played: they keep their leases, run their pods at once and confirm
//! what is deleted.

mod propagation;
mod spread;
mod upkeep;
mod world;

use std::time::Duration;

use orlop_proto::{
    Resource as _,
    apps::v1::ReplicaSet,
    core::v1::{Event, Namespace, Node, Pod, Service, ServicePort, ServiceSpec, Taint},
    discovery::v1::EndpointSlice,
};

use super::{ControllerConfig, GarbageConfig, LifecycleConfig, endpoint_slices::plan::SERVICE_NAME, pods};
use crate::{cache::ObjectKey, registry::DeleteOptions, scheduler::taints};
use world::{World, labels, pod, replica_set};

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_spread_scaled_and_replaced() {
    let world = World::start().await;
    for node in ["n1", "n2", "n3"] {
        world.node(node).await;
    }
    world.registry.create(replica_set("web", 6)).await.unwrap();
    world
        .until("six pods run", |world| world.running("web").len() == 6)
        .await;
    for node in ["n1", "n2", "n3"] {
        let here = world
            .running("web")
            .iter()
            .filter(|pod| pods::node_name(pod) == node)
            .count();
        assert_eq!(here, 2, "on {node}");
    }
    let status = |world: &World| {
        let set = world
            .cache()
            .reader::<ReplicaSet>()
            .get("default", "web")
            .unwrap_or_default();
        let status = set.status.clone().unwrap_or_default();
        (
            status.replicas,
            status.ready_replicas,
            status.available_replicas,
            status.fully_labeled_replicas,
        )
    };
    world
        .until("the status says so", |world| status(world) == (6, 6, 6, 6))
        .await;
    world.scale("web", 2).await;
    world
        .until("two are left", |world| {
            world.pods().len() == 2 && status(world) == (2, 2, 2, 2)
        })
        .await;
    let victim = world.pods()[0].clone();
    world
        .registry
        .delete::<Pod>(&ObjectKey::of(&*victim), DeleteOptions::default())
        .await
        .unwrap();
    world
        .until("the deleted one is replaced", |world| {
            world.running("web").len() == 2 && world.pods().iter().all(|pod| pod.uid() != victim.uid())
        })
        .await;
    world
        .until("events tell of it", |world| {
            let events = world.cache().reader::<Event>().snapshot();
            let told = |reason: &str| events.objects.values().any(|event| event.reason == reason);
            told("SuccessfulCreate") && told("SuccessfulDelete") && told("Scheduled")
        })
        .await;
    // Nothing more happens: no pod too many was made on the way.
    world
        .until("all creations are told", |world| world.created_pods() >= 7)
        .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.created_pods(), 7, "6, and 1 that replaced the deleted one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphans_are_adopted_and_strangers_released() {
    let world = World::start().await;
    world.node("n1").await;
    let orphan = world.registry.create(pod("orphan", "web")).await.unwrap();
    world.registry.create(replica_set("web", 2)).await.unwrap();
    world
        .until("the orphan is one of two", |world| {
            let pods = world.running("web");
            pods.len() == 2
                && pods
                    .iter()
                    .all(|pod| pods::controller(pod).is_some_and(|owner| owner.name == "web"))
                && pods.iter().any(|pod| pod.uid() == orphan.uid())
        })
        .await;
    world
        .registry
        .modify(&key("orphan"), |pod: &mut Pod| {
            pod.meta_mut().labels = labels("other");
            true
        })
        .await
        .unwrap();
    world
        .until("it is released and replaced", |world| {
            let released = world.cache().reader::<Pod>().get("default", "orphan").unwrap();
            pods::controller(&released).is_none() && world.running("web").len() == 2
        })
        .await;
    world
        .registry
        .delete::<ReplicaSet>(&key("web"), DeleteOptions::default())
        .await
        .unwrap();
    world
        .until("only the released one is left", |world| world.pods().len() == 1)
        .await;
    assert_eq!(world.pods()[0].uid(), orphan.uid());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_follow_readiness() {
    let world = World::start().await;
    world.node("n1").await;
    let service = Service {
        metadata: Some(orlop_proto::meta::v1::ObjectMeta {
            name: "web".into(),
            namespace: "default".into(),
            ..Default::default()
        }),
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
    world.registry.create(service).await.unwrap();
    world.registry.create(replica_set("web", 3)).await.unwrap();
    let endpoints = |world: &World, ready: bool| -> usize {
        let slices = world.cache().reader::<EndpointSlice>().snapshot();
        let ours = slices
            .objects
            .values()
            .filter(|slice| slice.meta().labels.get(SERVICE_NAME).is_some_and(|name| name == "web"));
        ours.flat_map(|slice| slice.endpoints.clone())
            .filter(|endpoint| {
                endpoint
                    .conditions
                    .is_some_and(|conditions| conditions.ready == Some(ready))
            })
            .count()
    };
    world
        .until("three are ready", |world| endpoints(world, true) == 3)
        .await;
    let sick = world.running("web")[0].clone();
    world.set_ready(&sick, false).await;
    world
        .until("one is not", |world| {
            endpoints(world, true) == 2 && endpoints(world, false) == 1
        })
        .await;
    world.scale("web", 0).await;
    world
        .until("none is left", |world| {
            endpoints(world, true) + endpoints(world, false) == 0
        })
        .await;
    world
        .registry
        .delete::<Service>(&key("web"), DeleteOptions::default())
        .await
        .unwrap();
    world
        .until("its slices go with it", |world| {
            let slices = world.cache().reader::<EndpointSlice>().snapshot();
            !slices
                .objects
                .values()
                .any(|slice| slice.meta().labels.get(SERVICE_NAME).is_some_and(|name| name == "web"))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_nodes_pods_run_elsewhere_and_it_may_return() {
    let world = World::start().await;
    for node in ["n1", "n2", "n3"] {
        world.node(node).await;
    }
    world.registry.create(replica_set("web", 3)).await.unwrap();
    world
        .until("three pods run", |world| world.running("web").len() == 3)
        .await;
    let lost: Vec<_> = world
        .running("web")
        .into_iter()
        .filter(|pod| pods::node_name(pod) == "n2")
        .collect();
    assert_eq!(lost.len(), 1);
    world.cut("n2");
    world
        .until("the node is NotReady, its pods too", |world| {
            let node = world.cache().reader::<Node>().get("", "n2").unwrap();
            let tainted = node
                .spec
                .iter()
                .flat_map(|spec| &spec.taints)
                .any(|taint| taint.key == taints::UNREACHABLE);
            let ready = world
                .cache()
                .reader::<Pod>()
                .get("default", lost[0].name())
                .is_some_and(|pod| pods::is_ready(&pod));
            tainted && !ready
        })
        .await;
    world
        .until("three run elsewhere", |world| {
            let elsewhere = world
                .running("web")
                .into_iter()
                .filter(|pod| pods::node_name(pod) != "n2" && pods::is_active(pod));
            elsewhere.count() == 3
        })
        .await;
    let left = world
        .cache()
        .reader::<Pod>()
        .get("default", lost[0].name())
        .expect("stays until its node says otherwise");
    assert!(left.is_deleting());
    world.heal("n2");
    world
        .until("the node is back and clean", |world| {
            let node = world.cache().reader::<Node>().get("", "n2").unwrap();
            node.spec.as_ref().is_some_and(|spec| spec.taints.is_empty()) && world.pods().len() == 3
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_silent_for_a_moment_keeps_its_pods() {
    let mut config = World::config();
    config.lifecycle.eviction_delay = Duration::from_secs(600);
    let mut world = World::start_with(config).await;
    for node in ["n1", "n2"] {
        world.node(node).await;
    }
    world.registry.create(replica_set("web", 2)).await.unwrap();
    world
        .until("two pods run", |world| world.running("web").len() == 2)
        .await;
    let before: Vec<String> = world.pods().iter().map(|pod| pod.uid().to_owned()).collect();
    world.cut("n2");
    world
        .until("one is in doubt", |world| world.running("web").len() == 1)
        .await;
    let is_marked = |pod: &Pod| pods::condition(pod, "Ready").is_some_and(|ready| ready.reason == "NodeNotHeardOf");
    let marked = world.pods().into_iter().find(|pod| is_marked(pod));
    let key = ObjectKey::of(&*marked.expect("says why"));
    // Somebody writes the pod meanwhile, and somebody else leads.
    let touch = |pod: &mut Pod| {
        pod.meta_mut().labels.insert("touched".into(), "yes".into());
        true
    };
    let touched: Pod = world.registry.modify(&key, touch).await.unwrap();
    world.change_leader();
    // Several looks: who has just begun to look has not heard of the node either.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let looked_at: Pod = world.registry.get(&key).await.unwrap();
    assert_eq!(looked_at.meta().resource_version, touched.meta().resource_version);
    // It speaks, and says that it is not ready: of its pods it may know nothing yet.
    for _ in 0..10 {
        world.says_not_ready("n2").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let looked_at: Pod = world.registry.get(&key).await.unwrap();
    assert_eq!(looked_at.meta().resource_version, touched.meta().resource_version);
    world.heal("n2");
    // The node says nothing of its pods: for it nothing has changed.
    world
        .until("it is not any more", |world| world.running("web").len() == 2)
        .await;
    assert!(!world.pods().iter().any(|pod| is_marked(pod)));
    let after: Vec<String> = world.pods().iter().map(|pod| pod.uid().to_owned()).collect();
    assert_eq!(before, after);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_taints_evict_and_nodes_that_are_deleted_free_their_pods() {
    let world = World::start().await;
    world.node("n1").await;
    world.registry.create(replica_set("web", 1)).await.unwrap();
    world.until("it runs", |world| world.running("web").len() == 1).await;
    world.node("n2").await;
    let taint = Taint {
        key: "maintenance".into(),
        effect: taints::NO_EXECUTE.into(),
        ..Taint::default()
    };
    world
        .registry
        .modify(&ObjectKey::new("", "n1"), |node: &mut Node| {
            node.spec.get_or_insert_default().taints.push(taint.clone());
            true
        })
        .await
        .unwrap();
    let on = |world: &World, node: &str| {
        world
            .running("web")
            .iter()
            .filter(|pod| pods::node_name(pod) == node)
            .count()
    };
    world
        .until("it moved", |world| world.pods().len() == 1 && on(world, "n2") == 1)
        .await;
    world
        .registry
        .modify(&ObjectKey::new("", "n1"), |node: &mut Node| {
            node.spec.get_or_insert_default().taints.clear();
            true
        })
        .await
        .unwrap();
    world.cut("n2");
    world
        .registry
        .delete::<Node>(&ObjectKey::new("", "n2"), DeleteOptions::default())
        .await
        .unwrap();
    world
        .until("it moved back, nothing is left", |world| {
            world.pods().len() == 1 && on(world, "n1") == 1
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_unschedulable_say_why_and_wake_up() {
    let world = World::start().await;
    let mut picky = pod("picky", "web");
    picky.spec.get_or_insert_default().node_selector = [("disk".to_owned(), "ssd".to_owned())].into();
    world.registry.create(picky).await.unwrap();
    let why = |world: &World| {
        let pod = world
            .cache()
            .reader::<Pod>()
            .get("default", "picky")
            .unwrap_or_default();
        let condition = pods::condition(&pod, "PodScheduled").cloned().unwrap_or_default();
        (condition.status, condition.reason, condition.message)
    };
    let expected = |message: &str| ("False".to_owned(), "Unschedulable".to_owned(), message.to_owned());
    world
        .until("there is no node", |world| {
            why(world) == expected("no nodes available to schedule pods")
        })
        .await;
    world.node("n1").await;
    // The first node wakes everybody; it is no help. Nor is what the pod itself says now.
    world
        .registry
        .modify(&key("picky"), |pod: &mut Pod| {
            pod.meta_mut().labels.insert("touched".into(), "yes".into());
            true
        })
        .await
        .unwrap();
    let message = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.";
    world
        .until("the node is no help", |world| why(world) == expected(message))
        .await;
    world
        .until("an event says so", |world| {
            let events = world.cache().reader::<Event>().snapshot();
            events
                .objects
                .values()
                .any(|event| event.reason == "FailedScheduling" && event.message == message)
        })
        .await;
    world
        .registry
        .modify(&ObjectKey::new("", "n1"), |node: &mut Node| {
            node.meta_mut().labels.insert("disk".into(), "ssd".into());
            true
        })
        .await
        .unwrap();
    world.until("it runs", |world| world.running("web").len() == 1).await;
    assert_eq!(why(&world).0, "True");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_get_ranges_of_their_own() {
    let world = World::start().await;
    for node in ["n1", "n2", "n3"] {
        world.node(node).await;
    }
    world
        .until("each has one", |world| {
            let nodes = world.cache().reader::<Node>().snapshot();
            let ranges: std::collections::HashSet<String> = nodes
                .objects
                .values()
                .filter_map(|node| node.spec.clone())
                .map(|spec| spec.pod_cidr)
                .filter(|range| !range.is_empty())
                .collect();
            ranges.len() == 3
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_goes_with_all_that_is_in_it() {
    let world = World::start().await;
    world.node("n1").await;
    let mut namespace = Namespace::default();
    namespace.meta_mut().name = "shop".into();
    world.registry.create(namespace).await.unwrap();
    let mut set = replica_set("web", 2);
    set.meta_mut().namespace = "shop".into();
    world.registry.create(set).await.unwrap();
    world
        .until("its pods run", |world| world.running("web").len() == 2)
        .await;
    world
        .registry
        .delete::<Namespace>(&ObjectKey::new("", "shop"), DeleteOptions::default())
        .await
        .unwrap();
    world
        .until("nothing is left", |world| {
            let cache = world.cache();
            cache.reader::<Namespace>().get("", "shop").is_none()
                && cache.reader::<Pod>().snapshot().in_namespace("shop").next().is_none()
                && cache
                    .reader::<ReplicaSet>()
                    .snapshot()
                    .in_namespace("shop")
                    .next()
                    .is_none()
                && cache.reader::<Event>().snapshot().in_namespace("shop").next().is_none()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_expire() {
    let mut config = World::config();
    config.garbage.event_ttl = Duration::from_secs(1);
    let world = World::start_with(config).await;
    world.registry.create(pod("lonely", "web")).await.unwrap();
    let count = |world: &World| world.cache().reader::<Event>().snapshot().objects.len();
    world.until("an event is there", |world| count(world) > 0).await;
    world.until("it is gone", |world| count(world) == 0).await;
}

impl World {
    fn config() -> ControllerConfig {
        let lifecycle = LifecycleConfig {
            monitor_grace: Duration::from_millis(1500),
            eviction_delay: Duration::from_millis(300),
            period: Duration::from_millis(50),
            eviction_rate: 100.0,
            ..LifecycleConfig::default()
        };
        let garbage = GarbageConfig {
            period: Duration::from_millis(100),
            node_quarantine: Duration::from_millis(300),
            ..GarbageConfig::default()
        };
        ControllerConfig { lifecycle, garbage }
    }
}
