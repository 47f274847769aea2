//! The simulated parts, and what these tests want to see of their use.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::FutureExt as _;
use orlop_proto::node::v1 as link;
use tokio::sync::Notify;

use crate::{
    network::{Network as _, Stale},
    runtime::{ContainerSpec, Image, ImageRequest, Observed, PodId, Runtime, RuntimeError, SandboxSpec},
    simulated::{SimulatedDataplane, SimulatedNetwork, SimulatedRuntime},
};

/// The parts below one loop.
pub struct Fake {
    pub runtime: Arc<Watched>,
    pub network: Arc<SimulatedNetwork>,
    pub dataplane: Arc<SimulatedDataplane>,
}

impl Fake {
    /// A sandbox takes so long.
    pub fn new(start_time: Duration) -> Self {
        let network = SimulatedNetwork::default();
        let ranges = link::Welcome {
            pod_cidrs: vec!["10.244.0.0/24".to_owned()],
            ..link::Welcome::default()
        };
        let configured = network
            .configure(&ranges, &imbl::OrdMap::new(), Stale::Removed)
            .now_or_never();
        configured.unwrap().unwrap();
        let mut runtime = Watched::default();
        runtime.inner.start_time = start_time;
        Self {
            runtime: Arc::new(runtime),
            network: Arc::new(network),
            dataplane: Arc::default(),
        }
    }

    pub fn observed(&self) -> Observed {
        self.runtime.observe().now_or_never().unwrap().unwrap()
    }

    /// The sandboxes that have a network.
    pub fn networks(&self) -> Vec<String> {
        let attachments = self.network.list().now_or_never().unwrap().unwrap();
        attachments
            .into_iter()
            .map(|attachment| attachment.sandbox_id)
            .collect()
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self::new(Duration::from_millis(5))
    }
}

/// A runtime that sees whether two calls are made for one pod at once, and whose images named `panics`, `hangs` and `absent` are that.
#[derive(Default)]
pub struct Watched {
    inner: SimulatedRuntime,
    /// Calls under way for each pod, and the most there ever were.
    under_way: Mutex<BTreeMap<String, usize>>,
    pub most: AtomicUsize,
}

impl Watched {
    /// Counts a call for a pod as long as the guard lives.
    fn enter<'a>(&'a self, uid: &str) -> impl Drop + use<'a> {
        struct Guard<'a>(&'a Watched, String);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                *self.0.under_way.lock().unwrap().get_mut(&self.1).unwrap() -= 1;
            }
        }
        let mut under_way = self.under_way.lock().unwrap();
        let count = under_way.entry(uid.to_owned()).or_default();
        *count += 1;
        self.most.fetch_max(*count, Ordering::Relaxed);
        Guard(self, uid.to_owned())
    }
}

#[async_trait]
impl Runtime for Watched {
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        self.inner.observe().await
    }
    fn changed(&self) -> Arc<Notify> {
        self.inner.changed()
    }
    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        match request.reference.as_str() {
            "panics" => panic!("a worker that panics"),
            "hangs" => std::future::pending().await,
            _ => self.inner.ensure_image(request).await,
        }
    }
    async fn has_image(&self, reference: &str) -> Result<bool, RuntimeError> {
        Ok(reference != "absent")
    }
    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError> {
        let _guard = self.enter(&spec.pod.uid);
        self.inner.create_sandbox(spec).await
    }
    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        let _guard = self.enter(&spec.pod.uid);
        self.inner.start_container(spec).await
    }
    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        self.inner.signal(id, signal).await
    }
    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.inner.remove_container(pod, id).await
    }
    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.inner.remove_sandbox(pod, id).await
    }
    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        self.inner.remove_pod(pod).await
    }
    async fn version(&self) -> Result<String, RuntimeError> {
        self.inner.version().await
    }
    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        self.inner.disk_usage().await
    }
}
