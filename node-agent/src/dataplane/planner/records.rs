//! Reads service records: which frontends they claim, and with which backends.

use orlop_ebpf_abi::{FrontendKey, Protocol, Scope, SlotState, selection};
use orlop_proto::node::v1 as link;

/// The frontends that a service claims: every IPv4 ClusterIP with every TCP and UDP port.
pub fn frontends_of(service: &link::Service) -> impl Iterator<Item = FrontendKey> {
    service
        .addresses
        .iter()
        .filter_map(|bytes| <[u8; 4]>::try_from(&bytes[..]).ok())
        .flat_map(|address| {
            service.ports.iter().filter_map(move |port| {
                let protocol = Protocol::from_number(port.protocol)?;
                let port = u16::try_from(port.port).ok().filter(|port| *port != 0)?;
                Some(FrontendKey {
                    address,
                    port,
                    protocol,
                    scope: Scope::Cluster,
                })
            })
        })
}

/// The port of a service that a frontend belongs to.
#[must_use]
pub fn port_of<'a>(service: &'a link::Service, key: &FrontendKey) -> Option<&'a link::ServicePort> {
    service
        .ports
        .iter()
        .find(|port| port.protocol == key.protocol as u32 && port.port == u32::from(key.port))
}

/// The backends of a service at a frontend: ready ones first, each part in the order of [`selection::order`].
#[must_use]
pub fn backends_of(service: &link::Service, key: &FrontendKey) -> Vec<([u8; 4], u16, SlotState)> {
    let mut backends = Vec::new();
    read_backends(service, key, &mut backends);
    backends
}

/// The same, in the place of what is in `backends`.
pub fn read_backends(service: &link::Service, key: &FrontendKey, backends: &mut Vec<([u8; 4], u16, SlotState)>) {
    let packed = port_of(service, key).map_or(&[][..], |port| &port.backends_v4);
    backends.clear();
    backends.extend(packed.chunks_exact(8).filter_map(|bytes| {
        let address = [bytes[0], bytes[1], bytes[2], bytes[3]];
        let port = u16::from_be_bytes([bytes[4], bytes[5]]);
        let state = match link::BackendState::try_from(i32::from(bytes[6])) {
            Ok(link::BackendState::Ready) => SlotState::Ready,
            Ok(link::BackendState::ServingTerminating) => SlotState::Terminating,
            _ => return None,
        };
        (port != 0 && may_be_a_backend(address)).then_some((address, port, state))
    }));
    backends.sort_by_key(|(address, port, state)| (selection::order(*address, *port), *state));
    backends.dedup_by_key(|(address, port, _)| selection::order(*address, *port));
    backends.sort_by_key(|(_, _, state)| *state);
}

/// Control refuses such endpoints; here is the last place to.
fn may_be_a_backend(address: [u8; 4]) -> bool {
    let address = std::net::Ipv4Addr::from(address);
    !(address.is_loopback()
        || address.is_link_local()
        || address.is_unspecified()
        || address.is_multicast()
        || address.is_broadcast())
}

/// FNV-1a over the service's uid and the port; never 0.
pub fn owner(service: &link::Service, key: &FrontendKey) -> u32 {
    let port = key.port.to_be_bytes();
    let tail = [port[0], port[1], key.protocol as u8];
    let hash = service.uid.bytes().chain(tail).fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    hash.max(1)
}
