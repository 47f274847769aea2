//! Who leads: a Lease that people read, and a record that the leader's writes are fenced with.
//!
//! The Lease changes with every renewal, so it cannot be what a write depends on. The fence is a record of its own that is written
//! when the leadership is taken, in one transaction with the Lease, and never by a renewal. So from the moment that somebody else
//! leads, no write of an earlier leader commits: not one that was under way, nor one of a process that was stopped for an hour.

use orlop_proto::{
    coordination::v1::{Lease, LeaseSpec},
    meta::v1::ObjectMeta,
    time,
};

use super::{
    Fence, Registry, RegistryError,
    codec::encode,
    write::{Committed, Part, merged, revision_of, store_key},
};
use crate::{
    cache::ObjectKey,
    store::{Expected, Key, Operation, StoreError, Write},
};

/// Where the Lease is.
pub(crate) const NAMESPACE: &str = "kube-system";
/// Its name, and that of the fence's record.
pub(crate) const NAME: &str = "orlop-control";

/// A leader's claim.
#[derive(Debug, Clone)]
pub struct Term {
    /// What its writes depend on.
    pub fence: Fence,
    /// The Lease as the leader last wrote it.
    pub lease: Lease,
}

impl Term {
    /// Whose it is.
    pub fn holder(&self) -> &str {
        self.lease
            .spec
            .as_ref()
            .map_or("", |spec| spec.holder_identity.as_str())
    }
}

fn lease_key() -> ObjectKey {
    ObjectKey::new(NAMESPACE, NAME)
}

impl Registry {
    /// The Lease of the leadership as the store has it; made, without a holder, where there is none.
    pub async fn leadership(&self) -> Result<Lease, RegistryError> {
        let found = self.read(&lease_key()).await;
        let metadata = ObjectMeta {
            name: NAME.to_owned(),
            namespace: NAMESPACE.to_owned(),
            ..ObjectMeta::default()
        };
        let lease = Lease {
            metadata: Some(metadata),
            ..Lease::default()
        };
        match found {
            Err(error) if error.is_not_found() => {}
            // Otherwise nobody could lead again. Who leads now is fenced by whoever takes it.
            Err(RegistryError::Store(StoreError::Damaged { .. })) => self.clear_damaged(&lease).await?,
            other => return other,
        }
        match self.create(lease).await {
            Err(error) if error.is_already_exists() => self.read(&lease_key()).await,
            other => other,
        }
    }

    /// Takes the leadership from whoever had it by `old`: from this commit on, nothing that an earlier leader writes is taken.
    /// `None`: somebody else wrote the Lease since.
    pub async fn take_leadership(
        &self,
        old: &Lease,
        holder: &str,
        seconds: i32,
    ) -> Result<Option<Term>, RegistryError> {
        let mut given = old.clone();
        let spec: &mut LeaseSpec = given.spec.get_or_insert_default();
        if spec.holder_identity != holder {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        let now = time::now();
        spec.holder_identity = holder.to_owned();
        spec.lease_duration_seconds = Some(seconds);
        spec.acquire_time = Some(now);
        spec.renew_time = Some(now);
        let mut lease = merged(old, given, Part::Spec)?;
        let fence = Key::internal("leaders", NAME);
        let operations = vec![
            Operation {
                key: store_key::<Lease>(&lease_key()),
                expected: Expected::Revision(revision_of(old)),
                write: Write::Put(encode(&mut lease)),
            },
            Operation {
                key: fence.clone(),
                expected: Expected::Any,
                write: Write::Put(holder.to_owned().into()),
            },
        ];
        match self.commit(operations).await? {
            Committed::At(revision) => {
                lease.metadata.get_or_insert_default().resource_version = revision.to_string();
                let fence = Fence { key: fence, revision };
                Ok(Some(Term { fence, lease }))
            }
            Committed::Failed(_) => Ok(None),
        }
    }

    /// Renews the claim. `false`, or [`RegistryError::Fenced`]: it is lost.
    pub async fn renew_leadership(&self, term: &mut Term, holder: &str) -> Result<bool, RegistryError> {
        let renew = |lease: &mut Lease| lease.spec.get_or_insert_default().renew_time = Some(time::now());
        self.write_term(term, holder, renew).await
    }

    /// Lets the next leader begin at once. Who has lost the claim meanwhile gets [`RegistryError::Fenced`].
    pub async fn leave_leadership(&self, term: &mut Term, holder: &str) -> Result<bool, RegistryError> {
        let leave = |lease: &mut Lease| {
            let spec = lease.spec.get_or_insert_default();
            spec.holder_identity = String::new();
            spec.renew_time = Some(time::now());
        };
        self.write_term(term, holder, leave).await
    }

    async fn write_term(
        &self,
        term: &mut Term,
        holder: &str,
        change: impl Fn(&mut Lease),
    ) -> Result<bool, RegistryError> {
        let fenced = self.with_fence(term.fence.clone());
        loop {
            if term.holder() != holder {
                return Ok(false);
            }
            let mut given = term.lease.clone();
            change(&mut given);
            let new = merged(&term.lease, given, Part::Spec)?;
            if let Some(stored) = fenced.put(&term.lease, new).await? {
                term.lease = stored;
                return Ok(true);
            }
            // The fence held, so this was no other leader: somebody has edited or deleted the Lease.
            term.lease = fenced.leadership().await?;
            if term.holder().is_empty() {
                term.lease.spec.get_or_insert_default().holder_identity = holder.to_owned();
            }
        }
    }
}
