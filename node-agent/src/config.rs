//! `node.toml`: the agent's configuration.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    dataplane::Sizes,
    runtime::registry::{PullSettings, RegistrySettings},
};

/// The agent's configuration. Unknown keys are refused; every key has a default but `control`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's name, a DNS-1123 subdomain. Default: the host name.
    pub node_name: String,
    /// Durable state: identity, ledger, CNI results. Default `/var/lib/orlop/node`.
    pub data_dir: PathBuf,
    /// State that a reboot clears: sockets, pinned network namespaces. Default `/run/orlop`.
    pub run_dir: PathBuf,
    /// Control's addresses, `https://HOST:PORT`; tried in turn. Empty: the node runs by its ledger alone.
    pub control: Vec<String>,
    /// The token to join with, needed once; see `orlop.cluster.v1.Join`.
    pub join_token: Option<String>,
    /// A file that holds the token, instead of `join_token`.
    pub join_token_file: Option<PathBuf>,
    /// The address that other nodes reach this one by. Default: the one from which control is reached, else that of the
    /// interface with the default route.
    pub node_address: Option<IpAddr>,
    /// containerd's socket. Default `/run/containerd/containerd.sock`.
    pub containerd_socket: PathBuf,
    /// Where CNI configuration lists are read from, and the agent's own is written to. Default `/etc/cni/net.d`.
    pub cni_conf_dir: PathBuf,
    /// Where CNI plugins are looked for. Default `["/opt/cni/bin"]`.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// Directories with image archives (`*.tar`, docker-archive or OCI layout). What they have is not pulled. Default
    /// `["/var/lib/orlop/images"]`.
    pub image_dirs: Vec<PathBuf>,
    /// How images are pulled.
    pub images: PullSettings,
    /// Registries by `HOST` or `HOST:PORT`, as images name them (`docker.io` for those without): credentials, certificates,
    /// mirrors. One that is not here is asked over HTTPS, without credentials.
    pub registries: BTreeMap<String, RegistrySettings>,
    /// Where containers' logs go. Default `/var/log/pods`.
    pub log_dir: PathBuf,
    /// The BPF file system. Default `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// The pause program. Default: `orlop-pause` beside the agent's executable.
    pub pause_binary: PathBuf,
    /// The logger program. Default: `orlop-logger` beside the agent's executable.
    pub logger_binary: PathBuf,
    /// The unix socket that serves Prometheus text. Default `/run/orlop/metrics.sock`.
    pub metrics_socket: PathBuf,
    /// Seconds between two readings of the metrics. Default 5.
    pub metrics_interval_seconds: u64,
    /// How many pods the node takes. Default 110.
    pub max_pods: u32,
    /// The wait, in milliseconds, before a crashed container's second restart; it doubles with each. Default 10000.
    pub restart_backoff_ms: u64,
    /// The longest such wait, in milliseconds. Default 300000.
    pub restart_backoff_max_ms: u64,
    /// With less than this part of the disk free, in percent, the node has DiskPressure and gets no new pods. Default 5; 0
    /// switches it off.
    pub disk_pressure_percent: u64,
    /// What is kept back for the system, by resource name (`cpu = "100m"`, `memory = "256Mi"`): allocatable is capacity less
    /// this.
    pub reserved: BTreeMap<String, String>,
    /// How much the dataplane's maps hold.
    pub dataplane: Sizes,
}

impl Default for Config {
    fn default() -> Self {
        let beside = |name: &str| {
            std::env::current_exe()
                .ok()
                .and_then(|path| path.parent().map(|dir| dir.join(name)))
                .unwrap_or_else(|| Path::new("/usr/local/bin").join(name))
        };
        Self {
            node_name: host_name(),
            data_dir: "/var/lib/orlop/node".into(),
            run_dir: "/run/orlop".into(),
            control: Vec::new(),
            join_token: None,
            join_token_file: None,
            node_address: None,
            containerd_socket: "/run/containerd/containerd.sock".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            image_dirs: vec!["/var/lib/orlop/images".into()],
            images: PullSettings::default(),
            registries: BTreeMap::new(),
            log_dir: "/var/log/pods".into(),
            bpffs: "/sys/fs/bpf".into(),
            pause_binary: beside("orlop-pause"),
            logger_binary: beside("orlop-logger"),
            metrics_socket: "/run/orlop/metrics.sock".into(),
            metrics_interval_seconds: 5,
            max_pods: 110,
            restart_backoff_ms: 10_000,
            restart_backoff_max_ms: 300_000,
            disk_pressure_percent: 5,
            reserved: BTreeMap::new(),
            dataplane: Sizes::default(),
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key or a value of the wrong type.
    #[error("{path}: {source}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that makes no sense.
    #[error("{key}: {reason}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Config = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// INSTANCE: the node's name as cgroups and pins have it (bpffs refuses dots).
    pub fn instance(&self) -> String {
        self.node_name.replace('.', "_")
    }

    /// The join token from the configuration or its file, without surrounding white space.
    pub fn token(&self) -> Result<Option<String>, ConfigError> {
        match (&self.join_token, &self.join_token_file) {
            (Some(token), _) => Ok(Some(token.trim().to_owned())),
            (None, Some(path)) => std::fs::read_to_string(path)
                .map(|text| Some(text.trim().to_owned()))
                .map_err(|source| ConfigError::Read {
                    path: path.clone(),
                    source,
                }),
            (None, None) => Ok(None),
        }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |key, reason: &str| {
            Err(ConfigError::Invalid {
                key,
                reason: reason.to_owned(),
            })
        };
        let label = |part: &str| {
            !part.is_empty()
                && part.len() <= 63
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
                && !part.starts_with('-')
                && !part.ends_with('-')
        };
        if self.node_name.len() > 253 || !self.node_name.split('.').all(label) {
            return invalid(
                "node_name",
                "must be a DNS-1123 subdomain: lower case letters, digits, '-' and '.'",
            );
        }
        if self.control.iter().any(|address| !address.starts_with("https://")) {
            return invalid("control", "addresses must begin with https://");
        }
        if self.join_token.is_some() && self.join_token_file.is_some() {
            return invalid("join_token", "give either join_token or join_token_file");
        }
        if self.metrics_interval_seconds == 0 {
            return invalid("metrics_interval_seconds", "must be at least 1");
        }
        if self.disk_pressure_percent > 100 {
            return invalid("disk_pressure_percent", "is a part of the disk, 0 to 100");
        }
        if let Err(reason) = self.images.check() {
            return invalid("images", reason);
        }
        for (host, registry) in &self.registries {
            if let Err(reason) = registry.check(host) {
                return invalid("registries", &reason);
            }
        }
        for (key, path) in [
            ("data_dir", &self.data_dir),
            ("run_dir", &self.run_dir),
            ("log_dir", &self.log_dir),
        ] {
            if !path.is_absolute() {
                return invalid(key, "must be an absolute path");
            }
        }
        Ok(())
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::load(&path)
        };
        assert!(load("node_name = 'a.b-1'\ncontrol = ['https://127.0.0.1:6443']").is_ok());
        assert!(load("node_nam = 'a'").unwrap_err().to_string().contains("node_nam"));
        assert!(load("node_name = '-a'").unwrap_err().to_string().contains("node_name"));
        assert!(load("node_name = 'A'").is_err());
        assert!(load("node_name = 'a'\ncontrol = ['http://127.0.0.1:1']").is_err());
        assert!(load("node_name = 'a'\ndata_dir = 'relative'").is_err());
        assert!(load("node_name = 'a'\nmax_pods = -1").is_err());
        assert!(load("node_name = 'a'\n[images]\nparallel_downloads = 0").is_err());
        assert!(load("node_name = 'a'\n[registries.'r:5000']\nusername = 'u'").is_err());
        assert!(load("node_name = 'a'\n[registries.'http://r']\nplain_http = true").is_err());
        assert!(load("node_name = 'a'\n[registries.'r']\nmirrors = ['a/b']").is_err());
    }

    #[test]
    fn passwords_are_never_shown() {
        let text =
            "[registries.'r.example:5000']\nusername = 'u'\npassword = 'hidden'\nca = '/ca.pem'\nmirrors = ['m:1']";
        let config: Config = toml::from_str(text).unwrap();
        config.validate().unwrap();
        assert!(!format!("{config:?}").contains("hidden"));
    }

    #[test]
    fn instance_has_no_dots() {
        let config = Config {
            node_name: "a.b.c".into(),
            ..Config::default()
        };
        assert_eq!(config.instance(), "a_b_c");
    }
}
