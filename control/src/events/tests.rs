use std::collections::BTreeMap;

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

struct World {
    recorder: Recorder,
    cache: Cache,
    _folder: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
        let store: Arc<dyn Store> = Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap());
        let cache = Cache::start(store.clone()).await;
        let registry = Registry::new(store, cache.clone(), RegistryConfig::default());
        registry.ensure_bootstrap().await.unwrap();
        Self {
            recorder: Recorder::start(registry, CancellationToken::new()),
            cache,
            _folder: folder,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_notes_are_one_event_and_different_ones_are_not() {
    let world = World::new().await;
    let recorder = &world.recorder;
    let other = recorder.from_component("other");
    let pod = pod("p".into());
    for _ in 0..3 {
        recorder.warning(&pod, "Failed", "why");
    }
    recorder.warning(&pod, "Failed", "another why");
    recorder.warning(&pod, "Unhealthy", "why");
    recorder.normal(&pod, "Failed", "why");
    other.warning(&pod, "Failed", "why");
    let from = |host: &str, count| {
        let note = recorder.note(&pod, WARNING, "Failed", "why".into());
        let source = EventSource {
            component: "what a node says it is".into(),
            host: host.into(),
        };
        recorder.event(Event {
            source: Some(source),
            count,
            ..note
        });
    };
    from("n1", 5);
    from("n1", 2);
    from("n2", 0);
    let told = |event: Arc<Event>| {
        let source = event.source.clone().unwrap();
        assert_eq!(event.involved_object.as_ref().unwrap().uid, "p");
        assert_eq!(
            (&event.reporting_component, &event.reporting_instance),
            (&source.component, &source.host)
        );
        assert_eq!(event.namespace(), "default");
        let says = format!("{} {} {}", event.r#type, event.reason, event.message);
        (format!("{}@{}: {says}", source.component, source.host), event.count)
    };
    let expect = async |expected: &[(&str, i32)]| {
        let expected: BTreeMap<String, i32> = expected
            .iter()
            .map(|(who, count)| ((*who).to_owned(), *count))
            .collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let events = world.cache.reader::<Event>().snapshot().objects;
            let (number, all) = (events.len(), events.values().map(told).collect::<BTreeMap<_, _>>());
            if number == expected.len() && all == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{number} events: {all:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut expected = [
        ("orlop-control@: Warning Failed why", 3),
        ("orlop-control@: Warning Failed another why", 1),
        ("orlop-control@: Warning Unhealthy why", 1),
        ("orlop-control@: Normal Failed why", 1),
        ("other@: Warning Failed why", 1),
        ("orlop-control@n1: Warning Failed why", 7),
        ("orlop-control@n2: Warning Failed why", 1),
    ];
    expect(&expected).await;
    // What is written already is counted up.
    recorder.warning(&pod, "Failed", "why");
    expected[0].1 = 4;
    expect(&expected).await;
    assert_eq!(recorder.dropped(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routine_is_written_slowly_and_trouble_at_once() {
    let world = World::new().await;
    let (recorder, events) = (world.recorder.clone(), world.cache.reader::<Event>());
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
