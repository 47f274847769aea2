//! Writers: each has its own keys, and writes a value of its own each time.

use std::{sync::Arc, time::Duration};

use orlop_proto::{
    Resource,
    api::v1::{CreateRequest, DeleteRequest, Object, UpdateRequest},
    coordination::v1::{Lease, LeaseSpec},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status};

use super::{CALL, Shared, lock, revision};
use crate::faults::history::{Change, Outcome, Write};

/// Keys of each writer.
const KEYS: usize = 3;
/// Between two writes of one writer.
const PAUSE: Duration = Duration::from_millis(40);

/// Writes until it is stopped.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken, index: usize, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed.wrapping_add(index as u64));
    let mut present = [false; KEYS];
    for number in 0u64.. {
        if stop.is_cancelled() {
            return;
        }
        let which = random.random_range(0..KEYS);
        let removes = present[which] && random.random_bool(0.2);
        let change = if removes {
            Change::Delete
        } else {
            Change::Put(format!("writer{index}-{number}"))
        };
        let outcome = write(&shared, format!("writer{index}-key{which}"), change, !present[which]).await;
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

/// Writes once and records it. A put creates, or updates what is there.
pub async fn write(shared: &Shared, key: String, change: Change, creates: bool) -> Outcome {
    let begun = shared.now();
    let outcome = match tokio::time::timeout(CALL, send(shared, &key, &change, creates)).await {
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

async fn send(shared: &Shared, key: &str, change: &Change, creates: bool) -> Result<Response<Object>, Status> {
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
            let object = Some(lease.into_object());
            if creates {
                objects.create(CreateRequest { object }).await
            } else {
                objects.update(UpdateRequest { object }).await
            }
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
