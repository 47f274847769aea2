//! What the two kinds have in common.

use orlop_proto::{
    apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus},
    core::v1::{PodTemplateSpec, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus},
};
use prost_types::Timestamp;

use crate::{model::selector::Selector, registry::Registered};

/// The status of either kind.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ReplicaStatus {
    /// Active pods.
    pub replicas: i32,
    /// Those that have all labels of the template.
    pub fully_labeled: i32,
    /// Those that are ready.
    pub ready: i32,
    /// Those that were ready long enough.
    pub available: i32,
    /// The generation that was last looked at.
    pub observed_generation: i64,
    /// Condition ReplicaFailure, while pods cannot be created or deleted.
    pub failure: Option<Failure>,
}

/// Condition ReplicaFailure.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Failure {
    /// FailedCreate or FailedDelete.
    pub reason: String,
    /// The error.
    pub message: String,
    /// Since when.
    pub since: Option<Timestamp>,
}

/// A kind that keeps a number of pods.
pub trait ReplicaOwner: Registered {
    /// How many pods are wanted.
    fn replicas(&self) -> i32;
    /// How long a pod must be ready to be available, in seconds.
    fn min_ready_seconds(&self) -> i32;
    /// Which pods are its own. An error's text says what is wrong with it.
    fn selector(&self) -> Result<Selector, String>;
    /// What pods are made from.
    fn template(&self) -> Option<&PodTemplateSpec>;
    /// The status as it is.
    fn status(&self) -> ReplicaStatus;
    /// Replaces the status; conditions that are not ours stay.
    fn set_status(&mut self, status: &ReplicaStatus);
}

const FAILURE: &str = "ReplicaFailure";

macro_rules! replica_owner {
    ($owner:ident, $status:ident, $condition:ident, $selector:expr) => {
        impl ReplicaOwner for $owner {
            fn replicas(&self) -> i32 {
                self.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1)
            }

            fn min_ready_seconds(&self) -> i32 {
                self.spec.as_ref().map_or(0, |spec| spec.min_ready_seconds)
            }

            fn selector(&self) -> Result<Selector, String> {
                $selector(self)
            }

            fn template(&self) -> Option<&PodTemplateSpec> {
                self.spec.as_ref().and_then(|spec| spec.template.as_ref())
            }

            fn status(&self) -> ReplicaStatus {
                let Some(status) = &self.status else {
                    return ReplicaStatus::default();
                };
                let failure = status
                    .conditions
                    .iter()
                    .find(|condition| condition.r#type == FAILURE && condition.status == "True")
                    .map(|condition| Failure {
                        reason: condition.reason.clone(),
                        message: condition.message.clone(),
                        since: condition.last_transition_time,
                    });
                ReplicaStatus {
                    replicas: status.replicas,
                    fully_labeled: status.fully_labeled_replicas,
                    ready: status.ready_replicas,
                    available: status.available_replicas,
                    observed_generation: status.observed_generation,
                    failure,
                }
            }

            fn set_status(&mut self, status: &ReplicaStatus) {
                let target = self.status.get_or_insert_with($status::default);
                target.replicas = status.replicas;
                target.fully_labeled_replicas = status.fully_labeled;
                target.ready_replicas = status.ready;
                target.available_replicas = status.available;
                target.observed_generation = status.observed_generation;
                target.conditions.retain(|condition| condition.r#type != FAILURE);
                if let Some(failure) = &status.failure {
                    target.conditions.push($condition {
                        r#type: FAILURE.to_owned(),
                        status: "True".to_owned(),
                        last_transition_time: failure.since,
                        reason: failure.reason.clone(),
                        message: failure.message.clone(),
                    });
                }
            }
        }
    };
}

replica_owner!(
    ReplicaSet,
    ReplicaSetStatus,
    ReplicaSetCondition,
    |owner: &ReplicaSet| {
        let selector = owner.spec.as_ref().and_then(|spec| spec.selector.as_ref());
        Selector::from_message(selector).map_err(|error| error.to_string())
    }
);

replica_owner!(
    ReplicationController,
    ReplicationControllerStatus,
    ReplicationControllerCondition,
    |owner: &ReplicationController| {
        // An empty selector selects nothing here: else the controller would adopt its whole namespace.
        Ok(match owner.spec.as_ref() {
            Some(spec) if !spec.selector.is_empty() => Selector::from_labels(&spec.selector),
            _ => Selector::nothing(),
        })
    }
);
