//! CHECK: is everything still as ADD made it?

use crate::{
    config::{Config, Ipam},
    delegate,
    error::{Failure, code},
    ipam::{self, Leases},
    link::Net,
    names,
    netns::Namespaces,
    plugin::gateway_for,
    request::{Attachment, Env},
    result::{CniResult, Ip, Route, mac_text},
};

/// Whether all that ADD made is still as it made it.
pub async fn check(config: &Config, at: &Attachment, env: &Env) -> Result<(), Failure> {
    let Some(previous) = &config.prev_result else {
        return Err(Failure::new(code::INVALID_CONFIG, "prevResult is missing"));
    };
    match &config.ipam {
        Ipam::None => {}
        Ipam::Orlop(ipam) => check_lease(&Leases::open(ipam, &config.name)?, at, previous)?,
        Ipam::Foreign(plugin) => delegate::silent(plugin, "CHECK", config, env).await?,
    }
    let namespaces = Namespaces::open(&at.netns)?;
    let host = Net::open()?;
    let inside = namespaces.inside(Net::open)??;
    check_host(config, at, previous, &host).await?;
    check_container(at, previous, &inside).await
}

fn mismatch(msg: String) -> Failure {
    Failure::new(code::CHECK_FAILED, msg)
}

fn check_lease(leases: &Leases, at: &Attachment, previous: &CniResult) -> Result<(), Failure> {
    let held = leases.held(&at.container_id, &at.ifname);
    let index = previous
        .container_interface(&at.netns, &at.ifname)
        .map(|(index, _)| index);
    let ours = previous
        .ips
        .iter()
        .filter(|ip| ip.interface == index)
        .map(|ip| ip.address.addr());
    match ours.into_iter().find(|ip| !held.contains(ip)) {
        Some(ip) => Err(mismatch(format!(
            "address {ip} is not leased to container {}",
            at.container_id
        ))),
        None => Ok(()),
    }
}

async fn check_host(config: &Config, at: &Attachment, previous: &CniResult, host: &Net) -> Result<(), Failure> {
    let name = &config.bridge.name;
    let bridge = host.link(name).await?.filter(|link| link.bridge);
    let bridge = bridge.ok_or_else(|| mismatch(format!("bridge {name} is gone")))?;
    let host_name = names::host_interface(&config.name, &at.container_id, &at.ifname);
    let port = host
        .link(&host_name)
        .await?
        .ok_or_else(|| mismatch(format!("link {host_name} is gone")))?;
    for (link, role) in [(&bridge, "bridge"), (&port, "port")] {
        let told = previous
            .interfaces
            .iter()
            .find(|i| i.name == link.name && i.sandbox.is_empty());
        let told = told.ok_or_else(|| mismatch(format!("prevResult does not name the {role} {}", link.name)))?;
        if !told.mac.is_empty() && !told.mac.eq_ignore_ascii_case(&mac_text(&link.mac)) {
            return Err(mismatch(format!(
                "{} has another hardware address than {}",
                link.name, told.mac
            )));
        }
        if !link.up {
            return Err(mismatch(format!("{} is down", link.name)));
        }
    }
    if port.controller != Some(bridge.index) {
        return Err(mismatch(format!("{host_name} is not a port of {name}")));
    }
    if config.bridge.hairpin_mode && !port.hairpin {
        return Err(mismatch(format!("{host_name} is not in hairpin mode")));
    }
    if config.bridge.is_gateway {
        let present = host.addresses(bridge.index).await?;
        if let Some(lost) = ipam::gateways(&previous.ips)
            .into_iter()
            .find(|gateway| !present.contains(gateway))
        {
            return Err(mismatch(format!("bridge {name} has lost {lost}")));
        }
    }
    Ok(())
}

async fn check_container(at: &Attachment, previous: &CniResult, inside: &Net) -> Result<(), Failure> {
    let ifname = &at.ifname;
    let told = previous.container_interface(&at.netns, ifname);
    let (index, told) = told.ok_or_else(|| mismatch(format!("prevResult does not name {ifname}")))?;
    let link = inside
        .link(ifname)
        .await?
        .ok_or_else(|| mismatch(format!("{ifname} is gone")))?;
    if !link.up {
        return Err(mismatch(format!("{ifname} is down")));
    }
    if !told.mac.is_empty() && !told.mac.eq_ignore_ascii_case(&mac_text(&link.mac)) {
        return Err(mismatch(format!(
            "{ifname} has another hardware address than {}",
            told.mac
        )));
    }
    let present = inside.addresses(link.index).await?;
    let ours = || previous.ips.iter().filter(|ip| ip.interface == Some(index));
    if let Some(lost) = ours().find(|ip| !present.contains(&ip.address)) {
        return Err(mismatch(format!("{ifname} has lost {}", lost.address)));
    }
    let ips: Vec<Ip> = ours().cloned().collect();
    for route in &previous.routes {
        let gw = route.gw.or_else(|| gateway_for(route.dst, &ips));
        if !inside.has_route(link.index, &Route { gw, ..route.clone() }).await? {
            return Err(mismatch(format!("the route to {} is gone", route.dst)));
        }
    }
    Ok(())
}
