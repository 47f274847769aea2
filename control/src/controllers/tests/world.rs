//! A cluster without nodes: store, cache, registry, controllers, scheduler, and players for the nodes.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use orlop_proto::{
    Resource as _,
    apps::v1::{ReplicaSet, ReplicaSetSpec},
    coordination::v1::{Lease, LeaseSpec},
    core::v1::{Container, Node, NodeCondition, NodeStatus, Pod, PodCondition, PodIp, PodSpec, PodTemplateSpec},
    meta::v1::{LabelSelector, ObjectMeta},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{Cache, ObjectKey},
    controllers::{self, ControllerConfig, pods},
    events::Recorder,
    registry::{Registry, RegistryConfig},
    scheduler,
    store::{
        Store,
        embedded::{EmbeddedConfig, EmbeddedStore},
    },
};

/// How long anything may take: the machine is shared.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct World {
    pub(super) registry: Registry,
    config: ControllerConfig,
    cancel: CancellationToken,
    /// The controllers' and the scheduler's.
    term: CancellationToken,
    cut: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl World {
    pub(super) async fn start() -> Self {
        Self::start_with(Self::config()).await
    }

    pub(super) async fn start_with(config: ControllerConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let open = move || EmbeddedStore::open(&path, EmbeddedConfig::default());
        let store: Arc<dyn Store> = Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap());
        let cache = Cache::start(store.clone()).await;
        let registry = Registry::new(store, cache, RegistryConfig::default());
        registry.ensure_bootstrap().await.unwrap();
        let cancel = CancellationToken::new();
        let world = Self {
            registry,
            config,
            term: cancel.child_token(),
            cancel,
            cut: Arc::default(),
            _folder: folder,
        };
        world.lead();
        world
    }

    fn lead(&self) {
        let recorder = Recorder::start(self.registry.clone(), self.term.clone());
        controllers::spawn(&self.registry, &recorder, &self.config, &self.term);
        scheduler::spawn(self.registry.clone(), recorder, self.term.clone());
    }

    /// Another leads from now on, who remembers nothing.
    pub(super) fn change_leader(&mut self) {
        self.term.cancel();
        self.term = self.cancel.child_token();
        self.lead();
    }

    pub(super) fn cache(&self) -> &Cache {
        self.registry.cache()
    }

    /// A node that lives until it is cut off.
    pub(super) async fn node(&self, name: &str) {
        let mut node = Node::default();
        node.meta_mut().name = name.into();
        self.registry.create(node).await.unwrap();
        let player = Player {
            registry: self.registry.clone(),
            name: name.to_owned(),
        };
        let (cancel, cut) = (self.cancel.clone(), self.cut.clone());
        player.speak().await;
        // A new node bears the taint of one that is not ready until lifecycle has seen that it is.
        let settled = |world: &Self| {
            let node = world.cache().reader::<Node>().get("", name).unwrap_or_default();
            let is_clean = node
                .spec
                .as_ref()
                .is_some_and(|spec| spec.taints.is_empty() && !spec.pod_cidr.is_empty());
            is_clean
                && node
                    .status
                    .iter()
                    .flat_map(|status| &status.conditions)
                    .any(|one| one.status == "True")
        };
        tokio::spawn(async move {
            while !cancel.is_cancelled() {
                if !cut.lock().unwrap().contains(&player.name) {
                    player.speak().await;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        self.until("the node is ready", settled).await;
        // Twice the controller's period: what it has read before is acted on.
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.until("the node is ready", settled).await;
    }

    pub(super) fn cut(&self, node: &str) {
        self.cut.lock().unwrap().push(node.to_owned());
    }

    pub(super) fn heal(&self, node: &str) {
        self.cut.lock().unwrap().retain(|cut| cut != node);
    }

    /// A node that is cut off renews its lease once, and says that it is not ready.
    pub(super) async fn says_not_ready(&self, node: &str) {
        let lease = ObjectKey::new("kube-node-lease", node);
        let renew = |lease: &mut Lease| {
            lease.spec.get_or_insert_default().renew_time = Some(time::now());
            true
        };
        self.registry.modify(&lease, renew).await.unwrap();
        let say = |node: &mut Node| {
            let conditions = &mut node.status.get_or_insert_default().conditions;
            let ready = conditions.iter_mut().find(|condition| condition.r#type == "Ready");
            ready.map(|ready| "False".clone_into(&mut ready.status)).is_some()
        };
        self.registry
            .modify_status(&ObjectKey::new("", node), say)
            .await
            .unwrap();
    }

    pub(super) fn pods(&self) -> Vec<Arc<Pod>> {
        self.cache().reader::<Pod>().snapshot().objects.values().collect()
    }

    /// Pods of an app that run and are ready.
    pub(super) fn running(&self, app: &str) -> Vec<Arc<Pod>> {
        let selected = |pod: &Arc<Pod>| pod.meta().labels.get("app").is_some_and(|label| label == app);
        self.pods()
            .into_iter()
            .filter(|pod| selected(pod) && pods::is_ready(pod))
            .collect()
    }

    /// How many pods were ever created by owners, as the recorder counted nothing twice.
    pub(super) fn created_pods(&self) -> usize {
        let events = self.cache().reader::<orlop_proto::core::v1::Event>().snapshot();
        events
            .objects
            .values()
            .filter(|event| event.reason == "SuccessfulCreate")
            .map(|event| event.count as usize)
            .sum()
    }

    pub(super) async fn scale(&self, name: &str, replicas: i32) {
        let change = |set: &mut ReplicaSet| {
            set.spec.get_or_insert_default().replicas = Some(replicas);
            true
        };
        self.registry
            .modify(&ObjectKey::new("default", name), change)
            .await
            .unwrap();
    }

    pub(super) async fn set_ready(&self, pod: &Pod, ready: bool) {
        self.registry
            .modify_status(&ObjectKey::of(pod), |pod: &mut Pod| set_ready(pod, ready))
            .await
            .unwrap();
    }

    pub(super) async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !holds(self) {
            if tokio::time::Instant::now() > deadline {
                let pods: Vec<_> = self
                    .pods()
                    .iter()
                    .map(|pod| {
                        (
                            pod.name().to_owned(),
                            pods::node_name(pod).to_owned(),
                            pods::phase(pod).to_owned(),
                            pod.is_deleting(),
                        )
                    })
                    .collect();
                panic!("not in {PATIENCE:?}: {what}; pods: {pods:?}");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Plays a node.
struct Player {
    registry: Registry,
    name: String,
}

impl Player {
    async fn speak(&self) {
        let lease = ObjectKey::new("kube-node-lease", &self.name);
        let renewed = self
            .registry
            .modify(&lease, |lease: &mut Lease| {
                lease.spec.get_or_insert_default().renew_time = Some(time::now());
                true
            })
            .await;
        if renewed.is_err() {
            let lease = Lease {
                metadata: Some(ObjectMeta {
                    name: self.name.clone(),
                    namespace: "kube-node-lease".into(),
                    ..ObjectMeta::default()
                }),
                spec: Some(LeaseSpec {
                    renew_time: Some(time::now()),
                    ..LeaseSpec::default()
                }),
                ..Lease::default()
            };
            self.registry.create(lease).await.ok();
        }
        self.registry
            .modify_status(&ObjectKey::new("", &self.name), set_node_ready)
            .await
            .ok();
        let all = self.registry.cache().reader::<Pod>().snapshot();
        for pod in all.objects.values().filter(|pod| pods::node_name(pod) == self.name) {
            if pod.is_deleting() {
                self.registry
                    .confirm_pod_gone(pod.namespace(), pod.name(), pod.uid())
                    .await
                    .ok();
            } else if pods::phase(&pod) != "Running" {
                self.registry.modify_status(&ObjectKey::of(&*pod), start).await.ok();
            }
        }
    }
}

fn set_node_ready(node: &mut Node) -> bool {
    let amounts: BTreeMap<String, String> = [("cpu", "4"), ("memory", "8Gi"), ("pods", "110")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let ready = NodeCondition {
        r#type: "Ready".into(),
        status: "True".into(),
        reason: "KubeletReady".into(),
        ..NodeCondition::default()
    };
    let wanted = NodeStatus {
        capacity: amounts.clone(),
        allocatable: amounts,
        conditions: vec![ready],
        ..node.status.clone().unwrap_or_default()
    };
    let changes = node.status.as_ref() != Some(&wanted);
    node.status = Some(wanted);
    changes
}

fn start(pod: &mut Pod) -> bool {
    static ADDRESSES: AtomicU32 = AtomicU32::new(2);
    let number = ADDRESSES.fetch_add(1, Ordering::Relaxed);
    let status = pod.status.get_or_insert_default();
    status.phase = "Running".into();
    status.pod_ip = format!("10.244.{}.{}", number / 250, number % 250);
    status.pod_ips = vec![PodIp {
        ip: status.pod_ip.clone(),
    }];
    set_ready(pod, true)
}

fn set_ready(pod: &mut Pod, ready: bool) -> bool {
    let conditions = &mut pod.status.get_or_insert_default().conditions;
    conditions.retain(|condition| condition.r#type != "Ready");
    conditions.push(PodCondition {
        r#type: "Ready".into(),
        status: if ready { "True" } else { "False" }.into(),
        last_transition_time: Some(time::now_seconds()),
        ..PodCondition::default()
    });
    true
}

pub(super) fn labels(app: &str) -> BTreeMap<String, String> {
    [("app".to_owned(), app.to_owned())].into()
}

pub(super) fn pod(name: &str, app: &str) -> Pod {
    Pod {
        metadata: Some(ObjectMeta {
            name: name.into(),
            namespace: "default".into(),
            labels: labels(app),
            ..ObjectMeta::default()
        }),
        spec: Some(spec()),
        ..Pod::default()
    }
}

fn spec() -> PodSpec {
    let container = Container {
        name: "c".into(),
        image: "orlop/fixture:1".into(),
        ..Container::default()
    };
    PodSpec {
        containers: vec![container],
        ..PodSpec::default()
    }
}

pub(super) fn replica_set(name: &str, replicas: i32) -> ReplicaSet {
    ReplicaSet {
        metadata: Some(ObjectMeta {
            name: name.into(),
            namespace: "default".into(),
            ..ObjectMeta::default()
        }),
        spec: Some(ReplicaSetSpec {
            replicas: Some(replicas),
            selector: Some(LabelSelector {
                match_labels: labels(name),
                match_expressions: Vec::new(),
            }),
            template: Some(PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: labels(name),
                    ..ObjectMeta::default()
                }),
                spec: Some(spec()),
            }),
            ..ReplicaSetSpec::default()
        }),
        ..ReplicaSet::default()
    }
}
