//! Reading, creating, replacing.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orlop_proto::{Resource as _, core::v1::Namespace};
use prost_types::Timestamp;

use super::{
    FieldError, Registered, Registry, RegistryError, claims::Chosen, codec::encode, generated::generate_name,
    kinds::same_spec,
};
use crate::{
    cache::ObjectKey,
    store::{Expected, Key, Operation, Revision, StoreError, Transaction, Write},
};

/// How often a write begins anew when others wrote in between. Each failure means that somebody else succeeded.
const ATTEMPTS: usize = 64;
/// So often a writer tries again at once.
const AT_ONCE: usize = 4;

/// Who has lost several times in a row waits for a moment, each time another: writers in lockstep, as a group commit makes
/// them, would let the same one lose for ever.
pub(super) async fn step_aside(attempt: usize) {
    if attempt >= AT_ONCE {
        let longest = u64::try_from(attempt).unwrap_or(u64::MAX);
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..=longest))).await;
    }
}

/// Which half of an object a write replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Spec,
    Status,
}

/// Where an object that is to be changed was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    /// It may be old.
    Cached,
    Stored,
}

/// The store key of an object.
pub(super) fn store_key<T: Registered>(key: &ObjectKey) -> Key {
    Key::object(&T::KIND, &key.namespace, &key.name)
}

pub(super) fn not_found<T: Registered>(key: &ObjectKey) -> RegistryError {
    RegistryError::NotFound {
        resource: T::KIND.resource,
        name: key.to_string(),
    }
}

pub(super) fn conflict<T: Registered>(key: &ObjectKey, message: impl Into<String>) -> RegistryError {
    RegistryError::Conflict {
        resource: T::KIND.resource,
        name: key.to_string(),
        message: message.into(),
    }
}

pub(super) fn invalid<T: Registered>(key: &ObjectKey, fields: Vec<FieldError>) -> RegistryError {
    RegistryError::Invalid {
        resource: T::KIND.resource,
        name: key.to_string(),
        fields,
    }
}

pub(super) fn field(path: &str, message: impl Into<String>) -> FieldError {
    FieldError {
        field: path.to_owned(),
        message: message.into(),
    }
}

/// The revision that an object was read at.
pub(super) fn revision_of<T: Registered>(object: &T) -> Revision {
    object.meta().resource_version.parse().unwrap_or_default()
}

/// Now, in whole seconds, as metav1.Time.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: 0,
    }
}

/// What became of a commit.
pub(super) enum Committed {
    At(Revision),
    /// The condition on this key did not hold; it is not the fence's.
    Failed(Key),
}

impl Registry {
    /// Commits under the fence.
    pub(super) async fn commit(&self, mut operations: Vec<Operation>) -> Result<Committed, RegistryError> {
        if let Some(fence) = &self.fence {
            let check = Operation {
                key: fence.key.clone(),
                expected: Expected::Revision(fence.revision),
                write: Write::Check,
            };
            // The first that is looked at: who lost the claim is told that, whatever else does not hold.
            operations.insert(0, check);
        }
        match self.store.commit(Transaction { operations }).await {
            Ok(revision) => Ok(Committed::At(revision)),
            Err(StoreError::Conflict { key, .. }) => match &self.fence {
                Some(fence) if fence.key == key => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    Err(RegistryError::Fenced(key))
                }
                _ => Ok(Committed::Failed(key)),
            },
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn read<T: Registered>(&self, key: &ObjectKey) -> Result<T, RegistryError> {
        let store_key = store_key::<T>(key);
        match self.store.get(&store_key).await? {
            Some(record) => Ok(super::decode(&store_key, &record.value, record.revision)?),
            None => Err(not_found::<T>(key)),
        }
    }

    pub(super) async fn create_new<T: Registered>(&self, mut object: T) -> Result<T, RegistryError> {
        let generated = begin(&mut object)?;
        for attempt in 0..ATTEMPTS {
            step_aside(attempt).await;
            if generated {
                object.meta_mut().name = generate_name(&object.meta().generate_name);
            }
            let key = ObjectKey::of(&object);
            let mut new = object.clone();
            new.set_defaults();
            new.complete();
            new.reset_status();
            let mut fields = new.validate_create();
            let chosen = match self.choose_cluster_ip(&mut new).await {
                Err(RegistryError::Invalid { fields: more, .. }) => {
                    fields.extend(more);
                    Chosen::Given
                }
                other => other?,
            };
            if !fields.is_empty() {
                return Err(invalid::<T>(&key, fields));
            }
            let mut operations = vec![Operation {
                key: store_key::<T>(&key),
                expected: Expected::Absent,
                write: Write::Put(encode(&mut new)),
            }];
            if T::KIND.namespaced {
                operations.push(self.namespace_is_active(&key, attempt > 0).await?);
            }
            let claims = new.claims();
            operations.extend(self.apart(&new, &claims).await?);
            operations.extend(claims.into_iter().map(|claim| claimed(&new, claim)));
            match self.commit(operations).await? {
                Committed::At(revision) => {
                    new.meta_mut().resource_version = revision.to_string();
                    return Ok(new);
                }
                Committed::Failed(failed) if failed == store_key::<T>(&key) => {
                    if !generated {
                        return Err(RegistryError::AlreadyExists {
                            resource: T::KIND.resource,
                            name: key.to_string(),
                        });
                    }
                }
                Committed::Failed(failed) if new.claims().contains(&failed) => {
                    if chosen == Chosen::Given {
                        // An object of the same name that has the same address: that is the error to tell.
                        if self.store.get(&store_key::<T>(&key)).await?.is_some() && !generated {
                            return Err(RegistryError::AlreadyExists {
                                resource: T::KIND.resource,
                                name: key.to_string(),
                            });
                        }
                        return Err(invalid::<T>(&key, super::claims::taken(&failed)));
                    }
                }
                // The namespace changed, or what ranges there are: it is looked at again.
                Committed::Failed(_) => {}
            }
        }
        Err(conflict::<T>(
            &ObjectKey::of(&object),
            "no attempt to create it succeeded",
        ))
    }

    /// The condition that the namespace is there and takes new objects. What the cache has may be old: then the commit fails on
    /// it, and the next attempt asks the store (`fresh`).
    async fn namespace_is_active(&self, key: &ObjectKey, fresh: bool) -> Result<Operation, RegistryError> {
        let of_namespace = ObjectKey::new("", &key.namespace);
        let cached = self.cache.reader::<Namespace>().get("", &key.namespace);
        let namespace = match cached.filter(|cached| !fresh && !cached.is_deleting()) {
            Some(cached) => cached,
            None => Arc::new(self.read(&of_namespace).await?),
        };
        if namespace.is_deleting() {
            return Err(RegistryError::Precondition(format!(
                "namespace {} is being terminated: nothing new can be created in it",
                key.namespace
            )));
        }
        let expected = Expected::Revision(revision_of(&*namespace));
        Ok(Operation {
            key: store_key::<Namespace>(&of_namespace),
            expected,
            write: Write::Check,
        })
    }

    pub(super) async fn replace<T: Registered>(&self, given: T, part: Part) -> Result<T, RegistryError> {
        let key = ObjectKey::of(&given);
        for attempt in 0..ATTEMPTS {
            step_aside(attempt).await;
            let old: T = self.read(&key).await?;
            let (uid, version) = (&given.meta().uid, &given.meta().resource_version);
            if !uid.is_empty() && *uid != old.meta().uid {
                return Err(conflict::<T>(&key, format!("its uid is {}, not {uid}", old.meta().uid)));
            }
            if !version.is_empty() && *version != old.meta().resource_version {
                let message = format!("its resourceVersion is {}, not {version}", old.meta().resource_version);
                return Err(conflict::<T>(&key, message));
            }
            let new = merged(&old, given.clone(), part)?;
            if let Some(stored) = self.put(&old, new).await? {
                return Ok(stored);
            }
        }
        Err(conflict::<T>(&key, "others kept writing it"))
    }

    pub(super) async fn change<T, F>(&self, key: &ObjectKey, part: Part, mut change: F) -> Result<T, RegistryError>
    where
        T: Registered,
        F: FnMut(&mut T) -> bool + Send,
    {
        match self.cache.reader::<T>().get(&key.namespace, &key.name) {
            Some(cached) => {
                self.change_from(T::clone(&cached), Read::Cached, part, &mut change)
                    .await
            }
            None => {
                let old = self.read(key).await?;
                self.change_from(old, Read::Stored, part, &mut change).await
            }
        }
    }

    /// `old` is what to begin with; when that is out of date, what the store has. That nothing is to be changed is only believed of
    /// what the store has: what is cached may lack a write of a moment ago, even the caller's own, which this one takes back.
    async fn change_from<T: Registered>(
        &self,
        mut old: T,
        mut read: Read,
        part: Part,
        change: &mut (dyn FnMut(&mut T) -> bool + Send),
    ) -> Result<T, RegistryError> {
        let key = &ObjectKey::of(&old);
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            let mut given = old.clone();
            let wanted = if change(&mut given) {
                Some(merged(&old, given, part)?).filter(|new| is_done(new) || new != &old)
            } else {
                None
            };
            match (wanted, read) {
                (None, Read::Stored) => return Ok(old),
                (None, Read::Cached) => {}
                (Some(new), _) => {
                    if let Some(stored) = self.put(&old, new).await? {
                        return Ok(stored);
                    }
                    attempt += 1;
                    step_aside(attempt).await;
                }
            }
            (old, read) = (self.read(key).await?, Read::Stored);
        }
        Err(conflict::<T>(key, "others kept writing it"))
    }

    pub(super) async fn drop_finalizer<T: Registered>(
        &self,
        key: &ObjectKey,
        uid: &str,
        finalizer: &str,
    ) -> Result<(), RegistryError> {
        // What the cache has may be older than the finalizer.
        let old: T = match self.read(key).await {
            Err(error) if error.is_not_found() => return Ok(()),
            other => other?,
        };
        let mut without = |object: &mut T| {
            let before = object.meta().finalizers.len();
            if object.meta().uid == uid {
                object.meta_mut().finalizers.retain(|present| present != finalizer);
            }
            object.meta().finalizers.len() != before
        };
        match self.change_from(old, Read::Stored, Part::Spec, &mut without).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes `new` in the place of `old`, or removes it when nothing keeps it any more. `None`: somebody else wrote in between.
    pub(super) async fn put<T: Registered>(&self, old: &T, mut new: T) -> Result<Option<T>, RegistryError> {
        if is_done(&new) {
            return self.remove(old).await;
        }
        new.set_type();
        new.meta_mut().resource_version.clone_from(&old.meta().resource_version);
        if new == *old {
            // Nothing to write; but what was read may be old.
            return Ok(Some(new));
        }
        let key = ObjectKey::of(old);
        let expected = Expected::Revision(revision_of(old));
        let mut operations = vec![Operation {
            key: store_key::<T>(&key),
            expected,
            write: Write::Put(encode(&mut new)),
        }];
        let (held, wanted) = (old.claims(), new.claims());
        let released = held.iter().filter(|claim| !wanted.contains(claim));
        operations.extend(released.map(|claim| removed(claim.clone())));
        let added: Vec<Key> = wanted.into_iter().filter(|claim| !held.contains(claim)).collect();
        operations.extend(self.apart(&new, &added).await?);
        operations.extend(added.iter().map(|claim| claimed(&new, claim.clone())));
        match self.commit(operations).await? {
            Committed::At(revision) => {
                new.meta_mut().resource_version = revision.to_string();
                Ok(Some(new))
            }
            Committed::Failed(failed) if added.contains(&failed) => {
                Err(invalid::<T>(&key, super::claims::taken(&failed)))
            }
            Committed::Failed(_) => Ok(None),
        }
    }

    /// Removes what cannot be read in the place of an object, with the claims that the object makes: it is to be written anew.
    pub(super) async fn clear_damaged<T: Registered>(&self, object: &T) -> Result<(), RegistryError> {
        let key = store_key::<T>(&ObjectKey::of(object));
        tracing::error!(%key, "a stored object is damaged and is written anew");
        let keys = std::iter::once(key).chain(object.claims());
        self.commit(keys.map(removed).collect()).await.map(drop)
    }

    /// Removes an object with its claims. `None`: somebody else wrote in between.
    pub(super) async fn remove<T: Registered>(&self, old: &T) -> Result<Option<T>, RegistryError> {
        let key = ObjectKey::of(old);
        let expected = Expected::Revision(revision_of(old));
        let mut operations = vec![Operation {
            key: store_key::<T>(&key),
            expected,
            write: Write::Delete,
        }];
        let with_it = old.claims().into_iter().chain(old.belongings());
        operations.extend(with_it.map(removed));
        match self.commit(operations).await? {
            Committed::At(revision) => {
                let mut last = old.clone();
                last.meta_mut().resource_version = revision.to_string();
                Ok(Some(last))
            }
            Committed::Failed(_) => Ok(None),
        }
    }
}

/// Checks and fills what the server gives to a new object. Returns whether its name is to be generated.
fn begin<T: Registered>(object: &mut T) -> Result<bool, RegistryError> {
    object.set_type();
    let key = ObjectKey::of(object);
    let meta = object.meta_mut();
    let mut fields = Vec::new();
    if !meta.resource_version.is_empty() {
        fields.push(field(
            "metadata.resourceVersion",
            "must not be set on an object to be created",
        ));
    }
    if T::KIND.namespaced && meta.namespace.is_empty() {
        fields.push(field("metadata.namespace", "required"));
    }
    if !T::KIND.namespaced && !meta.namespace.is_empty() {
        fields.push(field("metadata.namespace", "not allowed on this kind"));
    }
    let generated = meta.name.is_empty() && !meta.generate_name.is_empty();
    if meta.name.is_empty() && !generated {
        fields.push(field("metadata.name", "name or generateName is required"));
    }
    if !fields.is_empty() {
        return Err(invalid::<T>(&key, fields));
    }
    // The thread's own generator, which is cryptographic: asking the kernel is a system call for each.
    meta.uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid().to_string();
    meta.creation_timestamp = Some(now());
    meta.deletion_timestamp = None;
    meta.deletion_grace_period_seconds = None;
    meta.generation = i64::from(T::GENERATIONS);
    Ok(generated)
}

/// The object to write: one half of `given`, everything else of `old`.
pub(super) fn merged<T: Registered>(old: &T, given: T, part: Part) -> Result<T, RegistryError> {
    if part == Part::Status {
        let mut new = old.clone();
        new.take_status(&given);
        let fields = new.validate_status_update(old);
        if !fields.is_empty() {
            return Err(invalid::<T>(&ObjectKey::of(old), fields));
        }
        return Ok(new);
    }
    let key = ObjectKey::of(old);
    let mut new = given;
    new.set_type();
    new.take_status(old);
    let meta = new.meta_mut();
    let was = old.meta();
    meta.name.clone_from(&was.name);
    meta.namespace.clone_from(&was.namespace);
    meta.generate_name.clone_from(&was.generate_name);
    meta.uid.clone_from(&was.uid);
    meta.resource_version.clone_from(&was.resource_version);
    meta.creation_timestamp = was.creation_timestamp;
    meta.deletion_timestamp = was.deletion_timestamp;
    meta.deletion_grace_period_seconds = was.deletion_grace_period_seconds;
    meta.generation = was.generation;
    new.keep_given(old);
    new.set_defaults();
    let fields = new.validate_update(old);
    if !fields.is_empty() {
        return Err(invalid::<T>(&key, fields));
    }
    if T::GENERATIONS && !same_spec(old, &new) {
        new.meta_mut().generation += 1;
    }
    Ok(new)
}

/// Whether a deletion was asked for and nothing keeps the object any more.
fn is_done<T: Registered>(object: &T) -> bool {
    let meta = object.meta();
    let graced = meta.deletion_grace_period_seconds.is_none_or(|seconds| seconds == 0);
    object.is_deleting() && graced && meta.finalizers.is_empty() && !object.is_held()
}

fn claimed<T: Registered>(owner: &T, claim: Key) -> Operation {
    let text = format!("{}/{}", T::KIND.resource, ObjectKey::of(owner));
    Operation {
        key: claim,
        expected: Expected::Absent,
        write: Write::Put(text.into()),
    }
}

fn removed(key: Key) -> Operation {
    Operation {
        key,
        expected: Expected::Any,
        write: Write::Delete,
    }
}
