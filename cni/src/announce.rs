//! Telling the neighbours who has an address now: gratuitous ARP, and unsolicited neighbour advertisements.
//!
//! An address that is given again comes with another hardware address; without this its peers would talk to the old one until
//! their caches expire.

use std::{io, net::IpAddr};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, sendto, socket,
};
use std::os::fd::{AsRawFd, OwnedFd};

/// `libc::AF_PACKET`, in the width that an address has for it.
const AF_PACKET: u16 = 17;
const BROADCAST: [u8; 6] = [0xff; 6];
/// All nodes on the link, ff02::1, and its hardware address.
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// A socket for frames, of the namespace that the calling thread is in.
pub fn open() -> io::Result<OwnedFd> {
    // Protocol 0: it only sends, so it never gets a copy of what arrives.
    Ok(socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None::<SockProtocol>,
    )?)
}

/// Sends one frame for the address out of the interface.
pub fn send(socket: &OwnedFd, index: u32, mac: [u8; 6], address: IpAddr) -> io::Result<()> {
    let frame = frame(mac, address);
    let index = i32::try_from(index).map_err(io::Error::other)?;
    let raw = libc::sockaddr_ll {
        sll_family: AF_PACKET,
        sll_protocol: u16::from_be_bytes([frame[12], frame[13]]).to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: `raw` is a whole sockaddr_ll of the right family that lives for the call.
    let target = unsafe { LinkAddr::from_raw((&raw const raw).cast(), None) }
        .ok_or_else(|| io::Error::other("not a link address"))?;
    sendto(socket.as_raw_fd(), &frame, &target, MsgFlags::empty())?;
    Ok(())
}

fn frame(mac: [u8; 6], address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => arp(mac, ip.octets()),
        IpAddr::V6(ip) => advertisement(mac, ip.octets()),
    }
}

/// RFC 5227, section 3: an ARP announcement is a request whose sender and target are the same.
fn arp(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend(BROADCAST);
    frame.extend(mac);
    // Ethertype ARP; Ethernet, IPv4, lengths 6 and 4, request.
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend(ip);
    frame
}

/// RFC 4861, section 7.2.6: an unsolicited advertisement with the override flag.
fn advertisement(mac: [u8; 6], ip: [u8; 16]) -> Vec<u8> {
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend(ip);
    icmp.extend([2, 1]);
    icmp.extend(mac);
    let sum = checksum(ip, ALL_NODES, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = Vec::with_capacity(86);
    frame.extend(ALL_NODES_MAC);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame.extend(ip);
    frame.extend(ALL_NODES);
    frame.extend(icmp);
    frame
}

/// The Internet checksum over the pseudo header (next header 58) and an even number of bytes.
fn checksum(source: [u8; 16], target: [u8; 16], icmp: &[u8]) -> u16 {
    let pair = |p: &[u8]| u32::from(u16::from_be_bytes([p[0], p[1]]));
    let words = source
        .chunks_exact(2)
        .chain(target.chunks_exact(2))
        .chain(icmp.chunks_exact(2));
    let length = u32::try_from(icmp.len()).unwrap_or(0);
    let mut sum: u32 = words.map(pair).sum::<u32>() + length + 58;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "the loop folded it into 16 bits")]
    let folded = sum as u16;
    !folded
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];

    #[test]
    fn an_announcement_names_itself_twice() {
        let frame = frame(MAC, "10.1.0.2".parse().unwrap());
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[..6], BROADCAST);
        assert_eq!(frame[28..32], [10, 1, 0, 2]);
        assert_eq!(frame[38..42], [10, 1, 0, 2]);
    }

    #[test]
    fn the_advertisement_has_a_right_checksum() {
        let frame = frame(MAC, "fd00::2".parse().unwrap());
        assert_eq!(frame.len(), 86);
        let source: [u8; 16] = frame[22..38].try_into().unwrap();
        // Over a message with its checksum the sum is 0.
        assert_eq!(checksum(source, ALL_NODES, &frame[54..]), 0);
    }
}
