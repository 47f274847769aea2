//! The ranges that nodes have, by name. Nodes join by the thousand, and every one of them asks which ranges are free: going through all
//! nodes each time would be the square of that.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use ipnet::Ipv4Net;
use orlop_proto::{Resource as _, core::v1::Node};

use crate::cache::{Event, EventStream, Reader};

/// Follows the cache's nodes, as far as it is asked. Clones share it.
#[derive(Clone, Default)]
pub(super) struct GivenRanges {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// `None` before the first question, and after events were missed.
    events: Option<EventStream<Node>>,
    by_node: BTreeMap<Arc<str>, Vec<Ipv4Net>>,
}

impl GivenRanges {
    /// All ranges, and who has them: as fresh as a snapshot that is taken now.
    pub fn all(&self, nodes: &Reader<Node>) -> Vec<(Ipv4Net, Arc<str>)> {
        // A panic under the lock would leave a half-made change: begin anew.
        let mut state = self.state.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
            let mut state = poisoned.into_inner();
            state.events = None;
            state
        });
        state.catch_up(nodes);
        let by_node = state.by_node.iter();
        by_node
            .flat_map(|(node, ranges)| ranges.iter().map(|range| (*range, node.clone())))
            .collect()
    }
}

impl State {
    fn catch_up(&mut self, nodes: &Reader<Node>) {
        if let Some(events) = &mut self.events
            && let Ok(entries) = events.take_ready()
        {
            for entry in entries {
                match entry.event() {
                    Event::Added(node) | Event::Modified { new: node, .. } => self.set(&node),
                    Event::Deleted(node) => {
                        self.by_node.remove(node.name());
                    }
                }
            }
            return;
        }
        let (snapshot, events) = nodes.events();
        self.by_node.clear();
        snapshot.objects.peek().for_each(|node| self.set(&node));
        self.events = Some(events);
    }

    fn set(&mut self, node: &Node) {
        let ranges = ranges_of(node);
        if self.by_node.get(node.name()) != Some(&ranges) {
            self.by_node.insert(node.name().into(), ranges);
        }
    }
}

/// The ranges of a node.
fn ranges_of(node: &Node) -> Vec<Ipv4Net> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let texts = spec.pod_cidrs.iter().chain(std::iter::once(&spec.pod_cidr));
    texts.filter_map(|range| range.parse().ok()).collect()
}
