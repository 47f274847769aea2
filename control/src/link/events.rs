//! Events that a node reports: about itself and its own pods, a few at a time.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use orlop_proto::{
    Resource,
    core::v1::{Event, EventSource, Node, ObjectReference, Pod},
    meta::v1::ObjectMeta,
};
use rand::Rng;
use tokio::time::Instant;

use super::{Inner, hub::node_of, reports::now};
use crate::cache::Reader;

/// A node may report this many events at once, and one more every [`REFILL`].
const BURST: u32 = 50;
const REFILL: Duration = Duration::from_secs(1);
/// A message is cut off here.
const MESSAGE: usize = 1024;

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

    /// Checks the event and writes it in the background.
    pub fn write(&mut self, event: Event) {
        if !self.take() {
            tracing::debug!(node = &*self.node, "too many events; dropped");
            return;
        }
        let Some(about) = self.own(event.involved_object.unwrap_or_default()) else {
            self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                node = &*self.node,
                "event about an object that is not this node's refused"
            );
            return;
        };
        let event = Event {
            metadata: Some(self.metadata(&about)),
            reason: event.reason.chars().take(128).collect(),
            message: event.message.chars().take(MESSAGE).collect(),
            r#type: if event.r#type == "Warning" { "Warning" } else { "Normal" }.to_owned(),
            source: Some(EventSource {
                component: "orlop-node".to_owned(),
                host: self.node.to_string(),
            }),
            first_timestamp: event.first_timestamp.or(Some(now())),
            last_timestamp: event.last_timestamp.or(Some(now())),
            count: event.count.max(1),
            reporting_component: "orlop-node".to_owned(),
            reporting_instance: self.node.to_string(),
            involved_object: Some(about),
            ..Event::default()
        };
        let registry = self.inner.registry.clone();
        let node = Arc::clone(&self.node);
        tokio::spawn(async move {
            if let Err(error) = registry.create(event).await {
                tracing::warn!(node = &*node, %error, "event not written");
            }
        });
    }

    /// The object that it is about, in our words, if it is the node itself or a pod that is bound to it.
    fn own(&self, about: ObjectReference) -> Option<ObjectReference> {
        match about.kind.as_str() {
            "Node" if about.name == *self.node => {
                let node = self.nodes.get("", &self.node)?;
                Some(ObjectReference {
                    uid: node.uid().to_owned(),
                    api_version: "v1".to_owned(),
                    ..about
                })
            }
            "Pod" => {
                let pod = self.pods.get(&about.namespace, &about.name)?;
                let own = node_of(&pod) == &*self.node && (about.uid.is_empty() || about.uid == pod.uid());
                own.then(|| ObjectReference {
                    uid: pod.uid().to_owned(),
                    api_version: "v1".to_owned(),
                    ..about
                })
            }
            _ => None,
        }
    }

    fn metadata(&self, about: &ObjectReference) -> ObjectMeta {
        let namespace = if about.namespace.is_empty() {
            "default"
        } else {
            &about.namespace
        };
        let suffix: u64 = rand::rng().random();
        ObjectMeta {
            // Names end at 253 characters; the suffix takes 17.
            name: format!("{}.{suffix:016x}", about.name.chars().take(230).collect::<String>()),
            namespace: namespace.to_owned(),
            ..ObjectMeta::default()
        }
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
