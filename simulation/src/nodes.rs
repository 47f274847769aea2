//! Machines that are played: they keep their leases, run what is bound to them, and confirm what is deleted. They live on when control
//! dies. (The real agent takes part in the simulation of links; here every write is control's or a node's plain word.)

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::Duration,
};

use orlop_control::{cache::ObjectKey, registry::Registry};
use orlop_proto::{
    Resource as _,
    coordination::v1::{Lease, LeaseSpec},
    core::v1 as core,
    time,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::state::{condition, is_ready, node_name, phase};

const LOOK: Duration = Duration::from_millis(500);
const RENEW: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(3);

pub(crate) struct Node {
    name: String,
    control: watch::Receiver<Option<Registry>>,
    pub cut: Cell<bool>,
    /// Pods that run, with their addresses.
    running: RefCell<BTreeMap<String, String>>,
    renewed: Cell<Option<Instant>>,
}

impl Node {
    pub fn new(name: &str, control: watch::Receiver<Option<Registry>>) -> Self {
        Self {
            name: name.to_owned(),
            control,
            cut: Cell::new(false),
            running: RefCell::default(),
            renewed: Cell::new(None),
        }
    }

    pub async fn live(&self) {
        loop {
            let registry = self.control.borrow().clone();
            if let Some(registry) = registry.filter(|_| !self.cut.get()) {
                let _no_answer = timeout(ANSWER, self.speak(&registry)).await;
            }
            sleep(LOOK).await;
        }
    }

    async fn speak(&self, registry: &Registry) {
        let key = ObjectKey::new("", &self.name);
        let Some(node) = registry.cache().reader::<core::Node>().get("", &self.name) else {
            let mut node = core::Node::default();
            node.meta_mut().name.clone_from(&self.name);
            node.meta_mut().labels = [("kubernetes.io/hostname".to_owned(), self.name.clone())].into();
            registry.create(node).await.ok();
            return;
        };
        let range = node.spec.as_ref().map(|spec| spec.pod_cidr.clone()).unwrap_or_default();
        if self.renewed.get().is_none_or(|at| at.elapsed() >= RENEW) && self.renew(registry).await {
            self.renewed.set(Some(Instant::now()));
        }
        if condition(&node, "Ready") != Some("True") {
            registry.modify_status(&key, set_ready).await.ok();
        }
        let Some(network) = range.strip_suffix(".0/24") else {
            return;
        };
        let all = registry.cache().reader::<core::Pod>().snapshot();
        let ours = || all.objects.values().filter(|pod| node_name(pod) == self.name);
        self.running
            .borrow_mut()
            .retain(|uid, _| ours().any(|pod| pod.uid() == uid && !pod.is_deleting()));
        for pod in ours() {
            if pod.is_deleting() {
                let gone = registry.confirm_pod_gone(pod.namespace(), pod.name(), pod.uid());
                gone.await.ok();
            } else if matches!(phase(&pod), "Succeeded" | "Failed") {
                self.running.borrow_mut().remove(pod.uid());
            } else if !is_ready(&pod) {
                let address = self.start(pod.uid(), network);
                let ends = pod.meta().labels.contains_key("ends");
                let report = |pod: &mut core::Pod| report(pod, &address, ends);
                registry.modify_status(&ObjectKey::of(&*pod), report).await.ok();
            }
        }
    }

    /// The pod's address; the same one each time.
    fn start(&self, uid: &str, network: &str) -> String {
        let mut running = self.running.borrow_mut();
        if let Some(address) = running.get(uid) {
            return address.clone();
        }
        let free = (2..255).map(|host| format!("{network}.{host}"));
        let mut free = free.filter(|address| !running.values().any(|taken| taken == address));
        let address = free.next().unwrap_or_default();
        running.insert(uid.to_owned(), address.clone());
        address
    }

    async fn renew(&self, registry: &Registry) -> bool {
        let key = ObjectKey::new("kube-node-lease", &self.name);
        let now = time::now();
        let renewed = registry
            .modify(&key, |lease: &mut Lease| {
                lease.spec.get_or_insert_default().renew_time = Some(now);
                true
            })
            .await;
        match renewed {
            Err(error) if error.is_not_found() => {
                let mut lease = Lease {
                    spec: Some(LeaseSpec {
                        renew_time: Some(now),
                        ..LeaseSpec::default()
                    }),
                    ..Lease::default()
                };
                lease.meta_mut().name.clone_from(&self.name);
                lease.meta_mut().namespace = "kube-node-lease".to_owned();
                registry.create(lease).await.is_ok()
            }
            renewed => renewed.is_ok(),
        }
    }
}

fn set_ready(node: &mut core::Node) -> bool {
    let amounts = [("cpu", "4"), ("memory", "8Gi"), ("pods", "110")];
    let amounts: BTreeMap<String, String> = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let status = node.status.get_or_insert_default();
    status.capacity.clone_from(&amounts);
    status.allocatable = amounts;
    status.conditions = vec![core::NodeCondition {
        r#type: "Ready".to_owned(),
        status: "True".to_owned(),
        reason: "KubeletReady".to_owned(),
        ..core::NodeCondition::default()
    }];
    true
}

fn report(pod: &mut core::Pod, address: &str, ends: bool) -> bool {
    let status = pod.status.get_or_insert_default();
    status.phase = if ends { "Succeeded" } else { "Running" }.to_owned();
    status.pod_ip = address.to_owned();
    status.pod_ips = vec![core::PodIp { ip: address.to_owned() }];
    status.conditions.retain(|condition| condition.r#type != "Ready");
    status.conditions.push(core::PodCondition {
        r#type: "Ready".to_owned(),
        status: if ends { "False" } else { "True" }.to_owned(),
        last_transition_time: Some(time::now_seconds()),
        ..core::PodCondition::default()
    });
    true
}
