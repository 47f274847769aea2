//! Where the network's files and programs are.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::config::Config;

/// Where things are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where configurations are read from and the agent's own is written to.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// What must survive a reboot: the cached results.
    pub data_dir: PathBuf,
    /// What a reboot clears: pinned namespaces, address leases.
    pub run_dir: PathBuf,
    /// The node's address: its interface's MTU is the pods' too.
    pub node_address: Option<IpAddr>,
    /// For each run of a plugin.
    pub plugin_timeout: Duration,
    /// What tells one boot of the machine from another.
    pub boot_id_file: PathBuf,
    /// `runtimeConfig` for plugins that declare the capability of that name.
    pub capability_args: BTreeMap<String, Value>,
}

impl Settings {
    /// From the agent's configuration. Plugins are also looked for beside the agent's executable, last.
    pub fn new(config: &Config) -> Self {
        let mut bin_dirs = config.cni_bin_dirs.clone();
        let beside = std::env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().map(Path::to_owned));
        bin_dirs.extend(beside.filter(|dir| !config.cni_bin_dirs.contains(dir)));
        Self {
            conf_dir: config.cni_conf_dir.clone(),
            bin_dirs,
            data_dir: config.data_dir.clone(),
            run_dir: config.run_dir.clone(),
            node_address: config.node_address,
            plugin_timeout: Duration::from_secs(60),
            boot_id_file: "/proc/sys/kernel/random/boot_id".into(),
            capability_args: BTreeMap::new(),
        }
    }
}
