//! Routes to the other nodes' pods, forwarding, and the uplink's MTU.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{StreamExt, TryStreamExt};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    link::LinkAttribute,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{NetworkError, Stale};

/// Marks our routes (`ip route show proto 79`): they are found again after a restart, and others' are never touched.
const PROTOCOL: u8 = 79;
/// The range that is not a node's loses against every other route to the same destination.
const UNREACHABLE_PRIORITY: u32 = u32::MAX - 1;
const DEFAULT_MTU: u32 = 1500;

/// Where a range's packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// To the node that has it.
    Via(IpAddr),
    /// Nowhere: the part of the cluster's range that no node has. Without it such packets would leave by the default route.
    Unreachable,
}

/// Sets `wanted` among our routes in the main table, and keeps or removes the `stale` ones. Goes on after a route that cannot be set, and gives all errors.
pub async fn sync_routes(wanted: &BTreeMap<IpNet, Target>, stale: Stale) -> Result<(), NetworkError> {
    let handle = connect()?;
    let mut present: BTreeMap<IpNet, Vec<RouteMessage>> = BTreeMap::new();
    for any in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let routes: Vec<RouteMessage> = handle.route().get(any).execute().try_collect().await.map_err(netlink)?;
        for route in routes
            .into_iter()
            .filter(|r| r.header.protocol == RouteProtocol::Other(PROTOCOL))
        {
            if let Some(destination) = destination(&route) {
                present.entry(destination).or_default().push(route);
            }
        }
    }
    let mut errors = Vec::new();
    for (destination, target) in wanted {
        let found = present.remove(destination).unwrap_or_default();
        let (right, wrong): (Vec<_>, Vec<_>) = found.into_iter().partition(|route| leads_to(route, *target));
        if right.is_empty() {
            // Before the old one goes: a changed route is never missing for a moment.
            let message = route_to(*destination, *target);
            if let Err(e) = handle.route().add(message).replace().execute().await {
                errors.push(NetworkError::Netlink(format!("route to {destination} {target:?}: {e}")));
                continue;
            }
        }
        for old in wrong {
            // Replaced already, unless its metric was another.
            handle.route().del(old).execute().await.ok();
        }
    }
    for (destination, left) in present.into_iter().filter(|_| stale == Stale::Removed) {
        for route in left {
            if let Err(e) = handle.route().del(route).execute().await {
                errors.push(NetworkError::Netlink(format!(
                    "removing the route to {destination}: {e}"
                )));
            }
        }
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(NetworkError::Several(errors))
    }
}

/// Switches forwarding on for the families of the node's ranges.
pub fn enable_forwarding(ranges: &[IpNet]) -> Result<(), NetworkError> {
    let families: BTreeSet<bool> = ranges.iter().map(|net| net.addr().is_ipv4()).collect();
    for v4 in families {
        let path = if v4 {
            "/proc/sys/net/ipv4/ip_forward"
        } else {
            "/proc/sys/net/ipv6/conf/all/forwarding"
        };
        // A read-only /proc/sys that says yes already is fine.
        if fs::read_to_string(path).is_ok_and(|value| value.trim() == "1") {
            continue;
        }
        fs::write(path, "1").map_err(|source| NetworkError::File {
            path: path.into(),
            source,
        })?;
    }
    Ok(())
}

/// The MTU of the interface that has the node's address, else of the one with the default route, else 1500.
pub async fn uplink_mtu(node_address: Option<IpAddr>) -> Result<u32, NetworkError> {
    let handle = connect()?;
    let by_address = match node_address {
        Some(address) => interface_of(&handle, address).await?,
        None => None,
    };
    let index = match by_address {
        Some(index) => Some(index),
        None => default_interface(&handle).await?,
    };
    let Some(index) = index else { return Ok(DEFAULT_MTU) };
    let link = handle
        .link()
        .get()
        .match_index(index)
        .execute()
        .try_next()
        .await
        .map_err(netlink)?;
    let attributes = link.map(|link| link.attributes).unwrap_or_default();
    let mtu = attributes.iter().find_map(|a| {
        if let LinkAttribute::Mtu(mtu) = a {
            Some(*mtu)
        } else {
            None
        }
    });
    // The loopback's 65536 is more than a veth takes; a node that is reached through it is a test's.
    Ok(mtu.filter(|mtu| *mtu < 65536).unwrap_or(DEFAULT_MTU))
}

async fn interface_of(handle: &Handle, address: IpAddr) -> Result<Option<u32>, NetworkError> {
    let all: Vec<AddressMessage> = handle.address().get().execute().try_collect().await.map_err(netlink)?;
    let has = |message: &AddressMessage| {
        message
            .attributes
            .iter()
            .any(|a| matches!(a, AddressAttribute::Local(ip) | AddressAttribute::Address(ip) if *ip == address))
    };
    Ok(all
        .iter()
        .find(|message| has(message))
        .map(|message| message.header.index))
}

async fn default_interface(handle: &Handle) -> Result<Option<u32>, NetworkError> {
    for any in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let mut routes = handle.route().get(any).execute();
        while let Some(route) = routes.next().await {
            let route = route.map_err(netlink)?;
            if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
                continue;
            }
            let interface = route
                .attributes
                .iter()
                .find_map(|a| if let RouteAttribute::Oif(i) = a { Some(*i) } else { None });
            if interface.is_some() {
                return Ok(interface);
            }
        }
    }
    Ok(None)
}

fn route_to(destination: IpNet, target: Target) -> RouteMessage {
    let mut message = match destination {
        IpNet::V4(net) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .build(),
        IpNet::V6(net) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .build(),
    };
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    match target {
        Target::Via(gateway) => message.attributes.push(RouteAttribute::Gateway(gateway.into())),
        Target::Unreachable => {
            message.header.kind = RouteType::Unreachable;
            message.attributes.push(RouteAttribute::Priority(UNREACHABLE_PRIORITY));
        }
    }
    message
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    let address = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    match address {
        Some(address) => IpNet::new(address, length).ok(),
        None if route.header.address_family == AddressFamily::Inet => Some(Ipv4Net::default().into()),
        None => Some(Ipv6Net::default().into()),
    }
}

fn leads_to(route: &RouteMessage, target: Target) -> bool {
    match target {
        Target::Via(gateway) => {
            route.header.kind == RouteType::Unicast
                && route.attributes.contains(&RouteAttribute::Gateway(gateway.into()))
        }
        Target::Unreachable => route.header.kind == RouteType::Unreachable,
    }
}

fn connect() -> Result<Handle, NetworkError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|e| NetworkError::Netlink(format!("opening a socket: {e}")))?;
    // Ends when the handle is dropped.
    tokio::spawn(connection);
    Ok(handle)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn netlink(error: rtnetlink::Error) -> NetworkError {
    NetworkError::Netlink(error.to_string())
}
