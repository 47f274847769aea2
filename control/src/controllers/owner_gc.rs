//! Owner garbage collection: what is owned goes when all its owners are gone, or wait for it to be gone (`foregroundDeletion`).
//!
//! An owner that was deleted in the foreground, or whose dependents are to be released (`orphan`), is held by a finalizer, which the
//! collector takes away when that is done: `farewell`.

mod farewell;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use orlop_proto::{
    Resource, ResourceKind,
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
    meta::v1::{ObjectMeta, OwnerReference},
};
use tokio_util::sync::CancellationToken;

use super::{
    queue::WorkQueue,
    runner::{self, ControlError, Controller, Outcome, Seen},
};
use crate::{
    cache::{self, Cache, ObjectKey},
    kinds::{KindVisitor, visit_kind},
    registry::{DeleteOptions, FOREGROUND, ORPHAN, Preconditions, Propagation, Registered, Registry},
};

/// Dependents and owners under work at once.
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
    let controller = Arc::new(Collector {
        registry,
        queue: queue.clone(),
        index: Arc::clone(&index),
    });
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
                    insert(&mut index, &*object);
                    queue_itself(queue, &*object);
                }
                // Whose end was missed is not known: everybody that is owned by this kind is looked at.
                for dependents in index.values() {
                    dependents.iter().for_each(|dependent| queue.add(dependent.clone()));
                }
            }
            Seen::Event(cache::Event::Added(object)) => {
                insert(&mut index, &**object);
                queue_itself(queue, &**object);
            }
            Seen::Event(cache::Event::Modified { old, new }) => {
                if old.meta().owner_references != new.meta().owner_references || old.uid() != new.uid() {
                    remove(&mut index, &**old);
                    insert(&mut index, &**new);
                    queue_itself(queue, &**new);
                    queue_waiting_owners(cache, queue, &**old);
                } else if is_held(new.meta()) {
                    queue_itself(queue, &**new);
                }
                if old.uid() != new.uid() {
                    queue_owned(&index, queue, old.uid());
                }
            }
            Seen::Event(cache::Event::Deleted(object)) => {
                remove(&mut index, &**object);
                queue_owned(&index, queue, object.uid());
                queue_waiting_owners(cache, queue, &**object);
            }
        }
    })
    .await;
}

/// Whether the object was deleted and waits for the collector.
fn is_held(meta: &ObjectMeta) -> bool {
    let ours = |finalizer: &String| matches!(finalizer.as_str(), FOREGROUND | ORPHAN);
    meta.deletion_timestamp.is_some() && meta.finalizers.iter().any(ours)
}

fn dependent<T: Resource>(object: &T) -> Dependent {
    Dependent {
        resource: T::KIND.resource,
        key: ObjectKey::of(object),
    }
}

fn queue_itself<T: Resource>(queue: &WorkQueue<Dependent>, object: &T) {
    if !object.meta().owner_references.is_empty() || is_held(object.meta()) {
        queue.add(dependent(object));
    }
}

/// The owners that this one held up, perhaps.
fn queue_waiting_owners<T: Resource>(cache: &Cache, queue: &WorkQueue<Dependent>, object: &T) {
    for owner in &object.meta().owner_references {
        let Some((kind, key)) = place(owner, object.namespace()) else {
            continue;
        };
        // One that begins to wait later looks for itself.
        let waits = visit_kind(&kind, Meta { cache, key: &key }).flatten();
        if waits.is_some_and(|owner| owner.held) {
            queue.add(Dependent {
                resource: kind.resource,
                key,
            });
        }
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
    queue: WorkQueue<Dependent>,
    index: Index,
}

/// How an owner stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is there.
    Present,
    /// It was deleted in the foreground: it waits for what it owns to be gone.
    Waiting,
    /// It is not there.
    Gone,
}

/// What becomes of a dependent.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All its owners are there.
    Keep,
    /// These owners (by uid) are gone or wait; others are there.
    Trim(Vec<String>),
    /// No owner is left that does not at least wait for it.
    Collect {
        /// One waits for it.
        awaited: bool,
    },
}

/// Pure: how the owners stand, in the order of the references.
fn judge(owners: &[OwnerReference], standing: &[Standing]) -> Verdict {
    let is_present = |standing: &Standing| *standing == Standing::Present;
    if standing.iter().all(is_present) {
        return Verdict::Keep;
    }
    if !standing.iter().any(is_present) {
        return Verdict::Collect {
            awaited: standing.contains(&Standing::Waiting),
        };
    }
    let others = owners
        .iter()
        .zip(standing)
        .filter(|(_, standing)| !is_present(standing));
    Verdict::Trim(others.map(|(owner, _)| owner.uid.clone()).collect())
}

#[async_trait]
impl Controller for Collector {
    const NAME: &'static str = "garbage-collector";
    type Key = Dependent;

    async fn reconcile(&self, dependent: &Dependent) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        let Some(kind) = ResourceKind::by_resource(dependent.resource) else {
            return Ok(outcome);
        };
        let Some(meta) = self.cached(&kind, &dependent.key) else {
            return Ok(outcome);
        };
        if meta.held {
            self.farewell(&kind, &dependent.key, &meta, &mut outcome).await?;
            return Ok(outcome);
        }
        if meta.going || meta.owners.is_empty() {
            return Ok(outcome);
        }
        let mut standing = Vec::with_capacity(meta.owners.len());
        for owner in &meta.owners {
            standing.push(self.standing(owner, &dependent.key.namespace).await?);
        }
        match judge(&meta.owners, &standing) {
            Verdict::Keep => {}
            Verdict::Collect { awaited } => {
                self.collect(&kind, &dependent.key, meta, awaited, &mut outcome).await?;
            }
            Verdict::Trim(gone) => {
                let trim = |owners: &mut Vec<OwnerReference>| owners.retain(|owner| !gone.contains(&owner.uid));
                self.change_owners(&kind, &dependent.key, &meta, trim, &mut outcome)
                    .await?;
            }
        }
        Ok(outcome)
    }
}

impl Collector {
    fn cached(&self, kind: &ResourceKind, key: &ObjectKey) -> Option<Owned> {
        let cache = self.registry.cache();
        visit_kind(kind, Meta { cache, key }).flatten()
    }

    async fn collect(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        meta: Owned,
        awaited: bool,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        let mut propagation = Propagation::Default;
        if awaited {
            let own = self.known_dependents(kind, key, &meta.uid);
            // Whoever waits may wait for this one in turn, in a circle: then nobody is to wait for this one.
            let blocks = meta.owners.iter().any(|owner| owner.block_owner_deletion == Some(true));
            if blocks && own.iter().any(|dependent| dependent.waits) {
                let unblock = |owners: &mut Vec<OwnerReference>| {
                    owners
                        .iter_mut()
                        .for_each(|owner| owner.block_owner_deletion = Some(false));
                };
                self.change_owners(kind, key, &meta, unblock, outcome).await?;
                outcome.look_again(Duration::ZERO);
                return Ok(());
            }
            if !own.is_empty() {
                propagation = Propagation::Foreground;
            }
        }
        outcome.wrote_unknown = true;
        let options = DeleteOptions {
            preconditions: Preconditions {
                uid: Some(meta.uid),
                resource_version: Some(meta.resource_version),
            },
            propagation,
            ..DeleteOptions::default()
        };
        match self.registry.delete_object(kind, key, options).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => {
                tracing::debug!(dependent = %key, kind = kind.kind, ?propagation, "collected: its owners are gone, or wait");
                Ok(())
            }
        }
    }

    /// Writes other references into the version of an object that was looked at; another version is looked at again.
    async fn change_owners(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        meta: &Owned,
        change: impl FnOnce(&mut Vec<OwnerReference>) + Send,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        outcome.wrote_unknown = true;
        let mut object = self.registry.get_object(kind, key).await?;
        let is_the_same = object
            .meta()
            .is_some_and(|found| found.resource_version == meta.resource_version);
        match object.meta_mut() {
            Some(found) if is_the_same => change(&mut found.owner_references),
            _ => {
                outcome.look_again(Duration::ZERO);
                return Ok(());
            }
        }
        self.registry.update_object(object).await?;
        Ok(())
    }

    /// How an owner stands. That it is gone is believed only when the store says so, too. An owner that cannot be looked for
    /// counts as there.
    async fn standing(&self, owner: &OwnerReference, namespace: &str) -> Result<Standing, ControlError> {
        let Some((kind, key)) = place(owner, namespace) else {
            return Ok(Standing::Present);
        };
        let there = |waits: bool| if waits { Standing::Waiting } else { Standing::Present };
        if let Some(meta) = self.cached(&kind, &key).filter(|meta| meta.uid == owner.uid) {
            return Ok(there(meta.waits));
        }
        match self.registry.get_object(&kind, &key).await {
            Ok(object) => {
                let meta = object.meta().filter(|meta| meta.uid == owner.uid);
                Ok(meta.map_or(Standing::Gone, |meta| there(is_waiting(meta))))
            }
            Err(error) if error.is_not_found() => Ok(Standing::Gone),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the object was deleted and waits for what it owns to be gone.
fn is_waiting(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some() && meta.finalizers.iter().any(|finalizer| finalizer == FOREGROUND)
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
    /// [`is_held`]
    held: bool,
    /// [`is_waiting`]
    waits: bool,
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
            held: is_held(meta),
            waits: is_waiting(meta),
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
    fn goes_only_when_all_owners_are_gone_or_wait_for_it() {
        let owner = |uid: &str| OwnerReference {
            uid: uid.into(),
            ..OwnerReference::default()
        };
        let owners = [owner("a"), owner("b")];
        let [here, waits, gone] = [Standing::Present, Standing::Waiting, Standing::Gone];
        assert_eq!(judge(&owners, &[here, here]), Verdict::Keep);
        assert_eq!(judge(&owners, &[here, gone]), Verdict::Trim(vec!["b".into()]));
        assert_eq!(judge(&owners, &[waits, here]), Verdict::Trim(vec!["a".into()]));
        assert_eq!(judge(&owners, &[gone, gone]), Verdict::Collect { awaited: false });
        assert_eq!(judge(&owners, &[gone, waits]), Verdict::Collect { awaited: true });
    }
}
