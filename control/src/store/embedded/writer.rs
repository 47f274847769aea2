//! The writer thread: group commit; and what it does when the disk fails.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use redb::{Durability, ReadableTable as _, Table};
use tokio::sync::{mpsc, oneshot};

use super::{
    COUNTERS, LOG, LOG_BYTES, RECORDS, REVISION, Request, Shared, full,
    group::Gathering,
    log::{self, LogChange, LogEntry},
};
use crate::store::{ChangeSet, DiskEffect, Expected, Operation, Revision, StoreError, Transaction, Write, frame};

type Reply = oneshot::Sender<Result<Revision, StoreError>>;
type Records<'a> = Table<'a, &'static str, (u64, &'static [u8])>;

/// Between attempts to open the database again, at most.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// While there is no database, who comes is refused within this time.
const REFUSE_WITHIN: Duration = Duration::from_millis(20);

/// Runs until the queue is closed and empty.
pub(super) fn run(shared: &Shared, mut queue: mpsc::Receiver<Request>) {
    let mut gathering = Gathering::default();
    let mut wait = shared.config.reopen_wait;
    while let Some(first) = queue.blocking_recv() {
        let group = gathering.gather(first, &mut queue);
        let (count, begin) = (group.len(), Instant::now());
        if commit(shared, group) {
            gathering.committed(count, begin.elapsed());
            wait = shared.config.reopen_wait;
        } else {
            recover(shared, &mut queue, &mut wait);
        }
    }
}

/// Opens the database again until that works; whoever comes meanwhile is refused with the reason. `wait` goes on from the
/// last outage when no commit came through since.
fn recover(shared: &Shared, queue: &mut mpsc::Receiver<Request>, wait: &mut Duration) {
    let told = *shared.revision.borrow();
    let mut attempts = 0_u32;
    loop {
        if !refuse(shared, queue, Instant::now() + *wait) {
            return;
        }
        *wait = (*wait * 2).min(RETRY_MAX);
        attempts += 1;
        match shared
            .disk
            .reopen(told)
            .map(|revision| (revision, catch_up(shared, told)))
        {
            Ok((revision, Ok(()))) => {
                tracing::info!(revision, told, attempts, "the store is open again");
                return;
            }
            Ok((_, Err(error))) => tracing::warn!(%error, "the store was opened again and cannot be read"),
            // The first time it was said by the commit that failed.
            Err(error) if attempts.is_power_of_two() => tracing::warn!(%error, attempts, "the store stays closed"),
            Err(_) => {}
        }
    }
}

/// Refuses all that come until then. `false` when nobody can come any more.
fn refuse(shared: &Shared, queue: &mut mpsc::Receiver<Request>, until: Instant) -> bool {
    loop {
        match queue.try_recv() {
            // Who no longer waits does not want the answer.
            Ok(request) => drop(request.reply.send(Err(shared.disk.told(DiskEffect::NotWritten)))),
            Err(mpsc::error::TryRecvError::Disconnected) => return false,
            Err(mpsc::error::TryRecvError::Empty) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return true;
                }
                std::thread::sleep(left.min(REFUSE_WITHIN));
            }
        }
    }
}

/// Shows what a commit that was reported as failed left in the file after all.
fn catch_up(shared: &Shared, told: Revision) -> Result<(), StoreError> {
    let mut seen = told;
    loop {
        let sets = log::read(shared, seen)?;
        let Some(last) = sets.last() else { return Ok(()) };
        seen = last.revision;
        publish(shared, sets);
    }
}

/// First the revision, then the changes: a watch that subscribes in between reads the log up to the revision.
fn publish(shared: &Shared, sets: Vec<ChangeSet>) {
    if let Some(last) = sets.last() {
        shared.revision.send_replace(last.revision);
        // Nobody watches: nothing to send.
        let _ = shared.live.send(Arc::new(sets));
    }
}

/// `false` when the database is to be opened again.
fn commit(shared: &Shared, group: Vec<Request>) -> bool {
    let (transactions, replies): (Vec<Transaction>, Vec<Reply>) = group
        .into_iter()
        .map(|request| (request.transaction, request.reply))
        .unzip();
    shared.disk.writing(true);
    let written = write(shared, &transactions);
    shared.disk.writing(false);
    match written {
        Ok((results, sets)) => {
            publish(shared, sets);
            for (reply, result) in replies.into_iter().zip(results) {
                // Who no longer waits does not want the answer.
                let _ = reply.send(result);
            }
            true
        }
        Err(error) => {
            shared.disk.failed(&error);
            tracing::error!(%error, transactions = replies.len(), "a commit failed; the store is opened again");
            for reply in replies {
                let _ = reply.send(Err(shared.disk.told(DiskEffect::Unknown)));
            }
            false
        }
    }
}

type Written = (Vec<Result<Revision, StoreError>>, Vec<ChangeSet>);

/// One redb transaction for all of the group.
fn write(shared: &Shared, transactions: &[Transaction]) -> Result<Written, redb::Error> {
    let database = shared.disk.database().map_err(|_| redb::Error::PreviousIo)?;
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    // Two syncs a commit: with one, opening after a crash is a walk through the whole file, which leaves out, without a word, a last commit
    // of which a page is damaged.
    transaction.set_quick_repair(true);
    let mut results = Vec::with_capacity(transactions.len());
    let mut sets = Vec::new();
    {
        let mut records = transaction.open_table(RECORDS)?;
        let mut log_table = transaction.open_table(LOG)?;
        let mut counters = transaction.open_table(COUNTERS)?;
        let mut revision = counters.get(REVISION)?.map_or(0, |guard| guard.value());
        let mut bytes = counters.get(LOG_BYTES)?.map_or(0, |guard| guard.value());
        for one in transactions {
            let mut operations: Vec<(String, &Operation)> =
                one.operations.iter().map(|one| (full(&one.key), one)).collect();
            if let Some(conflict) = conflict(&records, &operations)? {
                results.push(Err(conflict));
                continue;
            }
            operations.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
            let changes = apply(&mut records, operations, revision + 1)?;
            if !changes.is_empty() {
                revision += 1;
                let entry = LogEntry {
                    time: log::now(),
                    changes,
                };
                let encoded = entry.encode_to_vec();
                bytes += encoded.len() as u64;
                log_table.insert(revision, encoded.as_slice())?;
                // What was just framed here is of no newer format.
                sets.extend(entry.into_set(revision).ok());
            }
            results.push(Ok(revision));
        }
        if !sets.is_empty() {
            counters.insert(REVISION, revision)?;
            counters.insert(LOG_BYTES, bytes)?;
            log::compact(shared, &mut log_table, &mut counters, sets.len())?;
        }
    }
    if sets.is_empty() {
        transaction.abort()?;
    } else {
        transaction.commit()?;
    }
    Ok((results, sets))
}

/// The first condition that does not hold.
fn conflict(records: &Records<'_>, operations: &[(String, &Operation)]) -> Result<Option<StoreError>, redb::Error> {
    for (full, operation) in operations {
        if operation.expected == Expected::Any {
            continue;
        }
        let found = records.get(full.as_str())?.map(|guard| guard.value().0);
        let holds = match operation.expected {
            Expected::Absent => found.is_none(),
            Expected::Revision(revision) => found == Some(revision),
            Expected::Any => true,
        };
        if !holds {
            let (key, expected) = (operation.key.clone(), operation.expected);
            return Ok(Some(StoreError::Conflict { key, expected, found }));
        }
    }
    Ok(None)
}

/// Writes, and returns what changed in the order of the operations.
fn apply(
    records: &mut Records<'_>,
    operations: Vec<(String, &Operation)>,
    revision: Revision,
) -> Result<Vec<LogChange>, redb::Error> {
    let mut changes = Vec::with_capacity(operations.len());
    for (key, operation) in operations {
        match &operation.write {
            Write::Check => {}
            Write::Put(value) => {
                let framed = frame::frame(value);
                let before = records.insert(key.as_str(), (revision, framed.as_slice()))?;
                let before = before.map(|guard| Bytes::copy_from_slice(guard.value().1));
                changes.push(LogChange {
                    key,
                    now: Some(framed.into()),
                    before,
                });
            }
            Write::Delete => {
                let before = records
                    .remove(key.as_str())?
                    .map(|guard| Bytes::copy_from_slice(guard.value().1));
                if before.is_some() {
                    changes.push(LogChange { key, now: None, before });
                }
            }
        }
    }
    Ok(changes)
}
