//! Control as one process: everything that the real one starts, but for its sockets, over a store that may be taken from it. Alone, as
//! over the embedded store, or as one of several replicas.

use std::{net::SocketAddrV4, sync::Arc, time::Duration};

use orlop_control::{
    cache::Cache,
    config::LeaderConfig,
    controllers::{
        self, ControllerConfig, GarbageConfig, LifecycleConfig,
        api_endpoints::{self, ApiEndpointTimes},
    },
    events::Recorder,
    leader::Election,
    link::{Link, LinkConfig},
    metrics::NodeMetricsStore,
    registry::{Registry, RegistryConfig},
    scheduler,
    store::Store,
};
use tokio::task::JoinHandle;
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
    /// Starts one, as `orlop_control::run` does; a replica, which has a name, acts when it leads. It runs until it is dropped.
    pub async fn start(store: Arc<dyn Store>, replica: Option<String>) -> Self {
        let cache = Cache::start(store.clone()).await;
        let registry = Registry::new(store, cache, RegistryConfig::default());
        while registry.ensure_bootstrap().await.is_err() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let stop = CancellationToken::new();
        match replica {
            Some(replica) => {
                let election = Election::new(registry.clone(), replica, LeaderConfig::default(), stop.clone());
                tokio::spawn(election.run(act));
            }
            None => drop(act(&registry, &stop)),
        }
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

/// Starts those who act on the cache.
fn act(registry: &Registry, over: &CancellationToken) -> Vec<JoinHandle<()>> {
    let recorder = Recorder::start(registry.clone(), over.clone());
    let mut tasks = controllers::spawn(registry, &recorder, &config(), over);
    tasks.push(scheduler::spawn(registry.clone(), recorder, over.clone()));
    tasks
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
