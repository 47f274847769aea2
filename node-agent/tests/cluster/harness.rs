//! Control in this process, and agents over simulated nodes.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use orlop_control::{
    config::Config as ControlConfig,
    run,
    server::{Listener, Trust},
};
use orlop_node::{
    agent::{self, Parts},
    config::Config,
    identity::Identity,
    link::TlsDialer,
    runtime::Runtime,
    simulated::{self, SimulatedDataplane, SimulatedNetwork, SimulatedRuntime},
};
use orlop_proto::{
    Resource,
    api::v1::{ApplyRequest, DeleteRequest, ListRequest, apply_request::Input, objects_client::ObjectsClient},
    cluster::v1::{CreateTokenRequest, join_client::JoinClient},
    core::v1::Event,
};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

/// Everything that is waited for must have happened by then: machines are shared and slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again and again until it is so.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < end, "it never happened: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A control plane.
pub struct Cluster {
    dir: TempDir,
    address: SocketAddr,
    certificates: Option<Duration>,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Cluster {
    /// A fresh one.
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// One whose nodes' certificates live so long.
    pub async fn start_with(certificates: Option<Duration>) -> Self {
        let _second_test = rustls::crypto::ring::default_provider().install_default();
        let _same = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let mut cluster = Self {
            dir: tempfile::tempdir().unwrap(),
            address,
            certificates,
            running: None,
        };
        cluster.run().await;
        cluster
    }

    /// Starts it (again) on the same data and address, and waits until it answers.
    pub async fn run(&mut self) {
        let mut config = ControlConfig {
            data_dir: self.dir.path().to_owned(),
            unix_socket: self.dir.path().join("control.sock"),
            ..ControlConfig::default()
        };
        if let Some(life) = self.certificates {
            config.pki.node_certificate = life;
        }
        let stop = CancellationToken::new();
        let (ending, address) = (stop.clone(), self.address);
        let task = tokio::spawn(async move {
            // The store of a control that has just ended may still be held for a moment.
            while !ending.is_cancelled() {
                let Ok(listener) = TcpListener::bind(address).await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let listeners = vec![Listener::Tcp(listener, Trust::Tls)];
                if let Err(error) = run::run(config.clone(), listeners, ending.clone()).await {
                    tracing::info!(%error, "control did not start; trying again");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        self.running = Some((stop, task));
        eventually("control answers", async || {
            let Ok(channel) = self.admin().await else { return false };
            let request = ListRequest {
                resource: "namespaces".into(),
                ..Default::default()
            };
            ObjectsClient::new(channel).list(request).await.is_ok()
        })
        .await;
    }

    /// Ends it.
    pub async fn stop(&self) {
        if let Some((stop, task)) = &self.running {
            stop.cancel();
            let end = Instant::now() + PATIENCE;
            while !task.is_finished() {
                assert!(Instant::now() < end, "control does not end");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn admin(&self) -> Result<Channel, tonic::transport::Error> {
        let path = self.dir.path().join("control.sock");
        Endpoint::from_shared(format!("unix:{}", path.display()))?
            .connect()
            .await
    }

    /// Applies a manifest; all of it must be taken.
    pub async fn apply(&self, manifest: &str) {
        let request = ApplyRequest {
            input: Some(Input::Manifest(manifest.to_owned())),
            namespace: String::new(),
        };
        let mut results = ObjectsClient::new(self.admin().await.unwrap())
            .apply(request)
            .await
            .unwrap()
            .into_inner();
        while let Some(result) = results.message().await.unwrap() {
            assert_ne!(
                result.action, "failed",
                "{} {}: {}",
                result.resource, result.name, result.message
            );
        }
    }

    /// All objects of a kind, in user namespaces and others.
    pub async fn list<T: Resource>(&self, resource: &str) -> Vec<T> {
        self.select(resource, "").await
    }

    /// What was told of an object: reasons, with how often.
    pub async fn told(&self, kind: &str, name: &str) -> BTreeMap<String, i32> {
        let selector = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let mut told = BTreeMap::new();
        for event in self.select::<Event>("events", &selector).await {
            *told.entry(event.reason).or_default() += event.count;
        }
        told
    }

    async fn select<T: Resource>(&self, resource: &str, field_selector: &str) -> Vec<T> {
        let request = ListRequest {
            resource: resource.into(),
            field_selector: field_selector.into(),
            ..Default::default()
        };
        let list = ObjectsClient::new(self.admin().await.unwrap())
            .list(request)
            .await
            .unwrap()
            .into_inner();
        list.items.into_iter().filter_map(T::from_object).collect()
    }

    /// Asks for a deletion in the namespace `default`.
    pub async fn delete(&self, resource: &str, name: &str) {
        let request = DeleteRequest {
            resource: resource.into(),
            namespace: "default".into(),
            name: name.into(),
            grace_period_seconds: Some(1),
            ..Default::default()
        };
        ObjectsClient::new(self.admin().await.unwrap())
            .delete(request)
            .await
            .unwrap();
    }

    /// A join token.
    pub async fn token(&self) -> String {
        let mut client = JoinClient::new(self.admin().await.unwrap());
        client
            .create_token(CreateTokenRequest::default())
            .await
            .unwrap()
            .into_inner()
            .token
    }

    fn control(&self) -> Vec<String> {
        vec![format!("https://{}", self.address)]
    }

    /// The identity of a machine whose folder this is.
    pub fn identity(&self, name: &str, data_dir: &Path, token: &str) -> Identity {
        let config = Config {
            node_name: name.to_owned(),
            data_dir: data_dir.to_owned(),
            control: self.control(),
            join_token: Some(token.to_owned()),
            ..Config::default()
        };
        Identity::open(&config).unwrap()
    }

    /// A dialer with the certificate of a node that joins now.
    pub async fn joined(&self, name: &str, data_dir: &Path) -> TlsDialer {
        let identity = Arc::new(self.identity(name, data_dir, &self.token().await));
        if !identity.is_joined() {
            identity.join_once(0).await.unwrap();
        }
        TlsDialer::new(self.control(), Arc::new(move || identity.tls()))
    }
}

/// A simulated machine; its containers and maps outlive its agent, as on a real one.
pub struct SimulatedNode {
    name: String,
    address: String,
    dir: TempDir,
    pub runtime: Arc<SimulatedRuntime>,
    pub network: Arc<SimulatedNetwork>,
    pub dataplane: Arc<SimulatedDataplane>,
    agent: tokio::sync::Mutex<Option<(CancellationToken, JoinHandle<()>)>>,
}

impl SimulatedNode {
    /// Joins and runs.
    pub async fn start(cluster: &Cluster, name: &str, address: &str) -> Self {
        let node = Self {
            name: name.to_owned(),
            address: address.to_owned(),
            dir: tempfile::tempdir().unwrap(),
            runtime: Arc::default(),
            network: Arc::default(),
            dataplane: Arc::default(),
            agent: tokio::sync::Mutex::default(),
        };
        node.run(cluster).await;
        node
    }

    /// Runs the agent (again).
    pub async fn run(&self, cluster: &Cluster) {
        let dial = Arc::new(cluster.joined(&self.name, self.dir.path()).await);
        let parts = simulated::parts(&self.name, self.address.parse().unwrap(), self.dir.path(), dial);
        let parts = Parts {
            runtime: self.runtime.clone(),
            network: self.network.clone(),
            dataplane: self.dataplane.clone(),
            ..parts
        };
        let stop = CancellationToken::new();
        let ending = stop.clone();
        let task = tokio::spawn(async move { agent::run_parts(parts, async {}, ending).await.unwrap() });
        *self.agent.lock().await = Some((stop, task));
    }

    /// Ends the agent; what runs goes on.
    pub async fn stop(&self) {
        if let Some((stop, task)) = self.agent.lock().await.take() {
            stop.cancel();
            task.await.unwrap();
        }
    }

    /// How many backends a service of `default` has in the maps.
    pub fn backends(&self, service: &str) -> Option<usize> {
        let services = self.dataplane.services();
        let service = services.get(&("default".to_owned(), service.to_owned()))?;
        Some(service.ports.iter().map(|port| port.backends_v4.len() / 8).sum())
    }

    /// The ids of all containers.
    pub async fn container_ids(&self) -> Vec<String> {
        let observed = self.runtime.observe().await.unwrap();
        observed
            .pods
            .values()
            .flat_map(|pod| &pod.containers)
            .map(|container| container.id.clone())
            .collect()
    }
}
