//! What the agent reads of a CNI result.

use std::{net::IpAddr, path::Path};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::NetworkStatus;

#[derive(Deserialize)]
struct CniResult {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: IpNet,
    gateway: Option<IpAddr>,
    interface: Option<usize>,
}

/// The sandbox's addresses and the host's end, from the last plugin's result. Results of all spoken versions have these
/// fields alike.
pub fn status(value: &Value, netns: &Path) -> Result<NetworkStatus, String> {
    let result: CniResult = CniResult::deserialize(value).map_err(|e| format!("the result is not CNI's: {e}"))?;
    // An address without an interface is the sandbox's: some plugins leave it out.
    let inside = |ip: &&Ip| {
        let interface = ip.interface.map(|index| result.interfaces.get(index));
        interface.is_none_or(|interface| interface.is_some_and(|i| Path::new(&i.sandbox) == netns))
    };
    let ours: Vec<&Ip> = result.ips.iter().filter(inside).collect();
    let Some(first) = ours.first() else {
        return Err("the result has no address of the sandbox".into());
    };
    // Bridge plugins name the bridge and then the veth, others the veth alone.
    let host = result.interfaces.iter().rfind(|interface| interface.sandbox.is_empty());
    Ok(NetworkStatus {
        addresses: ours.iter().map(|ip| ip.address.addr()).collect(),
        gateway: first.gateway,
        host_interface: host.map(|interface| interface.name.clone()).unwrap_or_default(),
    })
}

/// The sandbox's addresses as a runtime asks for them (capability `ips`), from a result that [`status`] takes.
pub fn addresses(value: &Value, netns: &Path) -> Vec<String> {
    let Ok(status) = status(value, netns) else {
        return Vec::new();
    };
    let of = |ip: &Ip| status.addresses.contains(&ip.address.addr());
    let result = CniResult::deserialize(value);
    let ips = result.map(|result| result.ips).unwrap_or_default();
    ips.iter()
        .filter(|ip| of(ip))
        .map(|ip| ip.address.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_sandboxs_addresses_count() {
        let result = json!({
            "interfaces": [{"name": "br0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/n"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.7/24", "gateway": "10.0.0.1", "interface": 2}],
        });
        let status = status(&result, Path::new("/n")).unwrap();
        assert_eq!(status.addresses, ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            (&*status.host_interface, status.gateway),
            ("veth1", Some("10.0.0.1".parse().unwrap()))
        );
        assert_eq!(addresses(&result, Path::new("/n")), ["10.0.0.7/24"]);
    }

    #[test]
    fn garbage_is_an_error() {
        for garbage in [
            json!(null),
            json!([]),
            json!({"ips": "x"}),
            json!({}),
            json!({"ips": [{"address": "10.0.0.1/99"}]}),
        ] {
            assert!(status(&garbage, Path::new("/n")).is_err(), "{garbage}");
        }
    }
}
