//! containerd, network and dataplane in memory, each with the faults that these tests are about.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use orlop_proto::node::v1 as link;
use tokio::sync::Notify;

use crate::{
    dataplane::{Counters, Dataplane, DataplaneError, PodInterface, ServiceChanges},
    network::{Attachment, Network, NetworkError, NetworkStatus, PodNetwork, Stale},
    runtime::{
        ContainerSpec, Image, ImageRequest, Observed, ObservedContainer, ObservedPod, ObservedSandbox, PodId,
        ProcessState, Runtime, RuntimeError, SandboxSpec,
    },
};

/// containerd, network and dataplane in memory.
#[derive(Default)]
pub struct Fake {
    pub observed: Mutex<Observed>,
    pub networks: Mutex<BTreeMap<String, PodNetwork>>,
    pub changed: Arc<Notify>,
    /// Calls under way for each pod, and the most there ever were.
    pub under_way: Mutex<BTreeMap<String, usize>>,
    pub most: AtomicUsize,
    /// ADDs that fail before one succeeds.
    pub failing_adds: AtomicUsize,
    /// GCs that fail before one succeeds.
    pub failing_gcs: AtomicUsize,
    /// How long a sandbox takes, beside the usual.
    pub slow_sandbox: Duration,
    /// Pods whose programs somebody has detached.
    pub detached: Mutex<BTreeSet<String>>,
    /// How often a pod's programs were attached.
    pub attached: AtomicUsize,
}

impl Fake {
    /// Counts a call for a pod as long as the guard lives.
    fn enter<'a>(&'a self, uid: &str) -> impl Drop + use<'a> {
        struct Guard<'a>(&'a Fake, String);
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

    fn change(&self, pod: &PodId, change: impl FnOnce(&mut ObservedPod)) {
        let mut observed = self.observed.lock().unwrap();
        change(observed.pods.entry(pod.uid.clone()).or_insert_with(|| ObservedPod {
            id: pod.clone(),
            sandboxes: vec![],
            containers: vec![],
            networks: vec![],
            remains: true,
        }));
        self.changed.notify_one();
    }
}

#[async_trait]
impl Runtime for Fake {
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        Ok(self.observed.lock().unwrap().clone())
    }
    fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }
    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        match request.reference.as_str() {
            "panics" => panic!("a worker that panics"),
            "hangs" => std::future::pending().await,
            reference => {
                let name = reference.to_owned();
                let config = Default::default();
                Ok(Image {
                    id: name.clone(),
                    digest: name.clone(),
                    chain_id: name.clone(),
                    name,
                    config,
                })
            }
        }
    }
    async fn has_image(&self, reference: &str) -> Result<bool, RuntimeError> {
        Ok(reference != "absent")
    }
    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError> {
        let _guard = self.enter(&spec.pod.uid);
        tokio::time::sleep(Duration::from_millis(5) + self.slow_sandbox).await;
        let state = ProcessState::Running {
            pid: 1,
            started_at: Timestamp::now(),
        };
        let (addresses, host_interface) = (spec.addresses.clone(), spec.host_interface.clone());
        let made = ObservedSandbox {
            id: spec.id.clone(),
            attempt: spec.attempt,
            state,
            addresses,
            host_interface,
        };
        self.change(&spec.pod, |pod| pod.sandboxes.push(made));
        Ok(())
    }
    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        let _guard = self.enter(&spec.pod.uid);
        let made = ObservedContainer {
            id: spec.id.clone(),
            sandbox_id: spec.sandbox_id.clone(),
            name: spec.name.clone(),
            restart_count: spec.restart_count,
            backoff_ms: spec.backoff_ms,
            image: spec.image_reference.clone(),
            image_id: spec.image.id.clone(),
            grace_seconds: spec.grace_seconds,
            state: ProcessState::Running {
                pid: 2,
                started_at: Timestamp::now(),
            },
        };
        self.change(&spec.pod, |pod| pod.containers.push(made));
        Ok(())
    }
    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        let mut observed = self.observed.lock().unwrap();
        let now = Timestamp::now();
        for container in observed
            .pods
            .values_mut()
            .flat_map(|pod| &mut pod.containers)
            .filter(|c| c.id == id)
        {
            let (reason, message) = ("Error".to_owned(), String::new());
            let exit = crate::runtime::Exit {
                code: 128 + signal,
                reason,
                message,
                started_at: now,
                finished_at: now,
            };
            container.state = ProcessState::Exited(exit);
        }
        self.changed.notify_one();
        Ok(())
    }
    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.change(pod, |pod| pod.containers.retain(|container| container.id != id));
        Ok(())
    }
    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.change(pod, |pod| pod.sandboxes.retain(|sandbox| sandbox.id != id));
        Ok(())
    }
    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        self.observed.lock().unwrap().pods.remove(&pod.uid);
        Ok(())
    }

    async fn version(&self) -> Result<String, RuntimeError> {
        Ok("fake://1".to_owned())
    }
    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        Ok(BTreeMap::new())
    }
}

#[async_trait]
impl Network for Fake {
    async fn create_namespace(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError> {
        Ok(PathBuf::from("/run/netns").join(sandbox_id))
    }
    async fn delete_namespace(&self, _: &str) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn add(&self, pod: &PodNetwork) -> Result<NetworkStatus, NetworkError> {
        if take_one(&self.failing_adds) {
            return Err(NetworkError::NotConfigured("not yet".to_owned()));
        }
        self.networks
            .lock()
            .unwrap()
            .insert(pod.sandbox_id.clone(), pod.clone());
        Ok(NetworkStatus {
            addresses: vec!["10.244.0.2".parse().unwrap()],
            gateway: None,
            host_interface: "veth0".to_owned(),
        })
    }
    async fn check(&self, _: &PodNetwork) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn del(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        self.networks.lock().unwrap().remove(&pod.sandbox_id);
        Ok(())
    }
    async fn list(&self) -> Result<Vec<Attachment>, NetworkError> {
        let networks = self.networks.lock().unwrap();
        let attachment = |pod: &PodNetwork| Attachment {
            sandbox_id: pod.sandbox_id.clone(),
            netns: Some(pod.netns.clone()),
            pod: Some(pod.clone()),
            status: None,
        };
        Ok(networks.values().map(attachment).collect())
    }
    async fn gc(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError> {
        if take_one(&self.failing_gcs) {
            return Err(NetworkError::NotConfigured("not yet".to_owned()));
        }
        self.networks.lock().unwrap().retain(|id, _| valid.contains(id));
        Ok(())
    }
    async fn configure(
        &self,
        _: &link::Welcome,
        _: &imbl::OrdMap<String, Arc<link::Route>>,
        _: Stale,
    ) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

#[async_trait]
impl Dataplane for Fake {
    async fn apply(&self, _: ServiceChanges) -> Result<(), DataplaneError> {
        Ok(())
    }
    async fn attach_pod(&self, interface: PodInterface) -> Result<(), DataplaneError> {
        self.detached.lock().unwrap().remove(&interface.pod_uid);
        self.attached.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    async fn repair(&self) -> Result<Vec<String>, DataplaneError> {
        Ok(self.detached.lock().unwrap().iter().cloned().collect())
    }
    async fn detach_pod(&self, _: &str) -> Result<(), DataplaneError> {
        Ok(())
    }
    async fn read_counters(&self) -> Result<Counters, DataplaneError> {
        Ok(Counters::default())
    }
    fn serves(&self) -> bool {
        false
    }
    fn health(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Whether there was one.
fn take_one(count: &AtomicUsize) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .is_ok()
}
