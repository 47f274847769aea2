//! Who calls, and what they may call.

use std::{net::SocketAddr, sync::Arc};

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::pki::KeyHash;

/// The group of administrators.
pub const MASTERS: &str = "system:masters";
/// The group of nodes.
pub const NODES: &str = "system:nodes";
/// What a node's CN starts with.
pub const NODE_PREFIX: &str = "system:node:";

/// Who calls. In the extensions of every request; see [`caller`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// In `system:masters`, or on the unix socket, or on an insecure listener.
    Admin {
        /// The certificate's CN, or where the call came from.
        name: Arc<str>,
    },
    /// A node's agent: CN `system:node:NAME`, O `system:nodes`.
    Node {
        /// The node's name.
        name: Arc<str>,
        /// Of the certificate's public key.
        key: KeyHash,
    },
    /// A certificate of our CA that is neither.
    Stranger {
        /// Its CN.
        name: Arc<str>,
    },
    /// No certificate.
    Anonymous,
}

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddress(pub Option<SocketAddr>);

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Yes.
    Allowed,
    /// No: who they are does not suffice.
    Denied,
    /// No: they have not said who they are.
    Unauthenticated,
}

impl Identity {
    /// From a verified client certificate.
    pub fn from_certificate(der: &[u8]) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else {
            return Self::Stranger {
                name: "unreadable certificate".into(),
            };
        };
        let subject = certificate.subject();
        let names: Vec<&str> = subject
            .iter_common_name()
            .filter_map(|value| value.as_str().ok())
            .collect();
        let groups: Vec<&str> = subject
            .iter_organization()
            .filter_map(|value| value.as_str().ok())
            .collect();
        let name = names.first().copied().unwrap_or_default();
        // A certificate with several names or groups is not one of ours: it gets no rights at all.
        match (names.as_slice(), groups.as_slice()) {
            ([name], [MASTERS]) => Self::Admin { name: (*name).into() },
            ([name], [NODES]) if name.len() > NODE_PREFIX.len() && name.starts_with(NODE_PREFIX) => {
                let key = KeyHash::of(certificate.public_key().raw);
                Self::Node {
                    name: name[NODE_PREFIX.len()..].into(),
                    key,
                }
            }
            _ => Self::Stranger { name: name.into() },
        }
    }

    /// Whether they may call a gRPC method ("/orlop.api.v1.Objects/Get").
    pub fn access(&self, path: &str) -> Access {
        let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or((path, ""));
        let open = matches!(
            service,
            "grpc.health.v1.Health"
                | "grpc.reflection.v1.ServerReflection"
                | "grpc.reflection.v1alpha.ServerReflection"
        ) || (service, method) == ("orlop.cluster.v1.Join", "Join");
        let of_nodes = service == "orlop.node.v1.NodeLink" || (service, method) == ("orlop.cluster.v1.Join", "Renew");
        match self {
            _ if open => Access::Allowed,
            Self::Anonymous => Access::Unauthenticated,
            // An administrator is not a node: a session must belong to one.
            Self::Admin { .. } if of_nodes => Access::Denied,
            Self::Admin { .. } => Access::Allowed,
            Self::Node { .. } if of_nodes => Access::Allowed,
            Self::Node { .. } | Self::Stranger { .. } => Access::Denied,
        }
    }

    /// For logs: "admin orlop-admin", "node n1", "anonymous".
    pub fn describe(&self) -> String {
        match self {
            Self::Admin { name } => format!("admin {name}"),
            Self::Node { name, .. } => format!("node {name}"),
            Self::Stranger { name } => format!("stranger {name}"),
            Self::Anonymous => "anonymous".to_owned(),
        }
    }
}

/// Who sent a gRPC request.
pub fn caller<T>(request: &tonic::Request<T>) -> Identity {
    request
        .extensions()
        .get::<Identity>()
        .cloned()
        .unwrap_or(Identity::Anonymous)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_call_what() {
        let admin = Identity::Admin { name: "a".into() };
        let node = Identity::Node {
            name: "n".into(),
            key: KeyHash::of(b"k"),
        };
        let stranger = Identity::Stranger { name: "s".into() };
        let anonymous = Identity::Anonymous;
        let table = [
            (
                "/orlop.api.v1.Objects/Get",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
            (
                "/orlop.api.v1.Objects/Patch",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
            (
                "/orlop.node.v1.NodeLink/Session",
                [Access::Denied, Access::Allowed, Access::Denied, Access::Unauthenticated],
            ),
            ("/orlop.cluster.v1.Join/Join", [Access::Allowed; 4]),
            (
                "/orlop.cluster.v1.Join/Renew",
                [Access::Denied, Access::Allowed, Access::Denied, Access::Unauthenticated],
            ),
            (
                "/orlop.cluster.v1.Join/CreateToken",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
            (
                "/orlop.metrics.v1.Metrics/ListPods",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
            ("/grpc.health.v1.Health/Check", [Access::Allowed; 4]),
            (
                "/orlop.cluster.v1.Join/../Join",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
            (
                "",
                [Access::Allowed, Access::Denied, Access::Denied, Access::Unauthenticated],
            ),
        ];
        for (path, expected) in table {
            let found = [&admin, &node, &stranger, &anonymous].map(|who| who.access(path));
            assert_eq!(found, expected, "{path}");
        }
    }
}
