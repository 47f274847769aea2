//! Namespaces that are deleted: first what is in them, then they themselves.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use orlop_proto::{
    Resource as _, ResourceKind,
    core::v1::{Namespace, Pod},
};
use tokio_util::sync::CancellationToken;

use super::{
    queue::WorkQueue,
    runner::{self, ControlError, Controller, Outcome, Seen},
};
use crate::{
    cache::{Cache, Event, ObjectKey, Reader},
    kinds::{KindVisitor, visit_kind},
    registry::{DeleteOptions, Preconditions, Registered, Registry},
};

/// Namespaces under work at once.
const WORKERS: usize = 4;
/// Deletions under way at once, in one namespace.
const DELETIONS: usize = 32;
/// How often a namespace whose content takes its time (pods on nodes) is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Runs the controller.
pub async fn run(registry: Registry, cancel: CancellationToken) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<String> = WorkQueue::default();
    let namespaces = cache.reader::<Namespace>();
    let controller = Arc::new(Namespaces {
        registry,
        namespaces: namespaces.clone(),
    });
    let from_namespaces = runner::follow(namespaces.clone(), |seen: Seen<'_, Namespace>| {
        for namespace in seen.objects().filter(|namespace| is_going(namespace)) {
            queue.add(namespace.name().to_owned());
        }
    });
    // What goes last are pods: their end is what a namespace waits for.
    let from_pods = runner::follow(cache.reader::<Pod>(), |seen: Seen<'_, Pod>| {
        if let Seen::Event(Event::Deleted(pod)) = seen
            && namespaces
                .get("", pod.namespace())
                .is_some_and(|namespace| is_going(&namespace))
        {
            queue.add(pod.namespace().to_owned());
        }
    });
    tokio::join!(
        from_namespaces,
        from_pods,
        runner::work(controller, queue.clone(), cache, WORKERS, cancel)
    );
}

fn is_going(namespace: &Namespace) -> bool {
    namespace.is_deleting()
        || namespace
            .status
            .as_ref()
            .is_some_and(|status| status.phase == "Terminating")
}

struct Namespaces {
    registry: Registry,
    namespaces: Reader<Namespace>,
}

#[async_trait]
impl Controller for Namespaces {
    const NAME: &'static str = "namespaces";
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        let cache = self.registry.cache();
        // As fresh as the store: nothing that was written before the namespace began to go may be overlooked.
        runner::catch_up(cache).await;
        let Some(namespace) = self.namespaces.get("", name).filter(|namespace| is_going(namespace)) else {
            return Ok(outcome);
        };
        let content: Vec<Item> = ResourceKind::ALL
            .iter()
            .filter(|kind| kind.namespaced)
            .filter_map(|kind| visit_kind(kind, Content { cache, namespace: name }))
            .flatten()
            .collect();
        if content.is_empty() {
            outcome.wrote_unknown = true;
            return match self.registry.finalize_namespace(name, namespace.uid()).await {
                Err(error) if !error.is_not_found() => Err(error.into()),
                _ => Ok(outcome),
            };
        }
        let deletions = content
            .into_iter()
            .filter(|item| !item.going)
            .map(|item| self.delete(item));
        let mut results = stream::iter(deletions).buffer_unordered(DELETIONS);
        let mut failure = None;
        while let Some(result) = results.next().await {
            outcome.wrote_unknown = true;
            if let Err(error) = result {
                failure = Some(error);
            }
        }
        // Content without finalizers and nodes is gone already: look at once; else when there is news, or in a while.
        outcome.look_again(if outcome.wrote_unknown {
            Duration::ZERO
        } else {
            LOOK_AGAIN
        });
        failure.map_or(Ok(outcome), Err)
    }
}

impl Namespaces {
    async fn delete(&self, item: Item) -> Result<(), ControlError> {
        let options = DeleteOptions {
            preconditions: Preconditions {
                uid: Some(item.uid),
                resource_version: None,
            },
            ..DeleteOptions::default()
        };
        match self.registry.delete_object(&item.kind, &item.key, options).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Something in a namespace.
struct Item {
    kind: ResourceKind,
    key: ObjectKey,
    uid: String,
    /// Its deletion was asked for already.
    going: bool,
}

struct Content<'a> {
    cache: &'a Cache,
    namespace: &'a str,
}

impl KindVisitor for Content<'_> {
    type Output = Vec<Item>;

    fn visit<T: Registered>(self) -> Vec<Item> {
        let snapshot = self.cache.reader::<T>().snapshot();
        let item = |(key, object): (&ObjectKey, Arc<T>)| Item {
            kind: T::KIND,
            key: key.clone(),
            uid: object.uid().to_owned(),
            going: object.is_deleting(),
        };
        snapshot.in_namespace(self.namespace).map(item).collect()
    }
}
