//! From Services and EndpointSlices to the compact records that nodes get. Pure; one change rebuilds one record.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use bytes::{BufMut, Bytes, BytesMut};
use imbl::OrdMap;
use orlop_proto::{
    Resource,
    core::v1::{Service, ServicePort},
    discovery::v1::{Endpoint, EndpointSlice},
    node::v1::{self as link, BackendState},
};
use prost::Message;

use crate::{cache::ObjectKey, model::endpoint_address};

/// The label by which a slice names its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// All records, and what they are made from.
#[derive(Debug, Default)]
pub struct ServiceIndex {
    services: HashMap<ObjectKey, Arc<Service>>,
    slices: HashMap<ObjectKey, BTreeMap<Arc<str>, Arc<EndpointSlice>>>,
    records: OrdMap<ObjectKey, Bytes>,
}

impl ServiceIndex {
    /// Every record, as the encoded `orlop.node.v1.Change` that carries it.
    pub fn records(&self) -> &OrdMap<ObjectKey, Bytes> {
        &self.records
    }

    /// A service is there, or differs. Returns its key; the record is rebuilt by [`ServiceIndex::rebuild`].
    pub fn put_service(&mut self, service: Arc<Service>) -> ObjectKey {
        let key = ObjectKey::of(&*service);
        self.services.insert(key.clone(), service);
        key
    }

    /// A service is gone.
    pub fn remove_service(&mut self, key: &ObjectKey) {
        self.services.remove(key);
    }

    /// A slice is there, or differs. Returns the key of its service, if it names one.
    pub fn put_slice(&mut self, slice: Arc<EndpointSlice>) -> Option<ObjectKey> {
        let key = service_of(&slice)?;
        let name: Arc<str> = slice.name().into();
        self.slices.entry(key.clone()).or_default().insert(name, slice);
        Some(key)
    }

    /// A slice is gone, or names another service now. Returns the key of the service that it named.
    pub fn remove_slice(&mut self, slice: &EndpointSlice) -> Option<ObjectKey> {
        let key = service_of(slice)?;
        if let Some(slices) = self.slices.get_mut(&key) {
            slices.remove(slice.name());
            if slices.is_empty() {
                self.slices.remove(&key);
            }
        }
        Some(key)
    }

    /// The names of all services that something is known of.
    pub fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.services.keys().chain(self.slices.keys())
    }

    /// Forgets all slices: they are read anew.
    pub fn clear_slices(&mut self) {
        self.slices.clear();
    }

    /// Forgets all services: they are read anew.
    pub fn clear_services(&mut self) {
        self.services.clear();
    }

    /// Rebuilds one record, or removes it when its service is gone. Whether that made a difference.
    pub fn rebuild(&mut self, key: &ObjectKey) -> bool {
        let Some(service) = self.services.get(key) else {
            return self.records.remove(key).is_some();
        };
        let slices = self
            .slices
            .get(key)
            .into_iter()
            .flat_map(BTreeMap::values)
            .map(|slice| &**slice);
        let change = encode(link::change::Change::Service(build_record(service, slices)));
        let differs = self.records.get(key) != Some(&change);
        if differs {
            self.records.insert(key.clone(), change);
        }
        differs
    }
}

/// The record of one service. Slices that are not IPv4, and ports that no slice has, add nothing.
pub fn build_record<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice> + Clone) -> link::Service {
    let meta = service.meta();
    let spec = service.spec.clone().unwrap_or_default();
    let addresses = addresses(&spec.cluster_ips, &spec.cluster_ip);
    let headless = addresses.is_empty();
    let ports = spec.ports.iter().filter_map(|port| {
        let protocol = protocol(&port.protocol)?;
        let backends = if headless {
            Bytes::new()
        } else {
            backends(port, slices.clone())
        };
        Some(link::ServicePort {
            name: port.name.clone(),
            protocol,
            port: u32::try_from(port.port).ok()?,
            backends_v4: backends,
        })
    });
    link::Service {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        addresses,
        ports: ports.collect(),
    }
}

fn addresses(cluster_ips: &[String], cluster_ip: &str) -> Vec<Bytes> {
    let first = if cluster_ips.is_empty() {
        std::slice::from_ref(&cluster_ip)
    } else {
        &[]
    };
    cluster_ips
        .iter()
        .map(String::as_str)
        .chain(first.iter().copied())
        .filter_map(|text| text.parse().ok())
        .map(|address| match address {
            IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
            IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
        })
        .collect()
}

fn protocol(name: &str) -> Option<u32> {
    match name {
        "" | "TCP" => Some(6),
        "UDP" => Some(17),
        _ => None,
    }
}

fn backends<'a>(port: &ServicePort, slices: impl Iterator<Item = &'a EndpointSlice>) -> Bytes {
    // Ordered and without duplicates; of two states of one address the better one counts.
    let mut found: BTreeMap<(Ipv4Addr, u16), BackendState> = BTreeMap::new();
    for slice in slices.filter(|slice| slice.address_type == "IPv4") {
        let ports: Vec<u16> = slice
            .ports
            .iter()
            .filter(|candidate| candidate.name.as_deref().unwrap_or_default() == port.name)
            .filter(|candidate| protocol(candidate.protocol.as_deref().unwrap_or_default()) == protocol(&port.protocol))
            .filter_map(|candidate| u16::try_from(candidate.port?).ok().filter(|port| *port != 0))
            .collect();
        for endpoint in &slice.endpoints {
            let (Some(state), Some(address)) = (state(endpoint), address(endpoint)) else {
                continue;
            };
            for port in &ports {
                let known = found.entry((address, *port)).or_insert(state);
                *known = (*known).min(state);
            }
        }
    }
    let mut packed = BytesMut::with_capacity(found.len() * 8);
    for ((address, port), state) in found {
        packed.put_slice(&address.octets());
        packed.put_u16(port);
        packed.put_u8(if state == BackendState::Ready { 1 } else { 2 });
        packed.put_u8(0);
    }
    packed.freeze()
}

fn state(endpoint: &Endpoint) -> Option<BackendState> {
    let conditions = endpoint.conditions.unwrap_or_default();
    if conditions.ready.unwrap_or(true) {
        Some(BackendState::Ready)
    } else if conditions.serving.unwrap_or(true) && conditions.terminating.unwrap_or(false) {
        Some(BackendState::ServingTerminating)
    } else {
        None
    }
}

/// An address that traffic can be sent to. Slices may have been written before validation refused what leads a client to what only
/// the node itself may reach.
fn address(endpoint: &Endpoint) -> Option<Ipv4Addr> {
    endpoint_address(endpoint.addresses.first()?).ok()
}

fn service_of(slice: &EndpointSlice) -> Option<ObjectKey> {
    let name = slice.meta().labels.get(SERVICE_NAME)?;
    Some(ObjectKey::new(slice.namespace(), name))
}

/// A change as Updates carry it.
pub(super) fn encode(change: link::change::Change) -> Bytes {
    link::Change { change: Some(change) }.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    use orlop_proto::{
        core::v1::ServiceSpec,
        discovery::v1::{EndpointConditions, EndpointPort},
        meta::v1::ObjectMeta,
    };

    use super::*;

    fn service(name: &str, address: &str, ports: &[(&str, &str, i32)]) -> Arc<Service> {
        let ports = ports.iter().map(|(name, protocol, port)| ServicePort {
            name: (*name).into(),
            protocol: (*protocol).into(),
            port: *port,
            target_port: None,
        });
        Arc::new(Service {
            metadata: Some(ObjectMeta {
                name: name.into(),
                namespace: "default".into(),
                ..Default::default()
            }),
            spec: Some(ServiceSpec {
                ports: ports.collect(),
                cluster_ip: address.into(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// Address, ready, serving, terminating.
    type Case<'a> = (&'a str, Option<bool>, Option<bool>, Option<bool>);

    fn slice(name: &str, service: &str, ports: &[(&str, &str, i32)], endpoints: &[Case<'_>]) -> Arc<EndpointSlice> {
        let labels = [(SERVICE_NAME.to_owned(), service.to_owned())].into();
        Arc::new(EndpointSlice {
            metadata: Some(ObjectMeta {
                name: name.into(),
                namespace: "default".into(),
                labels,
                ..Default::default()
            }),
            address_type: "IPv4".into(),
            endpoints: endpoints
                .iter()
                .map(|(address, ready, serving, terminating)| Endpoint {
                    addresses: vec![(*address).into()],
                    conditions: Some(EndpointConditions {
                        ready: *ready,
                        serving: *serving,
                        terminating: *terminating,
                    }),
                    ..Default::default()
                })
                .collect(),
            ports: ports
                .iter()
                .map(|(name, protocol, port)| EndpointPort {
                    name: Some((*name).into()),
                    protocol: Some((*protocol).into()),
                    port: Some(*port),
                })
                .collect(),
            ..Default::default()
        })
    }

    /// "address:port/state" of every backend.
    fn unpack(port: &link::ServicePort) -> Vec<String> {
        port.backends_v4
            .chunks(8)
            .map(|slot| {
                let port = u16::from_be_bytes([slot[4], slot[5]]);
                assert_eq!(slot[7], 0);
                format!("{}.{}.{}.{}:{port}/{}", slot[0], slot[1], slot[2], slot[3], slot[6])
            })
            .collect()
    }

    const READY: (Option<bool>, Option<bool>, Option<bool>) = (Some(true), Some(true), Some(false));

    fn endpoint(address: &str) -> Case<'_> {
        (address, READY.0, READY.1, READY.2)
    }

    #[test]
    fn ports_are_joined_by_name_and_protocol() {
        let service = service(
            "web",
            "10.96.0.7",
            &[("http", "TCP", 80), ("dns", "TCP", 53), ("dns", "UDP", 53)],
        );
        let slice = slice(
            "web-1",
            "web",
            &[("http", "TCP", 8080), ("dns", "UDP", 5353), ("other", "TCP", 1)],
            &[endpoint("10.244.0.9"), endpoint("10.244.0.10")],
        );
        let record = build_record(&service, [&*slice].into_iter());
        assert_eq!(record.addresses, [Bytes::from_static(&[10, 96, 0, 7])]);
        assert_eq!(
            record.ports.iter().map(|port| port.protocol).collect::<Vec<_>>(),
            [6, 6, 17]
        );
        assert_eq!(unpack(&record.ports[0]), ["10.244.0.9:8080/1", "10.244.0.10:8080/1"]);
        assert!(record.ports[1].backends_v4.is_empty());
        assert_eq!(unpack(&record.ports[2]), ["10.244.0.9:5353/1", "10.244.0.10:5353/1"]);
    }

    #[test]
    fn states_duplicates_and_addresses_that_are_refused() {
        let service = service("web", "10.96.0.7", &[("", "TCP", 80)]);
        let first = slice(
            "a",
            "web",
            &[("", "TCP", 8080)],
            &[
                ("10.244.0.3", Some(false), Some(true), Some(true)),
                ("10.244.0.2", Some(false), Some(true), Some(true)),
                ("10.244.0.4", Some(false), Some(false), Some(true)),
                ("10.244.0.5", Some(false), Some(true), Some(false)),
                ("10.244.0.6", None, None, None),
                ("127.0.0.1", None, None, None),
                ("169.254.169.254", None, None, None),
                ("0.0.0.0", None, None, None),
                ("fd00::1", None, None, None),
                ("garbage", None, None, None),
            ],
        );
        let second = slice("b", "web", &[("", "TCP", 8080)], &[endpoint("10.244.0.2")]);
        let record = build_record(&service, [&*first, &*second].into_iter());
        assert_eq!(
            unpack(&record.ports[0]),
            ["10.244.0.2:8080/1", "10.244.0.3:8080/2", "10.244.0.6:8080/1"]
        );
    }

    #[test]
    fn a_headless_service_has_no_address_and_no_backends() {
        let service = service("db", "None", &[("", "TCP", 5432)]);
        let slice = slice("db-1", "db", &[("", "TCP", 5432)], &[endpoint("10.244.0.2")]);
        let record = build_record(&service, [&*slice].into_iter());
        assert!(record.addresses.is_empty());
        assert_eq!(record.ports.len(), 1);
        assert!(record.ports[0].backends_v4.is_empty());
    }

    fn record(index: &ServiceIndex, key: &ObjectKey) -> link::Service {
        match link::Change::decode(index.records()[key].clone()).unwrap().change {
            Some(link::change::Change::Service(record)) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_change_rebuilds_one_record_and_only_differences_count() {
        let mut index = ServiceIndex::default();
        let web = index.put_service(service("web", "10.96.0.7", &[("", "TCP", 80)]));
        let other = index.put_service(service("other", "10.96.0.8", &[("", "TCP", 80)]));
        assert!(index.rebuild(&web));
        assert!(index.rebuild(&other));
        assert!(!index.rebuild(&web));
        let with_one = slice("web-1", "web", &[("", "TCP", 8080)], &[endpoint("10.244.0.2")]);
        assert_eq!(index.put_slice(with_one.clone()), Some(web.clone()));
        assert!(index.rebuild(&web));
        assert_eq!(unpack(&record(&index, &web).ports[0]), ["10.244.0.2:8080/1"]);
        assert_eq!(index.remove_slice(&with_one), Some(web.clone()));
        assert!(index.rebuild(&web));
        assert!(record(&index, &web).ports[0].backends_v4.is_empty());
        index.remove_service(&web);
        assert!(index.rebuild(&web));
        assert!(!index.rebuild(&web));
        assert_eq!(index.records().keys().collect::<Vec<_>>(), [&other]);
    }

    #[test]
    fn slices_that_come_before_their_service_are_not_lost() {
        let mut index = ServiceIndex::default();
        let key = index
            .put_slice(slice("web-1", "web", &[("", "TCP", 8080)], &[endpoint("10.244.0.2")]))
            .unwrap();
        assert!(!index.rebuild(&key));
        index.put_service(service("web", "10.96.0.7", &[("", "TCP", 80)]));
        assert!(index.rebuild(&key));
        assert_eq!(unpack(&record(&index, &key).ports[0]).len(), 1);
    }
}
