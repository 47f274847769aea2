//! What all nodes are told alike: services and routes.
//!
//! The board is made of persistent maps of encoded changes. A session keeps the board that it has told its node, and sends in what the
//! present one differs: that costs a session some pointers, and what changes while its node is slow is folded by itself.

use std::sync::Arc;

use bytes::Bytes;
use imbl::{OrdMap, ordmap::DiffItem};
use orlop_proto::node::v1::{self as link, change::Change};

use super::services::encode;
use crate::cache::ObjectKey;

/// Every service and every route, each as the encoded `orlop.node.v1.Change` that carries it.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    pub services: OrdMap<ObjectKey, Bytes>,
    /// By the node's name.
    pub routes: OrdMap<Arc<str>, Bytes>,
}

impl Board {
    /// The changes that lead from this board to the next one. A node is not told of the route to itself.
    pub fn changes<'a>(&'a self, next: &'a Self, node: &'a str) -> impl Iterator<Item = Bytes> + Send + 'a {
        let services = self.services.diff(&next.services).map(|difference| match difference {
            DiffItem::Add(_, change) | DiffItem::Update { new: (_, change), .. } => change.clone(),
            DiffItem::Remove(key, _) => encode(Change::ServiceRemoved(link::ServiceKey {
                namespace: key.namespace.to_string(),
                name: key.name.to_string(),
            })),
        });
        let routes = self.routes.diff(&next.routes).filter_map(move |difference| {
            let (to, change) = match difference {
                DiffItem::Add(to, change) | DiffItem::Update { new: (to, change), .. } => (to, Some(change)),
                DiffItem::Remove(to, _) => (to, None),
            };
            let removal = || encode(Change::RouteRemoved(to.to_string()));
            (**to != *node).then(|| change.cloned().unwrap_or_else(removal))
        });
        services.chain(routes)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn route(node: &str, address: &str) -> (Arc<str>, Bytes) {
        let route = link::Route {
            node_name: node.to_owned(),
            node_address: address.to_owned(),
            pod_cidrs: Vec::new(),
        };
        (node.into(), encode(Change::Route(route)))
    }

    fn service(name: &str, uid: &str) -> (ObjectKey, Bytes) {
        let service = link::Service {
            name: name.to_owned(),
            uid: uid.to_owned(),
            ..link::Service::default()
        };
        (ObjectKey::new("default", name), encode(Change::Service(service)))
    }

    fn told(from: &Board, to: &Board, node: &str) -> Vec<String> {
        let changes = from.changes(to, node);
        let changes = changes.map(|bytes| link::Change::decode(bytes).unwrap().change.unwrap());
        let text = changes.map(|change| match change {
            Change::Service(service) => format!("service {} {}", service.name, service.uid),
            Change::ServiceRemoved(key) => format!("no service {}/{}", key.namespace, key.name),
            Change::Route(route) => format!("route {} {}", route.node_name, route.node_address),
            Change::RouteRemoved(node) => format!("no route {node}"),
            Change::Pod(_) | Change::PodRemoved(_) => panic!("boards have no pods"),
        });
        text.collect()
    }

    #[test]
    fn a_node_is_told_the_difference_and_nothing_of_itself() {
        let services = |all: &[(&str, &str)]| all.iter().map(|(name, uid)| service(name, uid)).collect();
        let routes = |all: &[(&str, &str)]| all.iter().map(|(node, address)| route(node, address)).collect();
        let before = Board {
            services: services(&[("a", "1"), ("b", "1"), ("c", "1")]),
            routes: routes(&[("n1", "192.0.2.1"), ("n2", "192.0.2.2")]),
        };
        let after = Board {
            services: services(&[("b", "2"), ("c", "1"), ("d", "1")]),
            routes: routes(&[("n1", "192.0.2.9"), ("n3", "192.0.2.3"), ("n4", "192.0.2.4")]),
        };
        assert_eq!(
            told(&Board::default(), &before, "n1"),
            ["service a 1", "service b 1", "service c 1", "route n2 192.0.2.2"]
        );
        assert_eq!(
            told(&before, &after, "n3"),
            [
                "no service default/a",
                "service b 2",
                "service d 1",
                "route n1 192.0.2.9",
                "no route n2",
                "route n4 192.0.2.4"
            ]
        );
        assert!(told(&after, &after.clone(), "n3").is_empty());
    }
}
