//! The embedded engine: redb, for one control process.
//!
//! A writer thread takes all transactions that wait into one durable redb commit. Each keeps its own conditions, revision and
//! result; nobody is told anything (not even of a conflict, which may be with a neighbour in the same commit) before that commit
//! returned. A log of changes in the same file is what watches resume from; it is compacted by age and size. When the disk
//! is full or fails, writes are refused with the reason and the file is opened again until that works, see [`disk`].

mod disk;
mod group;
mod log;
mod watch;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use redb::{
    Database, MultimapTableHandle as _, ReadTransaction, ReadableDatabase, ReadableTable as _, TableDefinition,
    TableHandle as _,
};
use tokio::sync::{broadcast, mpsc, oneshot, watch as latest};

use self::disk::{Disk, Opener};
use super::{ChangeSet, DiskEffect, Key, Listing, Record, Revision, Store, StoreError, Transaction, Watch, frame};

// The tables' names bear the version of what is in them: a file with others was written by a newer version of control, which may keep
// its records elsewhere. Here it would look empty.

/// Key with prefix -> revision of the last write, framed value.
const RECORDS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("records_v1");
/// Revision -> encoded [`log::LogEntry`].
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log_v1");
/// The counters below.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters_v1");
/// The revision of the last write.
const REVISION: &str = "revision";
/// The log has everything after this revision.
const COMPACTED: &str = "compacted";
/// Bytes in the log.
const LOG_BYTES: &str = "log_bytes";

/// Bounds of the embedded engine.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// How long changes are kept for watches.
    pub log_age: Duration,
    /// Bytes of changes that are kept at most.
    pub log_bytes: u64,
    /// Bytes of redb's page cache.
    pub cache_bytes: usize,
    /// How often a watch that has nothing to tell gives a bookmark.
    pub bookmark_interval: Duration,
    /// After a failure of the disk, the first wait before the file is opened again; doubles up to two seconds.
    pub reopen_wait: Duration,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            log_age: Duration::from_secs(600),
            log_bytes: 64 * 1024 * 1024,
            cache_bytes: 8 * 1024 * 1024,
            bookmark_interval: Duration::from_secs(2),
            reopen_wait: Duration::from_millis(100),
        }
    }
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("{path} is in use by another process")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is not a database of ours, or is damaged beyond repair.
    #[error("{path} cannot be opened")]
    Database {
        /// The file.
        path: PathBuf,
        /// What redb says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It has tables that are not known here.
    #[error(
        "{path} was written by a newer orlop-control: it has the table {table}, and this one knows {known}: start the newer one again"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The first that is not known.
        table: String,
        /// Those that are.
        known: String,
    },
    /// The writer thread cannot be started.
    #[error("the writer thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// The embedded store. Closing waits for what was accepted: drop it and the writer ends after its last commit.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    requests: Option<mpsc::Sender<Request>>,
    writer: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    disk: Disk,
    config: EmbeddedConfig,
    /// The last revision whose commit returned.
    revision: latest::Sender<Revision>,
    /// What each commit changed, sent after `revision` was set.
    live: broadcast::Sender<Arc<Vec<ChangeSet>>>,
    /// Wakes the writer when a read finds that the database is to be opened again. Weak: it does not keep the writer alive.
    wake: OnceLock<mpsc::WeakSender<Request>>,
}

struct Request {
    transaction: Transaction,
    reply: oneshot::Sender<Result<Revision, StoreError>>,
}

/// Requests that wait for the writer; who comes later waits for a place.
const QUEUE: usize = 4096;
/// Commits that a watch may be behind before it goes back to the log.
const LIVE: usize = 1024;

impl EmbeddedStore {
    /// Opens or creates the file, exclusively.
    pub fn open(path: &Path, config: EmbeddedConfig) -> Result<Self, OpenError> {
        // Whoever opens it to write changes it. One that was not closed in good order cannot be opened otherwise: it is looked at when
        // redb has repaired it.
        let read_only = redb::Builder::new()
            .set_cache_size(config.cache_bytes)
            .open_read_only(path);
        if let Ok(database) = read_only {
            refuse_newer(path, &database)?;
        }
        let opener = disk::file(path, config.cache_bytes);
        Self::open_with(path, opener, config)
    }

    fn open_with(path: &Path, opener: Opener, config: EmbeddedConfig) -> Result<Self, OpenError> {
        let (disk, revision) = Disk::open(path, opener)?;
        let shared = Arc::new(Shared {
            disk,
            config,
            revision: latest::Sender::new(revision),
            live: broadcast::Sender::new(LIVE),
            wake: OnceLock::new(),
        });
        let (requests, queue) = mpsc::channel(QUEUE);
        shared.wake.get_or_init(|| requests.downgrade());
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn({
                let shared = shared.clone();
                move || writer::run(&shared, queue)
            })
            .map_err(OpenError::Thread)?;
        Ok(Self {
            shared,
            requests: Some(requests),
            writer: Some(writer),
        })
    }
}

#[cfg(test)]
impl EmbeddedStore {
    /// As [`Self::open`], over what a test puts in the file's place.
    pub(super) fn open_on<B: redb::StorageBackend>(
        path: &Path,
        backend: impl Fn() -> B + Send + Sync + 'static,
        config: EmbeddedConfig,
    ) -> Result<Self, OpenError> {
        let opener: Opener = Box::new(move |_| redb::Builder::new().create_with_backend(backend()));
        Self::open_with(path, opener, config)
    }

    fn database(&self) -> Arc<Database> {
        self.shared.disk.database().expect("an open database")
    }

    /// Forgets the log up to a revision.
    pub(super) fn compact_to(&self, revision: Revision) -> Result<(), redb::Error> {
        let transaction = self.database().begin_write()?;
        transaction.open_table(LOG)?.retain(|at, _| at > revision)?;
        transaction.open_table(COUNTERS)?.insert(COMPACTED, revision)?;
        Ok(transaction.commit()?)
    }

    /// Writes bytes without a frame, as a revision of its own.
    pub(super) fn write_raw(&self, key: &Key, bytes: &[u8]) -> Result<(), redb::Error> {
        let transaction = self.database().begin_write()?;
        let revision = {
            let mut counters = transaction.open_table(COUNTERS)?;
            let revision = counters.get(REVISION)?.map_or(0, |guard| guard.value()) + 1;
            counters.insert(REVISION, revision)?;
            transaction
                .open_table(RECORDS)?
                .insert(full(key).as_str(), (revision, bytes))?;
            let change = log::LogChange {
                key: full(key),
                now: Some(bytes::Bytes::copy_from_slice(bytes)),
                before: None,
            };
            let entry = log::LogEntry {
                time: log::now(),
                changes: vec![change],
            };
            let row = prost::Message::encode_to_vec(&entry);
            transaction.open_table(LOG)?.insert(revision, row.as_slice())?;
            revision
        };
        transaction.commit()?;
        self.shared.revision.send_replace(revision);
        Ok(())
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.requests.take();
        if let Some(writer) = self.writer.take() {
            // A panic of the writer was reported by its thread; whoever waited was told "unavailable".
            let _ = writer.join();
        }
    }
}

/// Refuses a file that has a table which this version does not know.
fn refuse_newer(path: &Path, database: &impl ReadableDatabase) -> Result<(), OpenError> {
    let known = [RECORDS.name(), LOG.name(), COUNTERS.name()];
    let unknown = || -> Result<Option<String>, redb::Error> {
        let transaction = database.begin_read()?;
        let tables = transaction.list_tables()?.map(|table| table.name().to_owned());
        let others = transaction.list_multimap_tables()?;
        let mut tables = tables.chain(others.map(|table| table.name().to_owned()));
        Ok(tables.find(|table| !known.contains(&table.as_str())))
    };
    match unknown() {
        Ok(None) => Ok(()),
        Ok(Some(table)) => Err(OpenError::Newer {
            path: path.to_owned(),
            table,
            known: known.join(", "),
        }),
        Err(error) => Err(OpenError::Database {
            path: path.to_owned(),
            source: Box::new(error),
        }),
    }
}

/// Makes the tables and reads the revision.
fn prepare(database: &Database) -> Result<Revision, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    let revision = {
        transaction.open_table(RECORDS)?;
        transaction.open_table(LOG)?;
        let mut counters = transaction.open_table(COUNTERS)?;
        let revision = counters.get(REVISION)?.map_or(0, |guard| guard.value());
        // A commit that failed half-way may stand in the file and not be synced yet: with this it is, before anybody sees it.
        counters.insert(REVISION, revision)?;
        revision
    };
    transaction.commit()?;
    Ok(revision)
}

/// The key as redb has it.
fn full(key: &Key) -> String {
    [frame::PREFIX, key.as_str()].concat()
}

/// What a row of the log says, for who checks it from outside.
#[doc(hidden)]
pub fn logged(row: &[u8], revision: Revision) -> Option<ChangeSet> {
    use prost::Message as _;
    log::LogEntry::decode(row).ok()?.into_set(revision).ok()
}

/// The key without the engine's prefix.
fn short(full: &str) -> Key {
    Key::from_text(full.strip_prefix(frame::PREFIX).unwrap_or(full))
}

impl Shared {
    /// Reads from the database as it is now.
    fn read<T>(&self, work: impl FnOnce(&ReadTransaction) -> Result<T, ReadError>) -> Result<T, StoreError> {
        let database = self.disk.database()?;
        let outcome = database
            .begin_read()
            .map_err(ReadError::from)
            .and_then(|read| work(&read));
        drop(database);
        outcome.map_err(|error| match error {
            ReadError::Store(error) => error,
            ReadError::Engine(error) => self.unreadable(error),
        })
    }

    /// A read failed: if that was the disk, the writer opens the database again.
    fn unreadable(&self, error: redb::Error) -> StoreError {
        if !matches!(
            error,
            redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::LockPoisoned(_)
        ) {
            return StoreError::Unavailable(Box::new(error));
        }
        self.disk.failed(&error);
        if let Some(requests) = self.wake.get().and_then(mpsc::WeakSender::upgrade) {
            let (reply, _nobody) = oneshot::channel();
            let transaction = Transaction::default();
            // A full queue wakes the writer as well.
            let _ = requests.try_send(Request { transaction, reply });
        }
        self.disk.told(DiskEffect::NotRead)
    }

    fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        self.read(|read| {
            let records = read.open_table(RECORDS)?;
            let Some(guard) = records.get(full(key).as_str())? else {
                return Ok(None);
            };
            let (revision, framed) = guard.value();
            Ok(Some(Record {
                key: key.clone(),
                value: frame::unframe(key, framed)?,
                revision,
            }))
        })
    }

    fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let start = format!("{}{prefix}", frame::PREFIX);
        self.read(|read| {
            let counters = read.open_table(COUNTERS)?;
            let revision = counters.get(REVISION)?.map_or(0, |guard| guard.value());
            let table = read.open_table(RECORDS)?;
            let mut records = Vec::new();
            for row in table.range(start.as_str()..)? {
                let (key, value) = row?;
                if !key.value().starts_with(&start) {
                    break;
                }
                let (written, framed) = value.value();
                let key = short(key.value());
                if let Some(value) = frame::unframe_or_report(&key, framed)? {
                    records.push(Record {
                        key,
                        value,
                        revision: written,
                    });
                }
            }
            Ok(Listing { revision, records })
        })
    }
}

/// Why a read failed.
enum ReadError {
    /// It is told as it is.
    Store(StoreError),
    /// redb could not read.
    Engine(redb::Error),
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// redb has an error type for each step, and all of them become one.
macro_rules! engine_errors {
    ($($error:ty),*) => {
        $(impl From<$error> for ReadError {
            fn from(error: $error) -> Self {
                Self::Engine(error.into())
            }
        })*
    };
}
engine_errors!(redb::TransactionError, redb::TableError, redb::StorageError);

/// Runs what may wait for the disk outside of the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Unavailable(Box::new(error))),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the store's writer has ended")]
struct WriterGone;

#[async_trait]
impl Store for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        // One look-up, nearly always in redb's cache or the page cache: cheaper here than on another thread.
        self.shared.get(key)
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let (shared, prefix) = (self.shared.clone(), prefix.to_owned());
        blocking(move || shared.list(&prefix)).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        transaction.check_limits()?;
        let gone = || StoreError::Unavailable(Box::new(WriterGone));
        let (reply, result) = oneshot::channel();
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests
            .send(Request { transaction, reply })
            .await
            .map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        watch::open(self.shared.clone(), prefix.to_owned(), after).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(*self.shared.revision.borrow())
    }

    fn trouble(&self) -> Option<String> {
        self.shared.disk.trouble()
    }
}
