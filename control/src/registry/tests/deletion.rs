use super::*;

fn with_grace(seconds: i64) -> DeleteOptions {
    DeleteOptions {
        grace_period_seconds: Some(seconds),
        ..DeleteOptions::default()
    }
}

#[tokio::test]
async fn an_unscheduled_pod_goes_at_once() {
    let world = world().await;
    world.registry.create(pod("a")).await.unwrap();
    world
        .registry
        .delete::<Pod>(&key("a"), DeleteOptions::default())
        .await
        .unwrap();
    assert!(world.registry.get::<Pod>(&key("a")).await.unwrap_err().is_not_found());
    let again = world
        .registry
        .delete::<Pod>(&key("a"), DeleteOptions::default())
        .await
        .unwrap_err();
    assert!(again.is_not_found());
}

#[tokio::test]
async fn a_pod_on_a_node_stays_until_the_node_confirms() {
    let world = world().await;
    let bound = world.bound("a").await;
    let early = world
        .registry
        .confirm_pod_gone("default", "a", bound.uid())
        .await
        .unwrap_err();
    assert!(matches!(early, RegistryError::Precondition(_)), "{early}");

    let before = super::super::write::now().seconds;
    let deleted: Pod = world
        .registry
        .delete(&key("a"), DeleteOptions::default())
        .await
        .unwrap();
    assert_eq!(deleted.meta().deletion_grace_period_seconds, Some(30));
    let end = deleted.meta().deletion_timestamp.unwrap().seconds;
    assert!((before + 30..before + 40).contains(&end), "{end} {before}");
    assert_eq!(deleted.meta().generation, bound.meta().generation);

    let longer: Pod = world.registry.delete(&key("a"), with_grace(60)).await.unwrap();
    assert_eq!(longer, deleted, "a later deletion cannot lengthen");
    let shorter: Pod = world.registry.delete(&key("a"), with_grace(5)).await.unwrap();
    assert_eq!(shorter.meta().deletion_grace_period_seconds, Some(5));
    assert_eq!(shorter.meta().deletion_timestamp.unwrap().seconds, end - 25);

    world
        .registry
        .confirm_pod_gone("default", "a", "another")
        .await
        .unwrap();
    world.registry.get::<Pod>(&key("a")).await.unwrap();
    world
        .registry
        .confirm_pod_gone("default", "a", bound.uid())
        .await
        .unwrap();
    assert!(world.registry.get::<Pod>(&key("a")).await.unwrap_err().is_not_found());
    world
        .registry
        .confirm_pod_gone("default", "a", bound.uid())
        .await
        .unwrap();
}

#[tokio::test]
async fn grace_zero_removes_at_once_and_a_negative_one_is_a_second() {
    let world = world().await;
    world.bound("a").await;
    let deleted: Pod = world.registry.delete(&key("a"), with_grace(-3)).await.unwrap();
    assert_eq!(deleted.meta().deletion_grace_period_seconds, Some(1));
    world.registry.delete::<Pod>(&key("a"), with_grace(0)).await.unwrap();
    assert!(world.registry.get::<Pod>(&key("a")).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn finalizers_keep_an_object_until_they_are_cleared() {
    let world = world().await;
    let mut given = replica_set("rs", 1);
    given.meta_mut().finalizers = vec!["orlop.dev/a".to_owned(), "orlop.dev/b".to_owned()];
    let created = world.registry.create(given).await.unwrap();
    type Set = orlop_proto::apps::v1::ReplicaSet;
    let deleted: Set = world
        .registry
        .delete(&key("rs"), DeleteOptions::default())
        .await
        .unwrap();
    assert!(deleted.is_deleting());
    let before = world.revision().await;
    world
        .registry
        .delete::<Set>(&key("rs"), DeleteOptions::default())
        .await
        .unwrap();
    assert_eq!(world.revision().await, before, "deleting it again writes nothing");

    let mut more = deleted.clone();
    more.meta_mut().finalizers.push("orlop.dev/c".to_owned());
    let error = world.registry.update(more).await.unwrap_err();
    assert!(message(&error).contains("metadata.finalizers"), "{error}");

    world
        .registry
        .remove_finalizer::<Set>(&key("rs"), "another", "orlop.dev/a")
        .await
        .unwrap();
    world
        .registry
        .remove_finalizer::<Set>(&key("rs"), created.uid(), "orlop.dev/a")
        .await
        .unwrap();
    let left: Set = world.registry.get(&key("rs")).await.unwrap();
    assert_eq!(left.meta().finalizers, vec!["orlop.dev/b".to_owned()]);
    assert!(left.is_deleting());

    let mut last = left;
    last.meta_mut().finalizers.clear();
    world.registry.update(last).await.unwrap();
    assert!(world.registry.get::<Set>(&key("rs")).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_confirmed_pod_with_finalizers_loses_only_its_grace() {
    let world = world().await;
    let mut given = pod("a");
    given.meta_mut().finalizers = vec!["orlop.dev/a".to_owned()];
    let created = world.registry.create(given).await.unwrap();
    let binding = Binding {
        pod: key("a"),
        uid: created.uid().to_owned(),
        node: "n1".to_owned(),
    };
    world.registry.bind_pod(&binding).await.unwrap();
    world
        .registry
        .delete::<Pod>(&key("a"), DeleteOptions::default())
        .await
        .unwrap();
    // Without its finalizer it would still wait for the node.
    world
        .registry
        .confirm_pod_gone("default", "a", created.uid())
        .await
        .unwrap();
    let held: Pod = world.registry.get(&key("a")).await.unwrap();
    assert_eq!(held.meta().deletion_grace_period_seconds, Some(0));
    world
        .registry
        .remove_finalizer::<Pod>(&key("a"), created.uid(), "orlop.dev/a")
        .await
        .unwrap();
    assert!(world.registry.get::<Pod>(&key("a")).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_finalizer_cleared_early_does_not_skip_the_node() {
    let world = world().await;
    let mut given = pod("a");
    given.meta_mut().finalizers = vec!["orlop.dev/a".to_owned()];
    let created = world.registry.create(given).await.unwrap();
    let binding = Binding {
        pod: key("a"),
        uid: created.uid().to_owned(),
        node: "n1".to_owned(),
    };
    world.registry.bind_pod(&binding).await.unwrap();
    world
        .registry
        .delete::<Pod>(&key("a"), DeleteOptions::default())
        .await
        .unwrap();
    world
        .registry
        .remove_finalizer::<Pod>(&key("a"), created.uid(), "orlop.dev/a")
        .await
        .unwrap();
    let waiting: Pod = world.registry.get(&key("a")).await.unwrap();
    assert_eq!(waiting.meta().deletion_grace_period_seconds, Some(30));
}

#[tokio::test]
async fn preconditions_guard_a_deletion() {
    let world = world().await;
    let created = world.registry.create(replica_set("rs", 1)).await.unwrap();
    type Set = orlop_proto::apps::v1::ReplicaSet;
    for preconditions in [
        Preconditions {
            uid: Some("another".to_owned()),
            resource_version: None,
        },
        Preconditions {
            uid: None,
            resource_version: Some("1".to_owned()),
        },
    ] {
        let options = DeleteOptions {
            preconditions,
            ..DeleteOptions::default()
        };
        let error = world.registry.delete::<Set>(&key("rs"), options).await.unwrap_err();
        assert!(matches!(error, RegistryError::Precondition(_)), "{error}");
    }
    let preconditions = Preconditions {
        uid: Some(created.uid().to_owned()),
        resource_version: Some(created.meta().resource_version.clone()),
    };
    let options = DeleteOptions {
        preconditions,
        ..DeleteOptions::default()
    };
    let gone: Set = world.registry.delete(&key("rs"), options).await.unwrap();
    assert_eq!(gone.meta().resource_version, world.revision().await.to_string());
}

#[tokio::test]
async fn a_namespace_goes_when_it_is_finalized() {
    let world = world().await;
    for immortal in ["default", "kube-system", "kube-public"] {
        let key = ObjectKey::new("", immortal);
        let error = world
            .registry
            .delete::<Namespace>(&key, DeleteOptions::default())
            .await
            .unwrap_err();
        assert!(matches!(error, RegistryError::Precondition(_)), "{error}");
    }
    let metadata = Some(ObjectMeta {
        name: "team".to_owned(),
        ..ObjectMeta::default()
    });
    let created = world
        .registry
        .create(Namespace {
            metadata,
            ..Namespace::default()
        })
        .await
        .unwrap();
    let early = world
        .registry
        .finalize_namespace("team", created.uid())
        .await
        .unwrap_err();
    assert!(matches!(early, RegistryError::Precondition(_)), "{early}");
    let key = ObjectKey::new("", "team");
    let deleted: Namespace = world.registry.delete(&key, DeleteOptions::default()).await.unwrap();
    assert!(deleted.is_deleting());
    // Users cannot finalize it.
    let mut emptied = deleted.clone();
    emptied.spec.as_mut().unwrap().finalizers.clear();
    world.registry.update(emptied).await.unwrap();
    world.registry.get::<Namespace>(&key).await.unwrap();
    world.registry.finalize_namespace("team", "another").await.unwrap();
    world.registry.finalize_namespace("team", created.uid()).await.unwrap();
    assert!(world.registry.get::<Namespace>(&key).await.unwrap_err().is_not_found());
    world.registry.finalize_namespace("team", created.uid()).await.unwrap();
}

#[tokio::test]
async fn a_pod_is_bound_once() {
    let world = world().await;
    let bound = world.bound("a").await;
    assert_eq!(bound.spec.clone().unwrap().node_name, "n1");
    let condition = &bound.status.as_ref().unwrap().conditions[0];
    assert_eq!((&*condition.r#type, &*condition.status), ("PodScheduled", "True"));
    let mut binding = Binding {
        pod: key("a"),
        uid: bound.uid().to_owned(),
        node: "n1".to_owned(),
    };
    assert_eq!(world.registry.bind_pod(&binding).await.unwrap(), bound);
    binding.node = "n2".to_owned();
    assert!(world.registry.bind_pod(&binding).await.unwrap_err().is_conflict());
    binding.uid = "another".to_owned();
    assert!(world.registry.bind_pod(&binding).await.unwrap_err().is_conflict());
    binding.pod = key("none");
    assert!(world.registry.bind_pod(&binding).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn many_pods_are_bound_together() {
    let world = world().await;
    let creations = (0..300).map(|number| world.registry.create(pod(&format!("p{number}"))));
    let pods = futures::future::join_all(creations).await;
    let bindings: Vec<Binding> = pods
        .into_iter()
        .map(|pod| pod.unwrap())
        .map(|pod| Binding {
            pod: ObjectKey::of(&pod),
            uid: pod.uid().to_owned(),
            node: "n1".to_owned(),
        })
        .collect();
    let results = world.registry.bind_pods(bindings).await;
    assert_eq!(results.len(), 300);
    for (number, bound) in results.into_iter().enumerate() {
        let bound = bound.unwrap();
        assert_eq!(bound.name(), format!("p{number}"));
        assert_eq!(bound.spec.unwrap().node_name, "n1");
    }
}

#[tokio::test]
async fn the_propagation_policy_is_a_finalizer() {
    type Set = orlop_proto::apps::v1::ReplicaSet;
    let world = world().await;
    let mut given = replica_set("rs", 1);
    given.meta_mut().finalizers = vec!["orlop.dev/a".to_owned()];
    let created = world.registry.create(given).await.unwrap();
    let by = |propagation: Propagation| DeleteOptions {
        propagation,
        ..DeleteOptions::default()
    };
    let refused = DeleteOptions {
        preconditions: Preconditions {
            uid: Some("another".to_owned()),
            resource_version: None,
        },
        ..by(Propagation::Foreground)
    };
    let error = world.registry.delete::<Set>(&key("rs"), refused).await.unwrap_err();
    assert!(matches!(error, RegistryError::Precondition(_)), "{error}");
    assert_eq!(world.registry.get::<Set>(&key("rs")).await.unwrap(), created);

    let mut begun = None;
    for (propagation, expected) in [
        (Propagation::Foreground, vec!["orlop.dev/a", FOREGROUND]),
        (Propagation::Default, vec!["orlop.dev/a", FOREGROUND]),
        (Propagation::Orphan, vec!["orlop.dev/a", ORPHAN]),
        (Propagation::Background, vec!["orlop.dev/a"]),
    ] {
        let deleted: Set = world.registry.delete(&key("rs"), by(propagation)).await.unwrap();
        assert_eq!(deleted.meta().finalizers, expected, "{propagation:?}");
        let revision = world.revision().await;
        world.registry.delete::<Set>(&key("rs"), by(propagation)).await.unwrap();
        assert_eq!(world.revision().await, revision, "the same again writes nothing");
        let since = deleted.meta().deletion_timestamp;
        assert!(since.is_some() && *begun.get_or_insert(since) == since);
    }

    // Without another finalizer, the change of mind ends it.
    world.registry.create(pod("p")).await.unwrap();
    let waits: Pod = world.registry.delete(&key("p"), by(Propagation::Orphan)).await.unwrap();
    assert!(waits.is_deleting());
    world
        .registry
        .delete::<Pod>(&key("p"), by(Propagation::Background))
        .await
        .unwrap();
    assert!(world.registry.get::<Pod>(&key("p")).await.unwrap_err().is_not_found());
}
