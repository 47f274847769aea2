//! Pods of nodes that are not heard of: nobody is to be sent to what cannot be seen.
//!
//! The mark is in the pod: condition Ready is False, for a reason that no node gives. So it does not matter whether the answer to its write
//! was lost, who writes the pod meanwhile, or who leads when the node is heard of again. Whatever the node says of the pod replaces it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use orlop_proto::{
    core::v1::{Pod, PodCondition},
    time,
};
use tokio::time::Instant;

use super::act::WRITES;
use crate::{
    cache::{ObjectKey, Objects},
    controllers::pods,
    registry::Registry,
};

/// Why a marked pod is not ready.
const REASON: &str = "NodeNotHeardOf";

/// All pods are looked at for marks so often: those of whoever led before us, and those that we thought were not written, or taken off.
const SCAN: Duration = Duration::from_secs(60);

/// Which pods bear the mark.
#[derive(Default)]
pub(super) struct Marks {
    /// The node of each pod that bears the mark, or may: a write of it was tried.
    known: HashMap<ObjectKey, String>,
    scanned: Option<Instant>,
}

impl Marks {
    /// Marks the pods of silent nodes that are ready, and takes the marks off the pods of nodes that are heard of: one that was cut off
    /// for a moment only says nothing new of its pods.
    pub(super) async fn look(
        &mut self,
        registry: &Registry,
        all: &Objects<Pod>,
        silent: &HashSet<String>,
        is_heard: impl Fn(&str) -> bool,
        now: Instant,
    ) {
        let place = |pod: Arc<Pod>| (ObjectKey::of(&*pod), pods::node_name(&pod).to_owned());
        if self.scanned.is_none_or(|scanned| now - scanned >= SCAN) {
            self.known.extend(all.peek().filter(|pod| is_marked(pod)).map(place));
            self.scanned = Some(now);
        }
        self.known.retain(|key, _| all.contains_key(key));
        let heard = self.known.iter().filter(|(_, node)| is_heard(node));
        let heard: Vec<(ObjectKey, String)> = heard.map(|(key, node)| (key.clone(), node.clone())).collect();
        let writes = stream::iter(heard).map(|(key, node)| async move {
            let settled = write(registry, &key, |pod| pods::node_name(pod) == node && unmark(pod)).await;
            settled.then_some(key)
        });
        let settled: Vec<Option<ObjectKey>> = writes.buffer_unordered(WRITES).collect().await;
        for key in settled.into_iter().flatten() {
            self.known.remove(&key);
        }
        if silent.is_empty() {
            return;
        }
        let doubtful = all
            .peek()
            .filter(|pod| silent.contains(pods::node_name(pod)) && pods::is_ready(pod));
        let doubtful: Vec<(ObjectKey, String)> = doubtful.map(place).collect();
        self.known.extend(doubtful.iter().cloned());
        let writes = stream::iter(doubtful).for_each_concurrent(WRITES, |(key, node)| async move {
            write(registry, &key, |pod| pods::node_name(pod) == node && mark(pod)).await;
        });
        writes.await;
    }
}

/// Whether there is nothing left to be written.
async fn write(registry: &Registry, key: &ObjectKey, change: impl Fn(&mut Pod) -> bool + Send + Sync) -> bool {
    match registry.modify_status(key, |pod: &mut Pod| change(pod)).await {
        Ok(_) => true,
        Err(error) if error.is_not_found() => true,
        Err(error) => {
            tracing::warn!(pod = %key, %error, "condition Ready could not be written; it is tried again");
            false
        }
    }
}

fn ready(pod: &mut Pod) -> Option<&mut PodCondition> {
    let mut conditions = pod.status.iter_mut().flat_map(|status| &mut status.conditions);
    conditions.find(|condition| condition.r#type == "Ready")
}

fn is_marked(pod: &Pod) -> bool {
    pods::condition(pod, "Ready").is_some_and(|ready| ready.status == "False" && ready.reason == REASON)
}

/// Whether that changed anything.
fn mark(pod: &mut Pod) -> bool {
    let Some(ready) = ready(pod).filter(|ready| ready.status == "True") else {
        return false;
    };
    ready.status = "False".to_owned();
    ready.reason = REASON.to_owned();
    ready.message = "the pod's node is not heard of".to_owned();
    ready.last_transition_time = Some(time::now_seconds());
    true
}

/// Whether that changed anything.
fn unmark(pod: &mut Pod) -> bool {
    if !is_marked(pod) {
        return false;
    }
    let Some(ready) = ready(pod) else { return false };
    ready.status = "True".to_owned();
    ready.reason.clear();
    ready.message.clear();
    ready.last_transition_time = Some(time::now_seconds());
    true
}
