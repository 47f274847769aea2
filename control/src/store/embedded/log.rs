//! The log of changes that watches resume from.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use redb::{ReadableTable as _, Table};

use super::{COMPACTED, COUNTERS, LOG, LOG_BYTES, Shared, short};
use crate::store::{ChangeSet, Key, Revision, StoreError, frame};

/// What one revision changed.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct LogEntry {
    /// Milliseconds since 1970.
    #[prost(uint64, tag = "1")]
    pub(super) time: u64,
    #[prost(message, repeated, tag = "2")]
    pub(super) changes: Vec<LogChange>,
}

/// Of a [`LogEntry`], the time alone.
#[derive(Clone, PartialEq, prost::Message)]
struct LogTime {
    #[prost(uint64, tag = "1")]
    time: u64,
}

/// A change to one key; values are framed.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct LogChange {
    #[prost(string, tag = "1")]
    pub(super) key: String,
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub(super) now: Option<bytes::Bytes>,
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub(super) before: Option<bytes::Bytes>,
}

/// At most so many entries of the log are read at once.
const CHUNK: usize = 512;
/// Entries that one commit removes at most beyond the number that it adds: compaction never makes a commit long.
const COMPACT_AT_ONCE: usize = 256;

pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl LogEntry {
    /// What a watch tells of it.
    ///
    /// # Errors
    /// When a newer version of control wrote it.
    pub(super) fn into_set(self, revision: Revision) -> Result<ChangeSet, StoreError> {
        let change = |change: LogChange| {
            frame::change(
                short(&change.key),
                revision,
                change.now.as_deref(),
                change.before.as_deref(),
            )
        };
        let changes = self.changes.into_iter().filter_map(|one| change(one).transpose());
        Ok(ChangeSet {
            revision,
            changes: changes.collect::<Result<_, _>>()?,
        })
    }
}

/// Removes entries that are too old or too many. `added` is the number of entries in this commit.
pub(super) fn compact(
    shared: &Shared,
    log: &mut Table<'_, u64, &'static [u8]>,
    counters: &mut Table<'_, &'static str, u64>,
    added: usize,
) -> Result<(), redb::Error> {
    let age = u64::try_from(shared.config.log_age.as_millis()).unwrap_or(u64::MAX);
    let oldest = now().saturating_sub(age);
    let mut bytes = counters.get(LOG_BYTES)?.map_or(0, |guard| guard.value());
    let mut compacted = None;
    for row in log.iter()?.take(added + COMPACT_AT_ONCE) {
        let (revision, value) = row?;
        let entry = value.value();
        // One whose time cannot be read counts as very old.
        let time = LogTime::decode(entry).map_or(0, |entry| entry.time);
        if bytes <= shared.config.log_bytes && time >= oldest {
            break;
        }
        bytes = bytes.saturating_sub(entry.len() as u64);
        compacted = Some(revision.value());
    }
    if let Some(compacted) = compacted {
        log.retain_in(..=compacted, |_, _| false)?;
        counters.insert(COMPACTED, compacted)?;
    }
    counters.insert(LOG_BYTES, bytes)?;
    Ok(())
}

/// The next changes after a revision, all keys. Empty: there are none.
pub(super) fn read(shared: &Shared, after: Revision) -> Result<Vec<ChangeSet>, StoreError> {
    shared.read(|read| {
        let compacted = read
            .open_table(COUNTERS)?
            .get(COMPACTED)?
            .map_or(0, |guard| guard.value());
        if after < compacted {
            let (requested, oldest) = (after, compacted);
            return Err(StoreError::Compacted { requested, oldest }.into());
        }
        let log = read.open_table(LOG)?;
        let mut sets = Vec::new();
        for row in log.range(after + 1..)?.take(CHUNK) {
            let (revision, value) = row?;
            let revision = revision.value();
            match LogEntry::decode(value.value()) {
                Ok(entry) => match entry.into_set(revision) {
                    Ok(set) => sets.push(set),
                    // What comes before it is told first.
                    Err(_) if !sets.is_empty() => break,
                    Err(error) => return Err(error.into()),
                },
                Err(_) if !sets.is_empty() => break,
                Err(error) => {
                    let key = Key::internal("log", &revision.to_string());
                    let error = StoreError::damaged(&key, error.to_string());
                    tracing::error!(%error, "a stored change is damaged: it is as forgotten as what is compacted");
                    let (requested, oldest) = (after, revision);
                    return Err(StoreError::Compacted { requested, oldest }.into());
                }
            }
        }
        Ok(sets)
    })
}
