//! The embedded engine, and what only it promises.

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::store::embedded::{EmbeddedConfig, EmbeddedStore, OpenError};

pub(super) struct Embedded {
    dir: TempDir,
    store: Option<Arc<EmbeddedStore>>,
}

pub(super) async fn bench() -> Embedded {
    let dir = tempfile::tempdir().unwrap();
    let store = Some(Arc::new(open(&dir.path().join("store.redb"))));
    Embedded { dir, store }
}

fn config() -> EmbeddedConfig {
    EmbeddedConfig {
        bookmark_interval: Duration::from_millis(100),
        ..EmbeddedConfig::default()
    }
}

/// Watches that were just dropped may hold the file for a moment.
fn open(path: &std::path::Path) -> EmbeddedStore {
    for _ in 0..100 {
        match EmbeddedStore::open(path, config()) {
            Err(OpenError::InUse { .. }) => std::thread::sleep(Duration::from_millis(20)),
            other => return other.unwrap(),
        }
    }
    panic!("{} stays in use", path.display());
}

impl Embedded {
    fn path(&self) -> PathBuf {
        self.dir.path().join("store.redb")
    }
}

#[async_trait]
impl Bench for Embedded {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone().unwrap()
    }
    async fn restart(&mut self) {
        self.store.take();
        self.store = Some(Arc::new(open(&self.path())));
    }
    async fn compact(&self, revision: Revision) {
        self.store.as_ref().unwrap().compact_to(revision).unwrap();
    }
    async fn write_raw(&self, key: &Key, bytes: &[u8]) {
        self.store.as_ref().unwrap().write_raw(key, bytes).unwrap();
    }
}

#[tokio::test]
async fn a_second_process_is_refused() {
    let bench = bench().await;
    let error = EmbeddedStore::open(&bench.path(), config()).err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_in_the_file_of_a_process_that_is_killed() {
    let bench = bench().await;
    let store = bench.store();
    let commits = (0..50).map(|number| store.commit(all([put(&format!("pods/{number}"), "1")])));
    let revisions = futures::future::join_all(commits).await;
    // The file as it is now, without a word of the process that has it open.
    let copy = bench.dir.path().join("copy.redb");
    std::fs::copy(bench.path(), &copy).unwrap();
    let found: Arc<dyn Store> = Arc::new(open(&copy));
    for (number, revision) in revisions.into_iter().enumerate() {
        let expected = Some(("1".to_owned(), revision.unwrap()));
        assert_eq!(value(&found, &format!("pods/{number}")).await, expected);
    }
    assert_eq!(write(&found, put("pods/next", "1")).await, 51);
}

#[tokio::test]
async fn what_is_no_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, vec![7_u8; 8192]).unwrap();
    let error = EmbeddedStore::open(&path, config()).err().unwrap();
    assert!(matches!(error, OpenError::Database { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![7_u8; 8192], "it is left as it was");
}

#[tokio::test]
async fn a_file_whose_making_was_cut_off_is_made_again() {
    // Nothing of it, its first page, all of it; and the same when the name was taken by an empty file.
    for (left, named) in [(0, false), (4096, false), (1 << 20, false), (4096, true)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        std::fs::write(dir.path().join("store.new"), vec![0_u8; left]).unwrap();
        if named {
            std::fs::write(&path, []).unwrap();
        }
        let store: Arc<dyn Store> = Arc::new(open(&path));
        assert_eq!(write(&store, put("pods/a", "1")).await, 1);
        assert!(!dir.path().join("store.new").exists());
        drop(store);
        let again: Arc<dyn Store> = Arc::new(open(&path));
        assert_eq!(value(&again, "pods/a").await, Some(("1".to_owned(), 1)));
    }
}

#[tokio::test]
async fn a_file_that_another_process_makes_is_left_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let other = std::fs::File::create(dir.path().join("store.new")).unwrap();
    other.lock().unwrap();
    let refused = EmbeddedStore::open(&path, EmbeddedConfig::default())
        .map(drop)
        .unwrap_err();
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
    assert!(!path.exists());
    drop(other);
    drop(open(&path));
}

#[tokio::test]
async fn the_log_is_compacted_by_size_and_by_age() {
    let dir = tempfile::tempdir().unwrap();
    for config in [
        EmbeddedConfig {
            log_bytes: 2000,
            ..config()
        },
        EmbeddedConfig {
            log_age: Duration::ZERO,
            ..config()
        },
    ] {
        let path = dir.path().join(format!("{}.redb", config.log_bytes));
        let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&path, config).unwrap());
        let mut last = 0;
        for number in 0..100 {
            last = write(&store, put("pods/a", &format!("{number:050}"))).await;
        }
        let error = store.watch("pods/", 1).await.err().unwrap();
        let StoreError::Compacted { requested: 1, oldest } = error else {
            panic!("{error}")
        };
        assert!(oldest > 1 && oldest <= last);
        let _watch = store.watch("pods/", oldest).await.unwrap();
        assert_eq!(value(&store, "pods/a").await.unwrap().1, last, "records stay");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_missed_the_live_buffer_goes_back_to_the_log() {
    let bench = bench().await;
    let store = bench.store();
    let mut watch = store.watch("pods/", 0).await.unwrap();
    // One commit each: more than the buffer holds.
    for number in 0..1500 {
        write(&store, put("pods/a", &number.to_string())).await;
    }
    let mut last = 0;
    for number in 0..1500 {
        let set = next(&mut watch, &mut last).await.unwrap();
        assert!(
            shorts(&set)[0].starts_with(["+", "~"][usize::from(number > 0)]),
            "{set:?}"
        );
        assert_eq!(set.revision, number + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_with_a_neighbour_of_the_same_group_is_told_after_the_commit() {
    let bench = bench().await;
    let store = bench.store();
    let commits = (0..64).map(|number| store.commit(all([if_(put("pods/a", &number.to_string()), Expected::Absent)])));
    let results = futures::future::join_all(commits).await;
    let won: Vec<Revision> = results
        .iter()
        .filter_map(|result| result.as_ref().ok().copied())
        .collect();
    assert_eq!(won.len(), 1);
    let stored = value(&store, "pods/a").await.unwrap().1;
    for result in results {
        match result {
            Ok(revision) => assert_eq!(revision, stored),
            Err(StoreError::Conflict { found, .. }) => assert_eq!(found, Some(stored)),
            Err(other) => panic!("{other}"),
        }
    }
}

/// A file as the first version wrote it, with its tables spelled out: who changes what is in them gives them other names, and goes on
/// reading these.
fn first_version(path: &std::path::Path) {
    use redb::TableDefinition;
    let records: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("records_v1");
    let log: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log_v1");
    let counters: TableDefinition<'_, &str, u64> = TableDefinition::new("counters_v1");
    let database = redb::Database::create(path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut records = transaction.open_table(records).unwrap();
        let value = b"orlp\x01\x01\0\0\x002";
        records
            .insert("/orlop/v1/pods/default/a", (2, value.as_slice()))
            .unwrap();
        let mut log = transaction.open_table(log).unwrap();
        for (revision, row) in [
            (
                1,
                "0880d8c1a28c3412260a182f6f726c6f702f76312f706f64732f64656661756c742f61120a6f726c70010100000031",
            ),
            (
                2,
                "0881d8c1a28c3412320a182f6f726c6f702f76312f706f64732f64656661756c742f61120a6f726c700101000000321a0a6f\
                 726c70010100000031",
            ),
        ] {
            log.insert(revision, hex::decode(row).unwrap().as_slice()).unwrap();
        }
        let mut counters = transaction.open_table(counters).unwrap();
        counters.insert("revision", 2).unwrap();
        counters.insert("log_bytes", 105).unwrap();
    }
    transaction.commit().unwrap();
}

#[tokio::test]
async fn a_file_of_the_first_version_is_read_and_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    first_version(&path);
    let store: Arc<dyn Store> = Arc::new(open(&path));
    assert_eq!(value(&store, "pods/default/a").await, Some(("2".to_owned(), 2)));
    let mut last = 0;
    let mut watch = store.watch("pods/", 0).await.unwrap();
    assert_eq!(
        shorts(&next(&mut watch, &mut last).await.unwrap()),
        ["+pods/default/a=1"]
    );
    assert_eq!(
        shorts(&next(&mut watch, &mut last).await.unwrap()),
        ["~pods/default/a=2<1"]
    );
    assert_eq!(write(&store, put("pods/default/a", "3")).await, 3);
}

#[tokio::test]
async fn a_file_of_a_newer_version_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let newer: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("records_v2");
    let database = redb::Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let record = transaction
        .open_table(newer)
        .unwrap()
        .insert("pods/default/a", b"1".as_slice())
        .map(drop);
    record.unwrap();
    transaction.commit().unwrap();
    drop(database);
    let before = std::fs::read(&path).unwrap();
    let error = EmbeddedStore::open(&path, config()).err().unwrap();
    assert!(matches!(error, OpenError::Newer { .. }), "{error}");
    for what in [
        &*path.display().to_string(),
        "records_v2",
        "records_v1",
        "start the newer one again",
    ] {
        assert!(error.to_string().contains(what), "{error}");
    }
    assert!(std::fs::read(&path).unwrap() == before, "the file was written to");
}
