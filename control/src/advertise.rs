//! Where this control plane is reached from the cluster: what stands behind the service `default/kubernetes`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};

use crate::{
    config::Config,
    model::endpoint_address,
    server::{Listener, Trust},
};

/// An address of the documentation range: a route to it is the default route.
const ELSEWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 9);

/// The address and port that pods reach this control plane by: as configured, or that of a TLS listener; `None` when only this
/// machine reaches it.
pub fn endpoint(config: &Config, listeners: &[Listener]) -> Option<SocketAddrV4> {
    let listening: Vec<SocketAddr> = listeners
        .iter()
        .filter_map(|listener| match listener {
            Listener::Tcp(socket, Trust::Tls) => socket.local_addr().ok(),
            _ => None,
        })
        .collect();
    choose(config.advertise_address, config.advertise_port, &listening, outgoing)
}

fn choose(
    address: Option<Ipv4Addr>,
    port: Option<u16>,
    listening: &[SocketAddr],
    outgoing: impl FnOnce() -> Option<Ipv4Addr>,
) -> Option<SocketAddrV4> {
    let reached = |address: &SocketAddr| match address.ip().to_canonical() {
        IpAddr::V4(ip) if endpoint_address(&ip.to_string()).is_ok() => Some(SocketAddrV4::new(ip, address.port())),
        _ => None,
    };
    let everywhere = || {
        listening
            .iter()
            .find(|address| address.ip().to_canonical().is_unspecified())
    };
    let found = if let Some(address) = address {
        let same = listening.iter().find(|found| found.ip().to_canonical() == address);
        let listener = same.or_else(everywhere).or(listening.first());
        SocketAddrV4::new(address, port.or(listener.map(SocketAddr::port))?)
    } else if let Some(found) = listening.iter().find_map(reached) {
        found
    } else {
        let listener = everywhere()?;
        reached(&SocketAddr::from((outgoing()?, listener.port())))?
    };
    Some(SocketAddrV4::new(*found.ip(), port.unwrap_or(found.port())))
}

/// The address of the interface that the default route leads out of. Nothing is sent: the kernel only looks the route up.
fn outgoing() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(ELSEWHERE).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(address: Option<&str>, port: Option<u16>, listening: &[&str]) -> Option<String> {
        let listening: Vec<SocketAddr> = listening.iter().map(|text| text.parse().unwrap()).collect();
        let address = address.map(|text| text.parse().unwrap());
        let outgoing = || Some(Ipv4Addr::new(198, 51, 100, 7));
        choose(address, port, &listening, outgoing).map(|found| found.to_string())
    }

    #[test]
    fn the_first_listener_that_others_reach() {
        let found = |listening: &[&str]| of(None, None, listening);
        assert_eq!(
            found(&["127.0.0.1:6443", "192.168.77.10:7443"]).unwrap(),
            "192.168.77.10:7443"
        );
        assert_eq!(found(&["[::1]:1", "0.0.0.0:6443"]).unwrap(), "198.51.100.7:6443");
        assert_eq!(found(&["[::]:6443"]).unwrap(), "198.51.100.7:6443");
        assert_eq!(found(&["0.0.0.0:1", "[::ffff:192.0.2.3]:2"]).unwrap(), "192.0.2.3:2");
        assert_eq!(found(&["127.0.0.1:6443", "[2001:db8::1]:6443"]), None);
        assert_eq!(found(&[]), None);
        let nowhere = choose(None, None, &["0.0.0.0:6443".parse().unwrap()], || None);
        assert_eq!(nowhere, None, "no default route");
    }

    #[test]
    fn what_is_configured_counts() {
        let both = ["127.0.0.1:6443", "0.0.0.0:7443"];
        assert_eq!(of(Some("192.0.2.9"), None, &both).unwrap(), "192.0.2.9:7443");
        assert_eq!(of(Some("192.0.2.9"), Some(443), &both).unwrap(), "192.0.2.9:443");
        assert_eq!(of(None, Some(443), &["192.0.2.3:6443"]).unwrap(), "192.0.2.3:443");
        assert_eq!(
            of(Some("192.0.2.9"), None, &["127.0.0.1:6443"]).unwrap(),
            "192.0.2.9:6443"
        );
    }
}
