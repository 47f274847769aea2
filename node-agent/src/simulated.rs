//! A node without containers, networks and maps: fakes of the three traits below the agent, for tests of the link and for
//! clusters of thousands of nodes in one process. Everything above the traits is the real agent.

mod dataplane;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use ipnet::Ipv4Net;
use jiff::Timestamp;
use orlop_proto::node::v1 as link;
use tokio::sync::Notify;

use crate::{
    agent::Parts,
    config::Config,
    desired::Routes,
    link::Dial,
    metrics,
    network::{Attachment, Network, NetworkError, NetworkStatus, PodNetwork, Stale},
    reconciler,
    runtime::{
        ContainerSpec, Exit, Image, ImageConfig, ImageRequest, Observed, ObservedContainer, ObservedPod,
        ObservedSandbox, PodId, ProcessState, Runtime, RuntimeError, SandboxSpec, cgroup::Cgroups,
    },
};

pub use dataplane::SimulatedDataplane;

/// The parts of a simulated node: the same agent over fakes. `data_dir` holds its ledger.
pub fn parts(name: &str, address: IpAddr, data_dir: &Path, dial: Arc<dyn Dial>) -> Parts {
    let config = Config {
        node_name: name.to_owned(),
        data_dir: data_dir.to_owned(),
        run_dir: data_dir.join("run"),
        metrics_socket: data_dir.join("metrics.sock"),
        disk_pressure_percent: 0,
        ..Config::default()
    };
    let paths = crate::agent::metric_paths(&config);
    Parts {
        address,
        dial,
        runtime: Arc::new(SimulatedRuntime::default()),
        network: Arc::new(SimulatedNetwork::default()),
        dataplane: Arc::new(SimulatedDataplane::default()),
        // No hierarchy: simulated containers have no cgroups.
        reader: metrics::Reader::new(
            Cgroups {
                unified: None,
                legacy: Vec::new(),
            },
            paths,
        ),
        reconciler: reconciler::Settings {
            host_addresses: vec![address],
            ..reconciler::Settings::default()
        },
        config,
    }
}

/// Containers that run until they are signalled.
#[derive(Debug, Default)]
pub struct SimulatedRuntime {
    observed: Mutex<Observed>,
    changed: Arc<Notify>,
    /// How long a start takes.
    pub start_time: Duration,
}

impl SimulatedRuntime {
    /// How many containers run.
    pub fn containers(&self) -> usize {
        let observed = lock(&self.observed);
        let containers = observed.pods.values().flat_map(|pod| &pod.containers);
        containers
            .filter(|container| matches!(container.state, ProcessState::Running { .. }))
            .count()
    }

    /// Ends a container as a crash would; whether there was one of this pod that ran.
    pub fn crash(&self, pod_uid: &str, code: i32) -> bool {
        let mut observed = lock(&self.observed);
        let mut containers = observed
            .pods
            .get_mut(pod_uid)
            .into_iter()
            .flat_map(|pod| &mut pod.containers);
        let ended = containers.any(|container| end(&mut container.state, code));
        drop(observed);
        self.changed.notify_one();
        ended
    }

    /// Changes what there is of a pod; nothing where there is nothing.
    fn reduce(&self, pod: &PodId, change: impl FnOnce(&mut ObservedPod)) {
        if let Some(pod) = lock(&self.observed).pods.get_mut(&pod.uid) {
            change(pod);
        }
        self.changed.notify_one();
    }

    fn change(&self, pod: &PodId, change: impl FnOnce(&mut ObservedPod)) {
        let mut observed = lock(&self.observed);
        let entry = observed.pods.entry(pod.uid.clone()).or_insert_with(|| ObservedPod {
            id: pod.clone(),
            sandboxes: Vec::new(),
            containers: Vec::new(),
            networks: Vec::new(),
            remains: true,
        });
        change(entry);
        drop(observed);
        self.changed.notify_one();
    }
}

/// Whether it ran.
fn end(state: &mut ProcessState, code: i32) -> bool {
    let ProcessState::Running { started_at, .. } = *state else {
        return false;
    };
    let reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
    let finished_at = Timestamp::now();
    *state = ProcessState::Exited(Exit {
        code,
        reason,
        message: String::new(),
        started_at,
        finished_at,
    });
    true
}

fn running() -> ProcessState {
    ProcessState::Running {
        pid: 1,
        started_at: Timestamp::now(),
    }
}

#[async_trait]
impl Runtime for SimulatedRuntime {
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        Ok(lock(&self.observed).clone())
    }

    fn changed(&self) -> Arc<Notify> {
        Arc::clone(&self.changed)
    }

    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        Ok(Image {
            name: request.reference.clone(),
            id: "sha256:simulated".to_owned(),
            digest: "sha256:simulated".to_owned(),
            chain_id: "sha256:simulated".to_owned(),
            config: ImageConfig::default(),
        })
    }

    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError> {
        tokio::time::sleep(self.start_time).await;
        self.change(&spec.pod, |pod| {
            pod.sandboxes.push(ObservedSandbox {
                id: spec.id.clone(),
                attempt: spec.attempt,
                state: running(),
                addresses: spec.addresses.clone(),
                host_interface: spec.host_interface.clone(),
            });
        });
        Ok(())
    }

    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        self.change(&spec.pod, |pod| {
            pod.containers.push(ObservedContainer {
                id: spec.id.clone(),
                sandbox_id: spec.sandbox_id.clone(),
                name: spec.name.clone(),
                restart_count: spec.restart_count,
                backoff_ms: spec.backoff_ms,
                image: spec.image_reference.clone(),
                image_id: spec.image.id.clone(),
                grace_seconds: spec.grace_seconds,
                state: running(),
            });
        });
        Ok(())
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        let mut observed = lock(&self.observed);
        for pod in observed.pods.values_mut() {
            let containers = pod
                .containers
                .iter_mut()
                .map(|container| (&container.id, &mut container.state));
            let sandboxes = pod
                .sandboxes
                .iter_mut()
                .map(|sandbox| (&sandbox.id, &mut sandbox.state));
            for (_, state) in containers.chain(sandboxes).filter(|(known, _)| *known == id) {
                end(state, 128 + signal);
            }
        }
        drop(observed);
        self.changed.notify_one();
        Ok(())
    }

    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.reduce(pod, |pod| pod.containers.retain(|container| container.id != id));
        Ok(())
    }

    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.reduce(pod, |pod| pod.sandboxes.retain(|sandbox| sandbox.id != id));
        Ok(())
    }

    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        lock(&self.observed).pods.remove(&pod.uid);
        self.changed.notify_one();
        Ok(())
    }

    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        Ok(BTreeMap::new())
    }

    async fn version(&self) -> Result<String, RuntimeError> {
        Ok("simulated://1".to_owned())
    }
}

/// Addresses from the node's range, and nothing behind them.
#[derive(Debug, Default)]
pub struct SimulatedNetwork {
    state: Mutex<Wiring>,
    failing_adds: AtomicU64,
    failing_gcs: AtomicU64,
}

#[derive(Debug, Default)]
struct Wiring {
    range: Option<Ipv4Net>,
    routes: Routes,
    attachments: BTreeMap<String, Attachment>,
}

impl SimulatedNetwork {
    /// The routes that were configured last.
    pub fn routes(&self) -> Routes {
        lock(&self.state).routes.clone()
    }

    /// Lets the next calls of `add` fail.
    pub fn fail_next_adds(&self, count: u64) {
        self.failing_adds.store(count, Ordering::Relaxed);
    }

    /// Lets the next calls of `gc` fail.
    pub fn fail_next_gcs(&self, count: u64) {
        self.failing_gcs.store(count, Ordering::Relaxed);
    }
}

#[async_trait]
impl Network for SimulatedNetwork {
    async fn create_namespace(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError> {
        let path = Path::new("/simulated").join(sandbox_id);
        let attachment = Attachment {
            sandbox_id: sandbox_id.to_owned(),
            netns: Some(path.clone()),
            pod: None,
            status: None,
        };
        lock(&self.state)
            .attachments
            .entry(sandbox_id.to_owned())
            .or_insert(attachment);
        Ok(path)
    }

    async fn delete_namespace(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        lock(&self.state).attachments.remove(sandbox_id);
        Ok(())
    }

    async fn add(&self, pod: &PodNetwork) -> Result<NetworkStatus, NetworkError> {
        if take_one(&self.failing_adds) {
            return Err(NetworkError::NotConfigured("simulated".to_owned()));
        }
        let mut state = lock(&self.state);
        let range = state
            .range
            .ok_or_else(|| NetworkError::NotConfigured("no range yet".to_owned()))?;
        if let Some(status) = state
            .attachments
            .get(&pod.sandbox_id)
            .and_then(|known| known.status.clone())
        {
            return Ok(status);
        }
        let taken: BTreeSet<IpAddr> = state
            .attachments
            .values()
            .filter_map(|known| known.status.as_ref())
            .flat_map(|known| known.addresses.clone())
            .collect();
        // The first host address is the gateway's.
        let free = range
            .hosts()
            .skip(1)
            .map(IpAddr::V4)
            .find(|address| !taken.contains(address));
        let address = free.ok_or_else(|| NetworkError::Invalid(format!("{range} has no free address")))?;
        let gateway: Option<Ipv4Addr> = range.hosts().next();
        let status = NetworkStatus {
            addresses: vec![address],
            gateway: gateway.map(IpAddr::V4),
            host_interface: format!("sim{}", &pod.sandbox_id.chars().take(8).collect::<String>()),
        };
        let attachment = Attachment {
            sandbox_id: pod.sandbox_id.clone(),
            netns: Some(pod.netns.clone()),
            pod: Some(pod.clone()),
            status: Some(status.clone()),
        };
        state.attachments.insert(pod.sandbox_id.clone(), attachment);
        Ok(status)
    }

    async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        let there = lock(&self.state)
            .attachments
            .get(&pod.sandbox_id)
            .is_some_and(|known| known.status.is_some());
        if there {
            Ok(())
        } else {
            Err(NetworkError::Invalid(format!("{} is not attached", pod.sandbox_id)))
        }
    }

    async fn del(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        if let Some(attachment) = lock(&self.state).attachments.get_mut(&pod.sandbox_id) {
            attachment.status = None;
            attachment.pod = None;
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Attachment>, NetworkError> {
        Ok(lock(&self.state).attachments.values().cloned().collect())
    }

    async fn gc(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError> {
        if take_one(&self.failing_gcs) {
            return Err(NetworkError::NotConfigured("simulated".to_owned()));
        }
        lock(&self.state)
            .attachments
            .retain(|sandbox, _| valid.contains(sandbox));
        Ok(())
    }

    async fn configure(&self, ranges: &link::Welcome, routes: &Routes, stale: Stale) -> Result<(), NetworkError> {
        let range = ranges.pod_cidrs.iter().find_map(|range| range.parse().ok());
        let range = range.ok_or_else(|| NetworkError::Invalid("no IPv4 range".to_owned()))?;
        let mut state = lock(&self.state);
        state.range = Some(range);
        // The later ones count. The first is of one step: thousands of simulated nodes have thousands of routes each.
        state.routes = match stale {
            Stale::Removed => routes.clone(),
            Stale::Kept => routes.clone().union(state.routes.clone()),
        };
        Ok(())
    }

    async fn ready(&self) -> Result<(), String> {
        lock(&self.state)
            .range
            .map(drop)
            .ok_or_else(|| "no range yet".to_owned())
    }
}

/// Whether there was one.
fn take_one(count: &AtomicU64) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .is_ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
