//! The cluster's own certificate authority, join tokens, and the service by which machines become nodes.
//!
//! The CA belongs to a `data_dir`. Several control replicas over one etcd must have the same one: copy `pki/ca.crt` and
//! `pki/ca.key` to every replica's `data_dir/pki` before its first start. The CA's key never is in the store; its certificate's hash
//! is, so that a replica with another CA, or none, does not begin. Tokens and node keys are in the store, so any replica serves them.

mod authority;
mod cluster;
mod files;
mod join;
mod node_keys;
mod token;

use std::path::PathBuf;

pub use authority::{Authority, Issued, ServerIdentity};
pub use cluster::{claim_authority, cluster_authority};
pub use join::JoinService;
#[doc(hidden)]
pub use node_keys::is_binding_of;
pub use node_keys::{KeyHash, NodeKeys};
#[doc(hidden)]
pub use token::TokenRecord;
pub use token::{Token, TokenError};

use crate::store::StoreError;

/// What goes wrong with certificates, keys and tokens.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file of `data_dir/pki`.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of `data_dir/pki` is not what it should be.
    #[error("{path}: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// In what way.
        reason: String,
    },
    /// The replicas of this store have another CA.
    #[error(
        "the control replicas of this store have the CA {theirs}, and this one has {}: copy ca.crt and ca.key from another \
         replica's data_dir/pki to this one's, and remove its other files",
        ours.as_deref().unwrap_or("none")
    )]
    OtherAuthority {
        /// The hash of ours, if there is one.
        ours: Option<String>,
        /// The hash of theirs.
        theirs: String,
    },
    /// A certificate could not be made.
    #[error("certificate")]
    Certificate(#[from] rcgen::Error),
    /// A certificate request is refused.
    #[error("certificate request: {0}")]
    Request(String),
    /// TLS refuses the server's own certificate or key.
    #[error("tls")]
    Tls(#[from] rustls::Error),
    /// The store.
    #[error("store")]
    Store(#[from] StoreError),
}
