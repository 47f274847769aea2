//! EndpointSlices: which pods stand behind a service.

pub mod plan;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use orlop_proto::{
    Resource as _,
    core::v1::{Pod, Service},
    discovery::v1::EndpointSlice,
};
use tokio_util::sync::CancellationToken;

use super::{
    pod_index::PodIndex,
    queue::WorkQueue,
    runner::{self, ControlError, Controller, Outcome, Seen},
    selectors::SelectorIndex,
};
use crate::{
    cache::{Event, ObjectKey, Reader},
    model::selector::Selector,
    registry::{DeleteOptions, Preconditions, Registry, generated_prefix},
};
use plan::{MANAGED_BY, MANAGER, SERVICE_NAME, SliceWrite};

/// Keys under work at once: many, so that their writes share the store's commits.
const WORKERS: usize = 32;

/// Runs the controller.
pub async fn run(registry: Registry, pods: Arc<PodIndex>, cancel: CancellationToken) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<ObjectKey> = WorkQueue::default();
    let services = cache.reader::<Service>();
    let controller = Arc::new(EndpointSlices {
        registry,
        services: services.clone(),
        pods,
        slices: cache.reader::<EndpointSlice>(),
    });
    let selectors = Mutex::new(SelectorIndex::default());
    let from_services = runner::follow(cache.reader::<Service>(), |seen: Seen<'_, Service>| {
        let mut selectors = selectors.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |selectors: &mut SelectorIndex, service: &Service| {
            selectors.set(ObjectKey::of(service), selector(service));
        };
        match &seen {
            Seen::All(snapshot) => {
                selectors.clear();
                snapshot
                    .objects
                    .values()
                    .for_each(|service| set(&mut selectors, &service));
            }
            Seen::Event(Event::Added(service) | Event::Modified { new: service, .. }) => set(&mut selectors, service),
            Seen::Event(Event::Deleted(service)) => selectors.remove(&ObjectKey::of(&**service)),
        }
        drop(selectors);
        seen.objects().for_each(|service| queue.add(ObjectKey::of(&*service)));
    });
    let from_slices = runner::follow(cache.reader::<EndpointSlice>(), |seen: Seen<'_, EndpointSlice>| {
        for slice in seen.objects() {
            if let Some(service) = slice.meta().labels.get(SERVICE_NAME) {
                queue.add(ObjectKey::new(slice.namespace(), service));
            }
        }
    });
    let from_pods = runner::follow(cache.reader::<Pod>(), |seen: Seen<'_, Pod>| match seen {
        Seen::All(_) => services
            .snapshot()
            .objects
            .keys()
            .for_each(|key| queue.add(key.clone())),
        Seen::Event(Event::Modified { old, new }) => {
            if plan::matters(old, new) {
                queue_services(&selectors, &queue, old);
                if old.meta().labels != new.meta().labels {
                    queue_services(&selectors, &queue, new);
                }
            }
        }
        Seen::Event(Event::Added(pod) | Event::Deleted(pod)) => queue_services(&selectors, &queue, pod),
    });
    let work = runner::work(controller, queue.clone(), cache, WORKERS, cancel);
    tokio::join!(from_services, from_slices, from_pods, work);
}

fn queue_services(selectors: &Mutex<SelectorIndex>, queue: &WorkQueue<ObjectKey>, pod: &Pod) {
    let selectors = selectors.lock().unwrap_or_else(PoisonError::into_inner);
    selectors.of(pod).for_each(|service| queue.add(service.clone()));
}

/// What a service selects: nothing without a selector, its endpoints are the user's then.
fn selector(service: &Service) -> Selector {
    match &service.spec {
        Some(spec) if !spec.selector.is_empty() => Selector::from_labels(&spec.selector),
        _ => Selector::nothing(),
    }
}

struct EndpointSlices {
    registry: Registry,
    services: Reader<Service>,
    pods: Arc<PodIndex>,
    slices: Reader<EndpointSlice>,
}

#[async_trait]
impl Controller for EndpointSlices {
    const NAME: &'static str = "endpointslices";
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        for write in self.plan(key) {
            match write {
                SliceWrite::Create(slice) => match self.registry.create(slice).await {
                    Ok(slice) => outcome.wrote(&slice),
                    // The service's namespace is going: no new content.
                    Err(crate::registry::RegistryError::Precondition(_)) => {}
                    Err(error) => return Err(error.into()),
                },
                // With the resourceVersion that was read: a slice that somebody else changed meanwhile is looked at again.
                SliceWrite::Update(slice) => outcome.wrote(&self.registry.update(slice).await?),
                SliceWrite::Delete(slice) => {
                    outcome.wrote_unknown = true;
                    let options = DeleteOptions {
                        preconditions: Preconditions {
                            uid: Some(slice.uid().to_owned()),
                            resource_version: None,
                        },
                        ..DeleteOptions::default()
                    };
                    match self
                        .registry
                        .delete::<EndpointSlice>(&ObjectKey::of(&*slice), options)
                        .await
                    {
                        Err(error) if !error.is_not_found() => return Err(error.into()),
                        _ => {}
                    }
                }
            }
        }
        Ok(outcome)
    }
}

impl EndpointSlices {
    fn plan(&self, key: &ObjectKey) -> Vec<SliceWrite> {
        // The slices of a service that is gone go with their owner.
        let Some(service) = self.services.get(&key.namespace, &key.name) else {
            return Vec::new();
        };
        let selector = selector(&service);
        if selector.is_nothing() || service.is_deleting() {
            return Vec::new();
        }
        let selected = self.pods.selected(&key.namespace, &selector);
        let slices = self.slices.snapshot();
        // Their names begin with the service's: there may be many slices, and few are this service's.
        let wanted = format!("{}-", key.name);
        let prefix = generated_prefix(&wanted);
        let existing: Vec<Arc<EndpointSlice>> = slices
            .objects
            .range(ObjectKey::new(&key.namespace, prefix)..)
            .take_while(|(found, _)| found.namespace == key.namespace && found.name.starts_with(prefix))
            .map(|(_, slice)| slice)
            .filter(|slice| {
                let labels = &slice.meta().labels;
                labels.get(SERVICE_NAME).map(String::as_str) == Some(&*key.name)
                    && labels.get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
                    && !slice.is_deleting()
            })
            .collect();
        plan::plan(&service, selected.iter(), &existing)
    }
}
