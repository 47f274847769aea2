use orlop_proto::core::v1::Pod;

use super::*;
use crate::{
    cache::Cache,
    registry::RegistryConfig,
    store::{
        Store,
        embedded::{EmbeddedConfig, EmbeddedStore},
    },
};

fn pod(name: String) -> Pod {
    Pod {
        metadata: Some(ObjectMeta {
            uid: name.clone(),
            name,
            namespace: "default".into(),
            ..ObjectMeta::default()
        }),
        ..Pod::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routine_is_written_slowly_and_trouble_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
    let store: Arc<dyn Store> = Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap());
    let cache = Cache::start(store.clone()).await;
    let registry = Registry::new(store, cache.clone(), RegistryConfig::default());
    registry.ensure_bootstrap().await.unwrap();
    let recorder = Recorder::start(registry, CancellationToken::new());
    let events = cache.reader::<Event>();
    let count = |reason: &str| {
        let snapshot = events.snapshot();
        snapshot.objects.values().filter(|event| event.reason == reason).count()
    };

    let begun = Instant::now();
    const ROUTINE: usize = 600;
    for number in 0..ROUTINE {
        recorder.routine(&pod(format!("p{number}")), "Scheduled", "somewhere");
    }
    recorder.warning(&pod("sick".into()), "FailedScheduling", "nowhere");
    let deadline = begun + Duration::from_secs(60);
    while count("FailedScheduling") == 0 {
        assert!(Instant::now() < deadline, "trouble is not told");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(count("Scheduled") < ROUTINE, "trouble waited behind the routine");
    while count("Scheduled") < ROUTINE {
        let written = count("Scheduled");
        let gatherings = u32::try_from(written.div_ceil(ROUTINE_CHUNK)).unwrap();
        assert!(
            begun.elapsed() >= GATHER * gatherings,
            "{written} after {:?}",
            begun.elapsed()
        );
        assert!(Instant::now() < deadline, "only {written} are written");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(recorder.dropped(), 0);
}
