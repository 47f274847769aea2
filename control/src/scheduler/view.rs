//! The cluster as the scheduler sees it: kept up to date by single events, never by scanning pods.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod, Taint},
};

use super::{
    resources::Resources,
    taints::{self, NO_SCHEDULE, NOT_READY, UNREACHABLE},
};

/// Pods that should stand apart from each other: those of one owner, or ownerless ones with equal labels.
pub type Group = u64;

/// A pod with what scheduling needs to know of it, computed once.
#[derive(Debug, Clone)]
pub struct PodInfo {
    /// The pod itself.
    pub pod: Arc<Pod>,
    /// What it asks for.
    pub requests: Resources,
    /// What it is taken to use when nodes are compared.
    pub assumed: Resources,
    /// With which pods it is spread.
    pub group: Option<Group>,
}

impl PodInfo {
    /// Computes it.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self {
            requests: Resources::requested(&pod),
            assumed: Resources::assumed(&pod),
            group: group(&pod),
            pod,
        }
    }
}

fn group(pod: &Pod) -> Option<Group> {
    let meta = pod.meta();
    let mut hasher = DefaultHasher::new();
    if let Some(owner) = meta
        .owner_references
        .iter()
        .find(|owner| owner.controller == Some(true))
    {
        owner.uid.hash(&mut hasher);
    } else if meta.labels.is_empty() {
        return None;
    } else {
        (&meta.namespace, &meta.labels).hash(&mut hasher);
    }
    Some(hasher.finish())
}

/// A node, and the sums over the pods on it.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// The node itself.
    pub node: Arc<Node>,
    /// What it offers.
    pub allocatable: Resources,
    /// What its pods ask for.
    pub requested: Resources,
    /// What its pods are taken to use.
    pub assumed: Resources,
    /// Its taints, with the one that its Ready condition implies.
    pub taints: Vec<Taint>,
    groups: HashMap<Group, i64>,
}

impl NodeInfo {
    fn new(node: Arc<Node>) -> Self {
        Self {
            allocatable: Resources::allocatable(&node),
            requested: Resources::default(),
            assumed: Resources::default(),
            taints: effective_taints(&node),
            groups: HashMap::new(),
            node,
        }
    }

    /// How many pods of a group are here.
    pub fn members(&self, group: Option<Group>) -> i64 {
        group.and_then(|group| self.groups.get(&group).copied()).unwrap_or(0)
    }

    fn add(&mut self, placed: &Placed) {
        self.requested = self.requested.plus(&placed.requests);
        self.assumed = self.assumed.plus(&placed.assumed);
        if let Some(group) = placed.group {
            *self.groups.entry(group).or_default() += 1;
        }
    }

    fn remove(&mut self, placed: &Placed) {
        self.requested = self.requested.minus(&placed.requests);
        self.assumed = self.assumed.minus(&placed.assumed);
        if let Some(group) = placed.group
            && let Some(count) = self.groups.get_mut(&group)
        {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(&group);
            }
        }
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
    node: Arc<str>,
    requests: Resources,
    assumed: Resources,
    group: Option<Group>,
    /// Decided by us, not yet seen in the cache.
    reserved: bool,
}

/// All nodes with the sums over their pods, and where every pod is.
#[derive(Debug, Clone, Default)]
pub struct ClusterView {
    nodes: Vec<NodeInfo>,
    index: HashMap<Arc<str>, usize>,
    pods: HashMap<String, Placed>,
    /// Pods by node, also of nodes that are not known (yet).
    on_node: HashMap<Arc<str>, HashSet<String>>,
}

impl ClusterView {
    /// The nodes, in no particular but stable order.
    pub fn nodes(&self) -> &[NodeInfo] {
        &self.nodes
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Option<&NodeInfo> {
        self.index.get(name).map(|index| &self.nodes[*index])
    }

    /// The uids of all pods that are counted somewhere.
    pub fn pods(&self) -> impl Iterator<Item = &String> {
        self.pods.keys()
    }

    /// Takes a new or changed node in. Says whether anything changed that scheduling looks at.
    pub fn set_node(&mut self, node: Arc<Node>) -> bool {
        if let Some(index) = self.index.get(node.name()) {
            let info = &mut self.nodes[*index];
            let allocatable = Resources::allocatable(&node);
            let taints = effective_taints(&node);
            let changed = info.allocatable != allocatable
                || info.taints != taints
                || info.node.meta().labels != node.meta().labels
                || unschedulable(&info.node) != unschedulable(&node);
            info.allocatable = allocatable;
            info.taints = taints;
            info.node = node;
            return changed;
        }
        let name: Arc<str> = node.name().into();
        let mut info = NodeInfo::new(node);
        for uid in self.on_node.get(&name).into_iter().flatten() {
            info.add(&self.pods[uid]);
        }
        self.index.insert(name, self.nodes.len());
        self.nodes.push(info);
        true
    }

    /// Forgets a node.
    pub fn remove_node(&mut self, name: &str) {
        if let Some(index) = self.index.remove(name) {
            self.nodes.swap_remove(index);
            if let Some(moved) = self.nodes.get(index) {
                self.index.insert(moved.node.name().into(), index);
            }
        }
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
        if self
            .pods
            .get(pod.uid())
            .is_some_and(|placed| &*placed.node == node && !placed.reserved)
        {
            return None;
        }
        let freed = self.remove_pod(pod.uid()).filter(|old| &**old != node);
        let info = PodInfo::new(pod.clone());
        self.place(&info, node, false);
        freed
    }

    /// Counts a pod on a node before the cache shows it there.
    pub fn reserve(&mut self, info: &PodInfo, node: &str) {
        self.remove_pod(info.pod.uid());
        self.place(info, node, true);
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
        if let Some(index) = self.index.get(&placed.node) {
            self.nodes[*index].remove(&placed);
        }
        if let Some(uids) = self.on_node.get_mut(&placed.node) {
            uids.remove(uid);
            if uids.is_empty() {
                self.on_node.remove(&placed.node);
            }
        }
        Some(placed.node)
    }

    fn place(&mut self, info: &PodInfo, node: &str, reserved: bool) {
        let name: Arc<str> = match self.index.get_key_value(node) {
            Some((name, _)) => name.clone(),
            None => node.into(),
        };
        let placed = Placed {
            node: name.clone(),
            requests: info.requests,
            assumed: info.assumed,
            group: info.group,
            reserved,
        };
        if let Some(index) = self.index.get(&name) {
            self.nodes[*index].add(&placed);
        }
        self.on_node.entry(name).or_default().insert(info.pod.uid().to_owned());
        self.pods.insert(info.pod.uid().to_owned(), placed);
    }
}

/// Whether new pods are refused (cordon).
pub fn unschedulable(node: &Node) -> bool {
    node.spec.as_ref().is_some_and(|spec| spec.unschedulable)
}

/// Whether the pod has ended for good.
pub fn is_terminal(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .is_some_and(|status| matches!(status.phase.as_str(), "Succeeded" | "Failed"))
}
