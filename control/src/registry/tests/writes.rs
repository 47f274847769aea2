use std::collections::HashSet;

use orlop_proto::core::v1::PodStatus;

use super::*;

#[tokio::test]
async fn a_new_object_gets_what_the_server_gives() {
    let world = world().await;
    let mut given = pod("a");
    given.meta_mut().uid = "mine".to_owned();
    given.meta_mut().deletion_timestamp = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    given.status = Some(PodStatus {
        phase: "Running".to_owned(),
        ..PodStatus::default()
    });
    let created = world.registry.create(given).await.unwrap();
    assert_eq!((&*created.api_version, &*created.kind), ("v1", "Pod"));
    assert_eq!(created.uid().len(), 36);
    assert_eq!(created.meta().generation, 1);
    assert!(created.meta().creation_timestamp.is_some());
    assert!(created.meta().deletion_timestamp.is_none());
    assert_eq!(created.meta().resource_version, world.revision().await.to_string());
    let status = created.status.clone().unwrap();
    assert_eq!((&*status.phase, &*status.qos_class), ("Pending", "BestEffort"));
    assert_eq!(world.registry.get::<Pod>(&key("a")).await.unwrap(), created);

    let again = world.registry.create(pod("a")).await.unwrap_err();
    assert!(again.is_already_exists(), "{again}");
}

#[tokio::test]
async fn names_are_generated_and_differ() {
    let world = world().await;
    let mut names = HashSet::new();
    for _ in 0..20 {
        let mut given = pod("");
        given.meta_mut().generate_name = "web-".to_owned();
        let created = world.registry.create(given).await.unwrap();
        assert!(
            created.name().starts_with("web-") && created.name().len() == 9,
            "{}",
            created.name()
        );
        assert!(names.insert(created.name().to_owned()));
    }
    let mut long = pod("");
    long.meta_mut().generate_name = "x".repeat(80);
    assert_eq!(world.registry.create(long).await.unwrap().name().len(), 63);
    let nameless = world.registry.create(pod("")).await.unwrap_err();
    assert!(message(&nameless).contains("metadata.name"), "{nameless}");
}

#[tokio::test]
async fn nothing_is_created_in_a_missing_or_terminating_namespace() {
    let world = world().await;
    let mut given = pod("a");
    given.meta_mut().namespace = "nowhere".to_owned();
    let error = world.registry.create(given.clone()).await.unwrap_err();
    assert!(error.is_not_found(), "{error}");

    let metadata = Some(ObjectMeta {
        name: "nowhere".to_owned(),
        ..ObjectMeta::default()
    });
    let namespace = world
        .registry
        .create(Namespace {
            metadata,
            ..Namespace::default()
        })
        .await
        .unwrap();
    assert_eq!(namespace.status.unwrap().phase, "Active");
    world.registry.create(given.clone()).await.unwrap();
    let of = ObjectKey::new("", "nowhere");
    let deleted: Namespace = world.registry.delete(&of, DeleteOptions::default()).await.unwrap();
    assert_eq!(deleted.status.unwrap().phase, "Terminating");
    given.meta_mut().name = "b".to_owned();
    // At once, whatever the cache has seen by now.
    let error = world.registry.create(given).await.unwrap_err();
    assert!(matches!(error, RegistryError::Precondition(_)), "{error}");
}

#[tokio::test]
async fn an_update_compares_and_swaps() {
    let world = world().await;
    let first = world.registry.create(replica_set("rs", 1)).await.unwrap();
    let mut second = first.clone();
    second.spec.as_mut().unwrap().replicas = Some(2);
    let second = world.registry.update(second).await.unwrap();
    assert_eq!(second.meta().generation, 2);
    assert_ne!(second.meta().resource_version, first.meta().resource_version);

    let mut stale = first.clone();
    stale.spec.as_mut().unwrap().replicas = Some(3);
    let error = world.registry.update(stale.clone()).await.unwrap_err();
    assert!(error.is_conflict(), "{error}");
    stale.meta_mut().resource_version.clear();
    let third = world.registry.update(stale.clone()).await.unwrap();
    assert_eq!(third.spec.unwrap().replicas, Some(3));
    stale.meta_mut().uid = "another".to_owned();
    assert!(world.registry.update(stale).await.unwrap_err().is_conflict());
    assert!(
        world
            .registry
            .update(replica_set("none", 1))
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn what_changes_nothing_is_not_written() {
    let world = world().await;
    let created = world.registry.create(replica_set("rs", 1)).await.unwrap();
    let before = world.revision().await;
    assert_eq!(world.registry.update(created.clone()).await.unwrap(), created);
    assert_eq!(world.registry.update_status(created.clone()).await.unwrap(), created);
    let same = world
        .registry
        .modify::<orlop_proto::apps::v1::ReplicaSet, _>(&key("rs"), |_| true)
        .await
        .unwrap();
    assert_eq!(same, created);
    assert_eq!(world.revision().await, before);
}

#[tokio::test]
async fn spec_and_status_are_written_apart() {
    let world = world().await;
    let created = world.registry.create(replica_set("rs", 1)).await.unwrap();
    let mut given = created.clone();
    given.status.as_mut().unwrap().replicas = 7;
    given.spec.as_mut().unwrap().replicas = Some(9);
    given.meta_mut().labels.insert("a".to_owned(), "b".to_owned());
    let status = world.registry.update_status(given.clone()).await.unwrap();
    assert_eq!(status.spec, created.spec);
    assert_eq!(status.meta().labels, created.meta().labels);
    assert_eq!(status.meta().generation, 1);
    assert_eq!(status.status.clone().unwrap().replicas, 7);

    given.meta_mut().resource_version.clear();
    given.status.as_mut().unwrap().replicas = 1;
    let spec = world.registry.update(given).await.unwrap();
    assert_eq!(spec.spec.unwrap().replicas, Some(9));
    assert_eq!(spec.status.unwrap().replicas, 7);
    assert_eq!(spec.metadata.clone().unwrap().generation, 2);
    assert_eq!(spec.metadata.unwrap().labels.len(), 1);
}

#[tokio::test]
async fn users_cannot_delete_or_undelete_by_writing() {
    let world = world().await;
    let mut created = world.registry.create(replica_set("rs", 1)).await.unwrap();
    created.meta_mut().deletion_timestamp = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    created.meta_mut().creation_timestamp = None;
    created.meta_mut().generation = 77;
    let written = world.registry.update(created).await.unwrap();
    assert!(!written.is_deleting());
    assert!(written.meta().creation_timestamp.is_some());
    assert_eq!(written.meta().generation, 1);
}

#[tokio::test]
async fn modify_goes_on_until_it_has_won() {
    let world = world().await;
    world.registry.create(replica_set("rs", 0)).await.unwrap();
    let mut writers = Vec::new();
    for _ in 0..8 {
        let registry = world.registry.clone();
        writers.push(tokio::spawn(async move {
            for _ in 0..10 {
                let add = |object: &mut orlop_proto::apps::v1::ReplicaSet| {
                    let replicas = &mut object.spec.as_mut().unwrap().replicas;
                    *replicas = Some(replicas.unwrap_or(0) + 1);
                    true
                };
                registry.modify(&key("rs"), add).await.unwrap();
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let end: orlop_proto::apps::v1::ReplicaSet = world.registry.get(&key("rs")).await.unwrap();
    assert_eq!(end.spec.unwrap().replicas, Some(80));
    assert_eq!(end.metadata.unwrap().generation, 81);
}

#[tokio::test]
async fn who_lost_the_claim_cannot_write() {
    let world = world().await;
    let claim = Key::internal("leaders", "scheduler");
    let put = || Transaction::one(claim.clone(), Expected::Any, Write::Put("me".into()));
    let revision = world.registry.store().commit(put()).await.unwrap();
    let leader = world.registry.with_fence(Fence {
        key: claim.clone(),
        revision,
    });
    leader.create(pod("a")).await.unwrap();
    world.registry.store().commit(put()).await.unwrap();
    let before = world.revision().await;
    for error in [
        leader.create(pod("b")).await.unwrap_err(),
        leader
            .delete::<Pod>(&key("a"), DeleteOptions::default())
            .await
            .unwrap_err(),
        leader.create(service("s", "")).await.unwrap_err(),
    ] {
        assert!(matches!(error, RegistryError::Fenced(_)), "{error}");
    }
    assert_eq!(world.revision().await, before);
}

#[tokio::test]
async fn verbs_work_on_objects_of_any_kind() {
    let world = world().await;
    let created = world
        .registry
        .create_object(replica_set("rs", 1).into_object())
        .await
        .unwrap();
    let kind = orlop_proto::object_kind(&created).unwrap();
    assert_eq!(kind.resource, "replicasets");
    assert_eq!(world.registry.get_object(&kind, &key("rs")).await.unwrap(), created);
    assert_eq!(world.registry.update_object(created.clone()).await.unwrap(), created);
    assert_eq!(
        world.registry.update_object_status(created.clone()).await.unwrap(),
        created
    );
    world
        .registry
        .delete_object(&kind, &key("rs"), DeleteOptions::default())
        .await
        .unwrap();
    assert!(
        world
            .registry
            .get_object(&kind, &key("rs"))
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn bootstrap_is_idempotent() {
    let world = world().await;
    let before = world.revision().await;
    world.registry.ensure_bootstrap().await.unwrap();
    assert_eq!(world.revision().await, before);
    let kubernetes: Service = world.registry.get(&key("kubernetes")).await.unwrap();
    assert_eq!(kubernetes.spec.unwrap().cluster_ip, "10.96.0.1");
    for name in ["default", "kube-system", "kube-node-lease", "kube-public"] {
        world
            .registry
            .get::<Namespace>(&ObjectKey::new("", name))
            .await
            .unwrap();
    }
}

/// A store whose watches tell nothing: a cache over it stays as it is.
struct Silent(Arc<dyn Store>);

#[async_trait::async_trait]
impl Store for Silent {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.0.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.0.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        self.0.commit(transaction).await
    }
    async fn watch(&self, _prefix: &str, _after: Revision) -> Result<Watch, StoreError> {
        Ok(Box::pin(futures::stream::pending()))
    }
    async fn revision(&self) -> Result<Revision, StoreError> {
        self.0.revision().await
    }
}

#[tokio::test]
async fn what_was_just_written_can_be_taken_back_before_the_cache_has_it() {
    let world = world().await;
    world.registry.create(pod("a")).await.unwrap();
    let store = Arc::clone(world.registry.store());
    let cache = Cache::start(Arc::new(Silent(Arc::clone(&store)))).await;
    let behind = Registry::new(store, cache, RegistryConfig::default());
    let say = |phase: &'static str| {
        move |pod: &mut Pod| {
            let status = pod.status.get_or_insert_default();
            let differs = status.phase != phase;
            phase.clone_into(&mut status.phase);
            differs
        }
    };
    // As a node that is started again says it of its pods: not yet, and then as it was.
    for phase in ["Running", "Pending", "Running"] {
        let written = behind.modify_status(&key("a"), say(phase)).await.unwrap();
        assert_eq!(written.status.unwrap().phase, phase);
        let stored: Pod = world.registry.get(&key("a")).await.unwrap();
        assert_eq!(stored.status.unwrap().phase, phase);
    }
    // One that says nothing new writes nothing.
    let before = world.revision().await;
    behind.modify_status(&key("a"), say("Running")).await.unwrap();
    behind.modify_status(&key("a"), |_: &mut Pod| true).await.unwrap();
    assert_eq!(world.revision().await, before);
}
