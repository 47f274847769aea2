//! Control as one process: everything that the real one starts, but for its sockets, over a store that may be taken from it.

use std::{net::SocketAddrV4, sync::Arc, time::Duration};

use orlop_control::{
    cache::Cache,
    controllers::{
        self, ControllerConfig, GarbageConfig, LifecycleConfig,
        api_endpoints::{self, ApiEndpointTimes},
    },
    events::Recorder,
    link::{Link, LinkConfig},
    metrics::NodeMetricsStore,
    registry::{Registry, RegistryConfig},
    scheduler,
    store::Store,
};
use tokio_util::sync::CancellationToken;

/// Where pods are told that control is.
const ADVERTISED: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(192, 0, 2, 1), 6443);

/// A running control process.
pub struct Control {
    /// Writes, and reads through its cache.
    pub registry: Registry,
    /// Its end of the nodes' link.
    pub link: Link,
    stop: CancellationToken,
}

impl Control {
    /// Starts one, as `orlop_control::run` does. It runs until it is dropped.
    pub async fn start(store: Arc<dyn Store>) -> Self {
        let cache = Cache::start(store.clone()).await;
        let registry = Registry::new(store, cache, RegistryConfig::default());
        while registry.ensure_bootstrap().await.is_err() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let stop = CancellationToken::new();
        let recorder = Recorder::start(registry.clone(), stop.clone());
        controllers::spawn(&registry, &recorder, &config(), &stop);
        scheduler::spawn(registry.clone(), recorder, stop.clone());
        let link = Link::start(
            registry.clone(),
            NodeMetricsStore::default(),
            LinkConfig::default(),
            stop.clone(),
        );
        tokio::spawn(api_endpoints::run(
            registry.clone(),
            Some(ADVERTISED),
            ApiEndpointTimes::default(),
            stop.clone(),
        ));
        Self { registry, link, stop }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn config() -> ControllerConfig {
    ControllerConfig {
        lifecycle: LifecycleConfig::default(),
        garbage: GarbageConfig {
            terminated_pods: 2,
            ..GarbageConfig::default()
        },
    }
}
