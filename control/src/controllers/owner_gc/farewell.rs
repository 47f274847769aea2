//! The end of owners that are held until something has become of what they own.

use std::{collections::HashSet, sync::PoisonError, time::Duration};

use orlop_proto::ResourceKind;

use super::{Collector, Dependent, Owned};
use crate::{
    cache::{Cache, ObjectKey},
    controllers::runner::{self, ControlError, Outcome},
    kinds::{KindVisitor, visit_kind},
    registry::{FOREGROUND, ORPHAN, Registered},
};

/// How often an owner that waits is looked at without a reason.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What an owner owns, as the cache has it.
pub(super) struct Found {
    pub dependent: Dependent,
    /// The owner's deletion in the foreground waits for it.
    pub blocks: bool,
    /// It waits for dependents of its own.
    pub waits: bool,
}

impl Collector {
    /// One look at an owner that was deleted and has one of the collector's finalizers.
    pub(super) async fn farewell(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        owner: &Owned,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        if owner.waits {
            self.wait(kind, key, owner, outcome).await
        } else {
            self.release(kind, key, owner, outcome).await
        }
    }

    /// Foreground: what it owns is looked at (and goes, when no other owner keeps it); the owner follows what blocks it.
    async fn wait(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        owner: &Owned,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        let mut found = self.known_dependents(kind, key, &owner.uid);
        if !found.iter().any(|found| found.blocks) {
            // That nothing is left is believed only of a cache that is as fresh as the store.
            found = self.all_dependents(kind, key, &owner.uid).await;
        }
        if found.iter().any(|found| found.blocks) {
            found.into_iter().for_each(|found| self.queue.add(found.dependent));
            outcome.look_again(LOOK_AGAIN);
            return Ok(());
        }
        self.let_go(kind, key, &owner.uid, FOREGROUND, outcome).await
    }

    /// Orphan: what it owns loses its reference to the owner. Once nothing has one any more, the owner goes.
    async fn release(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        owner: &Owned,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        let found = self.all_dependents(kind, key, &owner.uid).await;
        if found.is_empty() {
            return self.let_go(kind, key, &owner.uid, ORPHAN, outcome).await;
        }
        outcome.wrote_unknown = true;
        // Somebody may have become a dependent meanwhile.
        outcome.look_again(Duration::ZERO);
        for Found { dependent, .. } in found {
            let Some(kind) = ResourceKind::by_resource(dependent.resource) else {
                continue;
            };
            let mut object = match self.registry.get_object(&kind, &dependent.key).await {
                Err(error) if error.is_not_found() => continue,
                other => other?,
            };
            if let Some(meta) = object.meta_mut() {
                meta.owner_references.retain(|reference| reference.uid != owner.uid);
            }
            match self.registry.update_object(object).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {
                    tracing::debug!(dependent = %dependent.key, kind = kind.kind, owner = %key, "released: its owner goes");
                }
            }
        }
        Ok(())
    }

    async fn let_go(
        &self,
        kind: &ResourceKind,
        key: &ObjectKey,
        uid: &str,
        finalizer: &str,
        outcome: &mut Outcome,
    ) -> Result<(), ControlError> {
        outcome.wrote_unknown = true;
        self.registry.remove_object_finalizer(kind, key, uid, finalizer).await?;
        Ok(())
    }

    /// What the index knows: some may be missing from it for a moment.
    pub(super) fn known_dependents(&self, kind: &ResourceKind, key: &ObjectKey, uid: &str) -> Vec<Found> {
        let known: HashSet<Dependent> = {
            let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            index.get(uid).cloned().unwrap_or_default()
        };
        let can_be_owned = |dependent: &Dependent| !kind.namespaced || dependent.key.namespace == key.namespace;
        let found = |dependent: Dependent| {
            let meta = self.cached(&ResourceKind::by_resource(dependent.resource)?, &dependent.key)?;
            let mut references = meta.owners.iter().filter(|owner| owner.uid == uid).peekable();
            references.peek()?;
            Some(Found {
                blocks: references.any(|owner| owner.block_owner_deletion == Some(true)),
                waits: meta.waits,
                dependent,
            })
        };
        known.into_iter().filter(can_be_owned).filter_map(found).collect()
    }

    /// Everything that is owned, as of now.
    async fn all_dependents(&self, kind: &ResourceKind, key: &ObjectKey, uid: &str) -> Vec<Found> {
        let cache = self.registry.cache();
        runner::catch_up(cache).await;
        let search = |dependents: &ResourceKind| {
            let search = Search {
                cache,
                namespace: &key.namespace,
                uid,
            };
            visit_kind(dependents, search)
        };
        let kinds = ResourceKind::ALL
            .iter()
            .filter(|one| one.namespaced || !kind.namespaced);
        kinds.filter_map(search).flatten().collect()
    }
}

struct Search<'a> {
    cache: &'a Cache,
    namespace: &'a str,
    uid: &'a str,
}

impl KindVisitor for Search<'_> {
    type Output = Vec<Found>;

    fn visit<T: Registered>(self) -> Vec<Found> {
        let snapshot = self.cache.reader::<T>().snapshot();
        let mut found = Vec::new();
        for (key, object) in snapshot.in_namespace(self.namespace) {
            let meta = object.meta();
            let mut references = meta
                .owner_references
                .iter()
                .filter(|owner| owner.uid == self.uid)
                .peekable();
            if references.peek().is_none() {
                continue;
            }
            found.push(Found {
                dependent: Dependent {
                    resource: T::KIND.resource,
                    key: key.clone(),
                },
                blocks: references.any(|owner| owner.block_owner_deletion == Some(true)),
                waits: super::is_waiting(meta),
            });
        }
        found
    }
}
