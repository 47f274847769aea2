//! The cluster as the scheduler sees it: kept up to date by single events, never by scanning pods.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::Arc,
};

use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod, Taint, Toleration},
};

use super::{
    affinity::RequiredAffinity,
    counts::{ClassId, Counts},
    likeness::{Counted, Likeness},
    named::Named,
    node_sets::{NodeSet, SetKey, Slot},
    resources::Resources,
    spread::Spread,
    taints::{self, NO_EXECUTE, NO_SCHEDULE, NOT_READY, UNREACHABLE, UNSCHEDULABLE},
    tally::Tally,
};

/// A pod with what scheduling needs to know of it, computed once.
#[derive(Debug, Clone)]
pub struct PodInfo {
    /// The pod itself.
    pub pod: Arc<Pod>,
    /// What it asks for.
    pub requests: Resources,
    /// What it is taken to use when nodes are compared.
    pub assumed: Resources,
    /// The nodes that its affinity allows; `None`: all.
    pub allowed: Option<SetKey>,
    /// How it is to be spread.
    pub spread: Spread,
}

impl PodInfo {
    /// Computes it.
    pub fn new(pod: Arc<Pod>) -> Self {
        let affinity = pod.spec.as_ref().and_then(RequiredAffinity::of).map(Arc::new);
        Self {
            requests: Resources::requested(&pod),
            assumed: Resources::assumed(&pod),
            spread: Spread::of(&pod, affinity.as_ref()),
            allowed: affinity.map(SetKey::allowed),
            pod,
        }
    }
}

/// A node, and the sums over the pods on it.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// Its name and labels.
    pub named: Named,
    /// What it offers.
    pub allocatable: Resources,
    /// What its pods ask for.
    pub requested: Resources,
    /// What its pods are taken to use.
    pub assumed: Resources,
    /// Its taints, with the one that its Ready condition implies.
    pub taints: Vec<Taint>,
    /// Whether new pods are refused (cordon).
    pub unschedulable: bool,
    /// Where it stands in the order of the nodes.
    position: usize,
}

impl NodeInfo {
    fn new(node: &Node, position: usize) -> Self {
        Self {
            named: Named::of(node),
            allocatable: Resources::allocatable(node),
            requested: Resources::default(),
            assumed: Resources::default(),
            taints: effective_taints(node),
            unschedulable: unschedulable(node),
            position,
        }
    }

    /// Whether none of what refuses new pods is left uncovered.
    pub fn is_tolerated(&self, tolerations: &[Toleration]) -> bool {
        self.is_open_to(tolerations) && self.refusing_taint(tolerations).is_none()
    }

    /// Whether a cordon is none, or covered.
    pub fn is_open_to(&self, tolerations: &[Toleration]) -> bool {
        !self.unschedulable || taints::tolerated(tolerations, &taints::taint(UNSCHEDULABLE, NO_SCHEDULE))
    }

    /// The first taint that refuses new pods and is not covered.
    pub fn refusing_taint(&self, tolerations: &[Toleration]) -> Option<&Taint> {
        self.taints.iter().find(|taint| {
            (taint.effect == NO_SCHEDULE || taint.effect == NO_EXECUTE) && !taints::tolerated(tolerations, taint)
        })
    }

    fn add(&mut self, placed: &Placed) {
        self.requested = self.requested.plus(&placed.requests);
        self.assumed = self.assumed.plus(&placed.assumed);
    }

    fn remove(&mut self, placed: &Placed) {
        self.requested = self.requested.minus(&placed.requests);
        self.assumed = self.assumed.minus(&placed.assumed);
    }
}

/// The node's taints. A node that is not Ready counts as tainted before node lifecycle has written the taint: pods never
/// slip onto a node that registers.
fn effective_taints(node: &Node) -> Vec<Taint> {
    let mut list = node.spec.as_ref().map(|spec| spec.taints.clone()).unwrap_or_default();
    let ready = node
        .status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|condition| condition.r#type == "Ready");
    let implied = match ready.map(|condition| condition.status.as_str()) {
        Some("True") => return list,
        Some("Unknown") => UNREACHABLE,
        _ => NOT_READY,
    };
    if !list
        .iter()
        .any(|taint| taint.key == implied && taint.effect == NO_SCHEDULE)
    {
        list.push(taints::taint(implied, NO_SCHEDULE));
    }
    list
}

#[derive(Debug, Clone)]
struct Placed {
    slot: Slot,
    requests: Resources,
    assumed: Resources,
    /// What it counts as; `None`: it is being deleted, and counts for nobody's spread any more.
    class: Option<ClassId>,
    /// Decided by us, not yet seen in the cache.
    reserved: bool,
}

/// A node's place, also of one that is not known (yet) but has pods.
#[derive(Debug, Clone)]
struct Place {
    name: Arc<str>,
    node: Option<NodeInfo>,
    pods: HashSet<Arc<str>>,
}

/// All nodes with the sums over their pods, and where every pod is.
#[derive(Debug, Clone, Default)]
pub struct ClusterView {
    places: Vec<Place>,
    slots: HashMap<Arc<str>, Slot>,
    free: Vec<Slot>,
    /// The slots of the nodes.
    order: Vec<Slot>,
    pods: HashMap<Arc<str>, Placed>,
    counts: Counts,
}

impl ClusterView {
    /// The nodes, in no particular but stable order.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        nodes(&self.places, &self.order).map(|(_, node)| node)
    }

    /// The slots of the nodes, in the same order.
    pub fn order(&self) -> &[Slot] {
        &self.order
    }

    /// The node at a slot.
    pub fn at(&self, slot: Slot) -> Option<&NodeInfo> {
        self.places.get(slot as usize)?.node.as_ref()
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.at(*self.slots.get(name)?)
    }

    /// The name of the node at a slot.
    pub fn name(&self, slot: Slot) -> Arc<str> {
        self.places[slot as usize].name.clone()
    }

    /// The uids of all pods that are counted somewhere.
    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.pods.keys().map(|uid| &**uid)
    }

    /// Takes a new or changed node in. Says whether anything changed that scheduling looks at.
    pub fn set_node(&mut self, node: &Node) -> bool {
        let slot = self.slot(node.name());
        let place = &mut self.places[slot as usize];
        let changed = if let Some(info) = &mut place.node {
            let new = NodeInfo {
                requested: info.requested,
                assumed: info.assumed,
                ..NodeInfo::new(node, info.position)
            };
            let changed = info.allocatable != new.allocatable
                || info.taints != new.taints
                || info.unschedulable != new.unschedulable
                || info.named != new.named;
            *info = new;
            changed
        } else {
            let mut info = NodeInfo::new(node, self.order.len());
            for uid in &place.pods {
                info.add(&self.pods[uid]);
            }
            place.node = Some(info);
            self.order.push(slot);
            true
        };
        if changed {
            self.counts.set_node(slot, self.places[slot as usize].node.as_ref());
        }
        changed
    }

    /// Forgets a node.
    pub fn remove_node(&mut self, name: &str) {
        let Some(slot) = self.slots.get(name).copied() else {
            return;
        };
        let Some(gone) = self.places[slot as usize].node.take() else {
            return;
        };
        self.order.swap_remove(gone.position);
        if let Some(moved) = self.order.get(gone.position).copied()
            && let Some(moved) = &mut self.places[moved as usize].node
        {
            moved.position = gone.position;
        }
        self.counts.set_node(slot, None);
        self.tidy(slot);
    }

    /// Takes a bound pod in, as the cache has it. An end of its run frees what it held.
    /// Returns the node on which something became free.
    pub fn set_pod(&mut self, pod: &Arc<Pod>) -> Option<Arc<str>> {
        let node = pod.spec.as_ref().map_or("", |spec| spec.node_name.as_str());
        if node.is_empty() {
            return None;
        }
        if is_terminal(pod) {
            return self.remove_pod(pod.uid());
        }
        if let Some(placed) = self.pods.get_mut(pod.uid())
            && *self.places[placed.slot as usize].name == *node
        {
            placed.reserved = false;
            self.reclass(pod);
            return None;
        }
        let freed = self.remove_pod(pod.uid());
        let (requests, assumed) = (Resources::requested(pod), Resources::assumed(pod));
        self.place(pod, requests, assumed, node, false);
        freed
    }

    /// Counts a pod on a node before the cache shows it there.
    pub fn reserve(&mut self, info: &PodInfo, node: &str) {
        self.remove_pod(info.pod.uid());
        self.place(&info.pod, info.requests, info.assumed, node, true);
    }

    /// Takes a reservation back; a pod that the cache has shown on its node stays. Returns the node that became freer.
    pub fn release(&mut self, uid: &str) -> Option<Arc<str>> {
        if self.pods.get(uid).is_some_and(|placed| placed.reserved) {
            self.remove_pod(uid)
        } else {
            None
        }
    }

    /// Forgets a pod. Returns the node that became freer.
    pub fn remove_pod(&mut self, uid: &str) -> Option<Arc<str>> {
        let placed = self.pods.remove(uid)?;
        let place = &mut self.places[placed.slot as usize];
        let name = place.name.clone();
        if let Some(node) = &mut place.node {
            node.remove(&placed);
        }
        place.pods.remove(uid);
        if let Some(class) = placed.class {
            self.counts.remove(class, placed.slot);
        }
        self.tidy(placed.slot);
        Some(name)
    }

    /// A set of nodes: the kept one, or one that is made now.
    pub fn node_set(&self, key: &SetKey) -> Cow<'_, NodeSet> {
        self.counts.set(key, nodes(&self.places, &self.order))
    }

    /// How many of the pods that `counted` says are in each domain. `set` is the one of `key`.
    pub fn tally(&self, counted: &Counted, key: &SetKey, set: &NodeSet, topology: usize) -> Cow<'_, Tally> {
        self.counts.tally(counted, key, set, topology)
    }

    /// Lets a set of nodes follow single events from now on.
    pub fn keep_set(&mut self, key: &SetKey) {
        self.counts.keep_set(key, nodes(&self.places, &self.order));
    }

    /// Lets a tally follow single events from now on.
    pub fn keep_tally(&mut self, counted: &Counted, key: &SetKey, topology: usize) {
        let nodes = nodes(&self.places, &self.order);
        self.counts.keep_tally(counted, key, topology, nodes);
    }

    /// How many sets of nodes and tallies are kept.
    #[cfg(test)]
    pub fn counts_kept(&self) -> (usize, usize) {
        self.counts.kept()
    }

    /// Lets everything that deciding on this pod asks for follow single events from now on: the next pods like it are decided
    /// without a look at all nodes.
    pub fn keep_for(&mut self, pod: &PodInfo) {
        if let Some(allowed) = &pod.allowed {
            self.keep_set(allowed);
        }
        pod.spread.keep(self);
    }

    /// What kinds of pods came or went on nodes since the last call.
    pub fn take_changed_pods(&mut self) -> Vec<Arc<Likeness>> {
        self.counts.take_changed()
    }

    /// Counts a pod as what it is now: its labels may have changed, or its deletion begun.
    fn reclass(&mut self, pod: &Pod) {
        let Some(placed) = self.pods.get_mut(pod.uid()) else {
            return;
        };
        let stays = match placed.class {
            Some(class) => !pod.is_deleting() && self.counts.is_of(class, pod),
            None => pod.is_deleting(),
        };
        if stays {
            return;
        }
        if let Some(class) = placed.class.take() {
            self.counts.remove(class, placed.slot);
        }
        if !pod.is_deleting() {
            placed.class = Some(self.counts.add(pod, placed.slot));
        }
    }

    fn place(&mut self, pod: &Pod, requests: Resources, assumed: Resources, node: &str, reserved: bool) {
        let slot = self.slot(node);
        let placed = Placed {
            slot,
            requests,
            assumed,
            class: (!pod.is_deleting()).then(|| self.counts.add(pod, slot)),
            reserved,
        };
        let place = &mut self.places[slot as usize];
        if let Some(node) = &mut place.node {
            node.add(&placed);
        }
        let uid: Arc<str> = pod.uid().into();
        place.pods.insert(uid.clone());
        self.pods.insert(uid, placed);
    }

    /// The slot of a name, a new one if need be.
    fn slot(&mut self, name: &str) -> Slot {
        if let Some(slot) = self.slots.get(name) {
            return *slot;
        }
        let place = Place {
            name: name.into(),
            node: None,
            pods: HashSet::new(),
        };
        let name = place.name.clone();
        let slot = if let Some(slot) = self.free.pop() {
            self.places[slot as usize] = place;
            slot
        } else {
            self.places.push(place);
            Slot::try_from(self.places.len() - 1).unwrap_or(Slot::MAX)
        };
        self.slots.insert(name, slot);
        slot
    }

    /// Gives a slot free that has neither a node nor pods.
    fn tidy(&mut self, slot: Slot) {
        let place = &mut self.places[slot as usize];
        if place.node.is_none() && place.pods.is_empty() {
            self.slots.remove(&place.name);
            self.free.push(slot);
        }
    }
}

fn nodes<'a>(places: &'a [Place], order: &'a [Slot]) -> impl Iterator<Item = (Slot, &'a NodeInfo)> {
    let node = |slot: &Slot| Some((*slot, places[*slot as usize].node.as_ref()?));
    order.iter().filter_map(node)
}

/// Whether new pods are refused (cordon).
fn unschedulable(node: &Node) -> bool {
    node.spec.as_ref().is_some_and(|spec| spec.unschedulable)
}

/// Whether the pod has ended for good.
pub fn is_terminal(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .is_some_and(|status| matches!(status.phase.as_str(), "Succeeded" | "Failed"))
}
