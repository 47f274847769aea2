//! [`Network`] on a real node: the CNI runtime.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use orlop_proto::node::v1 as link;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, RwLock};

use super::{
    Attachment, Network, NetworkError, NetworkStatus, PodNetwork, Stale,
    addresses::Addresses,
    attachments::{Attachments, Record},
    conflist::{Configurations, plugin_type},
    kernel,
    namespace::{self, Pins},
    own_conflist, plugin, result,
    routes::{parse_ranges, wanted_routes},
    settings::Settings,
};
use crate::desired::Routes;

mod calls;

/// The interface that a sandbox gets.
const IFNAME: &str = "eth0";

/// The network of a node, through CNI plugins.
#[derive(Debug)]
pub struct CniNetwork {
    settings: Settings,
    configurations: Configurations,
    pins: Pins,
    attachments: Attachments,
    addresses: Addresses,
    /// One call at a time for a sandbox.
    busy: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    /// GC must not see half an ADD: they read, it writes.
    collecting: RwLock<()>,
}

impl CniNetwork {
    /// Makes nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            configurations: Configurations::new(&settings.conf_dir),
            pins: Pins::new(&settings.run_dir),
            attachments: Attachments::new(&settings.data_dir),
            addresses: Addresses::new(&settings.data_dir),
            busy: Mutex::default(),
            collecting: RwLock::default(),
            settings,
        }
    }

    async fn lock(&self, sandbox_id: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            busy.entry(sandbox_id.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }

    fn boot_id(&self) -> Result<String, NetworkError> {
        let path = &self.settings.boot_id_file;
        let text = fs::read_to_string(path).map_err(|source| NetworkError::File {
            path: path.clone(),
            source,
        })?;
        Ok(text.trim().to_owned())
    }

    /// The sandbox's record. What an unreadable one said is lost: it stands for an ADD with today's configuration that
    /// was cut off, so that it can be taken down, and does not keep all others from being listed.
    fn record(&self, sandbox_id: &str) -> Result<Option<Record>, NetworkError> {
        match self.attachments.read(sandbox_id) {
            Err(NetworkError::File { path, source }) if is_garbage(&source) => {
                tracing::error!(path = %path.display(), error = %source, "cached CNI result cannot be read");
                let netns = self.pins.path(sandbox_id);
                let pod = PodNetwork {
                    namespace: String::new(),
                    name: String::new(),
                    uid: String::new(),
                    sandbox_id: sandbox_id.to_owned(),
                    netns,
                };
                let list = self.configurations.load()?;
                Ok(Some(Record {
                    pod: (&pod).into(),
                    list,
                    namespace: None,
                    boot_id: String::new(),
                    result: None,
                    reached: None,
                }))
            }
            other => other,
        }
    }
}

#[async_trait]
impl Network for CniNetwork {
    async fn create_namespace(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError> {
        check_id(sandbox_id)?;
        let _one = self.lock(sandbox_id).await;
        let (pins, id) = (self.pins.clone(), sandbox_id.to_owned());
        blocking(move || pins.create(&id)).await
    }

    async fn delete_namespace(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        check_id(sandbox_id)?;
        let _one = self.lock(sandbox_id).await;
        let (pins, id) = (self.pins.clone(), sandbox_id.to_owned());
        blocking(move || pins.delete(&id)).await
    }

    async fn add(&self, pod: &PodNetwork) -> Result<NetworkStatus, NetworkError> {
        check_id(&pod.sandbox_id)?;
        let _collecting = self.collecting.read().await;
        let _one = self.lock(&pod.sandbox_id).await;
        let namespace = namespace::identity(&pod.netns);
        if namespace.is_none() {
            return Err(NetworkError::Invalid(format!(
                "{} is not a network namespace",
                pod.netns.display()
            )));
        }
        let boot_id = self.boot_id()?;
        if let Some(record) = self.record(&pod.sandbox_id)? {
            let same = record.namespace == namespace && record.boot_id == boot_id;
            if let (true, Some(value)) = (same, &record.result) {
                return result::status(value, &pod.netns).map_err(NetworkError::Invalid);
            }
            // Cut off half-way, or of a namespace that is no more.
            self.del_recorded(&pod.sandbox_id).await?;
        }
        let list = self.configurations.load()?;
        let mut record = Record {
            pod: pod.into(),
            list,
            namespace,
            boot_id,
            result: None,
            reached: None,
        };
        let had = self.addresses.of(&pod.uid);
        let mut added = self.add_recorded(&mut record, pod, &had).await;
        if let Err(error) = &added
            && !had.is_empty()
            && calls::refuses_addresses(&record.list, error)
        {
            // Another pod has them by now, or the node's range is another.
            tracing::warn!(pod = pod.uid, addresses = ?had, error = %error, "a pod does not get the addresses that it had");
            record.reached = None;
            added = self.add_recorded(&mut record, pod, &[]).await;
        }
        if added.is_ok() {
            self.addresses.forget(&pod.uid);
        }
        added
    }

    fn forget(&self, pod_uid: &str) {
        self.addresses.forget(pod_uid);
    }

    async fn check(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        check_id(&pod.sandbox_id)?;
        let _collecting = self.collecting.read().await;
        let _one = self.lock(&pod.sandbox_id).await;
        let record = self.record(&pod.sandbox_id)?;
        let Some((record, Some(value))) = record.map(|r| {
            let value = r.result.clone();
            (r, value)
        }) else {
            return Err(NetworkError::Invalid(format!(
                "sandbox {} was not added",
                pod.sandbox_id
            )));
        };
        if record.list.disable_check || !record.list.at_least("0.4.0") {
            return Ok(());
        }
        for config in &record.list.plugins {
            self.run(&record.list, config, "CHECK", Some(pod), Some(&value)).await?;
        }
        Ok(())
    }

    async fn del(&self, pod: &PodNetwork) -> Result<(), NetworkError> {
        check_id(&pod.sandbox_id)?;
        let _collecting = self.collecting.read().await;
        let _one = self.lock(&pod.sandbox_id).await;
        self.del_recorded(&pod.sandbox_id).await
    }

    async fn list(&self) -> Result<Vec<Attachment>, NetworkError> {
        let pinned = self.pins.list()?;
        let recorded = self.attachments.list()?;
        let ids: BTreeSet<String> = pinned
            .into_iter()
            .chain(recorded)
            .filter(|id| check_id(id).is_ok())
            .collect();
        let mut all = Vec::new();
        for sandbox_id in ids {
            let path = self.pins.path(&sandbox_id);
            let record = self.record(&sandbox_id)?;
            let pod = record.as_ref().map(|record| PodNetwork::from(&record.pod));
            // Whom an unreadable record was for is not known; nobody may take its sandbox for another pod's.
            let pod = pod.filter(|pod| !pod.uid.is_empty());
            let status = record.as_ref().and_then(|record| {
                result::status(record.result.as_ref()?, pod.as_ref().map_or(&path, |pod| &pod.netns)).ok()
            });
            let netns = path.symlink_metadata().is_ok().then_some(path);
            all.push(Attachment {
                sandbox_id,
                netns,
                pod,
                status,
            });
        }
        Ok(all)
    }

    async fn gc(&self, valid: &BTreeSet<String>) -> Result<(), NetworkError> {
        let _collecting = self.collecting.write().await;
        let mut errors = Vec::new();
        for attachment in self.list().await? {
            let id = &attachment.sandbox_id;
            if valid.contains(id) {
                continue;
            }
            tracing::info!(sandbox = id, "clearing the network of a sandbox that is gone");
            match self.del_recorded(id).await {
                Ok(()) => errors.extend(self.pins.delete(id).err()),
                Err(error) => errors.push(error),
            }
        }
        errors.extend(self.garbage_verb(valid).await.err());
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(NetworkError::Several(errors)),
        }
    }

    async fn configure(&self, ranges: &link::Welcome, routes: &Routes, stale: Stale) -> Result<(), NetworkError> {
        let own = parse_ranges(&ranges.pod_cidrs)?;
        if own.is_empty() {
            return Err(NetworkError::Invalid("the node has no pod range".into()));
        }
        kernel::enable_forwarding(&own)?;
        let mtu = kernel::uplink_mtu(self.settings.node_address).await?;
        let (run_dir, boot_id_file) = (&self.settings.run_dir, &self.settings.boot_id_file);
        let conflist = own_conflist::conflist(&own, mtu, &run_dir.join("ipam"), boot_id_file);
        if own_conflist::install(&self.settings.conf_dir, &conflist)? {
            tracing::info!(ranges = ?own, mtu, "CNI configuration written");
        }
        let (wanted, mut errors) = wanted_routes(&own, &ranges.cluster_pod_cidr, routes);
        errors.extend(kernel::sync_routes(&wanted, stale).await.err());
        if errors.is_empty() {
            Ok(())
        } else {
            Err(NetworkError::Several(errors))
        }
    }

    async fn ready(&self) -> Result<(), String> {
        let list = self.configurations.load().map_err(|e| e.to_string())?;
        for config in &list.plugins {
            let name = plugin_type(config);
            plugin::find(&self.settings.bin_dirs, name).map_err(|reason| format!("plugin {name}: {reason}"))?;
            if list.at_least("1.1.0") {
                self.call(&list, config, "STATUS", None, &[])
                    .await
                    .map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

/// A sandbox's id is a file's name and a CNI container id.
fn check_id(id: &str) -> Result<(), NetworkError> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    let first = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && id.len() <= 200 && id.bytes().all(legal) {
        return Ok(());
    }
    Err(NetworkError::Invalid(format!(
        "{:?} is not a sandbox id",
        id.chars().take(80).collect::<String>()
    )))
}

fn is_garbage(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
    )
}

async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(f)
        .await
        .unwrap_or_else(|e| Err(NetworkError::Invalid(e.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_no_file_names_are_refused() {
        for id in ["", "..", "../x", "a/b", "a b", "-a", "\u{e4}"] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        assert!(check_id("Ab0_.-").is_ok());
    }
}
