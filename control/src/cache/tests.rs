//! The cache over the embedded engine.

mod behind;
mod fresh;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod, PodSpec},
    meta::v1::ObjectMeta,
};
use prost::Message as _;
use tempfile::TempDir;

use super::*;
use crate::store::{
    Expected, Key, Operation, Transaction, Write,
    embedded::{EmbeddedConfig, EmbeddedStore},
};

struct World {
    store: Arc<dyn Store>,
    cache: Cache,
    _dir: TempDir,
}

async fn world_with(store: EmbeddedConfig, cache: CacheConfig) -> World {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&dir.path().join("store.redb"), store).unwrap());
    let cache = Cache::start_with(store.clone(), cache).await;
    World {
        store,
        cache,
        _dir: dir,
    }
}

async fn world() -> World {
    world_with(EmbeddedConfig::default(), CacheConfig::default()).await
}

fn pod(name: &str, node: &str) -> Pod {
    let metadata = ObjectMeta {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        ..ObjectMeta::default()
    };
    let spec = PodSpec {
        node_name: node.to_owned(),
        ..PodSpec::default()
    };
    Pod {
        metadata: Some(metadata),
        spec: Some(spec),
        ..Pod::default()
    }
}

fn put(pod: &Pod) -> Operation {
    let write = Write::Put(pod.encode_to_vec().into());
    Operation {
        key: Key::object(&Pod::KIND, pod.namespace(), pod.name()),
        expected: Expected::Any,
        write,
    }
}

fn delete(name: &str) -> Operation {
    Operation {
        key: Key::object(&Pod::KIND, "default", name),
        expected: Expected::Any,
        write: Write::Delete,
    }
}

impl World {
    async fn commit(&self, operations: impl IntoIterator<Item = Operation>) -> Revision {
        self.store
            .commit(Transaction {
                operations: operations.into_iter().collect(),
            })
            .await
            .unwrap()
    }

    async fn put(&self, name: &str, node: &str) -> Revision {
        self.commit([put(&pod(name, node))]).await
    }
}

/// "+name=node", "~name=node<before", "-name", each with "@revision".
fn short(entry: &Entry<Pod>) -> String {
    let node = |pod: &Pod| pod.spec.clone().unwrap().node_name;
    let text = match &entry.event() {
        Event::Added(new) => format!("+{}={}", new.name(), node(new)),
        Event::Modified { old, new } => format!("~{}={}<{}", new.name(), node(new), node(old)),
        Event::Deleted(last) => format!("-{}", last.name()),
    };
    assert_eq!(
        entry.event().object().meta().resource_version,
        entry.revision.to_string()
    );
    format!("{text}@{}", entry.revision)
}

async fn take(events: &mut EventStream<Pod>, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    for _ in 0..count {
        let next = tokio::time::timeout(Duration::from_secs(10), events.next())
            .await
            .expect("an event within 10 s");
        taken.push(short(&next.unwrap()));
    }
    taken
}

fn names(snapshot: &Snapshot<Pod>) -> BTreeMap<String, String> {
    let pair = |(key, pod): (&ObjectKey, Arc<Pod>)| (key.name.to_string(), pod.spec.clone().unwrap().node_name);
    snapshot.objects.iter().map(pair).collect()
}

fn map<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs
        .into_iter()
        .map(|(name, node)| (name.to_owned(), node.to_owned()))
        .collect()
}

#[tokio::test]
async fn what_is_there_is_loaded_and_what_comes_is_followed() {
    let world = world().await;
    world.put("a", "n1").await;
    let cache = Cache::start(world.store.clone()).await;
    let mut reader = cache.reader::<Pod>();
    let snapshot = reader.snapshot();
    assert_eq!(names(&snapshot), map([("a", "n1")]));
    assert_eq!(snapshot.revision, cache.revision());
    assert_eq!(reader.get("default", "a").unwrap().meta().resource_version, "1");
    assert!(reader.get("other", "a").is_none());
    let revision = world.put("b", "n2").await;
    tokio::time::timeout(Duration::from_secs(10), reader.changed())
        .await
        .unwrap();
    assert_eq!(names(&reader.wait_for(revision).await), map([("a", "n1"), ("b", "n2")]));
    assert_eq!(names(&snapshot), map([("a", "n1")]), "a snapshot does not change");
    assert!(cache.reader::<Node>().snapshot().objects.is_empty());
    // Other kinds, and records that are no objects, move the revision of all.
    let other = world
        .commit([Operation {
            key: Key::internal("tokens", "a"),
            ..put(&pod("x", ""))
        }])
        .await;
    assert_eq!(reader.wait_for(other).await.revision, other);
    assert!(cache.catch_up(Duration::from_secs(10)).await.unwrap());
}

#[tokio::test]
async fn namespaces_are_ranges() {
    let world = world().await;
    for namespace in ["a", "ab", "b"] {
        let mut pod = pod("p", "n");
        pod.meta_mut().namespace = namespace.to_owned();
        world.commit([put(&pod)]).await;
    }
    let revision = world.store.revision().await.unwrap();
    let snapshot = world.cache.reader::<Pod>().wait_for(revision).await;
    assert_eq!(snapshot.in_namespace("a").count(), 1);
    assert_eq!(snapshot.in_namespace("").count(), 3);
    assert_eq!(snapshot.in_namespace("c").count(), 0);
    assert!(snapshot.get("ab", "p").is_some());
}

#[tokio::test]
async fn events_continue_a_snapshot() {
    let world = world().await;
    world.put("a", "n1").await;
    let reader = world.cache.reader::<Pod>();
    reader.wait_for(1).await;
    let (snapshot, mut events) = reader.events();
    assert_eq!(names(&snapshot), map([("a", "n1")]));
    world.put("a", "n2").await;
    world.commit([put(&pod("b", "n1")), delete("a")]).await;
    world.put("a", "n3").await;
    assert_eq!(take(&mut events, 4).await, ["~a=n2<n1@2", "-a@3", "+b=n1@3", "+a=n3@4"]);
    assert_eq!(events.revision(), 4);
}

#[tokio::test]
async fn a_transaction_is_handed_out_whole_before_its_revision_is_said() {
    let world = world().await;
    let (_, mut events) = world.cache.reader::<Pod>().events();
    world.commit([put(&pod("a", "n")), put(&pod("b", "n"))]).await;
    world.put("c", "n").await;
    world.cache.wait_for(2).await;
    events.next().await.unwrap();
    assert_eq!(events.revision(), 0, "b is of revision 1 as well");
    events.next().await.unwrap();
    assert_eq!(events.revision(), 1);
    events.next().await.unwrap();
    assert_eq!(events.revision(), 2);
    let other = world
        .commit([Operation {
            key: Key::internal("tokens", "a"),
            ..put(&pod("x", ""))
        }])
        .await;
    world.cache.wait_for(other).await;
    assert_eq!(
        events.revision(),
        other,
        "who has seen everything moves on with the store"
    );
}

#[tokio::test]
async fn a_slow_reader_is_told_and_can_resume() {
    let config = CacheConfig {
        window_events: 10,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let reader = world.cache.reader::<Pod>();
    let (_, mut events) = reader.events();
    world.put("a", "0").await;
    assert_eq!(take(&mut events, 1).await, ["+a=0@1"]);
    for number in 1..=50 {
        world.put("a", &number.to_string()).await;
    }
    world.cache.wait_for(51).await;
    let lagged = events.next().await.unwrap_err();
    assert_eq!(lagged, Lagged { resume_after: 1 });
    assert_eq!(events.next().await.unwrap_err(), lagged, "it stays so");

    // The window has ten; the rest comes from the store's log, and then it goes on live.
    let mut resumed = reader.events_after(lagged.resume_after).await.unwrap();
    let expected: Vec<String> = (1..=50).map(|n| format!("~a={n}<{}@{}", n - 1, n + 1)).collect();
    assert_eq!(take(&mut resumed, 50).await, expected);
    world.commit([delete("a")]).await;
    assert_eq!(take(&mut resumed, 1).await, ["-a@52"]);
    assert_eq!(resumed.revision(), 52);
    // Within the window.
    let mut near = reader.events_after(48).await.unwrap();
    assert_eq!(
        take(&mut near, 4).await,
        ["~a=48<47@49", "~a=49<48@50", "~a=50<49@51", "-a@52"]
    );
}

#[tokio::test]
async fn a_watch_resumes_from_before_the_cache_was_started() {
    let world = world().await;
    for number in 0..5 {
        world.put("a", &number.to_string()).await;
    }
    world
        .commit([Operation {
            key: Key::internal("tokens", "a"),
            ..put(&pod("x", ""))
        }])
        .await;
    let cache = Cache::start(world.store.clone()).await;
    let reader = cache.reader::<Pod>();
    let mut events = reader.events_after(3).await.unwrap();
    assert_eq!(take(&mut events, 2).await, ["~a=3<2@4", "~a=4<3@5"]);
    world.put("b", "n").await;
    assert_eq!(take(&mut events, 1).await, ["+b=n@7"]);
}

#[tokio::test]
async fn what_is_compacted_or_in_the_future_is_refused() {
    let store = EmbeddedConfig {
        log_bytes: 500,
        ..EmbeddedConfig::default()
    };
    let config = CacheConfig {
        window_events: 3,
        ..CacheConfig::default()
    };
    let world = world_with(store, config).await;
    for number in 0..100 {
        world.put("a", &number.to_string()).await;
    }
    world.cache.wait_for(100).await;
    let reader = world.cache.reader::<Pod>();
    assert!(matches!(
        reader.events_after(1).await,
        Err(StoreError::Compacted { requested: 1, .. })
    ));
    assert!(matches!(
        reader.events_after(101).await,
        Err(StoreError::Future {
            requested: 101,
            current: 100
        })
    ));
    assert_eq!(take(&mut reader.events_after(97).await.unwrap(), 3).await.len(), 3);
}

#[tokio::test]
async fn older_snapshots_are_rebuilt_or_kept() {
    let config = CacheConfig {
        window_events: 4,
        kept_snapshots: 2,
        ..CacheConfig::default()
    };
    let world = world_with(EmbeddedConfig::default(), config).await;
    let reader = world.cache.reader::<Pod>();
    world.put("a", "1").await;
    world.put("b", "1").await;
    let second = reader.wait_for(2).await;
    world.put("a", "2").await;
    world.commit([delete("b")]).await;
    world.cache.wait_for(4).await;
    for (revision, expected) in [
        (0, map([])),
        (1, map([("a", "1")])),
        (2, map([("a", "1"), ("b", "1")])),
        (3, map([("a", "2"), ("b", "1")])),
        (4, map([("a", "2")])),
    ] {
        let snapshot = reader.snapshot_at(revision).unwrap();
        assert_eq!((snapshot.revision, names(&snapshot)), (revision, expected));
    }
    let rebuilt = reader.snapshot_at(3).unwrap();
    assert_eq!(rebuilt.get("default", "b").unwrap().meta().resource_version, "2");
    assert!(reader.snapshot_at(5).is_none());

    reader.keep(&second);
    for number in 0..10 {
        world.put("c", &number.to_string()).await;
    }
    world.cache.wait_for(14).await;
    assert!(reader.snapshot_at(3).is_none(), "the window no longer reaches it");
    assert_eq!(names(&reader.snapshot_at(2).unwrap()), names(&second));
    reader.keep(&reader.snapshot_at(12).unwrap());
    reader.keep(&reader.snapshot_at(13).unwrap());
    assert!(reader.snapshot_at(2).is_none(), "two are kept at most");
}

#[tokio::test]
async fn damaged_objects_are_put_aside() {
    let world = world().await;
    let broken = |name: &str, value: &'static [u8]| Operation {
        key: Key::object(&Pod::KIND, "default", name),
        expected: Expected::Any,
        write: Write::Put(value.into()),
    };
    world.commit([broken("x", b"\xff\xff\xff"), put(&pod("a", "n"))]).await;
    // Another object's bytes under this key.
    let wrong = Operation {
        key: Key::object(&Pod::KIND, "default", "y"),
        ..put(&pod("a", "n"))
    };
    let revision = world.commit([wrong]).await;
    let live = world.cache.reader::<Pod>().wait_for(revision).await;
    assert_eq!(names(&live), map([("a", "n")]));
    let loaded = Cache::start(world.store.clone()).await.reader::<Pod>().snapshot();
    assert_eq!(names(&loaded), map([("a", "n")]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replaying_events_gives_the_snapshot_under_many_writers() {
    let world = world().await;
    let reader = world.cache.reader::<Pod>();
    let writers = (0..6).map(|writer| {
        let store = world.store.clone();
        tokio::spawn(async move {
            for number in 0..100_u32 {
                let name = format!("p{}", (writer * 31 + number * 7) % 40);
                let operations = match number % 5 {
                    0 => vec![delete(&name)],
                    1 => vec![
                        put(&pod(&name, &number.to_string())),
                        put(&pod(&format!("w{writer}"), &number.to_string())),
                    ],
                    _ => vec![put(&pod(&name, &format!("{writer}-{number}")))],
                };
                store.commit(Transaction { operations }).await.unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    // Readers that begin at different moments, one of them in a later snapshot's past.
    let mut replays = Vec::new();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(2)).await;
        replays.push(reader.events());
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let end = world.store.revision().await.unwrap();
    let expected = names(&reader.wait_for(end).await);
    for (snapshot, mut events) in replays {
        let mut replayed = names(&snapshot);
        let mut last = snapshot.revision;
        while events.revision() < end {
            let entry = events.next().await.unwrap();
            assert!(entry.revision >= last && entry.revision > snapshot.revision);
            last = entry.revision;
            let event = entry.event();
            let object = event.object();
            let node = object.spec.clone().unwrap().node_name;
            match &entry.event() {
                Event::Added(_) => assert_eq!(replayed.insert(object.name().to_owned(), node), None),
                Event::Modified { old, .. } => {
                    let before = replayed.insert(object.name().to_owned(), node);
                    assert_eq!(before, Some(old.spec.clone().unwrap().node_name));
                }
                Event::Deleted(_) => assert!(replayed.remove(object.name()).is_some()),
            }
        }
        assert_eq!(replayed, expected);
        assert_eq!(names(&reader.snapshot_at(snapshot.revision).unwrap()), names(&snapshot));
    }
}

/// A store whose watches end as compacted when they are told to.
struct Forgetful {
    inner: Arc<dyn Store>,
    forget: tokio::sync::watch::Receiver<bool>,
}

#[async_trait::async_trait]
impl Store for Forgetful {
    async fn get(&self, key: &Key) -> Result<Option<crate::store::Record>, StoreError> {
        self.inner.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<crate::store::Listing, StoreError> {
        self.inner.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        self.inner.commit(transaction).await
    }
    async fn watch(&self, prefix: &str, after: Revision) -> Result<crate::store::Watch, StoreError> {
        use futures::StreamExt as _;
        let mut forget = self.forget.clone();
        let compacted = StoreError::Compacted {
            requested: after,
            oldest: after + 1,
        };
        let told = async move {
            // When the sender is gone nothing is forgotten any more.
            if forget.wait_for(|forget| *forget).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let until = self.inner.watch(prefix, after).await?.take_until(told);
        Ok(Box::pin(until.chain(futures::stream::iter([Err(compacted)]))))
    }
    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }
}

#[tokio::test]
async fn a_cache_that_missed_changes_is_read_anew_and_says_so() {
    let world = world().await;
    let (forget, receiver) = tokio::sync::watch::channel(false);
    let cache = Cache::start(Arc::new(Forgetful {
        inner: world.store.clone(),
        forget: receiver,
    }))
    .await;
    let reader = cache.reader::<Pod>();
    let (_, mut events) = reader.events();
    world.put("a", "1").await;
    assert_eq!(take(&mut events, 1).await, ["+a=1@1"]);
    let mut changes = reader.clone();
    changes.changed().await;
    forget.send_replace(true);
    tokio::time::timeout(Duration::from_secs(10), changes.changed())
        .await
        .unwrap();
    forget.send_replace(false);
    let lagged = tokio::time::timeout(Duration::from_secs(10), events.next())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(lagged, Lagged { resume_after: 1 });
    let revision = world.put("b", "1").await;
    assert_eq!(names(&reader.wait_for(revision).await), map([("a", "1"), ("b", "1")]));
    let (_, mut again) = reader.events();
    world.put("b", "2").await;
    assert_eq!(take(&mut again, 1).await, ["~b=2<1@3"]);
}
