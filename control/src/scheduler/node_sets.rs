//! Sets of nodes that pods ask for again and again: which nodes an affinity allows, and into which domains topologies divide them.
//! A set is made once, from all nodes, and then follows single nodes.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use super::{affinity::RequiredAffinity, taints::Tolerations, view::NodeInfo};

/// Where a node is in the view, as long as it, or a pod on it, is known.
pub type Slot = u32;

/// A part of the cluster in one topology: a hash of the label's value.
pub type Domain = u64;

/// The node does not have the topology's label.
pub const NO_DOMAIN: Domain = 0;

/// Maps from numbers that need no protection: slots, ids, and hashes.
pub type ByNumber<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Sets of such numbers.
pub type Numbers<K> = HashSet<K, BuildHasherDefault<NumberHasher>>;

/// A multiplication: the numbers are ours, nobody can choose them.
#[derive(Debug, Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What divides nodes into domains.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Topology {
    /// Every node is one.
    Node,
    /// The values of a label.
    Label(Arc<str>),
}

impl Topology {
    fn domain(&self, slot: Slot, node: &NodeInfo) -> Domain {
        match self {
            Self::Node => Domain::from(slot) + 1,
            Self::Label(key) => node.named.label(key).map_or(NO_DOMAIN, |value| {
                let mut hasher = DefaultHasher::new();
                value.hash(&mut hasher);
                hasher.finish().max(NO_DOMAIN + 1)
            }),
        }
    }
}

/// What a set is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SetKey {
    /// What its nodes are divided by.
    pub topologies: Arc<[Topology]>,
    /// Nodes without a label of the topologies are left out.
    pub labelled: bool,
    /// Nodes that this excludes are left out.
    pub affinity: Option<Arc<RequiredAffinity>>,
    /// Nodes with taints that these do not cover are left out.
    pub tolerations: Option<Arc<Tolerations>>,
}

impl SetKey {
    /// The nodes that an affinity allows.
    pub fn allowed(affinity: Arc<RequiredAffinity>) -> Self {
        Self {
            topologies: Arc::new([]),
            labelled: false,
            affinity: Some(affinity),
            tolerations: None,
        }
    }

    fn includes(&self, node: &NodeInfo, domains: &[Domain]) -> bool {
        !(self.labelled && domains.contains(&NO_DOMAIN))
            && self
                .affinity
                .as_ref()
                .is_none_or(|affinity| affinity.allows(&node.named))
            && self
                .tolerations
                .as_ref()
                .is_none_or(|tolerations| node.is_tolerated(&tolerations.list))
    }
}

/// Nodes, divided into domains.
#[derive(Debug, Clone)]
pub struct NodeSet {
    key: SetKey,
    members: Vec<bool>,
    /// For each slot the domains in the topologies, also of nodes that are left out.
    domains: Vec<Domain>,
    /// For each topology, how many nodes its domains have.
    sizes: Vec<ByNumber<Domain, u32>>,
}

/// Where a node was in a set, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Its domains before; `None`: it was not in the set.
    pub from: Option<Vec<Domain>>,
    /// Its domains now; `None`: it is not in the set.
    pub to: Option<Vec<Domain>>,
}

impl NodeSet {
    /// Of these nodes.
    pub fn new<'a>(key: SetKey, nodes: impl Iterator<Item = (Slot, &'a NodeInfo)>) -> Self {
        let sizes = key.topologies.iter().map(|_| ByNumber::default()).collect();
        let mut set = Self {
            key,
            members: Vec::new(),
            domains: Vec::new(),
            sizes,
        };
        for (slot, node) in nodes {
            set.set(slot, Some(node));
        }
        set
    }

    /// Whether the node is in it.
    pub fn contains(&self, slot: Slot) -> bool {
        self.members.get(slot as usize).copied().unwrap_or(false)
    }

    /// The node's domain, also of one that is left out; [`NO_DOMAIN`] without the label.
    pub fn domain(&self, slot: Slot, topology: usize) -> Domain {
        let position = slot as usize * self.width() + topology;
        self.domains.get(position).copied().unwrap_or(NO_DOMAIN)
    }

    /// The node's domain in which its pods count.
    pub fn counted(&self, slot: Slot, topology: usize) -> Option<Domain> {
        self.contains(slot).then(|| self.domain(slot, topology))
    }

    /// How many domains have a node.
    pub fn len(&self, topology: usize) -> usize {
        self.sizes[topology].len()
    }

    /// Takes in what a node is now, or that it is gone. `None`: nothing changed for the set.
    pub fn set(&mut self, slot: Slot, node: Option<&NodeInfo>) -> Option<Moved> {
        let width = self.width();
        let place = slot as usize;
        if place >= self.members.len() {
            self.members.resize(place + 1, false);
            self.domains.resize((place + 1) * width, NO_DOMAIN);
        }
        let domains: Vec<Domain> = self
            .key
            .topologies
            .iter()
            .map(|topology| node.map_or(NO_DOMAIN, |node| topology.domain(slot, node)))
            .collect();
        let is_member = node.is_some_and(|node| self.key.includes(node, &domains));
        let range = place * width..(place + 1) * width;
        if is_member == self.members[place] && domains == self.domains[range.clone()] {
            return None;
        }
        let from = self.members[place].then(|| self.domains[range.clone()].to_vec());
        self.domains[range].copy_from_slice(&domains);
        self.members[place] = is_member;
        let to = is_member.then_some(domains);
        for (index, sizes) in self.sizes.iter_mut().enumerate() {
            if let Some(from) = &from {
                let left = sizes.entry(from[index]).or_default();
                *left = left.saturating_sub(1);
                if *left == 0 {
                    sizes.remove(&from[index]);
                }
            }
            if let Some(to) = &to {
                *sizes.entry(to[index]).or_default() += 1;
            }
        }
        Some(Moved { from, to })
    }

    fn width(&self) -> usize {
        self.key.topologies.len()
    }
}
