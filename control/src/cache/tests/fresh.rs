//! What is kept decoded, and encoded, and for how long.

use super::*;
use crate::{
    cache::index::Feed,
    store::{Change, Record},
};

#[tokio::test]
async fn an_event_that_is_no_longer_fresh_tells_the_same() {
    let config = CacheConfig {
        fresh: Duration::ZERO,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let (_, mut events) = world.cache.reader::<Pod>().events();
    world.put("a", "1").await;
    world.put("a", "2").await;
    world.commit([delete("a")]).await;
    let last = world.put("b", "1").await;
    world.cache.wait_for(last).await;
    let told = take(&mut events, 4).await;
    assert_eq!(told, ["+a=1@1", "~a=2<1@2", "-a@3", "+b=1@4"]);
}

#[tokio::test]
async fn what_is_kept_decoded_is_bounded_in_bytes_and_does_not_wait_for_time() {
    let config = CacheConfig {
        fresh: Duration::from_secs(3600),
        fresh_bytes: 10_000,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let reader = world.cache.reader::<Pod>();
    let value = "v".repeat(2000);
    for name in ["a", "b", "c", "d", "e", "f"] {
        let revision = world.put(name, &value).await;
        world.cache.wait_for(revision).await;
    }
    let is_kept = |name: &str| {
        let pod = || reader.peek("default", name).unwrap();
        Arc::ptr_eq(&pod(), &pod())
    };
    assert_eq!(
        ["a", "b", "c", "d", "e", "f"].map(is_kept),
        [false, false, true, true, true, true]
    );
    // A change counts what was there before, too: who follows is told of both.
    let revision = world.put("f", &value).await;
    world.cache.wait_for(revision).await;
    assert_eq!(["c", "d", "e", "f"].map(is_kept), [false, false, true, true]);
    let revision = world.commit([delete("f")]).await;
    world.cache.wait_for(revision).await;
    assert!(!is_kept("e"));
    // One alone that is larger is not kept either, and is told all the same.
    let (_, mut events) = reader.events();
    let revision = world.put("g", &"v".repeat(20_000)).await;
    world.cache.wait_for(revision).await;
    assert!(!is_kept("g"));
    assert_eq!(take(&mut events, 1).await.len(), 1);
}

#[tokio::test]
async fn an_event_is_encoded_once() {
    let world = world().await;
    let reader = world.cache.reader::<Pod>();
    let ((_, mut one), (_, mut other)) = (reader.events(), reader.events());
    world.put("a", "n").await;
    let (one, other) = (one.next().await.unwrap(), other.next().await.unwrap());
    assert!(Arc::ptr_eq(&one, &other));
    assert_eq!(one.encoded_object().as_ptr(), other.encoded_object().as_ptr());
    let object = orlop_proto::api::v1::Object::decode(one.encoded_object().clone()).unwrap();
    assert_eq!(Pod::from_object(object).as_ref(), Some(&**one.event().object()));
}

#[tokio::test]
async fn changes_are_applied_in_pieces_that_divide_no_revision() {
    let index = world().await.cache.shared.indexes.of::<Pod>();
    let feed: &dyn Feed = &*index;
    let of = |revision: Revision, count: usize| {
        (0..count).map(move |number| {
            let name = format!("r{revision}-{number}");
            let record = Record {
                key: Key::object(&Pod::KIND, "default", &name),
                value: pod(&name, "n").encode_to_vec().into(),
                revision,
            };
            (revision, Change::Put { record, previous: None })
        })
    };
    let mut told = index.changes();
    let mut position = index.snapshot_and_position(0).1;
    for (revisions, pieces) in [
        (vec![(1, 40), (2, 40)], 2),
        (vec![(3, 31), (4, 40)], 1),
        (vec![(5, 20), (6, 12), (7, 20)], 2),
        (vec![(8, 100)], 1),
    ] {
        let (before, count) = (
            *told.borrow_and_update(),
            revisions.iter().map(|(_, count)| count).sum::<usize>(),
        );
        feed.apply(
            revisions
                .iter()
                .flat_map(|(revision, count)| of(*revision, *count))
                .collect(),
        );
        assert_eq!(*told.borrow_and_update() - before, pieces, "{revisions:?}");
        let entries = index
            .entries(&mut position, 0, 1000)
            .ok()
            .expect("they are in the window");
        assert_eq!(entries.len(), count);
        assert!(entries.is_sorted_by_key(|entry| entry.revision));
    }
}
