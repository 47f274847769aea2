//! Deletions in the foreground, and such that leave orphans.

use orlop_proto::{
    Resource,
    apps::v1::ReplicaSet,
    core::v1::{Namespace, Pod},
    meta::v1::OwnerReference,
};

use super::{
    key,
    world::{World, pod, replica_set},
};
use crate::{
    cache::ObjectKey,
    controllers::pods,
    registry::{DeleteOptions, FOREGROUND, ORPHAN, Propagation, Registered},
};

/// Keeps what has it until the test lets it go.
const KEPT: &str = "orlop.dev/kept";

fn reference<T: Resource>(owner: &T, blocks: bool) -> OwnerReference {
    OwnerReference {
        api_version: T::KIND.api_version.into(),
        kind: T::KIND.kind.into(),
        name: owner.name().into(),
        uid: owner.uid().into(),
        block_owner_deletion: Some(blocks),
        ..OwnerReference::default()
    }
}

impl World {
    /// With a set of three pods that run.
    async fn with_a_set() -> Self {
        let world = Self::start().await;
        world.node("n1").await;
        world.registry.create(replica_set("web", 3)).await.unwrap();
        world
            .until("three pods run", |world| world.running("web").len() == 3)
            .await;
        world
    }

    async fn delete<T: Registered>(&self, key: &ObjectKey, propagation: Propagation) -> T {
        let options = DeleteOptions {
            propagation,
            ..DeleteOptions::default()
        };
        self.registry.delete(key, options).await.unwrap()
    }

    fn has_set(&self) -> bool {
        self.cache().reader::<ReplicaSet>().get("default", "web").is_some()
    }

    async fn owned_pod(&self, name: &str, owners: Vec<OwnerReference>) -> Pod {
        let mut pod = pod(name, "owned");
        pod.meta_mut().owner_references = owners;
        pod.meta_mut().finalizers = vec![KEPT.into()];
        self.registry.create(pod).await.unwrap()
    }

    fn find(&self, name: &str) -> Option<std::sync::Arc<Pod>> {
        self.cache().reader::<Pod>().get("default", name)
    }

    async fn let_go(&self, pod: &Pod) {
        self.registry
            .remove_finalizer::<Pod>(&ObjectKey::of(pod), pod.uid(), KEPT)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_foreground_the_owner_goes_last() {
    let world = World::with_a_set().await;
    // One of the pods takes its time.
    let slow = world.running("web")[0].clone();
    world
        .registry
        .modify(&ObjectKey::of(&*slow), |pod: &mut Pod| {
            pod.meta_mut().finalizers = vec![KEPT.into()];
            true
        })
        .await
        .unwrap();
    let deleted: ReplicaSet = world.delete(&key("web"), Propagation::Foreground).await;
    assert!(deleted.is_deleting() && deleted.meta().finalizers == [FOREGROUND]);
    world
        .until("the slow pod is left", |world| {
            world.pods().len() == 1 && world.pods()[0].is_deleting()
        })
        .await;
    let waiting: ReplicaSet = world.registry.get(&key("web")).await.unwrap();
    assert_eq!(waiting.uid(), deleted.uid());
    assert!(world.pods()[0].uid() == slow.uid());
    world.let_go(&slow).await;
    world
        .until("then the owner goes", |world| {
            world.pods().is_empty() && !world.has_set()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_blocks_is_waited_for_and_other_owners_keep_theirs() {
    let world = World::start().await;
    let owner = world.registry.create(pod("owner", "x")).await.unwrap();
    let other = world.registry.create(pod("other", "x")).await.unwrap();
    let lazy = world.owned_pod("lazy", vec![reference(&owner, false)]).await;
    let blocking = world.owned_pod("blocking", vec![reference(&owner, true)]).await;
    world
        .owned_pod("shared", vec![reference(&owner, true), reference(&other, true)])
        .await;
    world.delete::<Pod>(&key("owner"), Propagation::Foreground).await;
    world
        .until("two are asked to go and the shared one has another owner", |world| {
            let going = |name: &str| world.find(name).is_some_and(|pod| pod.is_deleting());
            let shared = world.find("shared").unwrap();
            going("lazy")
                && going("blocking")
                && !shared.is_deleting()
                && shared.meta().owner_references == [reference(&other, true)]
        })
        .await;
    assert!(world.find("owner").is_some(), "the blocking one is there yet");
    world.let_go(&blocking).await;
    world
        .until("the owner did not wait for the lazy one", |world| {
            world.find("owner").is_none() && world.find("lazy").is_some()
        })
        .await;
    world.let_go(&lazy).await;
    world.until("it goes", |world| world.find("lazy").is_none()).await;
    assert!(world.find("shared").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_foreground_reaches_down_and_ends_in_circles() {
    let world = World::start().await;
    let top = world.registry.create(pod("top", "x")).await.unwrap();
    let mut middle = pod("middle", "x");
    middle.meta_mut().owner_references = vec![reference(&top, true)];
    let middle = world.registry.create(middle).await.unwrap();
    let leaf = world.owned_pod("leaf", vec![reference(&middle, true)]).await;
    world.delete::<Pod>(&key("top"), Propagation::Foreground).await;
    world
        .until("the leaf is asked to go", |world| {
            world.find("leaf").is_some_and(|leaf| leaf.is_deleting())
        })
        .await;
    let waits = |world: &World, name: &str| {
        world
            .find(name)
            .is_some_and(|pod| pod.meta().finalizers == [FOREGROUND])
    };
    assert!(waits(&world, "top") && waits(&world, "middle"));
    world.let_go(&leaf).await;
    world.until("all are gone", |world| world.pods().is_empty()).await;

    let first = world.registry.create(pod("first", "x")).await.unwrap();
    let mut second = pod("second", "x");
    second.meta_mut().owner_references = vec![reference(&first, true)];
    let second = world.registry.create(second).await.unwrap();
    world
        .registry
        .modify(&key("first"), |pod: &mut Pod| {
            pod.meta_mut().owner_references = vec![reference(&second, true)];
            true
        })
        .await
        .unwrap();
    world.delete::<Pod>(&key("first"), Propagation::Foreground).await;
    world.until("the circle is gone", |world| world.pods().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphans_stay_without_their_owner() {
    let world = World::with_a_set().await;
    let uids = |world: &World| {
        let mut uids: Vec<String> = world.running("web").iter().map(|pod| pod.uid().to_owned()).collect();
        uids.sort();
        uids
    };
    let before = uids(&world);
    let deleted: ReplicaSet = world.delete(&key("web"), Propagation::Orphan).await;
    assert!(deleted.is_deleting() && deleted.meta().finalizers == [ORPHAN]);
    world.until("the set is gone", |world| !world.has_set()).await;
    assert!(world.pods().iter().all(|pod| pods::controller(pod).is_none()));
    // Another set of the same name takes them as its own: none was deleted, and none is made.
    world.registry.create(replica_set("web", 3)).await.unwrap();
    world
        .until("they are adopted", |world| {
            world
                .running("web")
                .iter()
                .filter(|pod| pods::controller(pod).is_some())
                .count()
                == 3
        })
        .await;
    assert_eq!(uids(&world), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_without_dependents_and_namespaces_go_too() {
    let world = World::start().await;
    for (name, propagation) in [("a", Propagation::Foreground), ("b", Propagation::Orphan)] {
        world.registry.create(pod(name, "x")).await.unwrap();
        world.delete::<Pod>(&key(name), propagation).await;
    }
    let mut namespace = Namespace::default();
    namespace.meta_mut().name = "shop".into();
    world.registry.create(namespace).await.unwrap();
    let shop = ObjectKey::new("", "shop");
    world.delete::<Namespace>(&shop, Propagation::Foreground).await;
    world
        .until("all are gone", |world| {
            world.pods().is_empty() && world.cache().reader::<Namespace>().get("", "shop").is_none()
        })
        .await;
}
