//! ReplicaSets and ReplicationControllers: one core.

mod act;
mod owner;
pub mod plan;

use std::sync::{Arc, Mutex, PoisonError};

use orlop_proto::{Resource as _, core::v1::Pod};
use tokio_util::sync::CancellationToken;

use super::{
    pod_index::PodIndex,
    pods,
    queue::WorkQueue,
    runner::{self, Seen},
    selectors::SelectorIndex,
};
use crate::{
    cache::{Event, ObjectKey},
    events::Recorder,
    model::selector::Selector,
    registry::Registry,
};

pub use owner::ReplicaOwner;

/// Keys under work at once.
const WORKERS: usize = 8;

/// Runs the controller for one of the two kinds.
pub async fn run<O: ReplicaOwner>(
    registry: Registry,
    recorder: Recorder,
    pods: Arc<PodIndex>,
    cancel: CancellationToken,
) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<ObjectKey> = WorkQueue::default();
    let owners = cache.reader::<O>();
    let controller = Arc::new(act::Replicas {
        registry,
        recorder,
        owners: owners.clone(),
        pods,
    });
    let selectors = Mutex::new(SelectorIndex::default());
    let from_owners = runner::follow(owners.clone(), |seen: Seen<'_, O>| {
        let mut selectors = selectors.lock().unwrap_or_else(PoisonError::into_inner);
        // What has no meaning selects nothing; a look at it says so.
        let set = |selectors: &mut SelectorIndex, owner: &O| {
            let selector = owner.selector().unwrap_or_else(|_| Selector::nothing());
            selectors.set(ObjectKey::of(owner), selector);
        };
        match &seen {
            Seen::All(snapshot) => {
                selectors.clear();
                snapshot.objects.values().for_each(|owner| set(&mut selectors, &owner));
            }
            Seen::Event(Event::Added(owner) | Event::Modified { new: owner, .. }) => set(&mut selectors, owner),
            Seen::Event(Event::Deleted(owner)) => selectors.remove(&ObjectKey::of(&**owner)),
        }
        drop(selectors);
        seen.objects().for_each(|owner| queue.add(ObjectKey::of(&*owner)));
    });
    let from_pods = runner::follow(cache.reader::<Pod>(), |seen: Seen<'_, Pod>| {
        if seen.is_all() {
            owners.snapshot().objects.keys().for_each(|key| queue.add(key.clone()));
            return;
        }
        seen.objects()
            .for_each(|pod| queue_owners::<O>(&selectors, &queue, &pod));
    });
    tokio::join!(
        from_owners,
        from_pods,
        runner::work(controller, queue.clone(), cache, WORKERS, cancel)
    );
}

/// The owner of a pod; for a pod without one all that could adopt it.
fn queue_owners<O: ReplicaOwner>(selectors: &Mutex<SelectorIndex>, queue: &WorkQueue<ObjectKey>, pod: &Pod) {
    match pods::controller(pod) {
        Some(reference) if reference.kind == O::KIND.kind && reference.api_version == O::KIND.api_version => {
            queue.add(ObjectKey::new(pod.namespace(), &reference.name));
        }
        Some(_) => {}
        None => {
            let selectors = selectors.lock().unwrap_or_else(PoisonError::into_inner);
            selectors.of(pod).for_each(|key| queue.add(key.clone()));
        }
    }
}
