//! A replica whose watch of the store is late, or cannot go on.

use async_trait::async_trait;
use futures::StreamExt as _;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::*;
use crate::store::{Listing, Record, StoreError, Watch, memory::MemoryStore};

/// A store whose watches tell nothing until they may.
struct Held {
    data: MemoryStore,
    may: watch::Receiver<bool>,
}

#[async_trait]
impl Store for Held {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.data.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.data.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        self.data.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let (told, may) = (self.data.watch(prefix, after).await?, self.may.clone());
        let held = told.then(move |set| {
            let mut may = may.clone();
            async move {
                let _open = may.wait_for(|may| *may).await;
                set
            }
        });
        Ok(held.boxed())
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.data.revision().await
    }
}

#[tokio::test]
async fn a_watch_that_resumes_at_a_replica_that_is_behind_is_told_nothing_twice() {
    let (open, may) = watch::channel(true);
    let data = MemoryStore::default();
    let store: Arc<dyn Store> = Arc::new(Held {
        data: data.clone(),
        may,
    });
    let cache = Cache::start(store.clone()).await;
    let commit = async |name: &str| {
        let operations = vec![put(&pod(name, "n"))];
        store.commit(Transaction { operations }).await.unwrap()
    };
    cache.wait_for(commit("a").await).await;
    open.send_replace(false);
    commit("b").await;
    // Another replica has told of this one.
    let told = commit("c").await;
    let reader = cache.reader::<Pod>();
    let mut resumed = Box::pin(reader.events_after(told));
    assert!(
        timeout(Duration::from_millis(200), &mut resumed).await.is_err(),
        "it goes on before the replica has what was told"
    );
    open.send_replace(true);
    let mut events = resumed.await.unwrap();
    sleep(Duration::from_millis(20)).await;
    commit("d").await;
    assert_eq!(take(&mut events, 1).await, [format!("+d=n@{}", told + 1)]);
}

#[tokio::test]
async fn what_a_newer_version_wrote_and_took_back_stops_nothing() {
    let data = MemoryStore::default();
    let store: Arc<dyn Store> = Arc::new(data.clone());
    let cache = Cache::start(store.clone()).await;
    data.write_raw(&Key::object(&Pod::KIND, "default", "a"), b"orlp\x02whatever comes then");
    let operations = vec![put(&pod("a", "n"))];
    let revision = store.commit(Transaction { operations }).await.unwrap();
    // The log still has what cannot be read.
    let reader = cache.reader::<Pod>();
    let live = timeout(Duration::from_secs(30), reader.wait_for(revision)).await;
    assert_eq!(names(&live.expect("everything is read anew")), map([("a", "n")]));
}
