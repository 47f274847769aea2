//! Starts and stops all of control.
//!
//! The order is that of the data: store, cache, registry, then those who act on the cache, then those who let others in.
//! The end is the reverse: first nobody comes in any more, then nobody acts, then the store is closed.

use std::{io, net::SocketAddrV4, sync::Arc, time::Duration};

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
    leader::{self, Election},
    link::{Link, LinkConfig},
    metrics::{NodeMetricsStore, Peers},
    pki::{Authority, JoinService, NodeKeys, PkiError, claim_authority, cluster_authority},
    registry::Registry,
    scheduler,
    server::{Front, Listener, MetricsSource, Readiness, Server, ServerTls, bind},
    store::{
        self, Store,
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
    let local = local_authority(&config)?;
    // Bound before the store is read: whoever connects early waits for the answer instead of being refused.
    let listeners = bind(&config, inherited).await?;
    let advertised = advertise::endpoint(&config, &listeners);
    let store = open_store(&config).await?;
    let authority = tokio::select! {
        authority = open_authority(&config, local, &*store) => Arc::new(authority?),
        () = shutdown.cancelled() => return Ok(()),
    };
    let tls = ServerTls::new(Arc::clone(&authority), &config.certificate_names(advertised))?;
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

    let election = election(&parts)?;
    let (routes, mut sources) = services(&parts, &store, &authority, advertised).await?;
    if let Some(election) = &election {
        let (standing, registry) = (election.standing(), parts.registry.clone());
        sources.push(Arc::new(move || standing.prometheus(registry.fenced_writes())));
    }
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
    start_controllers(&parts, election);
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

/// The CA, made if need be: it is there before anybody can connect. Not over etcd, where other replicas may have one.
fn local_authority(config: &Config) -> Result<Option<Authority>, PkiError> {
    if config.store.engine == Engine::Etcd {
        return Ok(None);
    }
    let authority = Authority::open(&config.pki_dir(), &config.pki)?;
    authority.admin()?;
    Ok(Some(authority))
}

/// The CA. All replicas over one etcd have the same one, and only the first of them makes it.
async fn open_authority(config: &Config, local: Option<Authority>, store: &dyn Store) -> Result<Authority, PkiError> {
    if let Some(local) = local {
        return Ok(local);
    }
    let directory = config.pki_dir();
    if !Authority::is_in(&directory)
        && let Some(theirs) = until_reached(|| async { Ok(cluster_authority(store).await?) }).await?
    {
        return Err(PkiError::OtherAuthority { ours: None, theirs });
    }
    let authority = Authority::open(&directory, &config.pki)?;
    let hash = authority.hash();
    until_reached(|| claim_authority(store, &hash)).await?;
    authority.admin()?;
    Ok(authority)
}

/// Asks until the store answers.
async fn until_reached<T, F>(ask: impl Fn() -> F) -> Result<T, PkiError>
where
    F: Future<Output = Result<T, PkiError>>,
{
    loop {
        match ask().await {
            Err(PkiError::Store(error)) => tracing::warn!(%error, "the cluster's CA cannot be asked for"),
            other => return other,
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// With a store that several processes share, this replica's part in who leads.
fn election(parts: &Parts) -> io::Result<Option<Election>> {
    if parts.config.store.engine == Engine::Embedded {
        return Ok(None);
    }
    let identity = leader::identity(&parts.config.data_dir)?;
    let times = parts.config.leader.clone();
    let election = Election::new(parts.registry.clone(), identity, times, parts.shutdown.clone());
    Ok(Some(election))
}

/// Starts those who act on the cache: at once when nobody else can, otherwise whenever this replica leads.
fn start_controllers(parts: &Parts, election: Option<Election>) {
    let config = ControllerConfig::from(&*parts.config);
    let lead = move |registry: &Registry, over: &CancellationToken| {
        let recorder = Recorder::start(registry.clone(), over.clone());
        let mut tasks = controllers::spawn(registry, &recorder, &config, over);
        tasks.push(scheduler::spawn(registry.clone(), recorder, over.clone()));
        tasks
    };
    if let Some(election) = election {
        parts.tasks.spawn(election.run(lead));
        return;
    }
    for task in lead(&parts.registry, &parts.shutdown) {
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
    advertised: Option<SocketAddrV4>,
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
    let metrics = match parts.config.store.engine {
        Engine::Embedded => NodeMetricsStore::default(),
        Engine::Etcd => {
            NodeMetricsStore::with_peers(Peers::new(parts.registry.cache(), advertised, Arc::clone(authority)))
        }
    };
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
        Arc::new(store::prometheus),
        Arc::new(move || metrics.prometheus()),
        Arc::new(move || link.prometheus()),
    ];
    Ok((routes, sources))
}
