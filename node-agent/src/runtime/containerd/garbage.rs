//! What images there are, which are in use, and the removal of those that are not.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use containerd_client::services::v1::{
    DeleteImageRequest, DeleteRequest, ListContainersRequest, ListImagesRequest, ListRequest, PluginsRequest,
};

use super::{Containerd, client::Refusal as _};
use crate::runtime::{
    RuntimeError,
    garbage::{ImageStore, Unwanted},
    pause_image,
};

/// containerd removes files before it answers.
const DEADLINE: Duration = Duration::from_secs(600);
/// What the leases of imports begin with; then comes which life of the agent it was.
const IMPORT: &str = "orlop-import-";

impl Containerd {
    /// See [`crate::runtime::Runtime::images`]. Imports that an earlier life of the agent left half-done are removed first.
    pub(super) async fn stored_images(&self) -> Result<ImageStore, RuntimeError> {
        self.remove_stale_leases().await?;
        let request = self.client.request(ListImagesRequest::default());
        let images = self
            .client
            .call("listing images", self.client.images().list(request))
            .await?;
        let used = self.used_images(Vec::new()).await?;
        let pause = pause_image::name();
        let images = images.images.into_iter().map(|image| {
            let in_use = image.name == pause || used.contains(&image.name);
            (image.name, in_use)
        });
        let root = self.snapshots_root().await?;
        let disk = rustix::fs::statvfs(&root).map_err(|source| RuntimeError::Io {
            doing: format!("asking how full the disk of {} is", root.display()),
            source: source.into(),
        })?;
        Ok(ImageStore {
            disk_total: disk.f_blocks * disk.f_frsize,
            disk_free: disk.f_bavail * disk.f_frsize,
            images: images.collect(),
        })
    }

    /// See [`crate::runtime::Runtime::remove_image`].
    pub(super) async fn drop_image(&self, name: &str, unwanted: Unwanted<'_>) -> Result<bool, RuntimeError> {
        let turn = self.turn(name).await;
        // One that is being pulled is about to be used. While this is held nobody finds it, and who comes later pulls it again.
        let Ok(mut last) = turn.try_lock() else {
            return Ok(false);
        };
        let filter = format!("image==\"{name}\"");
        if name == pause_image::name() || !unwanted(name) || !self.used_images(vec![filter]).await?.is_empty() {
            return Ok(false);
        }
        *last = None;
        let request = self.client.request(DeleteImageRequest {
            name: name.to_owned(),
            sync: true,
            ..DeleteImageRequest::default()
        });
        let deleted = self
            .client
            .call_within(DEADLINE, "deleting an image", self.client.images().delete(request))
            .await;
        Ok(deleted.found()?.is_some())
    }

    /// What the leases of this life's imports begin with.
    pub(super) fn lease_prefix(&self) -> String {
        format!("{IMPORT}{}-", self.life)
    }

    /// The images that containers were made from.
    async fn used_images(&self, filters: Vec<String>) -> Result<BTreeSet<String>, RuntimeError> {
        let request = self.client.request(ListContainersRequest { filters });
        let containers = self
            .client
            .call("listing containers", self.client.containers().list(request))
            .await?;
        Ok(containers
            .containers
            .into_iter()
            .map(|container| container.image)
            .collect())
    }

    async fn remove_stale_leases(&self) -> Result<(), RuntimeError> {
        let request = self.client.request(ListRequest { filters: Vec::new() });
        let leases = self
            .client
            .call("listing leases", self.client.leases().list(request))
            .await?;
        let own = self.lease_prefix();
        let stale = leases.leases.into_iter().map(|lease| lease.id);
        for id in stale.filter(|id| id.starts_with(IMPORT) && !id.starts_with(&own)) {
            tracing::info!(lease = id, "removing what an import left that was cut off");
            let request = self.client.request(DeleteRequest { id, sync: true });
            self.client
                .call_within(DEADLINE, "deleting a lease", self.client.leases().delete(request))
                .await
                .found()?;
        }
        Ok(())
    }

    /// Where the snapshotter keeps its files, as it says itself.
    async fn snapshots_root(&self) -> Result<PathBuf, RuntimeError> {
        let snapshotter = &self.options.snapshotter;
        let request = self.client.request(PluginsRequest {
            filters: vec![format!("type==io.containerd.snapshotter.v1,id=={snapshotter}")],
        });
        let plugins = self
            .client
            .call("asking for plugins", self.client.introspection().plugins(request))
            .await?;
        let root = plugins.plugins.iter().find_map(|plugin| plugin.exports.get("root"));
        root.map(PathBuf::from).ok_or_else(|| RuntimeError::Io {
            doing: format!("asking containerd where its snapshotter {snapshotter} keeps its files"),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }
}
