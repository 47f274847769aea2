//! Events go after a while.

use std::sync::Arc;

use futures::{StreamExt as _, stream};
use orlop_proto::{Resource as _, core::v1::Event, time};

use super::GarbageConfig;
use crate::{
    cache::ObjectKey,
    registry::{DeleteOptions, Preconditions, Registry},
};

/// Deletions under way at once.
const DELETIONS: usize = 16;

/// Runs until it is dropped.
pub async fn run(registry: Registry, config: GarbageConfig) {
    let reader = registry.cache().reader::<Event>();
    let mut ticks = tokio::time::interval(config.period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let oldest = time::now().seconds - i64::try_from(config.event_ttl.as_secs()).unwrap_or(i64::MAX);
        let expired: Vec<Arc<Event>> = reader
            .snapshot()
            .objects
            .values()
            .filter(|event| last_seen(event) < oldest)
            .collect();
        let deletions = expired.into_iter().map(|event| {
            let options = DeleteOptions {
                // With the version that was judged: an event that has just been counted up stays.
                preconditions: Preconditions {
                    uid: Some(event.uid().to_owned()),
                    resource_version: Some(event.meta().resource_version.clone()),
                },
                ..DeleteOptions::default()
            };
            let registry = registry.clone();
            async move { registry.delete::<Event>(&ObjectKey::of(&*event), options).await }
        });
        let mut results = stream::iter(deletions).buffer_unordered(DELETIONS);
        while let Some(result) = results.next().await {
            if let Err(error) = result {
                tracing::debug!(%error, "expired event not removed");
            }
        }
    }
}

/// When the event was last told, in seconds since the epoch.
fn last_seen(event: &Event) -> i64 {
    let times = [
        event.last_timestamp,
        event.event_time,
        event.first_timestamp,
        event.meta().creation_timestamp,
    ];
    times
        .into_iter()
        .flatten()
        .map(|time| time.seconds)
        .max()
        .unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_its_times_counts() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let event = Event {
            first_timestamp: at(5),
            last_timestamp: at(9),
            ..Event::default()
        };
        assert_eq!(last_seen(&event), 9);
        assert_eq!(
            last_seen(&Event::default()),
            i64::MAX,
            "an event without times is never taken for an old one"
        );
    }
}
