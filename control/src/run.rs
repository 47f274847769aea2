//! Starts and stops all of control.
//!
//! The order is that of the data: store, cache, registry, then those who act on the cache, then those who let others in.
//! The end is the reverse: first nobody comes in any more, then nobody acts, then the store is closed.

use std::{io, sync::Arc, time::Duration};

use orlop_proto::{FILE_DESCRIPTOR_SET, cluster::v1::join_server::JoinServer};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    advertise,
    api::{ObjectsService, error_details},
    cache::Cache,
    config::{Config, Engine},
    controllers::{self, ControllerConfig, api_endpoints::ApiEndpointTimes},
    events::Recorder,
    link::{Link, LinkConfig},
    metrics::NodeMetricsStore,
    pki::{Authority, JoinService, NodeKeys, PkiError},
    registry::Registry,
    scheduler,
    server::{Front, Listener, MetricsSource, Readiness, Server, ServerTls, bind},
    store::{
        Store,
        embedded::{EmbeddedConfig, EmbeddedStore},
        etcd::{EtcdOptions, EtcdStore},
    },
};

/// Between attempts to write what every cluster has from the beginning.
const RETRY: Duration = Duration::from_secs(1);
/// Bytes of a message to the services that are open to all: joining, health, reflection.
const OPEN_MESSAGE: usize = 64 << 10;
/// How long the parts may take to end.
const DRAIN: Duration = Duration::from_secs(3);

/// Why control could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store cannot be opened.
    #[error("store")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The CA, or the server's certificate.
    #[error("certificates")]
    Pki(#[from] PkiError),
    /// A listener.
    #[error("server")]
    Server(#[from] io::Error),
    /// The services' descriptors.
    #[error("reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// What the parts share.
pub struct Parts {
    /// Writes, and reads through its cache.
    pub registry: Registry,
    /// The configuration.
    pub config: Arc<Config>,
    /// Cancelled at the end.
    pub shutdown: CancellationToken,
    /// Tasks that are waited for at the end.
    pub tasks: TaskTracker,
}

/// Runs control until `shutdown`. `inherited` listeners take the place of the configured ones.
///
/// # Errors
/// When something cannot be started.
pub async fn run(config: Config, inherited: Vec<Listener>, shutdown: CancellationToken) -> Result<(), RunError> {
    let config = Arc::new(config);
    std::fs::create_dir_all(&config.data_dir)?;
    let authority = Arc::new(Authority::open(&config.pki_dir(), &config.pki)?);
    authority.admin()?;
    // Bound before the store is read: whoever connects early waits for the answer instead of being refused.
    let listeners = bind(&config, inherited).await?;
    let advertised = advertise::endpoint(&config, &listeners);
    let tls = ServerTls::new(Arc::clone(&authority), &config.certificate_names(advertised))?;
    let store = open_store(&config).await?;
    // Waits for as long as the store cannot be reached; whoever wants the end need not.
    let cache = tokio::select! {
        cache = Cache::start(Arc::clone(&store)) => cache,
        () = shutdown.cancelled() => return Ok(()),
    };
    let registry = Registry::new(Arc::clone(&store), cache, config.registry());
    let parts = Parts {
        registry,
        config: Arc::clone(&config),
        shutdown: shutdown.clone(),
        tasks: TaskTracker::new(),
    };
    if !bootstrap(&parts.registry, &shutdown).await {
        return Ok(());
    }

    let (routes, sources) = services(&parts, &store, &authority).await?;
    let readiness = Readiness::over(Arc::clone(&store));
    let keys = NodeKeys::new(Arc::clone(&store));
    let front = Front::new(
        routes,
        keys,
        readiness.clone(),
        sources,
        config.limits.concurrent_applies,
        config.limits.apply_timeout,
    );
    let server = Server::new(front, tls, config.limits.clone());
    parts.tasks.spawn(server.tls().keep_fresh(shutdown.clone()));
    start_controllers(&parts);
    parts.tasks.spawn(controllers::api_endpoints::run(
        parts.registry.clone(),
        advertised,
        ApiEndpointTimes::default(),
        shutdown.clone(),
    ));

    readiness.set(true);
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "the service manager was not told");
    }
    tracing::info!(ca = authority.hash(), "control is ready");
    server.serve(listeners, shutdown).await?;
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
        tracing::warn!(%error, "the service manager was not told");
    }
    parts.tasks.close();
    if tokio::time::timeout(DRAIN, parts.tasks.wait()).await.is_err() {
        tracing::warn!(tasks = parts.tasks.len(), "tasks cut off at shutdown");
    }
    Ok(())
}

async fn open_store(config: &Config) -> Result<Arc<dyn Store>, RunError> {
    match config.store.engine {
        Engine::Embedded => {
            let path = config.data_dir.join("store.redb");
            let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
            let opened = tokio::task::spawn_blocking(open)
                .await
                .map_err(|error| RunError::Store(error.into()))?;
            Ok(Arc::new(opened.map_err(|error| RunError::Store(error.into()))?))
        }
        Engine::Etcd => {
            let endpoints = config.store.etcd.endpoints.clone();
            let options = EtcdOptions {
                endpoints,
                ..EtcdOptions::default()
            };
            let store = EtcdStore::connect(options)
                .await
                .map_err(|error| RunError::Store(error.into()))?;
            Ok(Arc::new(store))
        }
    }
}

/// Starts those who act on the cache.
fn start_controllers(parts: &Parts) {
    let recorder = Recorder::start(parts.registry.clone(), parts.shutdown.clone());
    let config = ControllerConfig::from(&*parts.config);
    let mut tasks = controllers::spawn(&parts.registry, &recorder, &config, &parts.shutdown);
    tasks.push(scheduler::spawn(
        parts.registry.clone(),
        recorder,
        parts.shutdown.clone(),
    ));
    for task in tasks {
        parts.tasks.spawn(async move {
            if let Err(error) = task.await {
                tracing::error!(%error, "a controller ended");
            }
        });
    }
}

/// Writes what every cluster has; `false` when the end came before that.
async fn bootstrap(registry: &Registry, shutdown: &CancellationToken) -> bool {
    loop {
        match registry.ensure_bootstrap().await {
            Ok(()) => return true,
            Err(error) => tracing::warn!(%error, "the first objects are not written"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return false,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// All gRPC services, and what else `/metrics` shows.
async fn services(
    parts: &Parts,
    store: &Arc<dyn Store>,
    authority: &Arc<Authority>,
) -> Result<(Routes, Vec<MetricsSource>), RunError> {
    let limits = &parts.config.limits;
    let (health, health_service) = tonic_health::server::health_reporter();
    for name in [
        "",
        "orlop.api.v1.Objects",
        "orlop.cluster.v1.Join",
        "orlop.node.v1.NodeLink",
        "orlop.metrics.v1.Metrics",
    ] {
        health
            .set_service_status(name, tonic_health::ServingStatus::Serving)
            .await;
    }
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_file_descriptor_set(error_details())
    };
    let objects = ObjectsService::new(parts.registry.clone(), parts.shutdown.clone());
    let join = JoinService::new(Arc::clone(store), Arc::clone(authority));
    let metrics = NodeMetricsStore::default();
    let link_config = LinkConfig {
        lease_duration: parts.config.node.lease_duration,
        ..LinkConfig::default()
    };
    let link = Link::start(
        parts.registry.clone(),
        metrics.clone(),
        link_config,
        parts.shutdown.clone(),
    );
    let routes = Routes::new(objects.into_server(limits.message_bytes, limits.manifest_bytes))
        .add_service(link.service())
        .add_service(metrics.service())
        .add_service(JoinServer::new(join).max_decoding_message_size(OPEN_MESSAGE))
        .add_service(health_service.max_decoding_message_size(OPEN_MESSAGE))
        .add_service(describe().build_v1()?.max_decoding_message_size(OPEN_MESSAGE))
        .add_service(describe().build_v1alpha()?.max_decoding_message_size(OPEN_MESSAGE));
    let sources: Vec<MetricsSource> = vec![
        Arc::new(move || metrics.prometheus()),
        Arc::new(move || link.prometheus()),
    ];
    Ok((routes, sources))
}
