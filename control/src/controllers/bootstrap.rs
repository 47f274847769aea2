//! What every cluster has from the beginning is made again when somebody deletes it: without `kube-node-lease` no node can
//! renew its lease.

use std::time::Duration;

use orlop_proto::core::v1::{Namespace, Service};

use crate::registry::Registry;

/// Between attempts.
const RETRY: Duration = Duration::from_secs(1);

/// Runs until it is dropped.
pub async fn run(registry: Registry) {
    let (mut namespaces, mut services) = (
        registry.cache().reader::<Namespace>(),
        registry.cache().reader::<Service>(),
    );
    loop {
        if !registry.is_bootstrapped()
            && let Err(error) = registry.ensure_bootstrap().await
        {
            tracing::warn!(%error, "what every cluster has is missing and cannot be written");
            tokio::time::sleep(RETRY).await;
            continue;
        }
        // Cancel-safe, both: they only wake.
        tokio::select! {
            () = namespaces.changed() => {}
            () = services.changed() => {}
        }
    }
}
