//! The database on a disk that may be full, fail or hang.
//!
//! redb latches after its first I/O error: everything afterwards fails, so the database is closed and opened again until that
//! works. A failed fsync drops what it could not write and says so once (the page cache may go on showing it): before the
//! file is opened it is synced, and what the page cache has of it is dropped, so that what is read then is on the disk.
//!
//! Invariant: a file that lacks a revision which somebody was told of is not served again.

use std::{
    fmt,
    fs::{self, File, TryLockError},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use redb::Database;

use super::{OpenError, prepare, refuse_newer};
use crate::store::{DiskEffect, Revision, StoreError};

/// Opens the database. The first time it may make the file; afterwards a missing file is a failure like any other.
pub(super) type Opener = Box<dyn Fn(bool) -> Result<Database, redb::DatabaseError> + Send + Sync>;

/// A commit that takes longer is told as trouble, although it may end well.
const STALLED: Duration = Duration::from_secs(3);

/// The database and what is known about its disk.
pub(super) struct Disk {
    path: PathBuf,
    open: Opener,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// `None` while it is being opened again.
    database: Option<Arc<Database>>,
    failure: Option<Failure>,
    /// Since when the writer waits for the disk.
    writing_since: Option<Instant>,
}

/// Why the disk is not used.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    reason: String,
    full: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.reason)
    }
}

impl From<&redb::Error> for Failure {
    fn from(error: &redb::Error) -> Self {
        let full = matches!(
            error,
            redb::Error::Io(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        );
        Self {
            reason: error.to_string(),
            full,
        }
    }
}

/// What opens a file.
pub(super) fn file(path: &Path, cache_bytes: usize) -> Opener {
    let path = path.to_owned();
    Box::new(move |create| {
        let mut builder = redb::Builder::new();
        builder.set_cache_size(cache_bytes);
        if create && is_missing(&path)? {
            return make(&path, &builder);
        }
        settle(&path)?;
        builder.open(&path)
    })
}

/// Whether it was never made. An empty file has nothing that could be lost.
fn is_missing(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(found) => Ok(found.is_file() && found.len() == 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// Makes the file whole under another name first: one whose making was cut off is nothing that could be opened again.
fn make(path: &Path, builder: &redb::Builder) -> Result<Database, redb::DatabaseError> {
    let new = path.with_extension("new");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&new)?;
    // Held until the database is closed: of two processes that start at once only one makes the file.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(redb::DatabaseError::DatabaseAlreadyOpen),
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    if !is_missing(path)? {
        // The other was quicker and has ended; what was opened above may be its whole file, renamed since.
        return builder.open(path);
    }
    file.set_len(0)?;
    let database = builder.create_file(file)?;
    fs::rename(&new, path)?;
    // The folder of a name alone is the one that the process is in.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
    Ok(database)
}

/// Writes what the page cache has of the file, then forgets it.
fn settle(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    file.sync_all()?;
    // SAFETY: a plain system call on a descriptor that is open.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

impl Disk {
    /// Opens the database; returns its revision, too.
    pub(super) fn open(path: &Path, open: Opener) -> Result<(Self, Revision), OpenError> {
        let broken = |source: Box<dyn std::error::Error + Send + Sync>| OpenError::Database {
            path: path.to_owned(),
            source,
        };
        let database = open(true).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { path: path.to_owned() },
            other => broken(Box::new(other)),
        })?;
        // Before anything is written.
        refuse_newer(path, &database)?;
        let revision = prepare(&database).map_err(|error| broken(Box::new(error)))?;
        let disk = Self {
            path: path.to_owned(),
            open,
            state: Mutex::new(State {
                database: Some(Arc::new(database)),
                ..State::default()
            }),
        };
        Ok((disk, revision))
    }

    /// The database; an error while there is none, and from its failure on: what it shows then may lack a write in doubt that
    /// stands in the file.
    pub(super) fn database(&self) -> Result<Arc<Database>, StoreError> {
        let state = self.lock();
        match (&state.database, &state.failure) {
            (Some(database), None) => Ok(Arc::clone(database)),
            (_, failure) => Err(self.error(failure.as_ref(), DiskEffect::NotRead)),
        }
    }

    /// What somebody is told while the disk fails.
    pub(super) fn told(&self, effect: DiskEffect) -> StoreError {
        self.error(self.lock().failure.as_ref(), effect)
    }

    fn error(&self, failure: Option<&Failure>, effect: DiskEffect) -> StoreError {
        StoreError::Disk {
            path: self.path.clone(),
            full: failure.is_some_and(|failure| failure.full),
            effect,
            reason: failure.map_or_else(|| "it is being opened again".to_owned(), ToString::to_string),
        }
    }

    /// Notes why the disk cannot be used. redb tells the true reason once, and only that there was one from then on.
    pub(super) fn failed(&self, error: &redb::Error) {
        let mut state = self.lock();
        if state.failure.is_none() || !matches!(error, redb::Error::PreviousIo) {
            state.failure = Some(error.into());
        }
    }

    /// Around a commit: since when it waits for the disk.
    pub(super) fn writing(&self, begins: bool) {
        self.lock().writing_since = begins.then(Instant::now);
    }

    /// What is wrong with the disk now, for people.
    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.lock();
        if let Some(failure) = &state.failure {
            return Some(format!(
                "the store {} cannot be written: {failure}",
                self.path.display()
            ));
        }
        let waiting = state.writing_since?.elapsed();
        (waiting > STALLED).then(|| {
            let seconds = waiting.as_secs();
            format!(
                "the store {} has been waiting for its disk for {seconds} s",
                self.path.display()
            )
        })
    }

    /// Closes the database and opens it again; returns its revision. `told` is the last one that anybody was told of.
    pub(super) fn reopen(&self, told: Revision) -> Result<Revision, redb::Error> {
        let opened = self.try_reopen(told);
        let mut state = self.lock();
        match opened {
            Ok((database, revision)) => {
                state.database = Some(Arc::new(database));
                state.failure = None;
                Ok(revision)
            }
            Err(error) => {
                state.failure = Some((&error).into());
                Err(error)
            }
        }
    }

    fn try_reopen(&self, told: Revision) -> Result<(Database, Revision), redb::Error> {
        // Nobody gets it any more; who reads at this moment ends soon. Only its last owner's end lets the file go.
        let mut held = self.lock().database.take();
        while let Some(database) = held.take() {
            match Arc::try_unwrap(database) {
                Ok(database) => drop(database),
                Err(shared) => {
                    held = Some(shared);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        let database = (self.open)(false)?;
        let revision = prepare(&database)?;
        if revision < told {
            return Err(redb::Error::Corrupted(format!(
                "it ends at revision {revision}, and writes up to {told} were acknowledged"
            )));
        }
        Ok((database, revision))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
