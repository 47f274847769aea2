//! Owner garbage collection: what is owned goes when all its owners are gone.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use orlop_proto::{
    Resource, ResourceKind,
    api::v1::Object,
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
    meta::v1::OwnerReference,
};
use tokio_util::sync::CancellationToken;

use super::{
    queue::WorkQueue,
    runner::{self, ControlError, Controller, Outcome, Seen},
};
use crate::{
    cache::{self, Cache, ObjectKey},
    kinds::{KindVisitor, visit_kind},
    registry::{DeleteOptions, Preconditions, Registered, Registry},
};

/// Dependents under work at once.
const WORKERS: usize = 32;

/// An object of any kind: its plural, namespace, name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Dependent {
    resource: &'static str,
    key: ObjectKey,
}

/// Who is owned by whom, by the owner's uid.
type Index = Arc<Mutex<HashMap<String, HashSet<Dependent>>>>;

/// Runs the collector.
pub async fn run(registry: Registry, cancel: CancellationToken) {
    let cache = registry.cache().clone();
    let queue: WorkQueue<Dependent> = WorkQueue::default();
    let index = Index::default();
    let controller = Arc::new(Collector { registry });
    tokio::join!(
        watch::<Namespace>(&cache, &index, &queue),
        watch::<Node>(&cache, &index, &queue),
        watch::<Pod>(&cache, &index, &queue),
        watch::<Service>(&cache, &index, &queue),
        watch::<EndpointSlice>(&cache, &index, &queue),
        watch::<ReplicationController>(&cache, &index, &queue),
        watch::<ReplicaSet>(&cache, &index, &queue),
        watch::<Event>(&cache, &index, &queue),
        watch::<Lease>(&cache, &index, &queue),
        runner::work(controller, queue.clone(), cache.clone(), WORKERS, cancel),
    );
}

async fn watch<T: Resource>(cache: &Cache, index: &Index, queue: &WorkQueue<Dependent>) {
    runner::follow(cache.reader::<T>(), |seen: Seen<'_, T>| {
        let mut index = index.lock().unwrap_or_else(PoisonError::into_inner);
        match seen {
            Seen::All(snapshot) => {
                for object in snapshot.objects.values() {
                    insert(&mut index, &**object);
                    queue_dependent(queue, &**object);
                }
                // Whose end was missed is not known: everybody that is owned by this kind is looked at.
                for dependents in index.values() {
                    dependents.iter().for_each(|dependent| queue.add(dependent.clone()));
                }
            }
            Seen::Event(cache::Event::Added(object)) => {
                insert(&mut index, &**object);
                queue_dependent(queue, &**object);
            }
            Seen::Event(cache::Event::Modified { old, new }) => {
                if old.meta().owner_references != new.meta().owner_references || old.uid() != new.uid() {
                    remove(&mut index, &**old);
                    insert(&mut index, &**new);
                    queue_dependent(queue, &**new);
                }
                if old.uid() != new.uid() {
                    queue_owned(&index, queue, old.uid());
                }
            }
            Seen::Event(cache::Event::Deleted(object)) => {
                remove(&mut index, &**object);
                queue_owned(&index, queue, object.uid());
            }
        }
    })
    .await;
}

fn dependent<T: Resource>(object: &T) -> Dependent {
    Dependent {
        resource: T::KIND.resource,
        key: ObjectKey::of(object),
    }
}

fn queue_dependent<T: Resource>(queue: &WorkQueue<Dependent>, object: &T) {
    if !object.meta().owner_references.is_empty() {
        queue.add(dependent(object));
    }
}

fn queue_owned(index: &HashMap<String, HashSet<Dependent>>, queue: &WorkQueue<Dependent>, owner: &str) {
    index
        .get(owner)
        .into_iter()
        .flatten()
        .for_each(|dependent| queue.add(dependent.clone()));
}

fn insert<T: Resource>(index: &mut HashMap<String, HashSet<Dependent>>, object: &T) {
    for owner in &object.meta().owner_references {
        index.entry(owner.uid.clone()).or_default().insert(dependent(object));
    }
}

fn remove<T: Resource>(index: &mut HashMap<String, HashSet<Dependent>>, object: &T) {
    for owner in &object.meta().owner_references {
        if let Some(dependents) = index.get_mut(&owner.uid) {
            dependents.remove(&dependent(object));
            if dependents.is_empty() {
                index.remove(&owner.uid);
            }
        }
    }
}

struct Collector {
    registry: Registry,
}

/// What becomes of a dependent.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All its owners are there.
    Keep,
    /// These owners (by uid) are gone; others are there.
    Trim(Vec<String>),
    /// No owner is left.
    Collect,
}

/// Pure: `present` says whether an owner is there, in the order of the references.
fn judge(owners: &[OwnerReference], present: &[bool]) -> Verdict {
    let gone = || {
        owners
            .iter()
            .zip(present)
            .filter(|(_, present)| !**present)
            .map(|(owner, _)| owner.uid.clone())
    };
    if present.iter().all(|present| *present) {
        Verdict::Keep
    } else if present.iter().any(|present| *present) {
        Verdict::Trim(gone().collect())
    } else {
        Verdict::Collect
    }
}

#[async_trait]
impl Controller for Collector {
    const NAME: &'static str = "garbage-collector";
    type Key = Dependent;

    async fn reconcile(&self, dependent: &Dependent) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        let cache = self.registry.cache();
        let Some(kind) = ResourceKind::by_resource(dependent.resource) else {
            return Ok(outcome);
        };
        let Some(meta) = visit_kind(
            &kind,
            Meta {
                cache,
                key: &dependent.key,
            },
        )
        .flatten() else {
            return Ok(outcome);
        };
        if meta.going || meta.owners.is_empty() {
            return Ok(outcome);
        }
        let mut present = Vec::with_capacity(meta.owners.len());
        for owner in &meta.owners {
            present.push(self.is_present(owner, &dependent.key.namespace).await?);
        }
        match judge(&meta.owners, &present) {
            Verdict::Keep => {}
            Verdict::Collect => {
                outcome.wrote_unknown = true;
                let preconditions = Preconditions {
                    uid: Some(meta.uid),
                    resource_version: Some(meta.resource_version),
                };
                let options = DeleteOptions {
                    preconditions,
                    ..DeleteOptions::default()
                };
                match self.registry.delete_object(&kind, &dependent.key, options).await {
                    Err(error) if !error.is_not_found() => return Err(error.into()),
                    _ => {
                        tracing::debug!(dependent = %dependent.key, kind = kind.kind, "collected: its owners are gone");
                    }
                }
            }
            Verdict::Trim(gone) => {
                outcome.wrote_unknown = true;
                let mut object = self.registry.get_object(&kind, &dependent.key).await?;
                let resource_version = trim(&mut object, &gone);
                // The version that was judged, or the write is refused and the object looked at again.
                if resource_version == Some(meta.resource_version) {
                    self.registry.update_object(object).await?;
                } else {
                    outcome.look_again(std::time::Duration::ZERO);
                }
            }
        }
        Ok(outcome)
    }
}

fn trim(object: &mut Object, gone: &[String]) -> Option<String> {
    let meta = object.meta_mut()?;
    meta.owner_references.retain(|owner| !gone.contains(&owner.uid));
    Some(meta.resource_version.clone())
}

impl Collector {
    /// Whether an owner is there. That it is not is believed only when the store says so, too. An owner that cannot be looked
    /// for counts as there.
    async fn is_present(&self, owner: &OwnerReference, namespace: &str) -> Result<bool, ControlError> {
        let Some((kind, key)) = place(owner, namespace) else {
            return Ok(true);
        };
        let cached = visit_kind(
            &kind,
            Meta {
                cache: self.registry.cache(),
                key: &key,
            },
        )
        .flatten();
        if cached.is_some_and(|meta| meta.uid == owner.uid) {
            return Ok(true);
        }
        match self.registry.get_object(&kind, &key).await {
            Ok(object) => Ok(object.meta().is_some_and(|meta| meta.uid == owner.uid)),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where an owner would be. `None`: its kind is none of ours, or it has a namespace and what it owns has none, so that nobody can
/// say where to look.
fn place(owner: &OwnerReference, namespace: &str) -> Option<(ResourceKind, ObjectKey)> {
    let kind = ResourceKind::by_type(&owner.api_version, &owner.kind)?;
    match (kind.namespaced, namespace) {
        (true, "") => None,
        (true, namespace) => Some((kind, ObjectKey::new(namespace, &owner.name))),
        (false, _) => Some((kind, ObjectKey::new("", &owner.name))),
    }
}

struct Meta<'a> {
    cache: &'a Cache,
    key: &'a ObjectKey,
}

struct Owned {
    uid: String,
    resource_version: String,
    going: bool,
    owners: Vec<OwnerReference>,
}

impl KindVisitor for Meta<'_> {
    type Output = Option<Owned>;

    fn visit<T: Registered>(self) -> Option<Owned> {
        let object = self.cache.reader::<T>().get(&self.key.namespace, &self.key.name)?;
        let meta = object.meta();
        Some(Owned {
            uid: meta.uid.clone(),
            resource_version: meta.resource_version.clone(),
            going: meta.deletion_timestamp.is_some(),
            owners: meta.owner_references.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_that_cannot_be_looked_for_have_no_place() {
        let owner = |api_version: &str, kind: &str| OwnerReference {
            api_version: api_version.into(),
            kind: kind.into(),
            name: "o".into(),
            ..OwnerReference::default()
        };
        let key = |owner: &OwnerReference, namespace: &str| place(owner, namespace).map(|(_, key)| key.to_string());
        let (pod, node) = (owner("v1", "Pod"), owner("v1", "Node"));
        assert_eq!(key(&pod, "x").as_deref(), Some("x/o"));
        assert_eq!(key(&pod, ""), None, "a node that names a pod is not collected");
        assert_eq!(key(&node, "x").as_deref(), Some("o"));
        assert_eq!(key(&node, "").as_deref(), Some("o"));
        assert_eq!(key(&owner("apps/v1", "Deployment"), "x"), None);
    }

    #[test]
    fn goes_only_when_all_owners_are_gone() {
        let owner = |uid: &str| OwnerReference {
            uid: uid.into(),
            ..OwnerReference::default()
        };
        let owners = [owner("a"), owner("b")];
        assert_eq!(judge(&owners, &[true, true]), Verdict::Keep);
        assert_eq!(judge(&owners, &[true, false]), Verdict::Trim(vec!["b".into()]));
        assert_eq!(judge(&owners, &[false, false]), Verdict::Collect);
    }
}
