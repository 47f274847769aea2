//! Writers: each has its own keys, and all have one that they replace as they read it. Each value is written once.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, DeleteRequest, Object, UpdateRequest},
    coordination::v1::{Lease, LeaseSpec},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};

use super::{CALL, Shared, lock, revision};
use crate::faults::history::{Change, Outcome, Read, Revision, Write};

/// Keys of each writer.
const KEYS: usize = 3;
/// The key that all writers change.
const CONTENDED: &str = "contended";
/// How likely a writer turns to the next replica before a write, though nothing is wrong with its own.
const TURN: f64 = 0.1;
/// Between two writes of one writer, and between what it reads and what it makes of it.
const PAUSE: Duration = Duration::from_millis(40);
/// Who is to change the contended key waits for the next multiple of this, in milliseconds: left to chance, a short run had nobody who
/// came too late.
const MEETING: u64 = 200;

/// Writes until it is stopped.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken, index: usize, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed.wrapping_add(index as u64));
    let mut turn = index;
    let mut present = [false; KEYS];
    for number in 0u64.. {
        if stop.is_cancelled() {
            return;
        }
        if random.random_bool(TURN) {
            turn += 1;
        }
        if random.random_bool(0.3) {
            if contend(&shared, turn, format!("writer{index}-{number}")).await == Some(Outcome::Unknown) {
                turn += 1;
            }
            continue;
        }
        let which = random.random_range(0..KEYS);
        let removes = present[which] && random.random_bool(0.2);
        let change = if removes {
            Change::Delete
        } else {
            Change::Put(format!("writer{index}-{number}"))
        };
        let key = format!("writer{index}-key{which}");
        let base = (!present[which]).then_some(0);
        let outcome = write(&shared, turn, key.clone(), change, base).await;
        if random.random_bool(0.2) {
            shared.get(turn + 1, &key).await;
        }
        if outcome == Outcome::Unknown {
            turn += 1;
        }
        present[which] = match outcome {
            Outcome::Acknowledged(_) => !removes,
            // It is the other way round.
            Outcome::Refused => !present[which],
            // Whatever it is now: the next answer tells.
            Outcome::Unknown => present[which],
        };
        tokio::time::sleep(PAUSE).await;
    }
}

/// Reads the key that all change, at the same time as others do, and a while later replaces, at another replica, what it was; `None`: it
/// could not be read.
async fn contend(shared: &Shared, turn: usize, value: String) -> Option<Outcome> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let late = u64::from(now.subsec_millis()) % MEETING;
    tokio::time::sleep(Duration::from_millis(MEETING - late)).await;
    let read = shared.get(turn + 1, CONTENDED).await;
    tokio::time::sleep(PAUSE).await;
    let base = read?.found.map_or(0, |(_, revision)| revision);
    Some(write(shared, turn, CONTENDED.to_owned(), Change::Put(value), Some(base)).await)
}

/// Writes once, at the replica whose turn it is, and records it. A put replaces the revision that is its base, creates (0), or updates
/// whatever is there (`None`).
pub async fn write(shared: &Shared, turn: usize, key: String, change: Change, base: Option<Revision>) -> Outcome {
    let begun = shared.now();
    let answer = tokio::time::timeout(CALL, send(shared, turn, &key, &change, base)).await;
    let ended = shared.now();
    let outcome = match answer {
        Ok(Ok(answer)) => match answer.into_inner().meta().map(|meta| revision(&meta.resource_version)) {
            Some(Ok(revision)) => Outcome::Acknowledged(revision),
            _ => Outcome::Unknown,
        },
        Ok(Err(status)) => {
            // Who says that it is not there has read it: it must not be a replica that is behind.
            if status.code() == Code::NotFound {
                let (key, found) = (key.clone(), None);
                lock(&shared.reads).push(Read {
                    key,
                    begun,
                    ended,
                    found,
                });
            }
            judge(&status)
        }
        Err(_) => Outcome::Unknown,
    };
    let recorded = outcome.clone();
    lock(&shared.writes).push(Write {
        key,
        change,
        base,
        begun,
        ended,
        outcome,
    });
    recorded
}

/// Only what says clearly that nothing happened is a refusal.
fn judge(status: &Status) -> Outcome {
    match status.code() {
        Code::AlreadyExists | Code::NotFound | Code::Aborted | Code::InvalidArgument | Code::FailedPrecondition => {
            Outcome::Refused
        }
        _ => Outcome::Unknown,
    }
}

async fn send(
    shared: &Shared,
    turn: usize,
    key: &str,
    change: &Change,
    base: Option<Revision>,
) -> Result<Response<Object>, Status> {
    let mut objects = shared.objects(turn);
    match change {
        Change::Delete => {
            let request = DeleteRequest {
                resource: Lease::KIND.resource.to_owned(),
                namespace: shared.namespace.clone(),
                name: key.to_owned(),
                ..DeleteRequest::default()
            };
            objects.delete(request).await
        }
        Change::Put(value) => {
            let mut lease = Lease {
                spec: Some(LeaseSpec {
                    holder_identity: value.clone(),
                    ..LeaseSpec::default()
                }),
                ..Lease::default()
            };
            key.clone_into(&mut lease.meta_mut().name);
            shared.namespace.clone_into(&mut lease.meta_mut().namespace);
            if base == Some(0) {
                let object = Some(lease.into_object());
                return objects.create(CreateRequest { object }).await;
            }
            lease.meta_mut().resource_version = base.map(|base| base.to_string()).unwrap_or_default();
            let object = Some(lease.into_object());
            objects.update(UpdateRequest { object }).await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_no_is_a_refusal() {
        assert_eq!(judge(&Status::already_exists("x")), Outcome::Refused);
        assert_eq!(judge(&Status::not_found("x")), Outcome::Refused);
        for unclear in [
            Status::unavailable("x"),
            Status::deadline_exceeded("x"),
            Status::internal("x"),
            Status::unknown("x"),
        ] {
            assert_eq!(judge(&unclear), Outcome::Unknown, "{unclear}");
        }
    }
}
