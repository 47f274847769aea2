//! Layers: unpacked by containerd into snapshots, within bounds, and checked against the image's configuration.
//!
//! containerd keeps what it unpacks inside of the snapshot, whatever a layer's names and links say. How much that is, is watched
//! here: a layer of a few kilobytes may unpack to terabytes.

use std::{collections::HashMap, time::Duration};

use containerd_client::{
    services::v1::{
        ApplyRequest,
        snapshots::{
            CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest,
        },
    },
    types,
};

use super::{Containerd, client::Refusal as _, content};
use crate::runtime::{
    RuntimeError,
    image_source::{Descriptor, Manifest, digest_of},
};

/// No layer may take longer to unpack.
const DEADLINE: Duration = Duration::from_secs(600);
/// How often what is being unpacked is measured.
const LOOK: Duration = Duration::from_millis(250);

/// What an image's layers may still unpack to.
#[derive(Debug, Clone, Copy)]
struct Budget {
    bytes: u64,
    files: u64,
}

/// Which layer of which image.
#[derive(Clone, Copy)]
struct Layer<'a> {
    image: &'a str,
    blob: &'a Descriptor,
    diff_id: &'a str,
    /// The snapshots below it and of it.
    parent: &'a str,
    chain_id: &'a str,
}

impl Containerd {
    /// Applies the layers, one snapshot each, and lets the configuration's blob hold the last.
    pub(super) async fn unpack(&self, name: &str, lease: &str, manifest: &Manifest) -> Result<(), RuntimeError> {
        let configuration = self.configuration(name, manifest).await?;
        let diff_ids = &configuration.rootfs.diff_ids;
        let chain = chain_ids(diff_ids);
        let mut budget = Budget {
            bytes: self.options.images.max_unpacked_bytes,
            files: self.options.images.max_unpacked_files,
        };
        let mut parent = "";
        for ((blob, diff_id), chain_id) in manifest.layers.iter().zip(diff_ids).zip(&chain) {
            if !self.has_snapshot(chain_id).await? {
                let layer = Layer {
                    image: name,
                    blob,
                    diff_id,
                    parent,
                    chain_id,
                };
                budget = self.unpack_layer(lease, layer, budget).await?;
            }
            parent = chain_id;
        }
        if parent.is_empty() {
            return Ok(());
        }
        let label = format!("containerd.io/gc.ref.snapshot.{}", self.options.snapshotter);
        let labels = HashMap::from([(label, parent.to_owned())]);
        content::label(&self.client, &manifest.config.digest, labels).await
    }

    /// Unpacks one layer to its snapshot; what it leaves of the budget is returned. On failure nothing remains.
    async fn unpack_layer(&self, lease: &str, layer: Layer<'_>, budget: Budget) -> Result<Budget, RuntimeError> {
        let key = format!("orlop-extract-{}", uuid::Uuid::new_v4().simple());
        let request = PrepareSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: key.clone(),
            parent: layer.parent.to_owned(),
            labels: HashMap::new(),
        };
        let request = self.client.leased(lease, request);
        let prepared = self
            .client
            .call("preparing a snapshot", self.client.snapshots().prepare(request))
            .await?;
        let result = self.apply(layer, prepared.mounts, &key, budget).await;
        if result.is_err() {
            self.remove_snapshot(&key).await.ok();
        }
        result
    }

    async fn apply(
        &self,
        layer: Layer<'_>,
        mounts: Vec<types::Mount>,
        key: &str,
        budget: Budget,
    ) -> Result<Budget, RuntimeError> {
        let bad = |why: String| RuntimeError::BadImage {
            reference: layer.image.to_owned(),
            why: format!("layer {} {why}", layer.blob.digest),
        };
        let request = self.client.request(ApplyRequest {
            diff: Some(types::Descriptor {
                media_type: layer.blob.media_type.clone(),
                digest: layer.blob.digest.clone(),
                size: i64::try_from(layer.blob.size).unwrap_or(i64::MAX),
                annotations: HashMap::new(),
            }),
            mounts,
            ..ApplyRequest::default()
        });
        let mut diffs = self.client.diff();
        let applying = self
            .client
            .call_within(DEADLINE, "unpacking a layer", diffs.apply(request));
        tokio::pin!(applying);
        let applied = loop {
            tokio::select! {
                // Dropped when the budget is spent: containerd then stops unpacking.
                applied = &mut applying => break applied?,
                () = tokio::time::sleep(LOOK) => {
                    // Files that come and go under the measurement may make it fail; the last one counts.
                    if let Ok(used) = self.usage(key).await {
                        budget.less(used).map_err(bad)?;
                    }
                }
            }
        };
        let left = budget.less(self.usage(key).await?).map_err(bad)?;
        let digest = applied.applied.map(|applied| applied.digest).unwrap_or_default();
        if digest != layer.diff_id {
            let diff_id = layer.diff_id;
            return Err(bad(format!("unpacks to {digest}, its configuration says {diff_id}")));
        }
        let request = self.client.request(CommitSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            name: layer.chain_id.to_owned(),
            key: key.to_owned(),
            labels: HashMap::new(),
        });
        let committed = self
            .client
            .call("committing a snapshot", self.client.snapshots().commit(request))
            .await;
        if committed.made()?.is_none() {
            // Another image with the same layers was faster.
            self.remove_snapshot(key).await?;
        }
        Ok(left)
    }

    /// What a snapshot takes of the disk.
    async fn usage(&self, key: &str) -> Result<Budget, RuntimeError> {
        let request = self.client.request(UsageRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: key.to_owned(),
        });
        let mut snapshots = self.client.snapshots();
        let used = self.client.call("measuring a layer", snapshots.usage(request)).await?;
        Ok(Budget {
            bytes: u64::try_from(used.size).unwrap_or(0),
            files: u64::try_from(used.inodes).unwrap_or(0),
        })
    }

    async fn remove_snapshot(&self, key: &str) -> Result<(), RuntimeError> {
        let request = self.client.request(RemoveSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: key.to_owned(),
        });
        self.client
            .call("removing a snapshot", self.client.snapshots().remove(request))
            .await
            .found()?;
        Ok(())
    }

    pub(super) async fn has_snapshot(&self, key: &str) -> Result<bool, RuntimeError> {
        let request = StatSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: key.to_owned(),
        };
        let request = self.client.request(request);
        let answer = self
            .client
            .call("looking for a snapshot", self.client.snapshots().stat(request))
            .await;
        Ok(answer.found()?.is_some())
    }
}

impl Budget {
    /// What is left when this is used, or why it is not enough.
    fn less(self, used: Budget) -> Result<Budget, String> {
        let bytes = self.bytes.checked_sub(used.bytes).ok_or_else(|| {
            let left = self.bytes;
            format!("unpacks to more than the {left} bytes that images.max_unpacked_bytes leaves for it")
        })?;
        let files = self.files.checked_sub(used.files).ok_or_else(|| {
            let left = self.files;
            format!("unpacks to more than the {left} files that images.max_unpacked_files leaves for it")
        })?;
        Ok(Budget { bytes, files })
    }
}

/// The chain ids of layers, as the OCI image specification defines them.
pub(super) fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    for diff_id in diff_ids {
        let next = match chain.last() {
            Some(parent) => digest_of(format!("{parent} {diff_id}").as_bytes()),
            None => diff_id.clone(),
        };
        chain.push(next);
    }
    chain
}
