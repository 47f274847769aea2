//! What a deletion means.

use orlop_proto::{core::v1::Namespace, meta::v1::ObjectMeta};
use prost_types::Timestamp;

use super::{
    Registered, Registry, RegistryError,
    kinds::KUBERNETES,
    write::{conflict, now},
};
use crate::cache::ObjectKey;

/// How an object is to be deleted.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds of grace for pods; `None`: the pod's own. 0 removes at once, without waiting for the node.
    pub grace_period_seconds: Option<i64>,
    /// What must hold.
    pub preconditions: Preconditions,
    /// What happens to what the object owns.
    pub propagation: Propagation,
}

/// What must hold for a deletion.
#[derive(Debug, Clone, Default)]
pub struct Preconditions {
    /// The object's uid.
    pub uid: Option<String>,
    /// The object's resourceVersion.
    pub resource_version: Option<String>,
}

/// What happens to what an object owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Propagation {
    /// What the object's finalizers say; without one of them, background.
    #[default]
    Default,
    /// The garbage collector deletes it afterwards.
    Background,
    /// The garbage collector deletes it first: the object stays, with [`FOREGROUND`], until what blocks its deletion is gone.
    Foreground,
    /// The garbage collector takes the references to the object out of it; the object stays, with [`ORPHAN`], until then.
    Orphan,
}

/// The finalizer of an object that waits for what it owns to be deleted.
pub const FOREGROUND: &str = "foregroundDeletion";
/// The finalizer of an object that waits for what it owns to be released.
pub const ORPHAN: &str = "orphan";

impl Propagation {
    /// The finalizers of an object that is deleted so.
    fn finalizers(self, present: &[String]) -> Vec<String> {
        let added = match self {
            Self::Default => return present.to_vec(),
            Self::Background => None,
            Self::Foreground => Some(FOREGROUND),
            Self::Orphan => Some(ORPHAN),
        };
        // One that stays keeps its place: asking for the same again changes nothing.
        let stays = |finalizer: &&String| {
            !matches!(finalizer.as_str(), FOREGROUND | ORPHAN) || Some(finalizer.as_str()) == added
        };
        let mut finalizers: Vec<String> = present.iter().filter(stays).cloned().collect();
        if let Some(added) = added.filter(|added| !finalizers.iter().any(|present| present == added)) {
            finalizers.push(added.to_owned());
        }
        finalizers
    }
}

/// Namespaces that cannot be deleted, as in Kubernetes.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];
const ATTEMPTS: usize = 64;

impl Registry {
    /// Asks for a deletion. Returns the object: as it was, when it is gone; with its deletionTimestamp, when it stays for now
    /// (a pod on a node, finalizers, a namespace with content).
    pub async fn delete<T: Registered>(&self, key: &ObjectKey, options: DeleteOptions) -> Result<T, RegistryError> {
        if T::KIND.resource == "namespaces" && IMMORTAL.contains(&&*key.name) {
            return Err(RegistryError::Precondition(format!(
                "namespace {} cannot be deleted",
                key.name
            )));
        }
        for _ in 0..ATTEMPTS {
            let old: T = self.read(key).await?;
            check(&old, key, &options.preconditions)?;
            let grace = old.grace(options.grace_period_seconds);
            let finalizers = options.propagation.finalizers(&old.meta().finalizers);
            if grace == 0 && finalizers.is_empty() && !old.is_held() {
                match self.remove(&old).await? {
                    Some(gone) => return Ok(gone),
                    None => continue,
                }
            }
            let Some(new) = marked(&old, grace, finalizers) else {
                return Ok(old);
            };
            if let Some(stored) = self.put(&old, new).await? {
                return Ok(stored);
            }
        }
        Err(conflict::<T>(key, "others kept writing it"))
    }

    /// The namespace is empty: its finalizer "kubernetes" is cleared and it goes. A namespace that is not there, or that is another
    /// one of the same name, is a success.
    pub async fn finalize_namespace(&self, name: &str, uid: &str) -> Result<(), RegistryError> {
        let key = ObjectKey::new("", name);
        for _ in 0..ATTEMPTS {
            let old: Namespace = match self.read(&key).await {
                Err(error) if error.is_not_found() => return Ok(()),
                other => other?,
            };
            let meta = old.metadata.clone().unwrap_or_default();
            if meta.uid != uid {
                return Ok(());
            }
            if meta.deletion_timestamp.is_none() {
                return Err(RegistryError::Precondition(format!(
                    "namespace {name} is not being deleted"
                )));
            }
            let mut new = old.clone();
            if let Some(spec) = &mut new.spec {
                spec.finalizers.retain(|finalizer| finalizer != KUBERNETES);
            }
            if self.put(&old, new).await?.is_some() {
                return Ok(());
            }
        }
        Err(conflict::<Namespace>(&key, "others kept writing it"))
    }
}

fn check<T: Registered>(object: &T, key: &ObjectKey, preconditions: &Preconditions) -> Result<(), RegistryError> {
    let meta = object.meta();
    let pairs = [
        ("uid", &preconditions.uid, &meta.uid),
        (
            "resourceVersion",
            &preconditions.resource_version,
            &meta.resource_version,
        ),
    ];
    for (what, wanted, found) in pairs {
        if let Some(wanted) = wanted.as_ref().filter(|wanted| !wanted.is_empty() && *wanted != found) {
            let resource = T::KIND.resource;
            let message = format!("{resource} \"{key}\": the {what} is {found}, not {wanted}");
            return Err(RegistryError::Precondition(message));
        }
    }
    Ok(())
}

/// The object with its deletion asked for; `None` when that changes nothing.
fn marked<T: Registered>(old: &T, grace: i64, finalizers: Vec<String>) -> Option<T> {
    let mut new = old.clone();
    new.begin_deletion();
    new.meta_mut().finalizers = finalizers;
    end_after(new.meta_mut(), grace);
    (new != *old).then_some(new)
}

/// A later deletion can only shorten the grace period.
fn end_after(meta: &mut ObjectMeta, grace: i64) {
    match (meta.deletion_timestamp, meta.deletion_grace_period_seconds) {
        (Some(_), None | Some(0)) => return,
        (Some(_), Some(before)) if grace >= before => return,
        (Some(end), Some(before)) => {
            let end = Timestamp {
                seconds: end.seconds - before + grace,
                nanos: end.nanos,
            };
            meta.deletion_timestamp = Some(end);
        }
        (None, _) => {
            let now = now();
            meta.deletion_timestamp = Some(Timestamp {
                seconds: now.seconds.saturating_add(grace),
                nanos: 0,
            });
        }
    }
    meta.deletion_grace_period_seconds = Some(grace);
}
