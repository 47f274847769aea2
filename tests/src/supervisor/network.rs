//! The lab's network: one bridge in a namespace of its own that has no way out, a cable to every member.

use std::{
    net::{Ipv4Addr, TcpListener},
    os::fd::OwnedFd,
};

use anyhow::{Context, Result};

use crate::{
    layout::{Member, Members, Way},
    namespaces::{in_network, run_tool},
};

/// The bridge's name in the switch.
const BRIDGE: &str = "lab0";

/// Makes the bridge and all cables.
pub fn build(members: &Members) -> Result<()> {
    let switch = members.get("switch")?;
    in_network_of(
        switch,
        "ip",
        &["link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"],
    )?;
    in_network_of(switch, "ip", &["link", "set", BRIDGE, "up"])?;
    for member in &members.members {
        cable(members, member)?;
    }
    Ok(())
}

/// Makes the cable of a member that has an address.
pub fn cable(members: &Members, member: &Member) -> Result<()> {
    let Some(address) = member.address else { return Ok(()) };
    let switch = members.get("switch")?;
    let (port, pid) = (format!("to-{}", member.name), member.pid.to_string());
    in_network_of(
        switch,
        "ip",
        &[
            "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &pid,
        ],
    )?;
    in_network_of(switch, "ip", &["link", "set", &port, "master", BRIDGE, "up"])?;
    in_network_of(member, "ip", &["addr", "add", &format!("{address}/16"), "dev", "eth0"])?;
    in_network_of(member, "ip", &["link", "set", "eth0", "up"]).map(drop)
}

/// Removes the switch's end of a cable; it may be gone with the other end's namespace.
pub fn uncable(members: &Members, member: &str) {
    if let Ok(switch) = members.get("switch") {
        let _ = in_network_of(switch, "ip", &["link", "del", &format!("to-{member}")]);
    }
}

/// Pulls or plugs a member's cable.
pub fn set_link(members: &Members, member: &str, up: bool) -> Result<()> {
    let port = format!("to-{member}");
    in_network_of(
        members.get("switch")?,
        "ip",
        &["link", "set", &port, if up { "up" } else { "down" }],
    )
    .map(drop)
}

/// Loses everything that goes one way on a member's cable, or nothing any more. The switch loses it: neither end can tell.
pub fn lose(members: &Members, member: &str, way: Option<Way>) -> Result<()> {
    let (switch, table) = (members.get("switch")?, format!("lose-{}", members.get(member)?.name));
    let port = format!("to-{member}");
    // Made before it is removed, so that there always is one to remove.
    let mut script = format!("add table netdev {table}\ndelete table netdev {table}\n");
    if let Some(way) = way {
        let hook = match way {
            Way::FromMember => "ingress",
            Way::ToMember => "egress",
        };
        script += &format!(
            "table netdev {table} {{\nchain lost {{\ntype filter hook {hook} device \"{port}\" priority 0;\ncounter drop\n}}\n}}\n"
        );
    }
    in_network_of(switch, "nft", &[&script]).map(drop)
}

/// How many packets a member's cable has lost since [`lose`] was called for one way.
pub fn lost(members: &Members, member: &str) -> Result<u64> {
    let table = format!("lose-{member}");
    let told = in_network_of(members.get("switch")?, "nft", &["list", "table", "netdev", &table])?;
    let mut words = told.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    let count = words
        .next()
        .with_context(|| format!("{table} has no counter: {told}"))?;
    count
        .parse()
        .with_context(|| format!("{count:?} is no count of packets"))
}

fn in_network_of(member: &Member, program: &str, arguments: &[&str]) -> Result<String> {
    let namespace = format!("--net=/proc/{}/ns/net", member.pid);
    let mut all = vec![namespace.as_str(), program];
    all.extend(arguments);
    run_tool("nsenter", &all).with_context(|| format!("in {}", member.name))
}

/// A listening socket inside a member's network namespace.
pub fn listen_in(pid: i32, address: Ipv4Addr, port: u16) -> Result<OwnedFd> {
    in_network(pid, move || {
        let listener = TcpListener::bind((address, port)).with_context(|| format!("listening on {address}:{port}"))?;
        Ok(OwnedFd::from(listener))
    })
}
