//! The network configuration on stdin.
//!
//! The keys are the reference bridge plugin's. What is known there and not done here is refused by name; a key that nobody
//! knows is left alone, as the specification wants.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use cni_plugin::{ip_range::IpRange, macaddr::MacAddr};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    error::{Failure, code},
    request::check_container_id,
    result::{CniResult, Dns, Route},
    version::CniVersion,
};

/// More than this on stdin is refused before it is parsed.
pub const MAX_STDIN: usize = 4 << 20;
const DEFAULT_IPAM_TIMEOUT: Duration = Duration::from_secs(20);
/// In seconds.
const MAX_IPAM_TIMEOUT: u64 = 600;
const MAX_BRIDGE_NAME: usize = 15;

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The version that is spoken in the answer.
    pub version: CniVersion,
    /// The network's name.
    pub name: String,
    /// The bridge itself.
    pub bridge: Bridge,
    /// Where addresses come from.
    pub ipam: Ipam,
    /// How long another plugin may take over a call that is delegated to it.
    pub ipam_timeout: Duration,
    /// Handed through.
    pub dns: Dns,
    /// A hardware address that the runtime asks for.
    pub mac: Option<[u8; 6]>,
    /// Addresses that the runtime asks for.
    pub requested: Vec<IpAddr>,
    /// The result of the plugin before us, or (CHECK, DEL) of our own ADD's chain.
    pub prev_result: Option<CniResult>,
    /// GC: what is still valid, as (container id, interface); `None` when the runtime did not say.
    pub valid_attachments: Option<Vec<(String, String)>>,
    /// As it came, for delegation.
    pub raw: Map<String, Value>,
}

/// The bridge and the ports on it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bridge {
    /// Its name.
    #[serde(rename = "bridge")]
    pub name: String,
    /// It gets the gateway's addresses.
    pub is_gateway: bool,
    /// Pods get default routes through it; implies `is_gateway`.
    pub is_default_gateway: bool,
    /// Another address of the same family on the bridge is replaced, not an error.
    pub force_address: bool,
    /// 0: the kernel's, or that of the bridge that is there.
    pub mtu: u32,
    /// A pod reaches itself through the bridge.
    pub hairpin_mode: bool,
    /// The bridge takes every frame.
    pub promisc_mode: bool,
    /// Ports cannot talk to each other.
    pub port_isolation: bool,
}

impl Default for Bridge {
    fn default() -> Self {
        Self {
            name: "cni0".into(),
            is_gateway: false,
            is_default_gateway: false,
            force_address: false,
            mtu: 0,
            hairpin_mode: false,
            promisc_mode: false,
            port_isolation: false,
        }
    }
}

/// Where addresses come from.
#[derive(Debug, Clone)]
pub enum Ipam {
    /// Nowhere: a port on the bridge and no more.
    None,
    /// Ours, see [`crate::ipam`].
    Orlop(OrlopIpam),
    /// A plugin of that name, by delegation.
    Foreign(String),
}

/// `"ipam": {"type": "orlop", ...}`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OrlopIpam {
    #[serde(rename = "type")]
    _type: String,
    /// One address is given from each set; a set's ranges are of one family.
    pub ranges: Vec<Vec<IpRange>>,
    /// Handed to the container.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Where the leases are kept. What survives a reboot and what does not are both fine.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// What tells one boot of the machine from another.
    #[serde(default = "default_boot_id_file")]
    pub boot_id_file: PathBuf,
}

fn default_data_dir() -> PathBuf {
    "/run/orlop/ipam".into()
}

fn default_boot_id_file() -> PathBuf {
    "/proc/sys/kernel/random/boot_id".into()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Common {
    name: String,
    #[serde(default)]
    dns: Dns,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: Args,
    prev_result: Option<Value>,
    // The specification's name, and the one that it used by mistake; libcni sends both. There `null` is an empty list.
    #[serde(rename = "cni.dev/valid-attachments", default, deserialize_with = "present")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    #[serde(rename = "cni.dev/attachments", default, deserialize_with = "present")]
    attachments: Option<Vec<ValidAttachment>>,
}

fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    Option::deserialize(value).map(|list| Some(list.unwrap_or_default()))
}

#[derive(Default, Deserialize)]
struct RuntimeConfig {
    mac: Option<MacAddr>,
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: CniArgs,
}

#[derive(Default, Deserialize)]
struct CniArgs {
    mac: Option<MacAddr>,
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Reads `stdin` as an object and its `cniVersion`: the part that every answer, also an error's, needs.
pub fn object(stdin: &[u8]) -> Result<Map<String, Value>, Failure> {
    if stdin.len() > MAX_STDIN {
        return Err(Failure::new(
            code::DECODE,
            format!("configuration is larger than {MAX_STDIN} bytes"),
        ));
    }
    if stdin.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::new(code::DECODE, "no configuration on stdin"));
    }
    match serde_json::from_slice(stdin) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Failure::new(code::DECODE, "configuration is not a JSON object")),
        Err(error) => Err(Failure::new(code::DECODE, "configuration is not JSON").with(error)),
    }
}

/// The object's `cniVersion`.
pub fn version(object: &Map<String, Value>) -> Result<CniVersion, Failure> {
    match object.get("cniVersion") {
        None => CniVersion::parse("0.1.0"),
        Some(Value::String(text)) => CniVersion::parse(text),
        Some(_) => Err(Failure::new(code::DECODE, "cniVersion is not a string")),
    }
}

impl Config {
    /// Checks the whole configuration. `args` is what `CNI_ARGS` said.
    pub fn parse(raw: Map<String, Value>, args: &BTreeMap<String, String>) -> Result<Self, Failure> {
        let version = version(&raw)?;
        refuse_unsupported(&raw)?;
        let common: Common = decode(Value::Object(raw.clone()))?;
        check_container_id(&common.name)
            .map_err(|why| Failure::new(code::INVALID_CONFIG, format!("the network's name {why}")))?;
        let bridge = bridge(&raw)?;
        let prev_result = common
            .prev_result
            .filter(|v| !v.is_null())
            .map(|value| CniResult::parse(&value))
            .transpose()?;
        let mac_argument = args.get("MAC").map(|text| parse_mac(text)).transpose()?;
        let mac = common.runtime_config.mac.or(common.args.cni.mac).or(mac_argument);
        let mut requested = addresses(&common.runtime_config.ips)?;
        requested.extend(addresses(&common.args.cni.ips)?);
        if let Some(list) = args.get("IP") {
            requested.extend(addresses(&list.split(',').map(str::to_owned).collect::<Vec<_>>())?);
        }
        Ok(Self {
            version,
            bridge,
            ipam: ipam(&raw)?,
            ipam_timeout: ipam_timeout(&raw)?,
            dns: common.dns,
            mac: mac.map(check_mac).transpose()?,
            requested,
            prev_result,
            valid_attachments: common
                .valid_attachments
                .or(common.attachments)
                .map(|list| list.into_iter().map(|a| (a.container_id, a.ifname)).collect()),
            name: common.name,
            raw,
        })
    }
}

fn bridge(raw: &Map<String, Value>) -> Result<Bridge, Failure> {
    let mut bridge: Bridge = decode(Value::Object(raw.clone()))?;
    if bridge.name.is_empty() {
        bridge.name = Bridge::default().name;
    }
    let illegal = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
    let name = &bridge.name;
    if name.len() > MAX_BRIDGE_NAME || name.contains(illegal) || [".", "..", "all", "default", "lo"].contains(&&**name)
    {
        return Err(Failure::new(
            code::INVALID_CONFIG,
            format!("bridge: {name:?} is not an interface's name"),
        ));
    }
    if bridge.mtu != 0 && !(68..=65535).contains(&bridge.mtu) {
        return Err(Failure::new(
            code::INVALID_CONFIG,
            format!("mtu: {} is not within 68 and 65535", bridge.mtu),
        ));
    }
    if bridge.hairpin_mode && bridge.promisc_mode {
        return Err(Failure::new(
            code::INVALID_CONFIG,
            "hairpinMode and promiscMode cannot be set together: frames would come twice",
        ));
    }
    bridge.is_gateway |= bridge.is_default_gateway;
    Ok(bridge)
}

/// Keys of the reference plugin that we do not do, unless they say so themselves.
fn refuse_unsupported(raw: &Map<String, Value>) -> Result<(), Failure> {
    const UNSUPPORTED: [&str; 8] = [
        "ipMasq",
        "vlan",
        "vlanTrunk",
        "macspoofchk",
        "enabledad",
        "disableContainerInterface",
        "uplinkInterface",
        "hostInterface",
    ];
    for key in UNSUPPORTED {
        match raw.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::Number(n)) if n.as_u64() == Some(0) => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(value) => return Err(Failure::unsupported(key, value)),
        }
    }
    Ok(())
}

fn ipam(raw: &Map<String, Value>) -> Result<Ipam, Failure> {
    let Some(value) = raw.get("ipam").filter(|v| !v.is_null()) else {
        return Ok(Ipam::None);
    };
    let Some(object) = value.as_object() else {
        return Err(Failure::new(code::DECODE, "ipam is not an object"));
    };
    match object.get("type").map(Value::as_str) {
        None if object.is_empty() => Ok(Ipam::None),
        Some(Some("")) => Ok(Ipam::None),
        Some(Some("orlop")) => {
            let ipam: OrlopIpam = decode(value.clone())?;
            if ipam.ranges.is_empty() || ipam.ranges.iter().any(Vec::is_empty) {
                return Err(Failure::new(
                    code::INVALID_CONFIG,
                    "ipam.ranges: at least one range in each set is needed",
                ));
            }
            if !ipam.data_dir.is_absolute() || !ipam.boot_id_file.is_absolute() {
                return Err(Failure::new(
                    code::INVALID_CONFIG,
                    "ipam.dataDir and ipam.bootIdFile must be absolute",
                ));
            }
            Ok(Ipam::Orlop(ipam))
        }
        Some(Some(other)) if other.contains('/') || other.starts_with('.') => Err(Failure::new(
            code::INVALID_CONFIG,
            format!("ipam.type: {other:?} is not a plugin's name"),
        )),
        Some(Some(other)) => Ok(Ipam::Foreign(other.to_owned())),
        _ => Err(Failure::new(code::INVALID_CONFIG, "ipam.type is missing")),
    }
}

/// Twice the default (a call and its rollback) is within the minute that runtimes usually give us.
fn ipam_timeout(raw: &Map<String, Value>) -> Result<Duration, Failure> {
    match raw.get("ipamTimeoutSeconds") {
        None | Some(Value::Null) => Ok(DEFAULT_IPAM_TIMEOUT),
        Some(value) => value
            .as_u64()
            .filter(|seconds| (1..=MAX_IPAM_TIMEOUT).contains(seconds))
            .map(Duration::from_secs)
            .ok_or_else(|| {
                let msg = format!("ipamTimeoutSeconds: {value} is not a whole number within 1 and {MAX_IPAM_TIMEOUT}");
                Failure::new(code::INVALID_CONFIG, msg)
            }),
    }
}

fn addresses(list: &[String]) -> Result<Vec<IpAddr>, Failure> {
    list.iter()
        .map(|text| {
            let text = text.trim();
            text.parse::<IpNet>()
                .map(|net| net.addr())
                .or_else(|_| text.parse::<IpAddr>())
                .map_err(|_| {
                    Failure::new(
                        code::INVALID_CONFIG,
                        format!("requested address {text:?} is not an address"),
                    )
                })
        })
        .collect()
}

fn parse_mac(text: &str) -> Result<MacAddr, Failure> {
    text.parse()
        .map_err(|_| Failure::new(code::INVALID_CONFIG, format!("{text:?} is not a hardware address")))
}

/// A multicast address is none for an interface, and the kernel says so less clearly.
fn check_mac(mac: MacAddr) -> Result<[u8; 6], Failure> {
    let bytes = mac.0.into_array();
    if bytes[0] & 1 == 1 || bytes == [0; 6] {
        return Err(Failure::new(
            code::INVALID_CONFIG,
            format!("hardware address {mac} is not a unicast address"),
        ));
    }
    Ok(bytes)
}

fn decode<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|error| Failure::new(code::DECODE, "configuration").with(error))
}
