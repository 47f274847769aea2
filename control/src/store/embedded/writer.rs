//! The writer thread: group commit.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use bytes::Bytes;
use prost::Message as _;
use redb::{Durability, ReadableTable as _, Table};
use tokio::sync::{mpsc, oneshot};

use super::{
    COUNTERS, LOG, LOG_BYTES, RECORDS, REVISION, Request, Shared, full,
    group::Gathering,
    log::{self, LogChange, LogEntry},
};
use crate::store::{ChangeSet, Expected, Revision, StoreError, Transaction, Write, frame};

type Reply = oneshot::Sender<Result<Revision, StoreError>>;
type Records<'a> = Table<'a, &'static str, (u64, &'static [u8])>;

/// Runs until the queue is closed and empty.
pub(super) fn run(shared: &Shared, mut queue: mpsc::Receiver<Request>) {
    let mut gathering = Gathering::default();
    while let Some(first) = queue.blocking_recv() {
        let group = gathering.gather(first, &mut queue);
        let (count, begin) = (group.len(), Instant::now());
        commit(shared, group);
        gathering.committed(count, begin.elapsed());
    }
}

fn commit(shared: &Shared, group: Vec<Request>) {
    let (transactions, replies): (Vec<Transaction>, Vec<Reply>) = group
        .into_iter()
        .map(|request| (request.transaction, request.reply))
        .unzip();
    match write(shared, &transactions) {
        Ok((results, sets)) => {
            if let Some(last) = sets.last() {
                // First the revision, then the changes: a watch that subscribes in between reads the log up to the revision.
                shared.revision.send_replace(last.revision);
                // Nobody watches: nothing to send.
                let _ = shared.live.send(Arc::new(sets));
            }
            for (reply, result) in replies.into_iter().zip(results) {
                // Who no longer waits does not want the answer.
                let _ = reply.send(result);
            }
        }
        Err(error) => {
            tracing::error!(%error, transactions = replies.len(), "a commit failed");
            let error = Arc::new(error);
            for reply in replies {
                let _ = reply.send(Err(StoreError::Unavailable(Box::new(error.clone()))));
            }
        }
    }
}

type Written = (Vec<Result<Revision, StoreError>>, Vec<ChangeSet>);

/// One redb transaction for all of the group.
fn write(shared: &Shared, transactions: &[Transaction]) -> Result<Written, redb::Error> {
    let mut transaction = shared.database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
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
            if let Some(conflict) = conflict(&records, one)? {
                results.push(Err(conflict));
                continue;
            }
            let changes = apply(&mut records, one, revision + 1)?;
            if !changes.is_empty() {
                revision += 1;
                let entry = LogEntry {
                    time: log::now(),
                    changes,
                };
                let encoded = entry.encode_to_vec();
                bytes += encoded.len() as u64;
                log_table.insert(revision, encoded.as_slice())?;
                sets.push(entry.into_set(revision));
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
fn conflict(records: &Records<'_>, transaction: &Transaction) -> Result<Option<StoreError>, redb::Error> {
    for operation in &transaction.operations {
        if operation.expected == Expected::Any {
            continue;
        }
        let found = records.get(full(&operation.key).as_str())?.map(|guard| guard.value().0);
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

/// Writes, and returns what changed in the order of keys.
fn apply(
    records: &mut Records<'_>,
    transaction: &Transaction,
    revision: Revision,
) -> Result<Vec<LogChange>, redb::Error> {
    let ordered: BTreeMap<_, _> = transaction
        .operations
        .iter()
        .map(|one| (full(&one.key), &one.write))
        .collect();
    let mut changes = Vec::with_capacity(ordered.len());
    for (key, write) in ordered {
        match write {
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
