//! Links, addresses and routes of one namespace through netlink.

use std::{
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::RawFd,
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressScope},
    link::{
        BridgePortState, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVeth, LinkAttribute, LinkFlags,
        LinkInfo, LinkMessage, State,
    },
    route::{RouteAddress, RouteAttribute},
};
use rtnetlink::{
    Error, Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use crate::{
    error::{Failure, code},
    result::Route,
};

/// A netlink socket of the namespace that the opening thread was in.
#[derive(Debug, Clone)]
pub struct Net {
    handle: Handle,
}

/// What is of interest of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// In bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// It takes every frame.
    pub promiscuous: bool,
    /// It is a bridge.
    pub bridge: bool,
    /// The bridge that it is a port of.
    pub controller: Option<u32>,
    /// As a port: frames go back where they came from.
    pub hairpin: bool,
    /// As a port: frames pass.
    pub forwarding: bool,
}

/// What a veth is made with.
#[derive(Debug)]
pub struct Veth<'a> {
    /// The host's end.
    pub host_name: &'a str,
    /// Its hardware address.
    pub host_mac: [u8; 6],
    /// The container's end.
    pub name: &'a str,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The container's namespace.
    pub netns: RawFd,
    /// Of both ends; 0 for the kernel's.
    pub mtu: u32,
    /// The index of the bridge that the host's end is a port of.
    pub bridge: u32,
}

impl Net {
    /// Must be called within a tokio runtime.
    pub fn open() -> Result<Self, Failure> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|e| Failure::io("opening a netlink socket", &e))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The link of that name.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, Failure> {
        let mut found = self.handle.link().get().match_name(name).execute();
        match found.try_next().await {
            Ok(message) => Ok(message.map(|m| Link::from(&m))),
            Err(error) if errno(&error) == libc::ENODEV => Ok(None),
            Err(error) => Err(Failure::netlink(format!("looking for link {name}"), &error)),
        }
    }

    /// All links.
    pub async fn links(&self) -> Result<Vec<Link>, Failure> {
        let all: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| Failure::netlink("listing links", &e))?;
        Ok(all.iter().map(Link::from).collect())
    }

    /// Makes the bridge unless it is there, and brings it up.
    pub async fn ensure_bridge(&self, name: &str, mtu: u32, promiscuous: bool) -> Result<Link, Failure> {
        let failed = |what: &str, e: &Error| Failure::netlink(format!("{what} bridge {name}"), e);
        let mut found = self.link(name).await?;
        if found.is_none() {
            // Without an address of its own a bridge takes the lowest of its ports', which changes as pods come and go,
            // and with it the gateway's entry in every pod's neighbour cache.
            let mut message = LinkBridge::new(name).address(random_mac()?.to_vec()).up();
            if mtu != 0 {
                message = message.mtu(mtu);
            }
            match self.handle.link().add(message.build()).execute().await {
                // Another call was faster.
                Err(error) if errno(&error) != libc::EEXIST => return Err(failed("making", &error)),
                _ => found = self.link(name).await?,
            }
        }
        let Some(mut link) = found else {
            return Err(Failure::new(
                code::TRY_AGAIN,
                format!("bridge {name} vanished while it was made"),
            ));
        };
        if !link.bridge {
            return Err(Failure::new(
                code::INVALID_CONFIG,
                format!("{name} is there and is not a bridge"),
            ));
        }
        let resize = mtu != 0 && link.mtu != mtu;
        if !link.up || resize || (promiscuous && !link.promiscuous) {
            let mut message = LinkUnspec::new_with_index(link.index).up();
            if resize {
                message = message.mtu(mtu);
                link.mtu = mtu;
            }
            if promiscuous {
                message = message.promiscuous(true);
            }
            self.handle
                .link()
                .set(message.build())
                .execute()
                .await
                .map_err(|e| failed("setting up", &e))?;
            link.up = true;
        }
        Ok(link)
    }

    /// Makes a veth, its one end up and a port of the bridge, the other in the container's namespace and down: one request,
    /// so there is never half of it. `false` when the host's name is taken.
    pub async fn create_veth(&self, veth: &Veth<'_>) -> Result<bool, Failure> {
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(veth.name)
            .address(veth.mac.to_vec())
            .setns_by_fd(veth.netns);
        let mut host = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(veth.host_name)
            .address(veth.host_mac.to_vec())
            .controller(veth.bridge)
            .up();
        if veth.mtu != 0 {
            peer = peer.mtu(veth.mtu);
            host = host.mtu(veth.mtu);
        }
        let host = host.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
        match self.handle.link().add(host.build()).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == libc::EEXIST => Ok(false),
            Err(error) => Err(Failure::netlink(
                format!("making veth {} of {}", veth.name, veth.host_name),
                &error,
            )),
        }
    }

    /// Settings of a bridge's port.
    pub async fn set_port(&self, index: u32, hairpin: bool, isolated: bool) -> Result<(), Failure> {
        let mut message = LinkBridgePort::new(index);
        if hairpin {
            message = message.hairpin(true);
        }
        if isolated {
            message = message.append_info_data(InfoBridgePort::Isolated(true));
        }
        let request = self.handle.link().set_port(message.build());
        request
            .execute()
            .await
            .map_err(|e| Failure::netlink("setting the bridge's port", &e))
    }

    /// Brings a link up.
    pub async fn set_up(&self, index: u32) -> Result<(), Failure> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|e| Failure::netlink("bringing the link up", &e))
    }

    /// Sets the hardware address.
    pub async fn set_mac(&self, index: u32, mac: &[u8]) -> Result<(), Failure> {
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec()).build();
        let request = self.handle.link().set(message);
        request
            .execute()
            .await
            .map_err(|e| Failure::netlink("setting the hardware address", &e))
    }

    /// Removes a link by name; a success when it is gone.
    pub async fn delete(&self, name: &str) -> Result<(), Failure> {
        let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        match self.handle.link().del_with_message(message).execute().await {
            Err(error) if errno(&error) != libc::ENODEV => {
                Err(Failure::netlink(format!("removing link {name}"), &error))
            }
            _ => Ok(()),
        }
    }

    /// The link's addresses, without the link-local ones.
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, Failure> {
        let all: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(|e| Failure::netlink("listing addresses", &e))?;
        let of_link = all
            .into_iter()
            .filter(|m| m.header.index == index && m.header.scope != AddressScope::Link);
        let net = |m: netlink_packet_route::address::AddressMessage| {
            let local = m.attributes.iter().find_map(|a| {
                if let AddressAttribute::Local(ip) = a {
                    Some(*ip)
                } else {
                    None
                }
            });
            let address = m.attributes.iter().find_map(|a| {
                if let AddressAttribute::Address(ip) = a {
                    Some(*ip)
                } else {
                    None
                }
            });
            IpNet::new(local.or(address)?, m.header.prefix_len).ok()
        };
        Ok(of_link.filter_map(net).collect())
    }

    /// Adds an address; a success when it is there.
    pub async fn add_address(&self, index: u32, net: IpNet) -> Result<(), Failure> {
        let mut request = self.handle.address().add(index, net.addr(), net.prefix_len());
        if net.addr().is_ipv6() {
            // The address is ours alone by its lease: no second of waiting for duplicates.
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        match request.execute().await {
            Err(error) if errno(&error) != libc::EEXIST => {
                Err(Failure::netlink(format!("adding address {net}"), &error))
            }
            _ => Ok(()),
        }
    }

    /// Removes an address; a success when it is gone.
    pub async fn delete_address(&self, index: u32, net: IpNet) -> Result<(), Failure> {
        // The request's builder makes the same message for an addition.
        let message = self
            .handle
            .address()
            .add(index, net.addr(), net.prefix_len())
            .message_mut()
            .clone();
        match self.handle.address().del(message).execute().await {
            Err(error) if errno(&error) != libc::EADDRNOTAVAIL => {
                Err(Failure::netlink(format!("removing address {net}"), &error))
            }
            _ => Ok(()),
        }
    }

    /// Adds a route; a success when one is there already: the first wins.
    pub async fn add_route(&self, index: u32, route: &Route) -> Result<(), Failure> {
        let failed =
            |why: &dyn std::fmt::Display| Failure::new(code::NETLINK, format!("route to {}", route.dst)).with(why);
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(route.dst.network(), route.dst.prefix_len())
            .map_err(|e| failed(&e))?
            .output_interface(index);
        if let Some(gateway) = route.gw {
            builder = builder.gateway(gateway).map_err(|e| failed(&e))?;
        }
        match self.handle.route().add(builder.build()).execute().await {
            Err(error) if errno(&error) != libc::EEXIST => Err(failed(&error)),
            _ => Ok(()),
        }
    }

    /// Whether the namespace's main table has the route through the link.
    pub async fn has_route(&self, index: u32, route: &Route) -> Result<bool, Failure> {
        // With a destination the kernel would look one route up instead of listing them.
        let any = match route.dst {
            IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let all: Vec<_> = self
            .handle
            .route()
            .get(any)
            .execute()
            .try_collect()
            .await
            .map_err(|e| Failure::netlink("listing routes", &e))?;
        Ok(all.iter().any(|message| {
            let has = |wanted: RouteAttribute| message.attributes.contains(&wanted);
            let destination = RouteAddress::from(route.dst.network());
            message.header.destination_prefix_length == route.dst.prefix_len()
                && (route.dst.prefix_len() == 0 || has(RouteAttribute::Destination(destination)))
                && has(RouteAttribute::Oif(index))
                && route.gw.is_none_or(|gw| has(RouteAttribute::Gateway(gw.into())))
        }))
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            promiscuous: flags.contains(LinkFlags::Promisc),
            ..Self::default()
        };
        let mut running = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac.clone_from(mac),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::OperState(state) => running = *state == State::Up,
                LinkAttribute::LinkInfo(infos) => link.read_info(infos),
                _ => {}
            }
        }
        link.forwarding &= running;
        link
    }
}

impl Link {
    fn read_info(&mut self, infos: &[LinkInfo]) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.bridge = *kind == InfoKind::Bridge,
                LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                    self.hairpin = port.contains(&InfoBridgePort::HairpinMode(true));
                    self.forwarding = port.contains(&InfoBridgePort::State(BridgePortState::Forwarding));
                }
                _ => {}
            }
        }
    }
}

/// The kernel's error number, or 0 where it was not the kernel.
fn errno(error: &Error) -> i32 {
    if let Error::NetlinkError(message) = error {
        -message.raw_code()
    } else {
        0
    }
}

fn random_mac() -> Result<[u8; 6], Failure> {
    let mut mac = [0; 6];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut mac))
        .map_err(|e| Failure::io("reading /dev/urandom", &e))?;
    mac[0] = (mac[0] | 0x02) & !0x01;
    Ok(mac)
}
