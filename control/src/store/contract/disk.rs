//! The embedded engine on a disk that loses power, fills up and fails: at every single write, change of length and sync.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
};

use redb::StorageBackend;

use super::*;
use crate::store::embedded::{EmbeddedConfig, EmbeddedStore};

/// A disk in memory, as the kernel shows it: what was written is read at once, and is durable after a sync.
#[derive(Debug, Default)]
struct Platter {
    durable: Vec<u8>,
    seen: Vec<u8>,
    unsynced: Vec<Step>,
    steps: usize,
    fault: Option<(usize, Fault)>,
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// From then on nothing works.
    PowerLoss,
    /// This step fails, and later ones work. A sync that fails drops what it could not write, and says so once.
    Once(i32),
}

impl Step {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Write(at, data) => {
                bytes.resize(bytes.len().max(at + data.len()), 0);
                bytes[*at..at + data.len()].copy_from_slice(data);
            }
        }
    }
}

impl Platter {
    fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        match self.fault {
            Some((at, Fault::PowerLoss)) if self.steps > at => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some((at, Fault::Once(code))) if self.steps == at + 1 => Err(io::Error::from_raw_os_error(code)),
            _ => Ok(()),
        }
    }

    fn change(&mut self, change: Step) -> io::Result<()> {
        self.step()?;
        change.apply(&mut self.seen);
        self.unsynced.push(change);
        Ok(())
    }

    /// What a machine finds after power came back, when of the unsynced steps only these had reached the disk.
    fn image(&self, reached: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        let steps = self.unsynced.iter().enumerate();
        steps
            .filter(|(index, _)| reached(*index))
            .for_each(|(_, step)| step.apply(&mut image));
        image
    }
}

#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

impl Disk {
    fn of(image: Vec<u8>) -> Self {
        let disk = Self::default();
        disk.with(|platter| {
            platter.seen.clone_from(&image);
            platter.durable = image;
        });
        disk
    }

    /// What stands on it when the engine gives a new file its name: a database without tables.
    fn made() -> Self {
        static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
        let make = || {
            let disk = Self::default();
            let database = redb::Builder::new().create_with_backend(disk.clone()).unwrap();
            let image = disk.with(|platter| platter.image(|_| false));
            drop(database);
            image
        };
        Self::of(IMAGE.get_or_init(make).clone())
    }

    fn failing(at: usize, fault: Fault) -> Self {
        let disk = Self::made();
        disk.with(|platter| platter.fault = Some((at, fault)));
        disk
    }

    fn with<T>(&self, work: impl FnOnce(&mut Platter) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Opens the store on it. What the kernel shows and the disk does not have is forgotten first, as the engine does it.
    fn store(&self) -> Result<Arc<dyn Store>, crate::store::embedded::OpenError> {
        let disk = self.clone();
        let backend = move || {
            disk.with(|platter| {
                if matches!(platter.fault, Some((at, Fault::PowerLoss)) if platter.steps > at) {
                    // Nothing reaches a disk without power.
                    return;
                }
                for step in std::mem::take(&mut platter.unsynced) {
                    step.apply(&mut platter.durable);
                }
                platter.seen.clone_from(&platter.durable);
            });
            disk.clone()
        };
        let config = EmbeddedConfig {
            bookmark_interval: Duration::from_millis(100),
            reopen_wait: Duration::from_millis(1),
            ..EmbeddedConfig::default()
        };
        Ok(Arc::new(EmbeddedStore::open_on(Path::new("disk"), backend, config)?))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|platter| platter.seen.len()) as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|platter| {
            let at = usize::try_from(offset).unwrap();
            let found = platter
                .seen
                .get(at..at + out.len())
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(found);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|platter| platter.change(Step::Length(usize::try_from(len).unwrap())))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|platter| {
            let synced = platter.step();
            let unsynced = match platter.fault {
                Some((_, Fault::PowerLoss)) if synced.is_err() => return synced,
                _ => std::mem::take(&mut platter.unsynced),
            };
            if synced.is_ok() {
                unsynced.iter().for_each(|step| step.apply(&mut platter.durable));
            }
            synced
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        self.with(|platter| platter.change(Step::Write(at, data.to_vec())))
    }
}

/// Transactions of all sorts; the revision of each is its number, counted from 1.
fn workload() -> Vec<Transaction> {
    vec![
        all([put("pods/a", "1")]),
        all([put("pods/a", "2"), put("pods/b", "2"), put("services/c", "2")]),
        all([delete("pods/b"), put("pods/a", "3")]),
        all([put("pods/large", &"x".repeat(40_000)), delete("services/c")]),
        all([put("pods/a", "5")]),
    ]
}

/// What is there after so many of them.
fn expected(revision: Revision) -> BTreeMap<String, Bytes> {
    let mut records = BTreeMap::new();
    for operation in workload()
        .into_iter()
        .take(usize::try_from(revision).unwrap())
        .flat_map(|one| one.operations)
    {
        match operation.write {
            Write::Put(value) => records.insert(operation.key.to_string(), value),
            _ => records.remove(operation.key.as_str()),
        };
    }
    records
}

/// The store has exactly its revision's transactions, whole, and its log tells all of them.
async fn check(store: &Arc<dyn Store>, what: &str) -> Revision {
    let listing = store.list("").await.unwrap();
    let found: BTreeMap<String, Bytes> = listing
        .records
        .into_iter()
        .map(|record| (record.key.to_string(), record.value))
        .collect();
    assert_eq!(
        found,
        expected(listing.revision),
        "{what}: revision {}",
        listing.revision
    );
    let mut watch = store.watch("", 0).await.unwrap();
    let mut last = 0;
    for revision in 1..=listing.revision {
        assert_eq!(next(&mut watch, &mut last).await.unwrap().revision, revision, "{what}");
    }
    listing.revision
}

/// How many steps all of it takes.
async fn steps() -> usize {
    let disk = Disk::made();
    let store = disk.store().unwrap();
    for transaction in workload() {
        store.commit(transaction).await.unwrap();
    }
    drop(store);
    disk.with(|platter| platter.steps)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_is_lost_at_every_step() {
    for step in 0..steps().await {
        let disk = Disk::failing(step, Fault::PowerLoss);
        let mut acknowledged = 0;
        if let Ok(store) = disk.store() {
            for transaction in workload() {
                match store.commit(transaction).await {
                    Ok(revision) => acknowledged = revision,
                    Err(error) => {
                        assert!(matches!(error, StoreError::Disk { .. }), "step {step}: {error}");
                        break;
                    }
                }
            }
        }
        let scattered = |index: usize| (index * 31 + step * 17) % 7 < 3;
        let images = disk.with(|platter| {
            [
                platter.image(|_| false),
                platter.image(|_| true),
                platter.image(scattered),
            ]
        });
        for (number, image) in images.into_iter().enumerate() {
            let what = format!("step {step}, image {number}, {acknowledged} acknowledged");
            let store = Disk::of(image)
                .store()
                .unwrap_or_else(|error| panic!("{what}: {error:?}"));
            let found = check(&store, &what).await;
            assert!(
                found == acknowledged || found == acknowledged + 1,
                "{what}: revision {found}"
            );
            assert_eq!(write(&store, put("pods/next", "1")).await, found + 1, "{what}");
        }
    }
}

/// Commits as a client does who looks what became of a write in doubt.
async fn insist(store: &Arc<dyn Store>, transaction: &Transaction, revision: Revision, what: &str) {
    for _ in 0..1000 {
        match store.commit(transaction.clone()).await {
            Ok(written) => return assert_eq!(written, revision, "{what}"),
            Err(StoreError::Disk { effect, path, .. }) => {
                assert_eq!(path, Path::new("disk"));
                let current = loop {
                    match store.list("").await {
                        Ok(listing) => break listing.revision,
                        Err(StoreError::Disk { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
                        Err(other) => panic!("{what}: {other}"),
                    }
                };
                if current == revision {
                    assert_eq!(effect, crate::store::DiskEffect::Unknown, "{what}");
                    return;
                }
                assert_eq!(current, revision - 1, "{what}");
            }
            Err(other) => panic!("{what}: {other}"),
        }
    }
    panic!("{what}: the store does not take writes again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_fails_once_at_every_step_and_the_store_goes_on_by_itself() {
    for step in 0..steps().await {
        let code = [libc::ENOSPC, libc::EIO][step % 2];
        let what = format!("step {step} fails with {code}");
        let disk = Disk::failing(step, Fault::Once(code));
        // A process that cannot open its store ends, and is started again.
        let store = match disk.store() {
            Ok(store) => store,
            Err(_) => disk.store().unwrap_or_else(|error| panic!("{what}: {error:?}")),
        };
        let mut watch = store.watch("", 0).await.unwrap();
        for (number, transaction) in workload().iter().enumerate() {
            insist(&store, transaction, number as Revision + 1, &what).await;
        }
        let mut last = 0;
        for revision in 1..=5 {
            assert_eq!(next(&mut watch, &mut last).await.unwrap().revision, revision, "{what}");
        }
        assert_eq!(check(&store, &what).await, 5);
        assert_eq!(store.trouble(), None, "{what}");
        let image = disk.with(|platter| platter.image(|_| false));
        assert_eq!(check(&Disk::of(image).store().unwrap(), &what).await, 5, "durable");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_named_and_watches_stay_open() {
    let disk = Disk::default();
    let store = disk.store().unwrap();
    let mut watch = store.watch("", 0).await.unwrap();
    write(&store, put("pods/a", "1")).await;
    disk.with(|platter| platter.fault = Some((0, Fault::PowerLoss)));
    for effect in [crate::store::DiskEffect::Unknown, crate::store::DiskEffect::NotWritten] {
        let error = store.commit(all([put("pods/a", "2")])).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Disk { effect: told, .. } if *told == effect),
            "{error}"
        );
        assert!(
            error.to_string().starts_with("the store disk cannot be used: "),
            "{error}"
        );
    }
    assert!(store.trouble().unwrap().contains("the store disk cannot be written"));
    assert_eq!(
        store.revision().await.unwrap(),
        1,
        "readers of the cache wait for nothing"
    );
    disk.with(|platter| platter.fault = None);
    insist(&store, &all([put("pods/a", "2")]), 2, "healed").await;
    let mut last = 0;
    for revision in 1..=2 {
        assert_eq!(next(&mut watch, &mut last).await.unwrap().revision, revision);
    }
    assert_eq!(store.trouble(), None);
}
