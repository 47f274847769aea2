//! The slices of `default/kubernetes` as they should be. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
};

use orlop_proto::{
    Resource as _,
    discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    meta::v1::ObjectMeta,
};

use crate::controllers::endpoint_slices::plan::{MANAGED_BY, SERVICE_NAME, SliceWrite};

/// The service's namespace.
pub const NAMESPACE: &str = "default";
/// The service, and its first slice.
pub const SERVICE: &str = "kubernetes";
/// Who writes the slices.
const MANAGER: &str = "orlop-control";

/// Compares what there is with these addresses. The endpoints of a slice have one port: for every further port there is another
/// slice.
pub fn plan(addresses: &BTreeSet<SocketAddrV4>, existing: &[Arc<EndpointSlice>]) -> Vec<SliceWrite> {
    let mut by_port: BTreeMap<u16, Vec<Ipv4Addr>> = BTreeMap::new();
    for address in addresses {
        by_port.entry(address.port()).or_default().push(*address.ip());
    }
    let mut writes = Vec::new();
    let mut names = BTreeSet::new();
    for (index, (port, ips)) in by_port.into_iter().enumerate() {
        let name = if index == 0 {
            SERVICE.to_owned()
        } else {
            format!("{SERVICE}-{port}")
        };
        match existing.iter().find(|slice| slice.name() == name) {
            Some(old) => {
                let new = filled(EndpointSlice::clone(old), port, &ips);
                if new != **old {
                    writes.push(SliceWrite::Update(new));
                }
            }
            None => {
                let new = EndpointSlice {
                    metadata: Some(ObjectMeta {
                        name: name.clone(),
                        namespace: NAMESPACE.to_owned(),
                        ..ObjectMeta::default()
                    }),
                    address_type: "IPv4".to_owned(),
                    ..EndpointSlice::default()
                };
                writes.push(SliceWrite::Create(filled(new, port, &ips)));
            }
        }
        names.insert(name);
    }
    let ours = |slice: &EndpointSlice| {
        slice
            .meta()
            .labels
            .get(MANAGED_BY)
            .is_some_and(|manager| manager == MANAGER)
    };
    let left = existing
        .iter()
        .filter(|slice| ours(slice) && !names.contains(slice.name()));
    writes.extend(left.cloned().map(SliceWrite::Delete));
    writes
}

fn filled(mut slice: EndpointSlice, port: u16, ips: &[Ipv4Addr]) -> EndpointSlice {
    let labels = &mut slice.meta_mut().labels;
    labels.insert(SERVICE_NAME.to_owned(), SERVICE.to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    slice.ports = vec![EndpointPort {
        name: Some("https".to_owned()),
        protocol: Some("TCP".to_owned()),
        port: Some(port.into()),
    }];
    slice.endpoints = ips
        .iter()
        .map(|ip| Endpoint {
            addresses: vec![ip.to_string()],
            conditions: Some(EndpointConditions {
                ready: Some(true),
                serving: Some(true),
                terminating: Some(false),
            }),
            ..Endpoint::default()
        })
        .collect();
    slice
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(addresses: &[&str]) -> BTreeSet<SocketAddrV4> {
        addresses.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The slices after the writes.
    fn after(existing: &[Arc<EndpointSlice>], writes: Vec<SliceWrite>) -> Vec<Arc<EndpointSlice>> {
        let mut slices: BTreeMap<String, Arc<EndpointSlice>> = existing
            .iter()
            .map(|slice| (slice.name().to_owned(), slice.clone()))
            .collect();
        for write in writes {
            match write {
                SliceWrite::Create(slice) | SliceWrite::Update(slice) => {
                    slices.insert(slice.name().to_owned(), Arc::new(slice));
                }
                SliceWrite::Delete(slice) => {
                    slices.remove(slice.name());
                }
            }
        }
        slices.into_values().collect()
    }

    fn shown(slices: &[Arc<EndpointSlice>]) -> Vec<String> {
        let addresses = |slice: &EndpointSlice| {
            let port = slice.ports[0].port.unwrap_or_default();
            let ips: Vec<&str> = slice.endpoints.iter().map(|one| one.addresses[0].as_str()).collect();
            format!("{} {} {port}", slice.name(), ips.join(","))
        };
        slices.iter().map(|slice| addresses(slice)).collect()
    }

    #[test]
    fn slices_follow_the_addresses() {
        let steps: [(&[&str], &[&str]); 5] = [
            (&["192.0.2.1:6443"], &["kubernetes 192.0.2.1 6443"]),
            (
                &["192.0.2.1:6443", "192.0.2.2:6443"],
                &["kubernetes 192.0.2.1,192.0.2.2 6443"],
            ),
            (
                &["192.0.2.1:6443", "192.0.2.2:7443"],
                &["kubernetes 192.0.2.1 6443", "kubernetes-7443 192.0.2.2 7443"],
            ),
            (&["192.0.2.2:7443"], &["kubernetes 192.0.2.2 7443"]),
            (&[], &[]),
        ];
        let mut slices = Vec::new();
        for (addresses, expected) in steps {
            let addresses = set(addresses);
            slices = after(&slices, plan(&addresses, &slices));
            assert_eq!(shown(&slices), expected);
            assert!(plan(&addresses, &slices).is_empty(), "again: nothing to do");
        }
    }

    #[test]
    fn slices_of_others_stay() {
        let mut foreign = EndpointSlice::default();
        foreign.meta_mut().name = "kubernetes-mine".into();
        assert!(plan(&set(&[]), &[Arc::new(foreign)]).is_empty());
    }
}
