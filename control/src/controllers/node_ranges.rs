//! Pod ranges: every node gets its part of the cluster's.

use std::sync::Arc;

use async_trait::async_trait;
use orlop_proto::{Resource as _, core::v1::Node};
use tokio_util::sync::CancellationToken;

use super::{
    queue::WorkQueue,
    runner::{self, ControlError, Controller, Outcome, Seen},
};
use crate::{
    cache::Reader,
    events::Recorder,
    registry::{Registry, RegistryError},
};

/// Nodes under work at once.
const WORKERS: usize = 8;

/// Runs the controller.
pub async fn run(registry: Registry, recorder: Recorder, cancel: CancellationToken) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<String> = WorkQueue::default();
    let controller = Arc::new(NodeRanges {
        registry,
        recorder,
        nodes: cache.reader::<Node>(),
    });
    let from_nodes = runner::follow(cache.reader::<Node>(), |seen: Seen<'_, Node>| {
        for node in seen.objects().filter(|node| needs_range(node)) {
            queue.add(node.name().to_owned());
        }
    });
    tokio::join!(
        from_nodes,
        runner::work(controller, queue.clone(), cache, WORKERS, cancel)
    );
}

fn needs_range(node: &Node) -> bool {
    node.spec.as_ref().is_none_or(|spec| spec.pod_cidr.is_empty()) && !node.is_deleting()
}

struct NodeRanges {
    registry: Registry,
    recorder: Recorder,
    nodes: Reader<Node>,
}

#[async_trait]
impl Controller for NodeRanges {
    const NAME: &'static str = "node-ranges";
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        let Some(node) = self.nodes.get("", name).filter(|node| needs_range(node)) else {
            return Ok(outcome);
        };
        match self.registry.assign_pod_cidr(name).await {
            Ok(node) => outcome.wrote(&node),
            Err(error) if error.is_not_found() => {}
            Err(error @ RegistryError::Exhausted(_)) => {
                self.recorder.warning(&*node, "CIDRNotAvailable", error.to_string());
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        Ok(outcome)
    }
}
