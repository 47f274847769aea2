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
use crate::faults::history::{Change, Outcome, Revision, Write};

/// Keys of each writer.
const KEYS: usize = 3;
/// The key that all writers change.
const CONTENDED: &str = "contended";
/// Between two writes of one writer, and between what it reads and what it makes of it.
const PAUSE: Duration = Duration::from_millis(40);
/// Who is to change the contended key waits for the next multiple of this, in milliseconds: left to chance, a short run had nobody who
/// came too late.
const MEETING: u64 = 200;

/// Writes until it is stopped.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken, index: usize, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed.wrapping_add(index as u64));
    let mut present = [false; KEYS];
    for number in 0u64.. {
        if stop.is_cancelled() {
            return;
        }
        if random.random_bool(0.3) {
            contend(&shared, format!("writer{index}-{number}")).await;
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
        let outcome = write(&shared, key.clone(), change, base).await;
        if random.random_bool(0.2) {
            shared.get(&key).await;
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

/// Reads the key that all change, at the same time as others do, and a while later replaces what it was.
async fn contend(shared: &Shared, value: String) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let late = u64::from(now.subsec_millis()) % MEETING;
    tokio::time::sleep(Duration::from_millis(MEETING - late)).await;
    let read = shared.get(CONTENDED).await;
    tokio::time::sleep(PAUSE).await;
    if let Some(read) = read {
        let base = read.found.map_or(0, |(_, revision)| revision);
        write(shared, CONTENDED.to_owned(), Change::Put(value), Some(base)).await;
    }
}

/// Writes once and records it. A put replaces the revision that is its base, creates (0), or updates whatever is there (`None`).
pub async fn write(shared: &Shared, key: String, change: Change, base: Option<Revision>) -> Outcome {
    let begun = shared.now();
    let outcome = match tokio::time::timeout(CALL, send(shared, &key, &change, base)).await {
        Ok(Ok(answer)) => match answer.into_inner().meta().map(|meta| revision(&meta.resource_version)) {
            Some(Ok(revision)) => Outcome::Acknowledged(revision),
            _ => Outcome::Unknown,
        },
        Ok(Err(status)) => judge(&status),
        Err(_) => Outcome::Unknown,
    };
    let ended = shared.now();
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

async fn send(shared: &Shared, key: &str, change: &Change, base: Option<Revision>) -> Result<Response<Object>, Status> {
    let mut objects = shared.objects();
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
