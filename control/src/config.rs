//! `control.toml`: every key has a default, an unknown key is an error.

mod leader;

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{link::LEASE_INTERVAL, model::endpoint_address, registry::RegistryConfig};

pub use leader::LeaderConfig;

/// How pods call the API, apart from its address.
const SERVICE_NAMES: [&str; 4] = [
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];
/// Nodes a second: more is no limit.
const MAX_EVICTION_RATE: f64 = 1000.0;

/// What `orlop-control --config FILE` reads. Durations are written as `"40s"`, `"5m"`, `"24h"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Durable state: the embedded store and `pki/`.
    pub data_dir: PathBuf,
    /// TLS listeners. Sockets passed by `LISTEN_FDS` take their place.
    pub listen: Vec<SocketAddr>,
    /// Plaintext gRPC for the administrators of this machine: mode 0600, only root and control's own user are let in, and
    /// they are `system:masters`. An empty path switches it off.
    pub unix_socket: PathBuf,
    /// Plaintext listeners without any authentication: **whoever reaches them is `system:masters`**. For tests. Only loopback
    /// addresses are taken unless `insecure_listen_anywhere` is set too.
    pub insecure_listen: Vec<SocketAddr>,
    /// Lets `insecure_listen` bind addresses that other machines reach.
    pub insecure_listen_anywhere: bool,
    /// Names and addresses that nodes and clients reach control by, for its certificate; `localhost`, `127.0.0.1` and `::1`
    /// are always in it. A change makes a new certificate at the next start.
    pub server_names: Vec<String>,
    /// The IPv4 address that pods reach this control plane by, behind the service `default/kubernetes`. By default that of the first
    /// TLS listener (or socket of `LISTEN_FDS`) that is not bound to loopback; for one that is bound to all addresses, that of the
    /// interface with the default route. Without any of these the service has no endpoint here.
    pub advertise_address: Option<Ipv4Addr>,
    /// Its port; by default the listener's.
    pub advertise_port: Option<u16>,
    /// Where objects are kept.
    pub store: StoreConfig,
    /// ClusterIPs are taken from here.
    pub service_cidr: Ipv4Net,
    /// Nodes' pod ranges are taken from here.
    pub pod_cidr: Ipv4Net,
    /// How large a node's pod range is.
    pub pod_cidr_prefix: u8,
    /// Which of several replicas leads.
    pub leader: LeaderConfig,
    /// When a node counts as lost.
    pub node: NodeConfig,
    /// Certificates' lives.
    pub pki: PkiConfig,
    /// What one client, and all of them, may use.
    pub limits: Limits,
}

/// `[store]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// "embedded" (default: a file in `data_dir`, one control process) or "etcd".
    pub engine: Engine,
    /// For `engine = "etcd"`.
    pub etcd: EtcdConfig,
}

/// The store's engines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// redb, in this process.
    #[default]
    Embedded,
    /// An etcd cluster.
    Etcd,
}

/// `[store.etcd]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdConfig {
    /// "http://127.0.0.1:2379", ... or "unix:/path".
    pub endpoints: Vec<String>,
}

/// `[node]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// `leaseDurationSeconds` of a node's Lease.
    #[serde(deserialize_with = "duration")]
    pub lease_duration: Duration,
    /// A node whose Lease was not renewed for so long is NotReady. Leases are renewed every 10 s: more than that.
    #[serde(deserialize_with = "duration")]
    pub monitor_grace: Duration,
    /// Pods of a node that is NotReady for so long are replaced elsewhere.
    #[serde(deserialize_with = "duration")]
    pub eviction_delay: Duration,
    /// So many nodes a second, at most, begin to lose their pods; 0.1 is one in 10 s. While most of a large cluster is NotReady it is
    /// a tenth of the default or this, whichever is less; while most of a small one is, no node does.
    pub eviction_rate: f64,
}

/// `[pki]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PkiConfig {
    /// How long a node's certificate is good; the agent renews it long before.
    #[serde(deserialize_with = "duration")]
    pub node_certificate: Duration,
    /// How long the server's and the administrator's certificates are good; control makes new ones when a third of it is left.
    #[serde(deserialize_with = "duration")]
    pub own_certificates: Duration,
}

/// `[limits]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at one time, over all listeners.
    pub connections: usize,
    /// Of these, connections without a client certificate.
    pub anonymous_connections: usize,
    /// A connection without a client certificate is ended after this long: joining takes a moment, and others need its place.
    #[serde(deserialize_with = "duration")]
    pub anonymous_lifetime: Duration,
    /// TLS handshakes at one time.
    pub handshakes: usize,
    /// How long a handshake, and the first bytes after it, may take.
    #[serde(deserialize_with = "duration")]
    pub handshake_timeout: Duration,
    /// Concurrent requests on one HTTP/2 connection.
    pub streams_per_connection: u32,
    /// Bytes of one request's headers.
    pub header_bytes: u32,
    /// Bytes of one request message, but for Apply.
    pub message_bytes: usize,
    /// Bytes of an Apply's message (a manifest).
    pub manifest_bytes: usize,
    /// Apply calls at one time; more of them wait.
    pub concurrent_applies: usize,
    /// How long a manifest may take to arrive and to be checked, and how long a client that does not read the results keeps
    /// others waiting.
    #[serde(deserialize_with = "duration")]
    pub apply_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/orlop/control".into(),
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 6443))],
            unix_socket: "/run/orlop/control.sock".into(),
            insecure_listen: Vec::new(),
            insecure_listen_anywhere: false,
            server_names: Vec::new(),
            advertise_address: None,
            advertise_port: None,
            store: StoreConfig::default(),
            service_cidr: net([10, 96, 0, 0], 12),
            pod_cidr: net([10, 244, 0, 0], 16),
            pod_cidr_prefix: 24,
            leader: LeaderConfig::default(),
            node: NodeConfig::default(),
            pki: PkiConfig::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
        }
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            lease_duration: Duration::from_secs(40),
            monitor_grace: Duration::from_secs(16),
            eviction_delay: Duration::from_secs(20),
            eviction_rate: 0.1,
        }
    }
}

impl Default for PkiConfig {
    fn default() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self {
            node_certificate: day * 90,
            own_certificates: day * 365,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            anonymous_connections: 512,
            anonymous_lifetime: Duration::from_secs(300),
            handshakes: 256,
            handshake_timeout: Duration::from_secs(10),
            streams_per_connection: 1024,
            header_bytes: 16 << 10,
            message_bytes: 4 << 20,
            manifest_bytes: 64 << 20,
            concurrent_applies: 4,
            apply_timeout: Duration::from_secs(120),
        }
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML of this shape.
    #[error("{path}: {reason}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why, in one line.
        reason: String,
    },
    /// A value makes no sense.
    #[error("{field}: {reason}")]
    Invalid {
        /// The key.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read, has an unknown key or a value that cannot work.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            reason: in_one_line(&text, &error),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Whether the values make sense together.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let invalid = |field, reason: &str| {
            Err(ConfigError::Invalid {
                field,
                reason: reason.to_owned(),
            })
        };
        if let Some(address) = self.insecure_listen.iter().find(|address| !address.ip().is_loopback())
            && !self.insecure_listen_anywhere
        {
            return invalid("insecure_listen", &format!("{address} is not a loopback address"));
        }
        for (field, network) in [("service_cidr", self.service_cidr), ("pod_cidr", self.pod_cidr)] {
            if network.trunc() != network {
                return invalid(field, "has bits set behind its prefix");
            }
        }
        if self.pod_cidr.contains(&self.service_cidr) || self.service_cidr.contains(&self.pod_cidr) {
            return invalid("service_cidr", "overlaps with pod_cidr");
        }
        if let Some(address) = self.advertise_address {
            if let Err(reason) = endpoint_address(&address.to_string()) {
                return invalid("advertise_address", reason);
            }
            if self.service_cidr.contains(&address) || self.pod_cidr.contains(&address) {
                return invalid("advertise_address", "lies in service_cidr or pod_cidr");
            }
        }
        if self.advertise_port == Some(0) {
            return invalid("advertise_port", "must not be 0");
        }
        if self.pod_cidr_prefix < self.pod_cidr.prefix_len() || self.pod_cidr_prefix > 30 {
            return invalid("pod_cidr_prefix", "must lie between pod_cidr's prefix and 30");
        }
        if self.node.monitor_grace <= LEASE_INTERVAL || self.node.lease_duration <= LEASE_INTERVAL {
            return invalid(
                "node",
                "monitor_grace and lease_duration must be longer than the 10 s between two renewals",
            );
        }
        if !(self.node.eviction_rate > 0.0 && self.node.eviction_rate <= MAX_EVICTION_RATE) {
            return invalid("node.eviction_rate", "must be more than 0 and at most 1000");
        }
        self.leader.check()?;
        if self.store.engine == Engine::Etcd && self.store.etcd.endpoints.is_empty() {
            return invalid("store.etcd.endpoints", "is empty");
        }
        if self.limits.connections == 0 || self.limits.handshakes == 0 || self.limits.anonymous_connections == 0 {
            return invalid(
                "limits",
                "connections, anonymous_connections and handshakes must not be 0",
            );
        }
        if self.limits.concurrent_applies == 0 {
            return invalid("limits", "concurrent_applies must not be 0");
        }
        Ok(())
    }

    /// The ranges that the registry gives addresses from.
    pub fn registry(&self) -> RegistryConfig {
        RegistryConfig {
            service_cidr: self.service_cidr,
            pod_cidr: self.pod_cidr,
            pod_cidr_prefix: self.pod_cidr_prefix,
        }
    }

    /// What the server's certificate is for: the configured names, and how pods call the API.
    pub fn certificate_names(&self, advertised: Option<SocketAddrV4>) -> Vec<String> {
        let mut names = self.server_names.clone();
        names.extend(SERVICE_NAMES.map(str::to_owned));
        names.extend(self.service_cidr.hosts().next().map(|address| address.to_string()));
        names.extend(advertised.map(|address| address.ip().to_string()));
        names
    }

    /// Where certificates and keys are.
    pub fn pki_dir(&self) -> PathBuf {
        self.data_dir.join("pki")
    }
}

/// The place and the reason; TOML's own text draws a picture of several lines, which logs cannot show.
fn in_one_line(text: &str, error: &toml::de::Error) -> String {
    let reason = error.message().replace('\n', "; ");
    let before = error.span().and_then(|span| text.get(..span.start));
    match before {
        Some(before) => {
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|character| *character != '\n').count() + 1;
            format!("line {line}, column {column}: {reason}")
        }
        None => reason,
    }
}

fn net(address: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(address), prefix)
}

/// "40s", "1m 30s", "2160h".
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let signed: jiff::SignedDuration = text.parse().map_err(D::Error::custom)?;
    signed
        .try_into()
        .map_err(|_| D::Error::custom("a duration must not be negative"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default_and_it_is_sound() {
        let config: Config = toml::from_str("").expect("parses");
        config.check().expect("sound");
        assert_eq!(config.pod_cidr.to_string(), "10.244.0.0/16");
    }

    #[test]
    fn reads_what_the_documentation_names() {
        let config: Config = toml::from_str(
            r#"
            data_dir = "/x"
            listen = ["127.0.0.1:7000"]
            server_names = ["control.example", "192.0.2.1"]
            service_cidr = "10.96.0.0/16"
            pod_cidr = "10.128.0.0/9"
            [store]
            engine = "etcd"
            [store.etcd]
            endpoints = ["http://127.0.0.1:1"]
            [node]
            lease_duration = "40s"
            monitor_grace = "1m 30s"
            eviction_rate = 5.0
            "#,
        )
        .expect("parses");
        config.check().expect("sound");
        assert_eq!(config.node.monitor_grace, Duration::from_secs(90));
        assert!((config.node.eviction_rate - 5.0).abs() < f64::EPSILON);
        assert_eq!(config.store.engine, Engine::Etcd);
    }

    #[test]
    fn an_error_says_where_and_why_once_and_in_one_line() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("control.toml");
        std::fs::write(&path, "pod_cidr_prefix = 24\n\n  listne = []\n").expect("writes");
        let error = anyhow::Error::new(Config::load(&path).expect_err("unknown key")).context("configuration");
        let text = format!("{error:#}");
        assert!(!text.contains('\n'), "{text}");
        assert!(
            text.contains("control.toml: line 3, column 3: unknown field `listne`"),
            "{text}"
        );
        assert_eq!(text.matches("listne").count(), 1, "{text}");
    }

    #[test]
    fn pods_may_call_the_api_by_the_service() {
        let config = Config::default();
        let names = config.certificate_names(Some(SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 7), 1)));
        for name in [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "10.96.0.1",
            "192.0.2.7",
        ] {
            assert!(names.iter().any(|one| one == name), "{name}");
        }
    }

    #[test]
    fn refuses_what_cannot_work() {
        assert!(toml::from_str::<Config>("listne = []").is_err());
        assert!(toml::from_str::<Config>("[node]\nmonitor_grace = \"-3s\"").is_err());
        for text in [
            "insecure_listen = [\"0.0.0.0:80\"]",
            "service_cidr = \"10.244.0.0/20\"",
            "pod_cidr = \"10.244.0.1/16\"",
            "pod_cidr_prefix = 8",
            "pod_cidr_prefix = 31",
            "advertise_address = \"127.0.0.1\"",
            "advertise_address = \"0.0.0.0\"",
            "advertise_address = \"10.96.0.1\"",
            "advertise_address = \"10.244.3.1\"",
            "advertise_port = 0",
            "[node]\neviction_rate = 0.0",
            "[node]\neviction_rate = -1.0",
            "[node]\neviction_rate = nan",
            "[node]\neviction_rate = inf",
        ] {
            let config: Config = toml::from_str(text).expect("parses");
            assert!(config.check().is_err(), "{text}");
        }
        let config: Config =
            toml::from_str("insecure_listen = [\"0.0.0.0:80\"]\ninsecure_listen_anywhere = true").expect("parses");
        config.check().expect("asked for");
    }
}
