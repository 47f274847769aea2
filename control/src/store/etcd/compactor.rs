//! Tells etcd to forget the past, as Kubernetes' API server does: etcd by itself keeps everything.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use super::{Shared, StoreError, is_compacted, number};
use crate::store::Revision;

/// Runs until the store is gone.
pub(super) fn start(shared: &Arc<Shared>) {
    if let Some(interval) = shared.options.compact_interval {
        tokio::spawn(run(Arc::downgrade(shared), interval));
    }
}

async fn run(shared: Weak<Shared>, interval: Duration) {
    let mut previous = None;
    loop {
        tokio::time::sleep(interval).await;
        let Some(shared) = shared.upgrade() else { return };
        match round(&shared, previous).await {
            Ok(current) => previous = Some(current),
            Err(error) => tracing::warn!(%error, "etcd could not be compacted"),
        }
    }
}

/// Compacts to the revision of the round before. Several control processes do this; who comes second finds it done.
async fn round(shared: &Shared, previous: Option<Revision>) -> Result<Revision, StoreError> {
    let current = shared.revision().await?;
    if let Some(previous) = previous {
        match shared.bounded(shared.kv.clone().compact(number(previous), None)).await {
            Err(error) if !is_compacted(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(current)
}
