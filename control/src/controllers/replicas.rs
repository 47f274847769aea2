//! ReplicaSets and ReplicationControllers: one core.

mod act;
mod owner;
pub mod plan;

use std::sync::Arc;

use orlop_proto::{Resource as _, core::v1::Pod};
use tokio_util::sync::CancellationToken;

use super::{
    pods,
    queue::WorkQueue,
    runner::{self, Seen},
};
use crate::{
    cache::{ObjectKey, Reader},
    events::Recorder,
    registry::Registry,
};

pub use owner::ReplicaOwner;

/// Keys under work at once.
const WORKERS: usize = 8;

/// Runs the controller for one of the two kinds.
pub async fn run<O: ReplicaOwner>(registry: Registry, recorder: Recorder, cancel: CancellationToken) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<ObjectKey> = WorkQueue::default();
    let owners = cache.reader::<O>();
    let controller = Arc::new(act::Replicas {
        registry,
        recorder,
        owners: owners.clone(),
        pods: cache.reader::<Pod>(),
    });
    let own_queue = queue.clone();
    let from_owners = runner::follow(owners.clone(), |seen: Seen<'_, O>| {
        seen.objects().for_each(|owner| own_queue.add(ObjectKey::of(&**owner)));
    });
    let from_pods = runner::follow(cache.reader::<Pod>(), |seen: Seen<'_, Pod>| {
        if seen.is_all() {
            owners.snapshot().objects.keys().for_each(|key| queue.add(key.clone()));
            return;
        }
        seen.objects().for_each(|pod| queue_owners(&owners, &queue, pod));
    });
    tokio::join!(
        from_owners,
        from_pods,
        runner::work(controller, queue.clone(), cache, WORKERS, cancel)
    );
}

/// The owner of a pod; for a pod without one all that could adopt it.
fn queue_owners<O: ReplicaOwner>(owners: &Reader<O>, queue: &WorkQueue<ObjectKey>, pod: &Pod) {
    match pods::controller(pod) {
        Some(reference) if reference.kind == O::KIND.kind && reference.api_version == O::KIND.api_version => {
            queue.add(ObjectKey::new(pod.namespace(), &reference.name));
        }
        Some(_) => {}
        None => {
            for (key, owner) in owners.snapshot().in_namespace(pod.namespace()) {
                if owner
                    .selector()
                    .is_ok_and(|selector| selector.matches(&pod.meta().labels))
                {
                    queue.add(key.clone());
                }
            }
        }
    }
}
