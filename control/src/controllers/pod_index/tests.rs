use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use orlop_proto::meta::v1::{ObjectMeta, OwnerReference};
use prost::Message as _;

use super::*;
use crate::{
    cache::{Cache, CacheConfig},
    store::{
        Expected, Key, Store, Transaction, Write,
        embedded::{EmbeddedConfig, EmbeddedStore},
    },
};

fn pod(name: &str, labels: &[(&str, &str)], owner: Option<&str>) -> Pod {
    let controller = |uid: &str| OwnerReference {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        controller: Some(true),
        ..OwnerReference::default()
    };
    Pod {
        metadata: Some(ObjectMeta {
            name: name.into(),
            namespace: "default".into(),
            uid: name.into(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            owner_references: owner.map(controller).into_iter().collect(),
            ..ObjectMeta::default()
        }),
        ..Pod::default()
    }
}

fn names(mut pods: Vec<Arc<Pod>>) -> Vec<String> {
    pods.sort_by(|a, b| a.name().cmp(b.name()));
    pods.iter().map(|pod| pod.name().to_owned()).collect()
}

/// A store and the cache that follows it. What is written is written as the registry would.
struct World {
    store: Arc<dyn Store>,
    cache: Cache,
    _folder: tempfile::TempDir,
}

impl World {
    async fn start(config: CacheConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
        let store: Arc<dyn Store> = Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap());
        let cache = Cache::start_with(store.clone(), config).await;
        Self {
            store,
            cache,
            _folder: folder,
        }
    }

    async fn put(&self, pods: &[Pod]) {
        let mut revision = 0;
        for chunk in pods.chunks(64) {
            let mut transaction: Option<Transaction> = None;
            for pod in chunk {
                let key = Key::object(&Pod::KIND, pod.namespace(), pod.name());
                let write = Write::Put(pod.encode_to_vec().into());
                transaction = Some(match transaction {
                    Some(transaction) => transaction.and(key, Expected::Any, write),
                    None => Transaction::one(key, Expected::Any, write),
                });
            }
            if let Some(transaction) = transaction {
                revision = self.store.commit(transaction).await.unwrap();
            }
        }
        self.cache.wait_for(revision).await;
    }

    async fn delete(&self, name: &str) {
        let key = Key::object(&Pod::KIND, "default", name);
        let transaction = Transaction::one(key, Expected::Any, Write::Delete);
        let revision = self.store.commit(transaction).await.unwrap();
        self.cache.wait_for(revision).await;
    }
}

#[tokio::test]
async fn answers_are_as_fresh_as_the_cache() {
    // The window is small: a part of the changes is missed and the index begins anew.
    let window = CacheConfig {
        window_events: 4,
        ..CacheConfig::default()
    };
    let world = World::start(window).await;
    let index = PodIndex::new(world.cache.reader());
    let web = Selector::parse("app=web,tier=front").unwrap();
    assert!(index.selected("default", &web).is_empty());
    let both = [("app", "web"), ("tier", "front")];
    world
        .put(&[
            pod("a", &both, None),
            pod("b", &both, Some("set")),
            pod("c", &[("app", "web")], Some("set")),
            pod("d", &[("tier", "front")], None),
        ])
        .await;
    assert_eq!(names(index.selected("default", &web)), ["a", "b"]);
    assert!(index.selected("other", &web).is_empty());
    assert_eq!(names(index.of_owner("default", "set", &web)), ["a", "b", "c"]);
    assert_eq!(names(index.of_owner("default", "other", &web)), ["a"]);
    let loose = Selector::parse("app,tier!=back").unwrap();
    assert_eq!(names(index.selected("default", &loose)), ["a", "b", "c"]);
    assert_eq!(names(index.of_owner("default", "other", &loose)), ["a"]);
    assert!(index.selected("default", &Selector::nothing()).is_empty());

    world.put(&[pod("a", &both, Some("set"))]).await;
    assert_eq!(names(index.of_owner("default", "other", &web)), Vec::<String>::new());
    world.put(&[pod("b", &[("app", "db")], Some("set"))]).await;
    assert_eq!(names(index.selected("default", &web)), ["a"]);
    assert_eq!(names(index.of_owner("default", "set", &web)), ["a", "b", "c"]);
    world.delete("a").await;
    assert_eq!(names(index.of_owner("default", "set", &web)), ["b", "c"]);
    for round in 0..6 {
        world.put(&[pod(&format!("new-{round}"), &both, None)]).await;
    }
    world.delete("new-3").await;
    assert_eq!(
        names(index.selected("default", &web)),
        ["new-0", "new-1", "new-2", "new-4", "new-5"]
    );
    let mut state = index.state.lock().unwrap();
    for name in ["b", "c", "d", "new-0", "new-1", "new-2", "new-4", "new-5"] {
        let pod = world.cache.reader::<Pod>().get("default", name).unwrap();
        state.pods.remove(&pod);
    }
    let pods = &state.pods;
    assert!(pods.all.is_empty() && pods.orphans.is_empty() && pods.owned.is_empty() && pods.ids.is_empty());
}

/// What a look costs with many pods in one namespace: by the index, and by a scan of the namespace.
async fn measure(sets: usize) -> (Duration, Duration) {
    let world = World::start(CacheConfig::default()).await;
    let app = |set: usize| format!("app-{set}");
    let pods: Vec<Pod> = (0..sets * 10)
        .map(|number| {
            let app = app(number % sets);
            pod(&format!("pod-{number}"), &[("app", &app)], Some(&app))
        })
        .collect();
    world.put(&pods).await;
    let index = PodIndex::new(world.cache.reader());
    let selector = |set: usize| Selector::from_labels(&BTreeMap::from([("app".to_owned(), app(set))]));
    index.selected("default", &Selector::nothing());
    let begun = Instant::now();
    for set in 0..sets {
        assert_eq!(index.selected("default", &selector(set)).len(), 10);
        assert_eq!(index.of_owner("default", &app(set), &selector(set)).len(), 10);
    }
    let by_index = begun.elapsed() / u32::try_from(sets * 2).unwrap();
    let reader = world.cache.reader::<Pod>();
    let begun = Instant::now();
    const SCANS: u32 = 10;
    for set in 0..SCANS as usize {
        let (snapshot, selector) = (reader.snapshot(), selector(set));
        let found = snapshot
            .in_namespace("default")
            .filter(|(_, pod)| selector.matches(&pod.meta().labels));
        assert_eq!(found.count(), 10);
    }
    (by_index, begun.elapsed() / SCANS)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_does_not_pay_for_its_neighbours() {
    let (by_index, by_scan) = measure(1000).await;
    println!("1000 owners of 10 pods: {by_index:?} a look, by a scan {by_scan:?}");
    // Some hundred times: the bound leaves room for a busy machine.
    assert!(by_index * 10 < by_scan, "{by_index:?} a look, by a scan {by_scan:?}");
}
