//! Where everything is pinned.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::dataplane::Config;

/// Paths of the pins.
#[derive(Debug, Clone)]
pub struct Pins {
    pub(super) root: PathBuf,
}

impl Pins {
    /// Those of an instance.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            root: config.bpffs.join("orlop").join(&config.instance),
        }
    }

    /// The directory of all.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A map's.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The link of a program that is attached once.
    #[must_use]
    pub fn link(&self, program: &str) -> PathBuf {
        self.root.join(format!("{program}_link"))
    }

    /// The directory of the pods' links.
    #[must_use]
    pub fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// The link of a program at a pod's interface: `UID_ingress`, `UID_egress`.
    #[must_use]
    pub fn pod_link(&self, uid: &str, program: &str) -> PathBuf {
        let side = program.rsplit('_').next().unwrap_or(program);
        self.pods().join(format!("{uid}_{side}"))
    }

    pub(super) fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    /// The replacement of a map that is being made larger.
    pub(super) fn new_map(&self, name: &str) -> PathBuf {
        self.root.join(format!("new_{name}"))
    }
}

/// Names and paths of all pods' links.
pub fn pod_links(pins: &Pins) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    fs::read_dir(pins.pods())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}
