//! What a node's own word changes at once: a node that says that it is ready takes pods without waiting for the next look.

use std::collections::BTreeSet;

use futures::{StreamExt as _, stream};
use orlop_proto::{Resource as _, core::v1::Node, time};

use super::plan::{is_ready, plan_taints, says_not_ready};
use crate::{
    cache::{Event, ObjectKey},
    events::Recorder,
    registry::Registry,
};

/// Events that are taken together.
const BATCH: usize = 256;
/// Writes under way at once.
const WRITES: usize = 32;

/// Runs until it is dropped.
pub(super) async fn run(registry: Registry, recorder: Recorder) {
    let reader = registry.cache().reader::<Node>();
    loop {
        let (snapshot, mut events) = reader.events();
        let waiting = snapshot.objects.peek().filter(|node| waits(node));
        release(&registry, waiting.map(|node| node.name().to_owned()).collect()).await;
        drop(snapshot);
        let lagged = loop {
            let batch = match events.next_batch(BATCH).await {
                Ok(batch) => batch,
                Err(lagged) => break lagged,
            };
            let mut waiting = BTreeSet::new();
            for entry in &batch {
                let (old, new) = match entry.event() {
                    Event::Added(new) => (None, new),
                    Event::Modified { old, new } => (Some(old), new),
                    Event::Deleted(_) => continue,
                };
                tell(&recorder, old.as_deref(), &new);
                if waits(&new) {
                    waiting.insert(new.name().to_owned());
                } else {
                    waiting.remove(new.name());
                }
            }
            release(&registry, waiting).await;
        };
        tracing::warn!(%lagged, "the nodes' readiness is looked at anew");
    }
}

/// Whether a node is ready and bears taints that say otherwise.
fn waits(node: &Node) -> bool {
    is_ready(node) && says_not_ready(node)
}

/// Silence is told by who notices it.
fn tell(recorder: &Recorder, old: Option<&Node>, new: &Node) {
    let reason = match (old.is_some_and(is_ready), is_ready(new)) {
        (false, true) => "NodeReady",
        (true, false) if !super::plan::is_unknown(new) => "NodeNotReady",
        _ => return,
    };
    recorder.normal(new, reason, format!("Node {} status is now: {reason}", new.name()));
}

/// Takes the taints away. What fails is done by the next look at all nodes.
async fn release(registry: &Registry, nodes: BTreeSet<String>) {
    let at = time::now_seconds();
    let writes = stream::iter(nodes).for_each_concurrent(WRITES, |name| async move {
        let written = registry
            .modify(&ObjectKey::new("", &name), |node: &mut Node| {
                // Its condition may be another by now.
                let planned = if waits(node) {
                    plan_taints(node, false, at)
                } else {
                    None
                };
                let changes = planned.is_some();
                if let Some(taints) = planned {
                    node.spec.get_or_insert_default().taints = taints;
                }
                changes
            })
            .await;
        match written {
            Err(error) if !error.is_not_found() => {
                tracing::warn!(node = name, %error, "the taint of a node that is ready could not be removed");
            }
            _ => {}
        }
    });
    writes.await;
}
