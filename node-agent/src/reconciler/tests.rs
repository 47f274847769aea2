//! The loop over a runtime in memory: pods do not wait for each other, and nothing is done twice at once.

use std::{
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use orlop_proto::{
    core::v1::{Container, PodSpec},
    node::v1 as link,
};
use tokio::sync::Notify;

use super::*;
use crate::{
    dataplane::{Counters, DataplaneError, PodInterface, ServiceChanges},
    network::{Attachment, NetworkError, NetworkStatus, PodNetwork},
    runtime::{
        ContainerSpec, Image, ImageRequest, ObservedContainer, ObservedSandbox, ProcessState, RuntimeError, SandboxSpec,
    },
};

/// containerd, network and dataplane in memory.
#[derive(Default)]
struct Fake {
    observed: Mutex<Observed>,
    networks: Mutex<BTreeMap<String, PodNetwork>>,
    changed: Arc<Notify>,
    /// Calls under way for each pod, and the most there ever were.
    under_way: Mutex<BTreeMap<String, usize>>,
    most: AtomicUsize,
    /// ADDs that fail before one succeeds.
    failing_adds: AtomicUsize,
    /// GCs that fail before one succeeds.
    failing_gcs: AtomicUsize,
    /// How long a sandbox takes, beside the usual.
    slow_sandbox: Duration,
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
    async fn attach_pod(&self, _: PodInterface) -> Result<(), DataplaneError> {
        Ok(())
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

struct Loop {
    fake: Arc<Fake>,
    desired: watch::Sender<Arc<Desired>>,
    updates: mpsc::Receiver<PodUpdate>,
    events: mpsc::Receiver<Event>,
    latest: BTreeMap<String, PodUpdate>,
    stop: CancellationToken,
}

impl Loop {
    fn start(fake: Fake) -> Self {
        let fake = Arc::new(fake);
        let (desired, receive) = watch::channel(Arc::new(Desired {
            complete: true,
            ..Desired::default()
        }));
        let (sender, updates) = mpsc::channel(4);
        let (say, events) = mpsc::channel(256);
        let stop = CancellationToken::new();
        let inputs = Inputs {
            desired: receive,
            runtime: fake.clone(),
            network: fake.clone(),
            dataplane: fake.clone(),
            updates: sender,
            events: say,
            settings: Settings {
                backoff_initial: Duration::from_millis(20),
                ..Settings::default()
            },
        };
        tokio::spawn(run(inputs, stop.clone()));
        Self {
            fake,
            desired,
            updates,
            events,
            latest: BTreeMap::new(),
            stop,
        }
    }

    fn want(&self, uid: &str, image: &str, change: impl FnOnce(&mut Pod)) {
        let container = Container {
            name: "a".into(),
            image: image.into(),
            ..Default::default()
        };
        let spec = PodSpec {
            containers: vec![container],
            restart_policy: "Always".into(),
            ..Default::default()
        };
        let mut pod = Pod {
            spec: Some(spec),
            ..Default::default()
        };
        let meta = pod.meta_mut();
        (meta.namespace, meta.name, meta.uid) = ("default".into(), uid.into(), uid.into());
        change(&mut pod);
        self.desired.send_modify(|desired| {
            Arc::make_mut(desired).pods.insert(uid.to_owned(), Arc::new(pod));
        });
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&BTreeMap<String, PodUpdate>) -> bool) {
        let waiting = async {
            while !wanted(&self.latest) {
                let update = self.updates.recv().await.unwrap();
                self.latest.insert(update.uid.clone(), update);
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), waiting).await;
        assert!(ended.is_ok(), "{what}: {:#?}", self.latest);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn runs(updates: &BTreeMap<String, PodUpdate>, uid: &str) -> bool {
    updates.get(uid).is_some_and(|update| update.status.phase == "Running")
}

#[tokio::test]
async fn one_pods_slow_action_or_panic_does_not_hold_up_the_others() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("slow", "hangs", |_| {});
    reconciler.want("panic", "panics", |_| {});
    for at in 0..20 {
        reconciler.want(&format!("p{at}"), "i", |_| {});
    }
    reconciler
        .until("all others run", |updates| {
            (0..20).all(|at| runs(updates, &format!("p{at}")))
        })
        .await;
    assert!(!runs(&reconciler.latest, "slow"));
    assert_eq!(
        reconciler.fake.most.load(Ordering::Relaxed),
        1,
        "never two actions for one pod at once"
    );
    let observed = reconciler.fake.observed.lock().unwrap().clone();
    assert!(observed.pods.values().all(|pod| pod.sandboxes.len() <= 1));
}

#[tokio::test]
async fn a_failed_start_is_rolled_back_and_tried_again_and_a_deleted_pod_is_gone() {
    let fake = Fake {
        failing_adds: AtomicUsize::new(2),
        ..Fake::default()
    };
    let mut reconciler = Loop::start(fake);
    reconciler.want("p", "i", |_| {});
    reconciler
        .until("it runs after all", |updates| runs(updates, "p"))
        .await;
    assert_eq!(
        reconciler.fake.networks.lock().unwrap().len(),
        1,
        "what failed left nothing"
    );
    reconciler.want("p", "i", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
        pod.meta_mut().deletion_grace_period_seconds = Some(5);
    });
    reconciler.until("it is gone", |updates| updates["p"].gone).await;
    assert!(reconciler.fake.networks.lock().unwrap().is_empty());
    assert!(reconciler.fake.observed.lock().unwrap().pods.is_empty());
    let told: Vec<String> = std::iter::from_fn(|| reconciler.events.try_recv().ok())
        .map(|event| {
            assert_eq!(event.involved_object.unwrap().uid, "p");
            event.reason
        })
        .collect();
    assert_eq!(
        told,
        [
            "FailedCreatePodSandBox",
            "FailedCreatePodSandBox",
            "Pulled",
            "Created",
            "Started",
            "Killing"
        ]
    );
}

#[tokio::test]
async fn people_are_told_that_an_image_is_pulled() {
    for (image, expected) in [("absent", &["Pulling", "Pulled"][..]), ("there", &["Pulled"])] {
        let mut reconciler = Loop::start(Fake::default());
        reconciler.want("p", image, |_| {});
        reconciler.until("it runs", |updates| runs(updates, "p")).await;
        let told: Vec<String> = std::iter::from_fn(|| reconciler.events.try_recv().ok())
            .map(|event| event.reason)
            .filter(|reason| reason.starts_with("Pull"))
            .collect();
        assert_eq!(told, expected);
    }
}

#[tokio::test]
async fn a_pod_that_never_was_here_is_gone_at_once() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("p", "i", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
    });
    reconciler
        .until("it is gone", |updates| {
            updates.get("p").is_some_and(|update| update.gone)
        })
        .await;
}

#[tokio::test]
async fn a_deleted_pod_does_not_wait_for_its_image() {
    let mut reconciler = Loop::start(Fake::default());
    reconciler.want("p", "hangs", |_| {});
    reconciler
        .until("its sandbox is there", |updates| {
            updates.get("p").is_some_and(|update| !update.status.pod_ip.is_empty())
        })
        .await;
    reconciler.want("p", "hangs", |pod| {
        pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
    });
    reconciler.until("it is gone", |updates| updates["p"].gone).await;
    assert!(reconciler.fake.observed.lock().unwrap().pods.is_empty());
}

#[tokio::test]
async fn clearing_that_is_tried_again_spares_a_network_whose_sandbox_is_being_made() {
    let fake = Fake {
        failing_gcs: AtomicUsize::new(1),
        slow_sandbox: Duration::from_millis(200),
        ..Fake::default()
    };
    let left = PodNetwork {
        namespace: String::new(),
        name: String::new(),
        uid: "left".to_owned(),
        sandbox_id: "left".to_owned(),
        netns: PathBuf::new(),
    };
    fake.networks.lock().unwrap().insert("left".to_owned(), left);
    let mut reconciler = Loop::start(fake);
    reconciler.want("p", "i", |_| {});
    for _ in 0..50 {
        // As containerd's events would.
        reconciler.fake.changed.notify_one();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    reconciler.until("it runs", |updates| runs(updates, "p")).await;
    let fake = reconciler.fake.clone();
    let sandboxes = sandbox_ids(&fake.observed.lock().unwrap());
    let networks: BTreeSet<String> = fake.networks.lock().unwrap().keys().cloned().collect();
    assert!(sandboxes.is_subset(&networks), "{sandboxes:?} of {networks:?}");
    assert_eq!(sandboxes.len(), 1);
    for _ in 0..100 {
        if !fake.networks.lock().unwrap().contains_key("left") {
            return;
        }
        fake.changed.notify_one();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("what an earlier life left is cleared in the end");
}
