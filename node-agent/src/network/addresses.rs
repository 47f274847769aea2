//! The addresses that pods had, for their next sandbox.
//!
//! A pod whose sandbox is made anew (after a reboot, or because its pause ended) asks for the addresses that it had: control and
//! every node lead to them, and while control is away nobody can be told of others. What the reboot of a machine took is remembered
//! on disk, a file a pod in `data_dir/cni/addresses`, until the pod has its network again; the rest in memory alone.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{NetworkError, attachments::write_durably};

/// What is remembered: addresses with their prefix lengths, by pod uid.
#[derive(Debug)]
pub struct Addresses {
    dir: PathBuf,
    known: Mutex<HashMap<String, Vec<String>>>,
}

impl Addresses {
    /// Reads and makes nothing yet.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            dir: data_dir.join("cni/addresses"),
            known: Mutex::default(),
        }
    }

    /// What the pod had; nothing when that is not known. A file that makes no sense says nothing.
    pub fn of(&self, uid: &str) -> Vec<String> {
        if let Some(known) = self.lock().get(uid) {
            return known.clone();
        }
        let bytes = self.path(uid).and_then(|path| fs::read(path).ok());
        let parsed = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        parsed.unwrap_or_default()
    }

    /// Remembers what the pod had; `durable`: it survives the agent.
    ///
    /// # Errors
    /// When it cannot be written: then it is remembered as long as the agent lives.
    pub fn keep(&self, uid: &str, addresses: Vec<String>, durable: bool) -> Result<(), NetworkError> {
        let Some(path) = self.path(uid).filter(|_| !addresses.is_empty()) else {
            return Ok(());
        };
        self.lock().insert(uid.to_owned(), addresses.clone());
        if durable {
            let write = || -> io::Result<()> {
                fs::create_dir_all(&self.dir)?;
                write_durably(&path, &serde_json::to_vec(&addresses)?)
            };
            write().map_err(|source| NetworkError::File {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// The pod has its network, or is no more.
    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
        if let Some(path) = self.path(uid)
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "remembered addresses cannot be removed");
        }
    }

    /// `None` for what is no file's name.
    fn path(&self, uid: &str) -> Option<PathBuf> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let usable = !uid.is_empty() && uid.len() <= 100 && uid.bytes().all(plain);
        usable.then(|| self.dir.join(format!("{uid}.json")))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reboot_took_outlives_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let had = || vec!["10.1.0.7/24".to_owned()];
        let first = Addresses::new(dir.path());
        first.keep("rebooted", had(), true).unwrap();
        first.keep("other", had(), false).unwrap();
        first.keep("../escape", had(), true).unwrap();
        assert_eq!((first.of("rebooted"), first.of("other")), (had(), had()));
        let second = Addresses::new(dir.path());
        assert_eq!((second.of("rebooted"), second.of("other")), (had(), Vec::new()));
        second.forget("rebooted");
        assert!(second.of("rebooted").is_empty());
        assert!(Addresses::new(dir.path()).of("rebooted").is_empty());
        fs::write(dir.path().join("cni/addresses/torn.json"), b"[\"10").unwrap();
        assert!(second.of("torn").is_empty(), "garbage says nothing");
        assert_eq!(fs::read_dir(dir.path().join("cni/addresses")).unwrap().count(), 1);
    }
}
