//! The ranges and addresses that nodes have. Nodes join by the thousand, and every one of them asks which ranges are free; pods' addresses
//! come as often: going through all nodes each time would be the square of that.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ipnet::IpNet;
use orlop_proto::{Resource as _, core::v1::Node};

use crate::cache::{Event, EventStream, Reader};

/// Follows the cache's nodes, as far as it is asked. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Holdings {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// `None` before the first question, and after events were missed.
    events: Option<EventStream<Node>>,
    by_node: BTreeMap<Arc<str>, Holding>,
    /// Ranges by their first address: claims keep them apart, so an address can only be in the last that begins at or before it.
    by_start: BTreeMap<IpAddr, (IpNet, Arc<str>)>,
    by_address: HashMap<IpAddr, HashSet<Arc<str>>>,
}

/// What one node has.
#[derive(Default, PartialEq)]
struct Holding {
    ranges: Vec<IpNet>,
    addresses: Vec<IpAddr>,
}

impl Holdings {
    /// All ranges, and who has them: as fresh as a snapshot that is taken now.
    pub fn all(&self, nodes: &Reader<Node>) -> Vec<(IpNet, Arc<str>)> {
        let state = self.fresh(nodes);
        let by_node = state.by_node.iter();
        by_node
            .flat_map(|(node, holding)| holding.ranges.iter().map(|range| (*range, node.clone())))
            .collect()
    }

    /// A range that has addresses of this one, and who has it.
    pub fn overlapping(&self, nodes: &Reader<Node>, range: &IpNet) -> Option<(IpNet, Arc<str>)> {
        let state = self.fresh(nodes);
        let (_, (other, node)) = state.by_start.range(..=range.broadcast()).next_back()?;
        (other.broadcast() >= range.network()).then(|| (*other, node.clone()))
    }

    /// A node that has this address itself (`InternalIP`).
    pub fn node_at(&self, nodes: &Reader<Node>, address: IpAddr) -> Option<Arc<str>> {
        self.fresh(nodes).by_address.get(&address)?.iter().next().cloned()
    }

    /// Whether it is known to have any range.
    pub fn has_range(&self, nodes: &Reader<Node>, node: &str) -> bool {
        let state = self.fresh(nodes);
        state
            .by_node
            .get(node)
            .is_some_and(|holding| !holding.ranges.is_empty())
    }

    fn fresh(&self, nodes: &Reader<Node>) -> MutexGuard<'_, State> {
        // A panic under the lock would leave a half-made change: begin anew.
        let mut state = self.state.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            let mut state = poisoned.into_inner();
            state.events = None;
            state
        });
        state.catch_up(nodes);
        state
    }
}

impl State {
    fn catch_up(&mut self, nodes: &Reader<Node>) {
        if let Some(events) = &mut self.events
            && let Ok(entries) = events.take_ready()
        {
            for entry in entries {
                match entry.event() {
                    Event::Added(node) | Event::Modified { new: node, .. } => self.set(node.name(), Holding::of(&node)),
                    Event::Deleted(node) => self.set(node.name(), Holding::default()),
                }
            }
            return;
        }
        let (snapshot, events) = nodes.events();
        *self = Self::default();
        snapshot
            .objects
            .peek()
            .for_each(|node| self.set(node.name(), Holding::of(&node)));
        self.events = Some(events);
    }

    fn set(&mut self, node: &str, holding: Holding) {
        if self.by_node.get(node).unwrap_or(&Holding::default()) == &holding {
            return;
        }
        if let Some(before) = self.by_node.remove(node) {
            for range in before.ranges {
                if self
                    .by_start
                    .get(&range.network())
                    .is_some_and(|(_, holder)| **holder == *node)
                {
                    self.by_start.remove(&range.network());
                }
            }
            for address in before.addresses {
                if let Some(holders) = self.by_address.get_mut(&address) {
                    holders.remove(node);
                    if holders.is_empty() {
                        self.by_address.remove(&address);
                    }
                }
            }
        }
        if holding == Holding::default() {
            return;
        }
        let node: Arc<str> = node.into();
        for range in &holding.ranges {
            self.by_start.insert(range.network(), (*range, node.clone()));
        }
        for address in &holding.addresses {
            self.by_address.entry(*address).or_default().insert(node.clone());
        }
        self.by_node.insert(node, holding);
    }
}

impl Holding {
    fn of(node: &Node) -> Self {
        let ranges = node.spec.iter().flat_map(|spec| &spec.pod_cidrs);
        let addresses = node.status.iter().flat_map(|status| &status.addresses);
        Self {
            ranges: ranges.filter_map(|range| range.parse().ok()).collect(),
            addresses: addresses
                .filter(|address| address.r#type == "InternalIP")
                .filter_map(|address| address.address.parse().ok())
                .collect(),
        }
    }
}
