//! Why a write did not happen.

pub use crate::model::FieldError;
use crate::store::StoreError;

/// Why the registry could not do it.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is no such object.
    #[error("{resource} \"{name}\" not found")]
    NotFound {
        /// The plural of its kind.
        resource: &'static str,
        /// Its name.
        name: String,
    },
    /// There is one of this name already.
    #[error("{resource} \"{name}\" already exists")]
    AlreadyExists {
        /// The plural of its kind.
        resource: &'static str,
        /// Its name.
        name: String,
    },
    /// The object's resourceVersion (or uid) is not the stored one: read it again.
    #[error("{resource} \"{name}\" has been modified: {message}")]
    Conflict {
        /// The plural of its kind.
        resource: &'static str,
        /// Its name.
        name: String,
        /// What was expected and what is there.
        message: String,
    },
    /// Fields are wrong: all of them.
    #[error("{resource} \"{name}\" is invalid: {}", fields.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid {
        /// The plural of its kind.
        resource: &'static str,
        /// Its name.
        name: String,
        /// In the order of the fields.
        fields: Vec<FieldError>,
    },
    /// What was asked for cannot be done in the state that things are in: a precondition of a deletion, a terminating namespace.
    #[error("{0}")]
    Precondition(String),
    /// No address or range is free.
    #[error("{0}")]
    Exhausted(String),
    /// This writer is no longer the leader, or no longer its node's session.
    #[error("the claim {0} was lost")]
    Fenced(crate::store::Key),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegistryError {
    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether somebody else wrote in between.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict { .. })
    }

    /// Whether there is one of this name already.
    pub fn is_already_exists(&self) -> bool {
        matches!(self, Self::AlreadyExists { .. })
    }
}
