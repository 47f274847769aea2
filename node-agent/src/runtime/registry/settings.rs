//! What node.toml says about registries.

use std::{fmt, path::PathBuf};

use serde::Deserialize;

use crate::runtime::{garbage::GcSettings, reference::is_registry};

/// `[images]`: how images are pulled.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PullSettings {
    /// How many blobs of one registry are on their way at once. Default 4.
    pub parallel_downloads: usize,
    /// For so many seconds a registry may say nothing before a request is made again. Default 60.
    pub timeout_seconds: u64,
    /// How many bytes an image's layers may have, as they come. Default 32 GiB.
    pub max_image_bytes: u64,
    /// How many bytes an image's layers may have on disk when they are unpacked. Default 64 GiB.
    pub max_unpacked_bytes: u64,
    /// How many files an image's layers may have. Default 4 000 000.
    pub max_unpacked_files: u64,
    /// `[images.gc]`: when unused images go.
    pub gc: GcSettings,
}

impl Default for PullSettings {
    fn default() -> Self {
        Self {
            parallel_downloads: 4,
            timeout_seconds: 60,
            max_image_bytes: 32 << 30,
            max_unpacked_bytes: 64 << 30,
            max_unpacked_files: 4_000_000,
            gc: GcSettings::default(),
        }
    }
}

impl PullSettings {
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), &'static str> {
        if !(1..=256).contains(&self.parallel_downloads) {
            return Err("parallel_downloads must be from 1 to 256");
        }
        if !(1..=3600).contains(&self.timeout_seconds) {
            return Err("timeout_seconds must be from 1 to 3600");
        }
        self.gc.check()
    }
}

/// `[registries."HOST:PORT"]`: one registry.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySettings {
    /// Who asks, as basic authentication or at the registry's token service; with `password`.
    pub username: Option<String>,
    /// The password or token of `username`.
    pub password: Option<Secret>,
    /// A file of PEM certificates to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// HTTP without TLS: for registries on trusted networks only. Default false.
    pub plain_http: bool,
    /// Registries to ask before this one, each `HOST:PORT` with settings of its own.
    pub mirrors: Vec<String>,
}

impl RegistrySettings {
    /// What is wrong with it.
    pub fn check(&self, host: &str) -> Result<(), String> {
        let names = self.mirrors.iter().map(String::as_str).chain([host]);
        if let Some(name) = names.into_iter().find(|name| !is_registry(name)) {
            return Err(format!("{name:?} is no HOST or HOST:PORT"));
        }
        if self.username.is_some() != self.password.is_some() {
            return Err(format!("{host}: username and password belong together"));
        }
        if self.ca.is_some() && self.plain_http {
            return Err(format!("{host}: plain_http uses no ca"));
        }
        Ok(())
    }

    /// User name and password, if there are any.
    pub fn credentials(&self) -> Option<(String, Secret)> {
        self.username.clone().zip(self.password.clone())
    }
}

/// A password: never shown.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("(secret)")
    }
}
