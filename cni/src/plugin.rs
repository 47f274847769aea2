//! The verbs; CHECK is in [`crate::check`].

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    config::{Config, Ipam},
    delegate,
    error::{Failure, code},
    ipam::{self, Leases},
    link::{Link, Net, Veth},
    names,
    netns::{self, Namespaces},
    request::{Attachment, Env},
    result::{CniResult, Interface, Ip, Route, mac_text},
    unlink,
};

/// How long the bridge may take to let the new port's frames pass. It takes a millisecond.
const FORWARDING_PATIENCE: Duration = Duration::from_secs(2);

/// Wires the container. What a failed call did is undone before it returns.
pub async fn add(config: &Config, at: &Attachment, env: &Env) -> Result<CniResult, Failure> {
    let namespaces = Namespaces::open(&at.netns)?;
    namespaces.turn().await?;
    let host = Net::open()?;
    let inside = namespaces.inside(Net::open)??;
    if inside.link(&at.ifname).await?.is_some() {
        let msg = format!("container {} has an interface {} already", at.container_id, at.ifname);
        return Err(Failure::new(code::ALREADY_ADDED, msg));
    }
    let mut done = Done::default();
    let wiring = Wiring {
        env,
        config,
        at,
        namespaces: &namespaces,
        host: &host,
        inside: &inside,
    };
    match wiring.run(&mut done).await {
        Ok(result) => Ok(result.after(config.prev_result.clone())),
        Err(failure) => Err(undo(&wiring, &done, failure).await),
    }
}

/// Unwires the container. Everything may be gone already, the namespace too.
pub async fn del(config: &Config, at: &Attachment, env: &Env) -> Result<(), Failure> {
    let _turn = netns::turn_if_there(&at.netns).await?;
    // The link first: an address is free only when nobody has it any more. With one end of a veth both go.
    unlink::remove(&names::host_interface(&config.name, &at.container_id, &at.ifname))?;
    match &config.ipam {
        Ipam::None => Ok(()),
        Ipam::Orlop(ipam) => Leases::open(ipam, &config.name)?.release(&at.container_id, &at.ifname),
        Ipam::Foreign(plugin) => delegate::silent(plugin, "DEL", config, env).await,
    }
}

/// Whether ADD can be served. A full range does not count: the node is well, and other pods' ends make room.
pub async fn status(config: &Config, env: &Env) -> Result<(), Failure> {
    let unavailable = |f: Failure| Failure {
        code: code::NOT_AVAILABLE,
        ..f
    };
    match &config.ipam {
        Ipam::None => {}
        Ipam::Orlop(ipam) => {
            ipam::check(ipam)?;
            Leases::open(ipam, &config.name).map_err(unavailable)?;
        }
        Ipam::Foreign(plugin) => delegate::silent(plugin, "STATUS", config, env).await?,
    }
    match Net::open()?.link(&config.bridge.name).await? {
        Some(link) if !link.bridge => {
            let msg = format!("{} is there and is not a bridge", link.name);
            Err(Failure::new(code::NOT_AVAILABLE, msg))
        }
        _ => Ok(()),
    }
}

/// Clears this network's veths and leases that are not of a valid attachment.
pub async fn gc(config: &Config, env: &Env) -> Result<(), Failure> {
    let Some(valid) = &config.valid_attachments else {
        // To take a missing list for an empty one would unwire every container. cnitool sends none: it calls DEL for what it
        // added, and nothing more is known to be garbage.
        return Ok(());
    };
    let name = |(id, ifname): &(String, String)| names::host_interface(&config.name, id, ifname);
    let keep: BTreeSet<String> = valid.iter().map(name).collect();
    let prefix = names::host_prefix(&config.name);
    let host = Net::open()?;
    for link in host.links().await? {
        if link.name.len() == 15 && link.name.starts_with(&prefix) && !keep.contains(&link.name) {
            host.delete(&link.name).await?;
        }
    }
    match &config.ipam {
        Ipam::None => Ok(()),
        Ipam::Orlop(ipam) => Leases::open(ipam, &config.name)?.retain(|id, ifname| {
            valid
                .iter()
                .any(|(valid_id, valid_name)| id == valid_id && ifname == valid_name)
        }),
        Ipam::Foreign(plugin) => delegate::silent(plugin, "GC", config, env).await,
    }
}

/// What an ADD has done so far, for it to be undone.
#[derive(Debug, Default)]
struct Done {
    leased: bool,
    veth: Option<String>,
}

struct Wiring<'a> {
    env: &'a Env,
    config: &'a Config,
    at: &'a Attachment,
    namespaces: &'a Namespaces,
    host: &'a Net,
    inside: &'a Net,
}

impl Wiring<'_> {
    async fn run(&self, done: &mut Done) -> Result<CniResult, Failure> {
        let bridge_config = &self.config.bridge;
        let bridge = self
            .host
            .ensure_bridge(&bridge_config.name, bridge_config.mtu, bridge_config.promisc_mode)
            .await?;
        let mut given = self.lease(done).await?;
        if bridge_config.is_gateway {
            self.make_gateway(&bridge, &mut given).await?;
        }
        let host_end = self.veth(&bridge, done).await?;
        let container_end = self.configure(&given).await?;
        let mut addresses = given.ips;
        for ip in &mut addresses {
            ip.interface = Some(2);
        }
        self.announce(&host_end, &container_end, &addresses).await?;
        let named = |link: &Link, sandbox: String| Interface {
            name: link.name.clone(),
            mac: mac_text(&link.mac),
            mtu: Some(link.mtu),
            sandbox,
            ..Interface::default()
        };
        let sandbox = self.at.netns.to_string_lossy().into_owned();
        let dns = if self.config.dns == crate::result::Dns::default() {
            given.dns
        } else {
            self.config.dns.clone()
        };
        Ok(CniResult {
            interfaces: vec![
                named(&bridge, String::new()),
                named(&host_end, String::new()),
                named(&container_end, sandbox),
            ],
            ips: addresses,
            routes: given.routes,
            dns,
        })
    }

    /// Addresses and routes, without interfaces.
    async fn lease(&self, done: &mut Done) -> Result<CniResult, Failure> {
        match &self.config.ipam {
            Ipam::None => Ok(CniResult::default()),
            Ipam::Orlop(ipam) => {
                let (id, ifname) = (&self.at.container_id, &self.at.ifname);
                let mut leases = Leases::open(ipam, &self.config.name)?;
                let reservation = leases.reserve(ipam, id, ifname, &self.config.requested)?;
                done.leased = reservation.fresh;
                Ok(CniResult {
                    ips: reservation.ips,
                    routes: ipam.routes.clone(),
                    ..CniResult::default()
                })
            }
            Ipam::Foreign(plugin) => {
                let given = delegate::add(plugin, self.config, self.env).await?;
                done.leased = true;
                Ok(CniResult {
                    interfaces: Vec::new(),
                    ..given
                })
            }
        }
    }

    /// The bridge gets the gateways' addresses; with `isDefaultGateway` pods get default routes.
    async fn make_gateway(&self, bridge: &Link, given: &mut CniResult) -> Result<(), Failure> {
        for ip in &mut given.ips {
            ip.gateway = ip.gateway.or_else(|| first_host(ip.address));
        }
        for gateway in ipam::gateways(&given.ips) {
            self.ensure_gateway(bridge, gateway).await?;
        }
        if !self.config.bridge.is_default_gateway {
            return Ok(());
        }
        for ip in &given.ips {
            let default: IpNet = if ip.address.addr().is_ipv4() {
                Ipv4Net::default().into()
            } else {
                Ipv6Net::default().into()
            };
            if !given.routes.iter().any(|route| route.dst == default) {
                given.routes.push(Route {
                    dst: default,
                    gw: ip.gateway,
                });
            }
        }
        Ok(())
    }

    async fn ensure_gateway(&self, bridge: &Link, gateway: IpNet) -> Result<(), Failure> {
        let present = self.host.addresses(bridge.index).await?;
        if present.contains(&gateway) {
            return Ok(());
        }
        // A set may have several ranges of a family, and each has its gateway.
        let ours = match &self.config.ipam {
            Ipam::Orlop(ipam) => ipam::all_gateways(ipam)?,
            _ => Vec::new(),
        };
        for other in present.into_iter().filter(|other| !ours.contains(other)) {
            let same_family = other.addr().is_ipv4() == gateway.addr().is_ipv4();
            let overlap = other.contains(&gateway.addr()) || gateway.contains(&other.addr());
            if !same_family || (other.addr().is_ipv6() && !overlap) {
                continue;
            }
            if !self.config.bridge.force_address {
                let msg = format!("bridge {} has address {other}, not {gateway}", bridge.name);
                return Err(Failure::new(code::INVALID_CONFIG, msg).with("forceAddress would replace it"));
            }
            self.host.delete_address(bridge.index, other).await?;
        }
        if gateway.addr().is_ipv6() {
            enable_ipv6(&bridge.name)?;
        }
        self.host.add_address(bridge.index, gateway).await
    }

    /// Makes the veth; gives the host's end.
    async fn veth(&self, bridge: &Link, done: &mut Done) -> Result<Link, Failure> {
        let (config, at) = (self.config, self.at);
        let (network, id, ifname) = (&*config.name, &*at.container_id, &*at.ifname);
        let host_name = names::host_interface(network, id, ifname);
        let veth = Veth {
            host_name: &host_name,
            host_mac: names::mac("host", network, id, ifname),
            name: ifname,
            mac: config
                .mac
                .unwrap_or_else(|| names::mac("container", network, id, ifname)),
            netns: self.namespaces.container().as_raw_fd(),
            mtu: if config.bridge.mtu == 0 {
                bridge.mtu
            } else {
                config.bridge.mtu
            },
            bridge: bridge.index,
        };
        if !self.host.create_veth(&veth).await? {
            // An earlier life of the container left the name behind. Nobody adds this one at the same time: it is our turn.
            self.host.delete(&host_name).await?;
            if !self.host.create_veth(&veth).await? {
                return Err(Failure::new(
                    code::TRY_AGAIN,
                    format!("link {host_name} is there again and again"),
                ));
            }
        }
        done.veth = Some(host_name.clone());
        let vanished = || Failure::new(code::NETLINK, format!("link {host_name} vanished"));
        let link = self.host.link(&host_name).await?.ok_or_else(vanished)?;
        if config.bridge.hairpin_mode || config.bridge.port_isolation {
            self.host
                .set_port(link.index, config.bridge.hairpin_mode, config.bridge.port_isolation)
                .await?;
        }
        Ok(link)
    }

    /// Gives the container's end its addresses and routes; the link as it is then.
    async fn configure(&self, given: &CniResult) -> Result<Link, Failure> {
        let ifname = &self.at.ifname;
        let vanished = || Failure::new(code::NETLINK, format!("link {ifname} vanished"));
        let link = self.inside.link(ifname).await?.ok_or_else(vanished)?;
        if given.ips.iter().any(|ip| ip.address.addr().is_ipv6()) {
            self.namespaces.inside(|| enable_ipv6(ifname))??;
        }
        self.inside.set_up(link.index).await?;
        for ip in &given.ips {
            self.inside.add_address(link.index, ip.address).await?;
        }
        for route in &given.routes {
            let gw = route.gw.or_else(|| gateway_for(route.dst, &given.ips));
            self.inside
                .add_route(link.index, &Route { gw, ..route.clone() })
                .await?;
        }
        Ok(link)
    }

    /// Waits until the bridge lets frames through, then tells the neighbours who has the addresses now: one that is given
    /// again comes with another hardware address, and its peers would talk to the old one until their caches expire.
    ///
    /// The kernel does it, by gratuitous ARP and unsolicited neighbour advertisements, when a hardware address is set, to
    /// the same as before too. A packet socket of ours would cost an RCU period, 10 ms and more, when it is closed.
    async fn announce(&self, host_end: &Link, container_end: &Link, ips: &[Ip]) -> Result<(), Failure> {
        let deadline = Instant::now() + FORWARDING_PATIENCE;
        while !self
            .host
            .link(&host_end.name)
            .await?
            .is_some_and(|link| link.forwarding)
        {
            if Instant::now() >= deadline {
                let msg = format!("the bridge's port {} does not come up", host_end.name);
                return Err(Failure::new(code::TRY_AGAIN, msg));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if ips.is_empty() {
            return Ok(());
        }
        let ifname = &self.at.ifname;
        let has = |v4: bool| ips.iter().any(|ip| ip.address.addr().is_ipv4() == v4);
        self.namespaces.inside(|| {
            if has(true) {
                sysctl(&format!("ipv4/conf/{ifname}/arp_notify"), "1")?;
            }
            if has(false) {
                sysctl(&format!("ipv6/conf/{ifname}/ndisc_notify"), "1")?;
            }
            Ok(())
        })??;
        self.inside.set_mac(container_end.index, &container_end.mac).await
    }
}

/// Undoes what was done, all of it even if some of it fails, and adds to the failure what could not be undone.
async fn undo(wiring: &Wiring<'_>, done: &Done, failure: Failure) -> Failure {
    let (config, at, env) = (wiring.config, wiring.at, wiring.env);
    let mut left = Vec::new();
    if let Some(name) = &done.veth {
        left.extend(wiring.host.delete(name).await.err());
    }
    if done.leased {
        let released = match &config.ipam {
            Ipam::None => Ok(()),
            Ipam::Orlop(ipam) => {
                Leases::open(ipam, &config.name).and_then(|mut l| l.release(&at.container_id, &at.ifname))
            }
            Ipam::Foreign(plugin) => delegate::silent(plugin, "DEL", config, env).await,
        };
        left.extend(released.err());
    }
    if left.is_empty() {
        return failure;
    }
    let left = left.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let details = format!("{}; not undone: {left}", failure.details);
    failure.with(details.trim_start_matches("; "))
}

/// The first address of the subnet, as the reference plugins have it where address management names no gateway.
fn first_host(net: IpNet) -> Option<IpAddr> {
    match net.network() {
        IpAddr::V4(ip) if net.prefix_len() < 31 => Some(Ipv4Addr::from(u32::from(ip) + 1).into()),
        IpAddr::V6(ip) if net.prefix_len() < 127 => Some(Ipv6Addr::from(u128::from(ip) + 1).into()),
        _ => None,
    }
}

pub(crate) fn gateway_for(dst: IpNet, ips: &[Ip]) -> Option<IpAddr> {
    ips.iter()
        .filter_map(|ip| ip.gateway)
        .find(|gw| gw.is_ipv4() == dst.addr().is_ipv4())
}

/// Some hosts start interfaces without IPv6; and the automatic link-local address needs no wait for duplicates either,
/// which a port in hairpin mode would even take for found. Of the calling thread's namespace.
fn enable_ipv6(ifname: &str) -> Result<(), Failure> {
    sysctl(&format!("ipv6/conf/{ifname}/disable_ipv6"), "0")?;
    sysctl(&format!("ipv6/conf/{ifname}/accept_dad"), "0")
}

/// Sets a value below `/proc/sys/net` of the calling thread's namespace. A read-only /proc/sys is common in containers;
/// what is as wanted needs no write.
fn sysctl(key: &str, value: &str) -> Result<(), Failure> {
    let path = format!("/proc/sys/net/{key}");
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|e| Failure::io(format!("writing {path}"), &e))
}
