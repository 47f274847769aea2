//! A real etcd on this machine, and what only it promises.

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions};

use etcd_server::EtcdServer;

use super::*;
use crate::store::etcd::{EtcdOptions, EtcdStore};

#[path = "../../../tests/outside/etcd_server.rs"]
mod etcd_server;

pub(crate) struct Etcd {
    server: EtcdServer,
    store: Arc<dyn Store>,
}

impl EtcdServer {
    async fn client(&self) -> Client {
        Client::connect([self.endpoint()], None).await.unwrap()
    }

    async fn store(&self) -> Arc<dyn Store> {
        let options = EtcdOptions {
            endpoints: vec![self.endpoint()],
            request_timeout: Duration::from_secs(3),
            bookmark_interval: Duration::from_millis(100),
            compact_interval: None,
            ..EtcdOptions::default()
        };
        let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.unwrap());
        for _ in 0..600 {
            if store.revision().await.is_ok() {
                return store;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd does not come up");
    }
}

pub(crate) async fn bench() -> Etcd {
    with_quota(0).await
}

async fn with_quota(bytes: u64) -> Etcd {
    let server = EtcdServer::start(bytes);
    let store = server.store().await;
    Etcd { server, store }
}

impl Etcd {
    /// The store through a connection of its own, as another process has it.
    pub(crate) async fn connect(&self) -> Arc<dyn Store> {
        self.server.store().await
    }

    pub(crate) fn stop(&mut self) {
        self.server.stop();
    }

    pub(crate) fn run(&mut self) {
        self.server.run();
    }
}

#[async_trait]
impl Bench for Etcd {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }
    async fn restart(&mut self) {
        self.server.stop();
        self.server.run();
        self.store = self.server.store().await;
    }
    async fn compact(&self, revision: Revision) {
        let options = CompactionOptions::new().with_physical();
        let revision = i64::try_from(revision).unwrap();
        self.server
            .client()
            .await
            .compact(revision, Some(options))
            .await
            .unwrap();
    }
    async fn write_raw(&self, key: &Key, bytes: &[u8]) {
        self.server
            .client()
            .await
            .put(format!("/orlop/v1/{key}"), bytes, None)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_calls_fail_in_time_and_a_watch_goes_on_afterwards() {
    let mut bench = bench().await;
    let store = bench.store();
    let mut last = store.revision().await.unwrap();
    let mut watch = store.watch("pods/", last).await.unwrap();
    write(&store, put("pods/a", "1")).await;
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["+pods/a=1"]);

    bench.server.stop();
    let calls = async {
        let error = store.commit(all([put("pods/a", "2")])).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        let error = store.get(&key("pods/a")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        let error = store.list("pods/").await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    };
    tokio::time::timeout(Duration::from_secs(30), calls).await.unwrap();

    bench.server.run();
    // Through another connection, before the watch is back.
    let other = bench.server.store().await;
    write(&other, put("pods/a", "3")).await;
    write(&other, delete("pods/a")).await;
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["~pods/a=3<1"]);
    assert_eq!(shorts(&next(&mut watch, &mut last).await.unwrap()), ["-pods/a<3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn markers_are_invisible() {
    let bench = bench().await;
    let store = bench.store();
    let start = store.revision().await.unwrap();
    let mut everything = store.watch("", start).await.unwrap();
    write(&store, put("pods/a", "1")).await;
    let mut pods = store.watch("pods/", start).await.unwrap();
    let mut last = start;
    assert_eq!(shorts(&next(&mut pods, &mut last).await.unwrap()), ["+pods/a=1"]);
    write(&store, put("pods/b", "1")).await;
    last = start;
    assert_eq!(shorts(&next(&mut everything, &mut last).await.unwrap()), ["+pods/a=1"]);
    assert_eq!(shorts(&next(&mut everything, &mut last).await.unwrap()), ["+pods/b=1"]);
    assert_eq!(store.list("").await.unwrap().records.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_is_compacted_by_us() {
    let bench = bench().await;
    let options = EtcdOptions {
        endpoints: vec![bench.server.endpoint()],
        compact_interval: Some(Duration::from_millis(200)),
        ..EtcdOptions::default()
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.unwrap());
    let first = write(&store, put("pods/a", "1")).await;
    for _ in 0..100 {
        write(&store, put("pods/a", "2")).await;
        match store.watch("pods/", first).await {
            Err(StoreError::Compacted { oldest, .. }) => {
                assert!(oldest > first);
                return;
            }
            Err(other) => panic!("{other}"),
            Ok(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    panic!("it is never compacted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_overtaken_by_a_compaction_is_told() {
    let bench = bench().await;
    let store = bench.store();
    let mut last = write(&store, put("pods/victim", "1")).await;
    let mut watch = store.watch("pods/", last).await.unwrap();
    // Far more than what is on its way at a time, to a reader that does not read.
    let large = "x".repeat(32 * 1024);
    for _ in 0..300 {
        write(&store, put("pods/large", &large)).await;
    }
    write(&store, delete("pods/victim")).await;
    let end = write(&store, put("pods/end", "1")).await;
    bench.compact(end).await;
    loop {
        match next(&mut watch, &mut last).await {
            Ok(set) if shorts(&set) == ["-pods/victim<1"] => return,
            Ok(set) => assert!(set.revision < end, "the deletion was not told"),
            Err(StoreError::Compacted { .. }) => return,
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_records_are_read_in_messages_of_bounded_size() {
    let bench = bench().await;
    let options = EtcdOptions {
        endpoints: vec![bench.server.endpoint()],
        message_bytes: 4 << 20,
        ..EtcdOptions::default()
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::connect(options).await.unwrap());
    let start = store.revision().await.unwrap();
    let large = "x".repeat(1 << 20);
    for number in 0..12 {
        write(&store, put(&format!("pods/large-{number:02}"), &large)).await;
    }
    for number in 0..600 {
        write(&store, put(&format!("pods/small-{number:03}"), "1")).await;
    }
    let listing = store.list("pods/").await.unwrap();
    assert_eq!(listing.records.len(), 612);
    assert_eq!(listing.records[11].value.len(), large.len());
    // All of it comes at once for whoever is so far behind.
    let mut last = start;
    let mut behind = store.watch("pods/", start).await.unwrap();
    let told = next(&mut behind, &mut last).await;
    assert!(
        matches!(told, Err(StoreError::Compacted { requested, oldest }) if requested == start && oldest > start),
        "{told:?}"
    );
    last = listing.revision;
    let mut watch = store.watch("pods/", last).await.unwrap();
    write(&store, put("pods/small-000", "2")).await;
    assert_eq!(
        shorts(&next(&mut watch, &mut last).await.unwrap()),
        ["~pods/small-000=2<1"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_full_says_so_serves_reads_and_takes_writes_again() {
    let bench = with_quota(16 << 20).await;
    let store = bench.store();
    let first = write(&store, put("pods/first", "1")).await;
    let mut last = first;
    let mut watch = store.watch("pods/", last).await.unwrap();
    let large = "x".repeat(1 << 20);
    let mut written = Vec::new();
    let error = loop {
        let name = format!("pods/large-{:02}", written.len());
        match store.commit(all([put(&name, &large)])).await {
            Ok(revision) => written.push((name, revision)),
            Err(error) => break error,
        }
        assert!(written.len() < 64, "it is never full");
    };
    let StoreError::Full { reason } = &error else {
        panic!("{error}")
    };
    assert!(reason.contains("database space exceeded"), "{reason}");
    assert!(error.to_string().contains("etcdctl alarm disarm"), "{error}");
    assert_eq!(store.trouble(), Some(error.to_string()));

    // What is there can be read, and who was watching was told. The write that crosses the quota may be there.
    let count = store.list("pods/").await.unwrap().records.len();
    assert!(
        count == written.len() + 1 || count == written.len() + 2,
        "{count} records, and {} were acknowledged",
        written.len() + 1
    );
    for (name, revision) in &written {
        let set = next(&mut watch, &mut last).await.unwrap();
        assert_eq!(set.revision, *revision);
        assert_eq!(store.get(&key(name)).await.unwrap().unwrap().revision, *revision);
    }
    // A watch that begins in the past is told of it, and of what can still be done: deletions.
    let mut behind = store.watch("pods/first", first - 1).await.unwrap();
    let mut after = first - 1;
    assert_eq!(shorts(&next(&mut behind, &mut after).await.unwrap()), ["+pods/first=1"]);
    write(&store, delete("pods/first")).await;
    assert_eq!(shorts(&next(&mut behind, &mut after).await.unwrap()), ["-pods/first<1"]);
    assert!(store.trouble().is_some(), "a deletion needs no room");
    let error = store.commit(all([put("pods/small", "1")])).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");

    let mut unmarked = store.watch("services/", first - 1).await.unwrap();
    let bookmark = unmarked.next().await.unwrap().unwrap();
    assert_eq!(
        bookmark.revision,
        first - 1,
        "nobody knows yet that there is nothing to tell"
    );

    // As an operator makes room.
    for record in store.list("pods/").await.unwrap().records {
        write(&store, delete(record.key.as_str())).await;
    }
    bench.compact(store.revision().await.unwrap()).await;
    let mut maintenance = bench.server.client().await.maintenance_client();
    maintenance.defragment().await.unwrap();
    let raised = maintenance
        .alarm(AlarmAction::Get, AlarmType::None, None)
        .await
        .unwrap();
    for alarm in raised.alarms() {
        let mut options = AlarmOptions::new();
        options.with_member(alarm.member_id());
        maintenance
            .alarm(AlarmAction::Deactivate, alarm.alarm(), Some(options))
            .await
            .unwrap();
    }
    write(&store, put("pods/small", "1")).await;
    assert_eq!(store.trouble(), None);
    let caught_up = async { while unmarked.next().await.unwrap().unwrap().revision < first {} };
    tokio::time::timeout(Duration::from_secs(30), caught_up)
        .await
        .expect("a watch that could not mark the past does so later");
}
