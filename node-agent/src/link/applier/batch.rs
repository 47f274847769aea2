//! What Updates ask for, folded per key until it is applied. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use orlop_proto::{
    core::v1::Pod,
    node::v1::{self as link, change::Change as Kind},
};

use crate::{
    dataplane::ServiceId,
    desired::{
        Desired, Routes,
        services::{Name, kept},
    },
};

/// What a session has asked for and what is not applied yet.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The last version that was absorbed.
    pub version: u64,
    /// Gathers the snapshot until its end mark.
    snapshot: Option<Snapshot>,
    orders: Orders,
    /// Routes are all that there are, by a snapshot.
    all_routes: bool,
    routes: BTreeMap<Arc<str>, Option<Arc<link::Route>>>,
    /// All services that there are, by a snapshot, in order.
    all_services: Option<Vec<Arc<link::Service>>>,
    /// What came after it.
    services: BTreeMap<ServiceId, Option<Arc<link::Service>>>,
}

/// What is acted on when it is durable.
#[derive(Debug, Default)]
pub(super) struct Orders {
    welcome: Option<Arc<link::Welcome>>,
    /// Pods are all that there are, by a snapshot: others are to go.
    complete: bool,
    /// By uid: the pod, or its removal.
    pods: BTreeMap<String, Option<Arc<Pod>>>,
}

#[derive(Debug, Default)]
struct Snapshot {
    pods: BTreeMap<String, Arc<Pod>>,
    /// As they came.
    services: Vec<Arc<link::Service>>,
    routes: BTreeMap<Arc<str>, Arc<link::Route>>,
}

impl Batch {
    pub fn begin(welcome: Arc<link::Welcome>) -> Self {
        Self {
            snapshot: Some(Snapshot::default()),
            orders: Orders {
                welcome: Some(welcome),
                ..Orders::default()
            },
            ..Self::default()
        }
    }

    /// Takes an Update in.
    pub fn absorb(&mut self, update: link::Update) {
        self.version = update.version;
        for change in update.changes.into_iter().filter_map(|change| change.change) {
            if let Kind::Pod(pod) = &change
                && !crate::ledger::is_usable_uid(&uid(pod))
            {
                tracing::error!(
                    uid = uid(pod),
                    "control sent a pod whose uid cannot be kept; it is ignored"
                );
                continue;
            }
            match &mut self.snapshot {
                Some(snapshot) => snapshot.absorb(change),
                None => self.delta(change),
            }
        }
        if update.snapshot_end
            && let Some(snapshot) = self.snapshot.take()
        {
            self.snapshot_ends(snapshot);
        }
    }

    /// Whether what was absorbed counts: a snapshot does at its end mark.
    pub fn in_force(&self) -> bool {
        self.snapshot.is_none()
    }

    /// Puts services into `desired`: those that came one by one and differ, those that went, and whether a whole snapshot was put in
    /// before them, which has them all.
    pub fn take_services(&mut self, desired: &mut Desired) -> (Vec<Arc<link::Service>>, Vec<ServiceId>, bool) {
        let mut upserts = Vec::new();
        let mut removals = Vec::new();
        let all = self.all_services.take();
        let complete = all.is_some();
        if let Some(all) = all {
            // What is the same stays the very same record: others hold it too.
            let before = std::mem::take(&mut desired.services);
            let same = |service: &Arc<link::Service>| {
                before
                    .get(&service.namespace, &service.name)
                    .filter(|known| *known == service)
                    .cloned()
            };
            desired.services = all
                .into_iter()
                .map(|service| same(&service).unwrap_or(service))
                .collect();
        }
        for (id, service) in std::mem::take(&mut self.services) {
            match service {
                Some(service) if desired.services.get(&id.0, &id.1) == Some(&service) => {}
                Some(service) => {
                    desired.services.insert(Arc::clone(&service));
                    upserts.push(service);
                }
                None => {
                    if desired.services.remove(&id.0, &id.1).is_some() {
                        removals.push(id);
                    }
                }
            }
        }
        (upserts, removals, complete)
    }

    /// Puts routes in, those of a snapshot in place of all others: whether that changed any, and whether a snapshot was among them.
    pub fn take_routes(&mut self, known: &mut Routes) -> (bool, bool) {
        let all = std::mem::take(&mut self.all_routes);
        let routes = std::mem::take(&mut self.routes);
        let mut changed = false;
        if all {
            let gone = known.keys().filter(|node| !routes.contains_key(*node));
            for node in gone.cloned().collect::<Vec<_>>() {
                known.remove(&node);
                changed = true;
            }
        }
        for (node, route) in routes {
            if known.get(&node) != route.as_ref() {
                changed = true;
                match route {
                    Some(route) => known.insert(node, route),
                    None => known.remove(&node),
                };
            }
        }
        (changed, all)
    }

    /// What is to be made durable, to be put back if it could not be.
    pub fn take_orders(&mut self) -> Orders {
        std::mem::take(&mut self.orders)
    }

    /// Whether there is something to be made durable.
    pub fn has_orders(&self) -> bool {
        let orders = &self.orders;
        orders.complete || orders.welcome.is_some() || !orders.pods.is_empty()
    }

    /// Puts back what was taken from this batch; what came since counts.
    pub fn put_back(&mut self, mut earlier: Orders) {
        let later = std::mem::take(&mut self.orders);
        if later.complete {
            earlier.complete = true;
            earlier.pods = later.pods;
        } else {
            earlier.pods.extend(later.pods);
        }
        earlier.welcome = later.welcome.or(earlier.welcome);
        self.orders = earlier;
    }

    fn delta(&mut self, change: Kind) {
        match change {
            Kind::Pod(pod) => {
                self.orders.pods.insert(uid(&pod), Some(Arc::new(pod)));
            }
            Kind::PodRemoved(key) => {
                self.orders.pods.insert(key.uid, None);
            }
            Kind::Service(service) => {
                self.services.insert(id(&service), Some(kept(service)));
            }
            Kind::ServiceRemoved(key) => {
                self.services.insert((key.namespace, key.name), None);
            }
            Kind::Route(route) => {
                let name = route.node_name.as_str().into();
                self.routes.insert(name, Some(Arc::new(route)));
            }
            Kind::RouteRemoved(node) => {
                self.routes.insert(node.into(), None);
            }
        }
    }

    fn snapshot_ends(&mut self, snapshot: Snapshot) {
        self.orders.complete = true;
        self.orders.pods = named(snapshot.pods);
        self.all_routes = true;
        self.routes = named(snapshot.routes);
        let mut services = snapshot.services;
        // Of two records of one name the later counts: it is the first of them now, and stays that.
        services.reverse();
        services.sort_by(|one, other| Name::of(one).cmp(&Name::of(other)));
        services.dedup_by(|one, other| Name::of(one) == Name::of(other));
        self.all_services = Some(services);
    }
}

impl Orders {
    /// The uids of pods whose files are to be written to the ledger, or removed. `next` becomes what is in force after that.
    pub fn apply(&self, next: &mut Desired) -> BTreeSet<String> {
        let mut pods = BTreeSet::new();
        if self.complete {
            pods.extend(next.pods.keys().filter(|uid| !self.pods.contains_key(*uid)).cloned());
            for uid in &pods {
                next.pods.remove(uid);
            }
        }
        for (uid, pod) in &self.pods {
            match pod {
                Some(pod) if next.pods.get(uid).is_some_and(|known| same_orders(known, pod)) => {}
                Some(pod) => {
                    next.pods.insert(uid.clone(), Arc::clone(pod));
                    pods.insert(uid.clone());
                }
                None => {
                    if next.pods.remove(uid).is_some() {
                        pods.insert(uid.clone());
                    }
                }
            }
        }
        if let Some(welcome) = &self.welcome
            && next.ranges.as_ref() != Some(welcome)
        {
            next.ranges = Some(Arc::clone(welcome));
        }
        next.complete |= self.complete;
        pods
    }
}

impl Snapshot {
    fn absorb(&mut self, change: Kind) {
        match change {
            Kind::Pod(pod) => {
                self.pods.insert(uid(&pod), Arc::new(pod));
            }
            Kind::Service(service) => {
                self.services.push(kept(service));
            }
            Kind::Route(route) => {
                self.routes.insert(route.node_name.as_str().into(), Arc::new(route));
            }
            Kind::PodRemoved(key) => {
                self.pods.remove(&key.uid);
            }
            Kind::ServiceRemoved(key) => {
                self.services
                    .retain(|service| service.namespace != key.namespace || service.name != key.name);
            }
            Kind::RouteRemoved(node) => {
                self.routes.remove(node.as_str());
            }
        }
    }
}

fn named<K: Ord, T>(items: BTreeMap<K, T>) -> BTreeMap<K, Option<T>> {
    items.into_iter().map(|(name, item)| (name, Some(item))).collect()
}

fn uid(pod: &Pod) -> String {
    pod.metadata.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default()
}

fn id(service: &link::Service) -> ServiceId {
    (service.namespace.clone(), service.name.clone())
}

/// Whether two states of a pod ask the same of the node: what it reported itself comes back in the status and is no order,
/// except that control may have ended the pod.
fn same_orders(known: &Pod, new: &Pod) -> bool {
    let ended = |pod: &Pod| {
        pod.status
            .as_ref()
            .is_some_and(|status| status.phase == "Failed" || status.phase == "Succeeded")
    };
    let orders = |pod: &Pod| {
        pod.metadata.clone().map(|mut meta| {
            meta.resource_version.clear();
            meta
        })
    };
    known.spec == new.spec && ended(known) == ended(new) && orders(known) == orders(new)
}

/// What a node holds to be so after a session's Welcome and Updates; for who checks it from outside.
#[doc(hidden)]
pub fn told(welcome: link::Welcome, updates: impl IntoIterator<Item = link::Update>) -> Desired {
    let (mut batch, mut desired) = (Batch::begin(Arc::new(welcome)), Desired::default());
    for update in updates {
        batch.absorb(update);
        batch.take_services(&mut desired);
        batch.take_routes(&mut desired.routes);
        batch.take_orders().apply(&mut desired);
    }
    desired
}
