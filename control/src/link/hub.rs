//! The hub: the one owner of what nodes are told.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use imbl::OrdMap;
use orlop_proto::{
    Resource,
    core::v1::{Node, Pod, Service},
    discovery::v1::EndpointSlice,
    node::v1::{self as link, change::Change},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    LinkCounters,
    board::Board,
    mailbox::{Mailbox, PodChange},
    services::{ServiceIndex, encode},
};
use crate::{
    cache::{Cache, Entry, Event, EventStream, Lagged, ObjectKey, Reader},
    store::Revision,
};

/// Events are taken in batches of at most this many, so that one busy kind does not keep the others waiting.
const BATCH: usize = 256;
/// Each route goes to each node. New ones are told at once when none were told lately, otherwise together with those of this time a
/// session: nodes that join by the thousand are not told of each other one by one.
const ROUTES_PACE: Duration = Duration::from_micros(500);

/// All that a node is told when its session begins.
pub(super) struct Opening {
    pub pods: Vec<Arc<Pod>>,
    pub board: Board,
    /// What changes from then on for all nodes. Whoever is woken by it finds the present board.
    pub boards: watch::Receiver<Board>,
    /// What changes for this one.
    pub mailbox: Arc<Mailbox>,
}

enum Command {
    /// Begins a session whose snapshot holds everything up to `at_least`; ends the node's earlier one.
    Open {
        node: Arc<str>,
        at_least: Revision,
        reply: oneshot::Sender<Opening>,
    },
    /// The session with this mailbox is over.
    Close { node: Arc<str>, mailbox: Arc<Mailbox> },
}

/// Asks the hub.
#[derive(Clone)]
pub(super) struct HubHandle {
    commands: mpsc::Sender<Command>,
}

impl HubHandle {
    /// `None` when the hub has stopped. The cache must have `at_least` already.
    pub async fn open(&self, node: Arc<str>, at_least: Revision) -> Option<Opening> {
        let (reply, opening) = oneshot::channel();
        self.commands.send(Command::Open { node, at_least, reply }).await.ok()?;
        opening.await.ok()
    }

    pub async fn close(&self, node: Arc<str>, mailbox: Arc<Mailbox>) {
        let _stopped = self.commands.send(Command::Close { node, mailbox }).await;
    }
}

pub(super) fn start(cache: Cache, counters: Arc<LinkCounters>, stop: CancellationToken) -> HubHandle {
    let (commands, requests) = mpsc::channel(64);
    tokio::spawn(async move {
        let (mut hub, mut sources) = Hub::new(&cache, counters);
        tokio::select! {
            () = hub.run(&mut sources, requests) => {}
            () = stop.cancelled() => {}
        }
        for mailbox in hub.sessions.values() {
            mailbox.closed.cancel();
        }
    });
    HubHandle { commands }
}

/// A kind's events, and where to begin anew after missing some.
struct Source<T: Resource> {
    reader: Reader<T>,
    events: EventStream<T>,
}

struct Sources {
    services: Source<Service>,
    slices: Source<EndpointSlice>,
    pods: Source<Pod>,
    nodes: Source<Node>,
}

struct Hub {
    services: ServiceIndex,
    /// By node name, then uid. The pods themselves are the cache's.
    pods: HashMap<Arc<str>, HashMap<Arc<str>, ObjectKey>>,
    present: Reader<Pod>,
    routes: OrdMap<Arc<str>, Bytes>,
    /// Always holds the present services and routes; its readers are woken when they are to be told.
    boards: watch::Sender<Board>,
    /// Routes were told last.
    routes_told: Instant,
    /// Routes that have changed are to be told.
    routes_due: Option<Instant>,
    sessions: HashMap<Arc<str>, Arc<Mailbox>>,
    counters: Arc<LinkCounters>,
}

impl Hub {
    fn new(cache: &Cache, counters: Arc<LinkCounters>) -> (Self, Sources) {
        let mut hub = Self {
            services: ServiceIndex::default(),
            pods: HashMap::new(),
            present: cache.reader(),
            routes: OrdMap::new(),
            boards: watch::Sender::default(),
            routes_told: Instant::now(),
            routes_due: None,
            sessions: HashMap::new(),
            counters,
        };
        let sources = Sources {
            services: Source::new(cache.reader(), |service| {
                hub.services.put_service(service);
            }),
            slices: Source::new(cache.reader(), |slice| {
                hub.services.put_slice(slice);
            }),
            pods: Source::new(cache.reader(), |pod: Arc<Pod>| hub.put_pod(None, &pod)),
            nodes: Source::new(cache.reader(), |node: Arc<Node>| hub.put_node(&node)),
        };
        hub.rebuild_all();
        (hub, sources)
    }

    async fn run(&mut self, sources: &mut Sources, mut requests: mpsc::Receiver<Command>) {
        loop {
            let routes_due = self.routes_due;
            // Cancel-safe: event streams and the channel lose nothing when their futures are dropped.
            tokio::select! {
                batch = sources.services.events.next_batch(BATCH) => self.services_changed(&mut sources.services, batch),
                batch = sources.slices.events.next_batch(BATCH) => self.slices_changed(&mut sources.slices, batch),
                batch = sources.pods.events.next_batch(BATCH) => self.pods_changed(&mut sources.pods, batch),
                batch = sources.nodes.events.next_batch(BATCH) => self.nodes_changed(&mut sources.nodes, batch),
                request = requests.recv() => match request {
                    Some(Command::Open { node, at_least, reply }) => {
                        self.catch_up(sources, at_least).await;
                        let _gone = reply.send(self.open(node));
                    }
                    Some(Command::Close { node, mailbox }) => {
                        if self.sessions.get(&node).is_some_and(|current| Arc::ptr_eq(current, &mailbox)) {
                            self.sessions.remove(&node);
                        }
                    }
                    None => return,
                },
                () = sleep_until(routes_due.unwrap_or_else(Instant::now)), if routes_due.is_some() => self.tell_routes(),
            }
        }
    }

    /// Takes in everything up to a revision that the cache has.
    async fn catch_up(&mut self, sources: &mut Sources, at_least: Revision) {
        while sources.services.events.revision() < at_least {
            let batch = sources.services.events.next_batch(BATCH).await;
            self.services_changed(&mut sources.services, batch);
        }
        while sources.slices.events.revision() < at_least {
            let batch = sources.slices.events.next_batch(BATCH).await;
            self.slices_changed(&mut sources.slices, batch);
        }
        while sources.pods.events.revision() < at_least {
            let batch = sources.pods.events.next_batch(BATCH).await;
            self.pods_changed(&mut sources.pods, batch);
        }
        while sources.nodes.events.revision() < at_least {
            let batch = sources.nodes.events.next_batch(BATCH).await;
            self.nodes_changed(&mut sources.nodes, batch);
        }
    }

    fn open(&mut self, node: Arc<str>) -> Opening {
        let mailbox = Arc::new(Mailbox::default());
        let opening = Opening {
            pods: self.pods_of(&node),
            board: self.board(),
            boards: self.boards.subscribe(),
            mailbox: Arc::clone(&mailbox),
        };
        if let Some(earlier) = self.sessions.insert(node, mailbox) {
            earlier.closed.cancel();
        }
        opening
    }

    /// The pods as they are in the cache, which may be ahead: then the events that are still to come change nothing.
    fn pods_of(&self, node: &str) -> Vec<Arc<Pod>> {
        let known = self.pods.get(node).into_iter().flatten();
        let pods = known.filter_map(|(uid, key)| {
            let pod = self.present.get(&key.namespace, &key.name)?;
            (pod.uid() == &**uid && node_of(&pod) == node).then_some(pod)
        });
        pods.collect()
    }

    fn services_changed(&mut self, source: &mut Source<Service>, batch: Batch<Service>) {
        match batch {
            Ok(entries) => {
                let mut touched = BTreeSet::new();
                for entry in entries {
                    touched.insert(match &entry.event() {
                        Event::Added(service) | Event::Modified { new: service, .. } => {
                            self.services.put_service(Arc::clone(service))
                        }
                        Event::Deleted(service) => {
                            let key = ObjectKey::of(&**service);
                            self.services.remove_service(&key);
                            key
                        }
                    });
                }
                self.rebuild(&touched);
            }
            Err(_) => {
                self.services.clear_services();
                source.begin_anew(|service| {
                    self.services.put_service(service);
                });
                self.rebuild_all();
            }
        }
    }

    fn slices_changed(&mut self, source: &mut Source<EndpointSlice>, batch: Batch<EndpointSlice>) {
        match batch {
            Ok(entries) => {
                let mut touched = BTreeSet::new();
                for entry in entries {
                    match &entry.event() {
                        Event::Added(slice) => touched.extend(self.services.put_slice(Arc::clone(slice))),
                        Event::Modified { old, new } => {
                            touched.extend(self.services.remove_slice(old));
                            touched.extend(self.services.put_slice(Arc::clone(new)));
                        }
                        Event::Deleted(slice) => touched.extend(self.services.remove_slice(slice)),
                    }
                }
                self.rebuild(&touched);
            }
            Err(_) => {
                self.services.clear_slices();
                source.begin_anew(|slice| {
                    self.services.put_slice(slice);
                });
                self.rebuild_all();
            }
        }
    }

    fn pods_changed(&mut self, source: &mut Source<Pod>, batch: Batch<Pod>) {
        match batch {
            Ok(entries) => {
                for entry in entries {
                    match &entry.event() {
                        Event::Added(pod) => self.put_pod(None, pod),
                        Event::Modified { old, new } => self.put_pod(Some(old), new),
                        Event::Deleted(pod) => self.remove_pod(pod),
                    }
                }
            }
            Err(_) => {
                let mut gone = std::mem::take(&mut self.pods);
                source.begin_anew(|pod: Arc<Pod>| {
                    if let Some(pods) = gone.get_mut(node_of(&pod)) {
                        pods.remove(pod.uid());
                    }
                    self.put_pod(None, &pod);
                });
                for (node, pods) in gone {
                    for (uid, key) in pods {
                        self.tell_removed(&node, key, uid);
                    }
                }
            }
        }
    }

    fn nodes_changed(&mut self, source: &mut Source<Node>, batch: Batch<Node>) {
        match batch {
            Ok(entries) => {
                for entry in entries {
                    match &entry.event() {
                        Event::Added(node) | Event::Modified { new: node, .. } => self.put_node(node),
                        Event::Deleted(node) => self.remove_node(node.name()),
                    }
                }
            }
            Err(_) => {
                let mut gone: BTreeSet<Arc<str>> = self.routes.keys().cloned().collect();
                source.begin_anew(|node: Arc<Node>| {
                    gone.remove(node.name());
                    self.put_node(&node);
                });
                for name in gone {
                    self.remove_node(&name);
                }
            }
        }
    }

    fn rebuild_all(&mut self) {
        let keys = self
            .services
            .keys()
            .chain(self.services.records().keys())
            .cloned()
            .collect();
        self.rebuild(&keys);
    }

    fn rebuild(&mut self, keys: &BTreeSet<ObjectKey>) {
        let mut differs = false;
        for key in keys {
            self.counters.records_built.fetch_add(1, Ordering::Relaxed);
            differs |= self.services.rebuild(key);
        }
        if differs {
            self.boards.send_replace(self.board());
        }
    }

    fn board(&self) -> Board {
        Board {
            services: self.services.records().clone(),
            routes: self.routes.clone(),
        }
    }

    fn put_pod(&mut self, old: Option<&Arc<Pod>>, pod: &Arc<Pod>) {
        let node = node_of(pod);
        if let Some(old) = old
            && (node_of(old) != node || old.uid() != pod.uid())
        {
            self.remove_pod(old);
        }
        if node.is_empty() {
            return;
        }
        let pods = match self.pods.get_mut(node) {
            Some(pods) => pods,
            None => self.pods.entry(node.into()).or_default(),
        };
        pods.insert(pod.uid().into(), ObjectKey::of(&**pod));
        if old.is_some_and(|old| node_of(old) == node && same_orders(old, pod)) {
            return;
        }
        if let Some(mailbox) = self.sessions.get(node) {
            mailbox.put(PodChange::Put(Arc::clone(pod)));
        }
    }

    fn remove_pod(&mut self, pod: &Pod) {
        let node = node_of(pod);
        if let Some(pods) = self.pods.get_mut(node) {
            pods.remove(pod.uid());
            if pods.is_empty() {
                self.pods.remove(node);
            }
        }
        self.tell_removed(node, ObjectKey::of(pod), pod.uid().into());
    }

    fn tell_removed(&self, node: &str, key: ObjectKey, uid: Arc<str>) {
        if let Some(mailbox) = self.sessions.get(node) {
            mailbox.put(PodChange::Removed { key, uid });
        }
    }

    fn put_node(&mut self, node: &Node) {
        let Some(route) = route(node) else {
            return self.remove_route(node.name());
        };
        let change = encode(Change::Route(route));
        if self.routes.get(node.name()) != Some(&change) {
            self.routes.insert(node.name().into(), change);
            self.routes_changed();
        }
    }

    fn remove_node(&mut self, name: &str) {
        self.remove_route(name);
        // Its object is gone: the agent introduces itself anew and gets another.
        if let Some(mailbox) = self.sessions.remove(name) {
            mailbox.closed.cancel();
        }
    }

    fn remove_route(&mut self, name: &str) {
        if self.routes.remove(name).is_some() {
            self.routes_changed();
        }
    }

    fn routes_changed(&mut self) {
        let board = self.board();
        self.boards.send_if_modified(|present| {
            *present = board;
            false
        });
        let sessions = u32::try_from(self.sessions.len()).unwrap_or(u32::MAX);
        let due = self.routes_told + ROUTES_PACE.saturating_mul(sessions);
        self.routes_due.get_or_insert(due);
    }

    fn tell_routes(&mut self) {
        self.routes_due = None;
        self.routes_told = Instant::now();
        self.boards.send_if_modified(|_| true);
    }
}

type Batch<T> = Result<Vec<Arc<Entry<T>>>, Lagged>;

impl<T: Resource> Source<T> {
    fn new(reader: Reader<T>, take: impl FnMut(Arc<T>)) -> Self {
        let (snapshot, events) = reader.events();
        snapshot.objects.peek().for_each(take);
        Self { reader, events }
    }

    /// After missing events: everything there is, once more.
    fn begin_anew(&mut self, take: impl FnMut(Arc<T>)) {
        tracing::warn!(
            kind = T::KIND.kind,
            "the node link fell behind the cache and reads it anew"
        );
        let (snapshot, events) = self.reader.events();
        self.events = events;
        snapshot.objects.peek().for_each(take);
    }
}

/// The node that a pod is bound to; empty when it is not.
pub(super) fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().map_or("", |spec| &spec.node_name)
}

fn route(node: &Node) -> Option<link::Route> {
    let spec = node.spec.as_ref()?;
    let pod_cidrs = if spec.pod_cidrs.is_empty() && !spec.pod_cidr.is_empty() {
        vec![spec.pod_cidr.clone()]
    } else {
        spec.pod_cidrs.clone()
    };
    let addresses = &node.status.as_ref()?.addresses;
    let address = addresses.iter().find(|address| address.r#type == "InternalIP")?;
    if pod_cidrs.is_empty() {
        return None;
    }
    Some(link::Route {
        node_name: node.name().to_owned(),
        node_address: address.address.clone(),
        pod_cidrs,
    })
}

/// Whether two states of a pod ask the same of its node. What the node itself reported is not sent back to it.
fn same_orders(old: &Pod, new: &Pod) -> bool {
    let ended = |pod: &Pod| {
        pod.status
            .as_ref()
            .is_some_and(|status| status.phase == "Failed" || status.phase == "Succeeded")
    };
    let (before, after) = (old.meta(), new.meta());
    before.uid == after.uid
        && before.generation == after.generation
        && before.deletion_timestamp == after.deletion_timestamp
        && before.deletion_grace_period_seconds == after.deletion_grace_period_seconds
        && before.labels == after.labels
        && before.annotations == after.annotations
        && before.owner_references == after.owner_references
        && before.finalizers == after.finalizers
        && ended(old) == ended(new)
        && old.spec == new.spec
}
