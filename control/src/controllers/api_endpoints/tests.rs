use orlop_proto::core::v1::Service;

use super::*;
use crate::{
    cache::Cache,
    registry::RegistryConfig,
    store::{
        Store,
        embedded::{EmbeddedConfig, EmbeddedStore},
    },
};

async fn registry(folder: &tempfile::TempDir) -> Registry {
    let path = folder.path().join("store.redb");
    let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
    let store: Arc<dyn Store> = Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap());
    let cache = Cache::start(store.clone()).await;
    let registry = Registry::new(store, cache, RegistryConfig::default());
    registry.ensure_bootstrap().await.unwrap();
    registry
}

async fn until(registry: &Registry, what: &str, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let slices = registry.cache().reader::<EndpointSlice>();
        let slice = slices.get("default", "kubernetes").unwrap_or_default();
        let found: Vec<&str> = slice.endpoints.iter().map(|one| one.addresses[0].as_str()).collect();
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "not in time: {what}; found {found:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(&folder).await;
    let times = ApiEndpointTimes {
        look: Duration::from_millis(20),
        renew: Duration::from_millis(50),
        expire: Duration::from_millis(1000),
    };
    let start = |address: &str| {
        let cancel = CancellationToken::new();
        let own = Some(address.parse().unwrap());
        let task = tokio::spawn(run(registry.clone(), own, times.clone(), cancel.clone()));
        (task, cancel)
    };
    let (first, end_first) = start("192.0.2.1:6443");
    until(&registry, "one", &["192.0.2.1"]).await;
    let slice = registry
        .get::<EndpointSlice>(&ObjectKey::new("default", "kubernetes"))
        .await
        .unwrap();
    let service = registry
        .get::<Service>(&ObjectKey::new("default", "kubernetes"))
        .await
        .unwrap();
    assert_eq!(slice.ports[0].name(), service.spec.unwrap().ports[0].name);
    assert_eq!(slice.ports[0].port, Some(6443));
    let (second, _) = start("192.0.2.2:6443");
    let (third, end_third) = start("192.0.2.3:6443");
    until(&registry, "three", &["192.0.2.1", "192.0.2.2", "192.0.2.3"]).await;
    // Killed: the others notice.
    second.abort();
    until(&registry, "two", &["192.0.2.1", "192.0.2.3"]).await;
    // Asked to go: it goes at once, and a node's Lease beside is not touched.
    end_first.cancel();
    first.await.unwrap();
    until(&registry, "the last", &["192.0.2.3"]).await;
    // The last one leaves its entry.
    end_third.cancel();
    third.await.unwrap();
    until(&registry, "still the last", &["192.0.2.3"]).await;
    // Under another address: the old entry goes when it expires.
    let (fourth, _) = start("192.0.2.4:6443");
    until(&registry, "both", &["192.0.2.3", "192.0.2.4"]).await;
    until(&registry, "the new one", &["192.0.2.4"]).await;
    fourth.abort();
}
