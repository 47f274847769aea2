//! Results: one shape inside, the specification's shape of each version outside.

use std::{net::IpAddr, path::Path};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    error::{Failure, code},
    version::CniVersion,
};

/// The result of an ADD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct CniResult {
    /// What was made, host's side and container's.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// The addresses.
    #[serde(default)]
    pub ips: Vec<Ip>,
    /// The routes that were asked for or made.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Handed through.
    #[serde(default)]
    pub dns: Dns,
}

/// An interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address, in lower case.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// From 1.1.0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The container's namespace; empty for the host's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// What other plugins say of theirs.
    #[serde(flatten)]
    pub other: serde_json::Map<String, Value>,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// With its prefix length.
    pub address: IpNet,
    /// The gateway of its subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Which of the result's interfaces has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route of a result or a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// Through whom; the address's gateway when it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// Name resolution, which CNI only carries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl CniResult {
    /// A result of any of the supported versions: they differ in what is left out.
    pub fn parse(value: &Value) -> Result<Self, Failure> {
        let result: Self = serde_json::from_value(value.clone())
            .map_err(|error| Failure::new(code::DECODE, "prevResult").with(error))?;
        if result
            .ips
            .iter()
            .filter_map(|ip| ip.interface)
            .any(|index| index >= result.interfaces.len())
        {
            return Err(Failure::new(
                code::INVALID_CONFIG,
                "prevResult.ips names an interface that is not there",
            ));
        }
        Ok(result)
    }

    /// As `version` writes it.
    pub fn to_json(&self, version: CniVersion) -> Value {
        let interfaces: Vec<Value> = self
            .interfaces
            .iter()
            .map(|interface| {
                let mtu = interface.mtu.filter(|_| version >= CniVersion::V1_1_0);
                json!(Interface {
                    mtu,
                    ..interface.clone()
                })
            })
            .collect();
        let ips: Vec<Value> = self
            .ips
            .iter()
            .map(|ip| {
                let mut value = json!(ip);
                if version < CniVersion::V1_0_0 {
                    value["version"] = json!(if ip.address.addr().is_ipv4() { "4" } else { "6" });
                }
                value
            })
            .collect();
        let mut value = json!({"cniVersion": version.as_str(), "dns": self.dns});
        for (key, list) in [("interfaces", interfaces), ("ips", ips)] {
            if !list.is_empty() {
                value[key] = list.into();
            }
        }
        if !self.routes.is_empty() {
            value["routes"] = json!(self.routes);
        }
        value
    }

    /// The container's interface of that name, with its index.
    pub fn container_interface(&self, netns: &Path, name: &str) -> Option<(usize, &Interface)> {
        self.interfaces
            .iter()
            .enumerate()
            .find(|(_, i)| i.name == name && Path::new(&i.sandbox) == netns)
    }

    /// What came before in a chain, and then ours.
    pub fn after(self, previous: Option<CniResult>) -> Self {
        let Some(mut all) = previous else { return self };
        let shift = all.interfaces.len();
        all.interfaces.extend(self.interfaces);
        all.ips.extend(self.ips.into_iter().map(|ip| Ip {
            interface: ip.interface.map(|i| i + shift),
            ..ip
        }));
        all.routes.extend(self.routes);
        if self.dns != Dns::default() {
            all.dns = self.dns;
        }
        all
    }
}

/// `aa:bb:cc:dd:ee:ff`.
pub fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> CniResult {
        CniResult {
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: "aa:bb:cc:dd:ee:ff".into(),
                mtu: Some(1500),
                sandbox: "/run/n".into(),
                ..Default::default()
            }],
            ips: vec![Ip {
                address: "10.1.0.2/24".parse().unwrap(),
                gateway: Some("10.1.0.1".parse().unwrap()),
                interface: Some(0),
            }],
            routes: vec![Route {
                dst: "0.0.0.0/0".parse().unwrap(),
                gw: None,
            }],
            dns: Dns::default(),
        }
    }

    #[test]
    fn each_version_has_its_shape() {
        let old = sample().to_json(CniVersion::V0_4_0);
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["interfaces"][0].get("mtu"), None);
        let new = sample().to_json(CniVersion::V1_1_0);
        assert_eq!(
            new,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [{"name": "eth0", "mac": "aa:bb:cc:dd:ee:ff", "mtu": 1500, "sandbox": "/run/n"}],
                "ips": [{"address": "10.1.0.2/24", "gateway": "10.1.0.1", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dns": {},
            })
        );
        for version in CniVersion::ALL {
            let back = CniResult::parse(&sample().to_json(version)).unwrap();
            assert_eq!(back.ips, sample().ips);
        }
    }

    #[test]
    fn a_chain_keeps_what_came_before() {
        let both = sample().after(Some(sample()));
        assert_eq!(both.interfaces.len(), 2);
        assert_eq!(
            both.ips.iter().map(|ip| ip.interface).collect::<Vec<_>>(),
            [Some(0), Some(1)]
        );
    }

    #[test]
    fn an_index_that_points_nowhere_is_refused() {
        let value = json!({"interfaces": [], "ips": [{"address": "10.0.0.1/8", "interface": 3}]});
        assert_eq!(CniResult::parse(&value).unwrap_err().code, code::INVALID_CONFIG);
    }
}
