//! Events that a node reports: about itself and its own pods, a few at a time.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use orlop_proto::{
    Resource,
    core::v1::{Event, EventSource, Node, ObjectReference, Pod},
};
use tokio::time::Instant;

use super::{Inner, hub::node_of, reports::now};
use crate::cache::Reader;

/// A node may report this many events at once, and one more every [`REFILL`].
const BURST: u32 = 50;
const REFILL: Duration = Duration::from_secs(1);
/// A message is cut off here, in bytes.
const MESSAGE: usize = 1024;
/// A reason ends here, in bytes.
const REASON: usize = 128;
/// A path to a field ends here.
const FIELD_PATH: usize = 256;

/// Writes one node's events: best effort.
pub(super) struct EventWriter {
    inner: Arc<Inner>,
    node: Arc<str>,
    pods: Reader<Pod>,
    nodes: Reader<Node>,
    allowance: u32,
    refilled: Instant,
}

impl EventWriter {
    pub fn new(inner: Arc<Inner>, node: Arc<str>) -> Self {
        let cache = inner.registry.cache();
        let (pods, nodes) = (cache.reader(), cache.reader());
        Self {
            inner,
            node,
            pods,
            nodes,
            allowance: BURST,
            refilled: Instant::now(),
        }
    }

    /// Checks the event and hands it to the recorder, which folds equal ones and writes in the background.
    pub fn write(&mut self, event: Event) {
        if !self.take() {
            tracing::debug!(node = &*self.node, "too many events; dropped");
            return;
        }
        let Some(about) = self.own(event.involved_object.clone().unwrap_or_default()) else {
            return;
        };
        self.inner.recorder.event(taken_over(&self.node, event, about));
    }

    /// The object that it is about, in our words, if it is the node itself or a pod that is bound to it.
    fn own(&self, about: ObjectReference) -> Option<ObjectReference> {
        let uid = match about.kind.as_str() {
            // A node's first event may come before the cache has the node.
            "Node" if about.name == *self.node && about.namespace.is_empty() => self
                .nodes
                .peek("", &self.node)
                .map_or(String::new(), |node| node.uid().to_owned()),
            "Pod" => {
                // The pod may have gone meanwhile.
                let pod = self.pods.peek(&about.namespace, &about.name)?;
                if node_of(&pod) != &*self.node {
                    return self.refuse();
                }
                if pod.uid() != about.uid {
                    return None;
                }
                about.uid
            }
            _ => return self.refuse(),
        };
        Some(ObjectReference {
            api_version: "v1".to_owned(),
            kind: about.kind,
            namespace: about.namespace,
            name: about.name,
            uid,
            field_path: about.field_path,
            resource_version: String::new(),
        })
    }

    fn refuse(&self) -> Option<ObjectReference> {
        self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            node = &*self.node,
            "event about an object that is not this node's refused"
        );
        None
    }

    fn take(&mut self) -> bool {
        let earned = self.refilled.elapsed().as_millis() / REFILL.as_millis();
        if earned > 0 {
            self.allowance = u32::try_from(earned)
                .unwrap_or(BURST)
                .saturating_add(self.allowance)
                .min(BURST);
            self.refilled = Instant::now();
        }
        let allowed = self.allowance > 0;
        self.allowance = self.allowance.saturating_sub(1);
        allowed
    }
}

/// What is kept of a node's event about an object of its own.
pub fn taken_over(node: &str, event: Event, about: ObjectReference) -> Event {
    Event {
        reason: cut(&event.reason, REASON),
        message: cut(&event.message, MESSAGE),
        source: Some(EventSource {
            component: String::new(),
            host: node.to_owned(),
        }),
        involved_object: Some(ObjectReference {
            field_path: cut(&about.field_path, FIELD_PATH),
            ..about
        }),
        r#type: event.r#type,
        count: event.count,
        first_timestamp: past(event.first_timestamp),
        last_timestamp: past(event.last_timestamp),
        ..Event::default()
    }
}

/// A time that is over: events expire by it.
fn past(time: Option<prost_types::Timestamp>) -> Option<prost_types::Timestamp> {
    time.filter(|time| time.seconds <= now().seconds)
}

/// At most so many bytes, in whole characters.
fn cut(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_cut_between_characters() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut("a\u{e4}\u{e4}", 4), "a\u{e4}");
    }
}
