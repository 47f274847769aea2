//! The acting part: writes what the plan says.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use orlop_proto::{Resource as _, core::v1::Pod, time};

use super::{
    owner::{Failure, ReplicaOwner},
    plan::{self, Plan},
};
use crate::{
    cache::{ObjectKey, Reader},
    controllers::{
        pod_index::PodIndex,
        pods,
        runner::{ControlError, Controller, Outcome},
    },
    events::Recorder,
    registry::{DeleteOptions, Preconditions, Registry, RegistryError},
};

/// Pods that are created at first; it doubles while all goes well, so that what is bound to fail fails once and not 500 times.
const FIRST_BATCH: usize = 2;

/// The controller of one kind.
pub(super) struct Replicas<O: ReplicaOwner> {
    pub(super) registry: Registry,
    pub(super) recorder: Recorder,
    pub(super) owners: Reader<O>,
    pub(super) pods: Arc<PodIndex>,
}

#[async_trait]
impl<O: ReplicaOwner> Controller for Replicas<O> {
    const NAME: &'static str = O::KIND.resource;
    type Key = ObjectKey;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Outcome, ControlError> {
        let mut outcome = Outcome::default();
        let Some(owner) = self.owners.get(&key.namespace, &key.name) else {
            return Ok(outcome);
        };
        let selector = owner.selector().map_err(ControlError::Malformed)?;
        let pods = self.pods.of_owner(&key.namespace, owner.uid(), &selector);
        let Plan {
            adopt,
            release,
            create,
            delete,
            mut status,
            look_again,
        } = plan::plan(&*owner, pods.iter(), time::now().seconds).map_err(ControlError::Malformed)?;
        drop(pods);
        self.release(&owner, release, &mut outcome).await?;
        if !self.adopt(&owner, adopt, &mut outcome).await? {
            return Ok(outcome);
        }
        let created = self.create(&owner, create, &mut outcome).await;
        let deleted = self.delete(&owner, delete, &mut outcome).await;
        let failure = match (&created, &deleted) {
            (Err(error), _) => Some(("FailedCreate", error.to_string())),
            (_, Err(error)) => Some(("FailedDelete", error.to_string())),
            _ => None,
        };
        let since = status
            .failure
            .as_ref()
            .and_then(|failure| failure.since)
            .or_else(|| Some(time::now_seconds()));
        status.failure = failure.map(|(reason, message)| Failure {
            reason: reason.to_owned(),
            message,
            since,
        });
        if status != owner.status() {
            let uid = owner.uid().to_owned();
            let written = self
                .registry
                .modify_status(key, |owner: &mut O| {
                    let changes = owner.uid() == uid && owner.status() != status;
                    if changes {
                        owner.set_status(&status);
                    }
                    changes
                })
                .await;
            match written {
                Ok(owner) => outcome.wrote(&owner),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        created?;
        deleted?;
        if let Some(wait) = look_again {
            // The clock of ready conditions has whole seconds.
            outcome.look_again(wait + Duration::from_millis(100));
        }
        Ok(outcome)
    }
}

impl<O: ReplicaOwner> Replicas<O> {
    async fn release(&self, owner: &O, release: Vec<Arc<Pod>>, outcome: &mut Outcome) -> Result<(), ControlError> {
        for pod in release {
            let uid = pod.uid().to_owned();
            let written = self
                .registry
                .modify(&ObjectKey::of(&*pod), |pod: &mut Pod| {
                    let owners = &mut pod.meta_mut().owner_references;
                    let before = owners.len();
                    owners.retain(|reference| reference.uid != owner.uid());
                    let changed = owners.len() != before;
                    changed && pod.uid() == uid
                })
                .await;
            note(written, outcome)?;
        }
        Ok(())
    }

    /// Says no when the owner turned out to be gone.
    async fn adopt(&self, owner: &O, adopt: Vec<Arc<Pod>>, outcome: &mut Outcome) -> Result<bool, ControlError> {
        if adopt.is_empty() {
            return Ok(true);
        }
        // The cache may still show an owner that is deleted: an adopted pod would be collected with it.
        match self.registry.get::<O>(&ObjectKey::of(owner)).await {
            Ok(current) if current.uid() == owner.uid() && !current.is_deleting() => {}
            Ok(_) => return Ok(false),
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        for pod in adopt {
            let uid = pod.uid().to_owned();
            let written = self
                .registry
                .modify(&ObjectKey::of(&*pod), |pod: &mut Pod| {
                    if pod.uid() != uid || pods::controller(pod).is_some() || pod.is_deleting() {
                        return false;
                    }
                    pod.meta_mut().owner_references.push(plan::reference(owner));
                    true
                })
                .await;
            note(written, outcome)?;
        }
        Ok(true)
    }

    async fn create(&self, owner: &O, count: usize, outcome: &mut Outcome) -> Result<(), ControlError> {
        let (mut left, mut batch) = (count, FIRST_BATCH);
        while left > 0 {
            let size = batch.min(left);
            let mut pods = Vec::with_capacity(size);
            for _ in 0..size {
                pods.push(
                    self.registry
                        .create(plan::new_pod(owner).map_err(ControlError::Malformed)?),
                );
            }
            let mut failure = None;
            for result in join_all(pods).await {
                match result {
                    Ok(pod) => {
                        outcome.wrote(&pod);
                        self.recorder
                            .normal(owner, "SuccessfulCreate", format!("Created pod: {}", pod.name()));
                    }
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(error) = failure {
                self.recorder
                    .warning(owner, "FailedCreate", format!("Error creating: {error}"));
                return Err(error.into());
            }
            left -= size;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(&self, owner: &O, victims: Vec<Arc<Pod>>, outcome: &mut Outcome) -> Result<(), ControlError> {
        let deletions = victims.iter().map(|pod| async move {
            let options = DeleteOptions {
                preconditions: Preconditions {
                    uid: Some(pod.uid().to_owned()),
                    resource_version: None,
                },
                ..DeleteOptions::default()
            };
            (pod, self.registry.delete::<Pod>(&ObjectKey::of(&**pod), options).await)
        });
        let mut failure = None;
        for (pod, result) in join_all(deletions).await {
            outcome.wrote_unknown = true;
            match result {
                Ok(_) => self
                    .recorder
                    .normal(owner, "SuccessfulDelete", format!("Deleted pod: {}", pod.name())),
                // Gone, or a namesake is there: that is what was wanted.
                Err(RegistryError::NotFound { .. } | RegistryError::Precondition(_)) => {}
                Err(error) => {
                    self.recorder
                        .warning(owner, "FailedDelete", format!("Error deleting: {error}"));
                    failure = Some(error);
                }
            }
        }
        failure.map_or(Ok(()), |error| Err(error.into()))
    }
}

fn note(written: Result<Pod, RegistryError>, outcome: &mut Outcome) -> Result<(), ControlError> {
    match written {
        Ok(pod) => outcome.wrote(&pod),
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
