//! A machine with the real agent on it. Its containers, its network and its maps outlive the agent; what an agent that was killed still
//! asks for is never answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use async_trait::async_trait;
use orlop_node::{
    agent::{self, Parts},
    dataplane::{Counters, Dataplane, DataplaneError, PodInterface, ServiceChanges},
    desired::Routes,
    link::Dial,
    network::{Attachment, Network, NetworkError, NetworkStatus, PodNetwork, Stale},
    runtime::{ContainerSpec, Image, ImageRequest, Observed, PodId, Runtime, RuntimeError, SandboxSpec},
    simulated::{self, SimulatedDataplane, SimulatedNetwork, SimulatedRuntime},
};
use orlop_proto::node::v1 as link;
use tempfile::TempDir;
use tokio::{
    sync::{Notify, watch},
    time::{Duration, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::Cluster,
    environment::Chance,
    wire::{Weather, Wire},
};

/// The longest time that a call to containers, network or maps takes.
const CALL: Duration = Duration::from_millis(400);

/// See the module.
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its way to control.
    pub wire: Arc<Wire>,
    /// Its containers.
    pub runtime: Arc<SimulatedRuntime>,
    /// Its pods' network.
    pub network: Arc<SimulatedNetwork>,
    /// Its maps.
    pub dataplane: Arc<SimulatedDataplane>,
    folder: TempDir,
    address: std::net::IpAddr,
    agent: Option<CancellationToken>,
    chance: Chance,
}

/// Machines of a cluster, each with its agent started, and what tells the weather on the way of each.
pub fn start_all(
    count: u8,
    cluster: &Cluster,
    latency: Duration,
    chance: &mut Chance,
) -> (Vec<Machine>, Vec<watch::Sender<Weather>>) {
    let start = |number| {
        let (tell, told) = watch::channel(Weather::default());
        let name = format!("n{number}");
        let wire = Wire::new(&name, cluster.ports.clone(), told, latency, chance.seed());
        let mut machine = Machine::new(number, wire, chance.seed());
        machine.start();
        (machine, tell)
    };
    (1..=count).map(start).unzip()
}

impl Machine {
    /// Without an agent at first.
    ///
    /// # Panics
    /// When there is no room for its folder.
    pub fn new(number: u8, wire: Wire, seed: u64) -> Self {
        // The ledger is synced at every write: in memory that costs nothing.
        let memory = std::path::Path::new("/dev/shm");
        let folder = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        Self {
            name: format!("n{number}"),
            wire: Arc::new(wire),
            runtime: Arc::default(),
            network: Arc::default(),
            dataplane: Arc::default(),
            folder: folder.expect("a folder for the ledger"),
            address: std::net::Ipv4Addr::new(192, 0, 2, number).into(),
            agent: None,
            chance: Chance::new(seed, 5),
        }
    }

    /// Starts an agent.
    pub fn start(&mut self) {
        self.kill();
        let dead = CancellationToken::new();
        let wire: Arc<dyn Dial> = self.wire.clone();
        let mut hands = |purpose| Hands {
            dead: dead.clone(),
            chance: std::sync::Mutex::new(Chance::new(self.chance.seed(), purpose)),
        };
        let parts = simulated::parts(&self.name, self.address, self.folder.path(), wire);
        let parts = Parts {
            runtime: Arc::new(Held(self.runtime.clone(), hands(6))),
            network: Arc::new(Held(self.network.clone(), hands(7))),
            dataplane: Arc::new(Held(self.dataplane.clone(), hands(8))),
            ..parts
        };
        let stop = dead.clone();
        tokio::spawn(async move {
            if let Err(error) = agent::run_parts(parts, async {}, stop).await {
                tracing::error!(error = &error as &dyn std::error::Error, "the agent failed");
            }
        });
        self.agent = Some(dead);
    }

    /// Kills the agent; its connections break.
    pub fn kill(&mut self) {
        if let Some(dead) = self.agent.take() {
            dead.cancel();
            self.wire.cut();
        }
    }

    /// Whether an agent runs.
    pub fn is_up(&self) -> bool {
        self.agent.is_some()
    }
}

/// One agent's hold on its machine.
struct Hands {
    dead: CancellationToken,
    chance: std::sync::Mutex<Chance>,
}

impl Hands {
    /// A call takes its time before and after its effect, and the agent may die at either. The dead get no answer.
    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        let (before, after) = {
            let mut chance = self.chance.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            (chance.up_to(CALL), chance.up_to(CALL))
        };
        let work = async {
            sleep(before).await;
            let result = call.await;
            sleep(after).await;
            result
        };
        tokio::select! {
            biased;
            () = self.dead.cancelled() => std::future::pending().await,
            result = work => result,
        }
    }

    /// A look takes no time.
    async fn look<T>(&self, call: impl Future<Output = T>) -> T {
        if self.dead.is_cancelled() {
            std::future::pending().await
        } else {
            call.await
        }
    }
}

struct Held<T>(Arc<T>, Hands);

#[async_trait]
impl Runtime for Held<SimulatedRuntime> {
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        self.1.look(self.0.observe()).await
    }
    fn changed(&self) -> Arc<Notify> {
        self.0.changed()
    }
    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        self.1.call(self.0.ensure_image(request)).await
    }
    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError> {
        self.1.call(self.0.create_sandbox(spec)).await
    }
    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        self.1.call(self.0.start_container(spec)).await
    }
    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        self.1.call(self.0.signal(id, signal)).await
    }
    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.1.call(self.0.remove_container(pod, id)).await
    }
    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.1.call(self.0.remove_sandbox(pod, id)).await
    }
    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        self.1.call(self.0.remove_pod(pod)).await
    }
    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        self.1.look(self.0.disk_usage()).await
    }
    async fn version(&self) -> Result<String, RuntimeError> {
        self.1.look(self.0.version()).await
    }
}

#[async_trait]
impl Network for Held<SimulatedNetwork> {
    async fn create_namespace(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError> {
        self.1.call(self.0.create_namespace(sandbox_id)).await
    }
    async fn delete_namespace(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        self.1.call(self.0.delete_namespace(sandbox_id)).await
    }
    async fn add(&self, pod: &PodNetwork) -> Result<NetworkStatus, NetworkError> {
        self.1.call(self.0.add(pod)).await
    }
    async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        self.1.call(self.0.check(pod)).await
    }
    async fn del(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        self.1.call(self.0.del(pod)).await
    }
    async fn list(&self) -> Result<Vec<Attachment>, NetworkError> {
        self.1.look(self.0.list()).await
    }
    async fn gc(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.1.call(self.0.gc(valid)).await
    }
    async fn configure(&self, ranges: &link::Welcome, routes: &Routes, stale: Stale) -> Result<(), NetworkError> {
        self.1.call(self.0.configure(ranges, routes, stale)).await
    }
    async fn ready(&self) -> Result<(), String> {
        self.1.look(self.0.ready()).await
    }
}

#[async_trait]
impl Dataplane for Held<SimulatedDataplane> {
    async fn apply(&self, changes: ServiceChanges) -> Result<(), DataplaneError> {
        self.1.call(self.0.apply(changes)).await
    }
    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError> {
        self.1.call(self.0.attach_pod(interface)).await
    }
    async fn detach_pod(&self, pod_uid: &str) -> Result<(), DataplaneError> {
        self.1.call(self.0.detach_pod(pod_uid)).await
    }
    async fn read_counters(&self) -> Result<Counters, DataplaneError> {
        self.1.look(self.0.read_counters()).await
    }
    fn serves(&self) -> bool {
        self.0.serves()
    }
    fn health(&self) -> Result<(), String> {
        self.0.health()
    }
}
