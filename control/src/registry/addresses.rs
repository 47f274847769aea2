//! Whose an address may be: what users and nodes name is held against the cluster's ranges and the nodes' own addresses.
//!
//! Pods may have addresses of other people's management, so an address outside of the cluster's ranges is as good as any, as long as it
//! is nobody else's. Within `pod_cidr` the routes lead to the node that has the part, whoever gave the address.

use std::{collections::HashSet, net::IpAddr};

use ipnet::{IpNet, Ipv6Net};
use orlop_proto::{
    Resource as _,
    api::v1::{Object, object::Body},
    core::v1::Node,
    discovery::v1::EndpointSlice,
};

use super::{FieldError, Registry, RegistryError, claims::overlaps, write::field, write::invalid};
use crate::{cache::ObjectKey, model::unicast_address};

/// Where ranges of IPv6 may lie: unique local, and global unicast (RFC 4193, RFC 4291).
const UNICAST6: [(u16, u8); 2] = [(0xfc00, 7), (0x2000, 3)];

impl Registry {
    /// What is wrong with the addresses that an object asks for or names, as far as it can be told before it is written; `live` is the
    /// object that it takes the place of. What that has may stay.
    pub fn check_given(&self, object: &Object, live: Option<&Object>) -> Vec<FieldError> {
        match (&object.body, live.and_then(|live| live.body.as_ref())) {
            (Some(Body::Service(service)), None) => {
                let address = service.spec.as_ref().map_or("", |spec| spec.cluster_ip.as_str());
                let is_kubernetes = service.namespace() == "default" && service.name() == "kubernetes";
                let checked = self.check_cluster_ip(address, is_kubernetes);
                checked
                    .err()
                    .into_iter()
                    .map(|message| field("spec.clusterIP", message))
                    .collect()
            }
            (Some(Body::Node(node)), None) => self.check_node_ranges(node),
            (Some(Body::Node(node)), Some(Body::Node(live))) if ranges(live).is_empty() => self.check_node_ranges(node),
            (Some(Body::EndpointSlice(slice)), None) => self.check_endpoints(slice, None),
            (Some(Body::EndpointSlice(slice)), Some(Body::EndpointSlice(live))) => {
                self.check_endpoints(slice, Some(live))
            }
            _ => Vec::new(),
        }
    }

    /// Whether a user may write this object, by what the cache has: what control writes itself is not asked about.
    pub(super) fn check_written(&self, object: &Object) -> Result<(), RegistryError> {
        let Some(Body::EndpointSlice(slice)) = &object.body else {
            return Ok(());
        };
        let key = ObjectKey::of(slice);
        let live = self.cache.reader::<EndpointSlice>().get(&key.namespace, &key.name);
        let found = self.check_endpoints(slice, live.as_deref());
        if found.is_empty() {
            Ok(())
        } else {
            Err(invalid::<EndpointSlice>(&key, found))
        }
    }

    /// A node's own address is no endpoint: whoever may write a slice would reach what listens on nodes for the node itself.
    fn check_endpoints(&self, slice: &EndpointSlice, live: Option<&EndpointSlice>) -> Vec<FieldError> {
        let known = live.iter().flat_map(|live| &live.endpoints);
        let known: HashSet<&String> = known.flat_map(|endpoint| &endpoint.addresses).collect();
        let mut found = Vec::new();
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            for (number, text) in endpoint.addresses.iter().enumerate() {
                if let Ok(address) = text.parse()
                    && !known.contains(text)
                    && let Some(node) = self.node_at(address)
                {
                    let message = format!("Invalid value: \"{text}\": may not be the address of a node (nodes/{node})");
                    found.push(field(&format!("endpoints[{index}].addresses[{number}]"), message));
                }
            }
        }
        found
    }

    fn check_node_ranges(&self, node: &Node) -> Vec<FieldError> {
        let nodes = self.cache.reader::<Node>();
        let wrong = |range: IpNet| {
            if let Err(message) = self.check_pod_cidr(&range) {
                return Some(message);
            }
            let (other, holder) = self.holdings.overlapping(&nodes, &range)?;
            (*holder != *node.name()).then(|| overlaps(&range, &other, &holder))
        };
        let wanted = ranges(node).iter().filter_map(|range| range.parse().ok());
        wanted
            .filter_map(wrong)
            .map(|message| field("spec.podCIDRs", message))
            .collect()
    }

    /// Whether a node may have this range, whoever has it now. Ranges of IPv4 are parts of `pod_cidr`: to the rest of it no route
    /// leads, and what is outside is not the cluster's.
    pub(super) fn check_pod_cidr(&self, range: &IpNet) -> Result<(), String> {
        let (services, pods) = (self.config.service_cidr, self.config.pod_cidr);
        match range {
            IpNet::V4(range) if range.contains(&services) || services.contains(range) => {
                Err(format!("{range} overlaps service_cidr, {services}"))
            }
            IpNet::V4(range) if !pods.contains(range) => Err(format!("{range} is not within pod_cidr, {pods}")),
            IpNet::V4(_) => Ok(()),
            IpNet::V6(range) => {
                let blocks = UNICAST6.map(|(first, length)| Ipv6Net::new([first, 0, 0, 0, 0, 0, 0, 0].into(), length));
                if blocks.iter().flatten().any(|block| block.contains(range)) {
                    Ok(())
                } else {
                    Err(format!("{range} is not within fc00::/7 or 2000::/3"))
                }
            }
        }
    }

    /// Whether a pod of this node may have this address.
    ///
    /// # Errors
    /// Why not.
    pub fn check_pod_address(&self, node: &str, address: IpAddr) -> Result<(), String> {
        unicast_address(address)?;
        let nodes = self.cache.reader::<Node>();
        if let Some((range, holder)) = self.holdings.overlapping(&nodes, &IpNet::from(address)) {
            return if *holder == *node {
                Ok(())
            } else {
                Err(format!("lies in {range} of nodes/{holder}"))
            };
        }
        if let IpAddr::V4(address) = address {
            let (services, pods) = (self.config.service_cidr, self.config.pod_cidr);
            if services.contains(&address) {
                return Err(format!("lies in service_cidr, {services}"));
            }
            // A node whose record cannot be read has a range all the same.
            if pods.contains(&address) && self.holdings.has_range(&nodes, node) {
                return Err(format!("lies in pod_cidr, {pods}, but not in the node's part of it"));
            }
        }
        match self.node_at(address) {
            Some(holder) => Err(format!("is that of nodes/{holder}")),
            None => Ok(()),
        }
    }

    /// The node that has an address itself. What a node says of the cluster's own ranges does not count.
    fn node_at(&self, address: IpAddr) -> Option<std::sync::Arc<str>> {
        if let IpAddr::V4(address) = address
            && (self.config.pod_cidr.contains(&address) || self.config.service_cidr.contains(&address))
        {
            return None;
        }
        self.holdings.node_at(&self.cache.reader::<Node>(), address)
    }
}

fn ranges(node: &Node) -> &[String] {
    node.spec.as_ref().map_or(&[], |spec| &spec.pod_cidrs)
}
