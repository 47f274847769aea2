//! Images: found in sources, written to the content store, unpacked to snapshots.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use containerd_client::{
    services::v1::{
        CreateImageRequest, CreateRequest, DeleteRequest, GetImageRequest, Image as Record, UpdateImageRequest,
    },
    types,
};
use futures::{StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Containerd,
    client::{Client, Refusal as _},
    content::{self, Blob},
    unpack::chain_ids,
};
use crate::runtime::{
    Image, ImageConfig, ImageRequest, PullPolicy, RuntimeError,
    image_source::{Descriptor, FoundImage, Manifest, Platform, digest_of},
    pause_image,
    reference::{Reference, is_digest},
};

/// No JSON file of an image may be larger.
const MAX_JSON: usize = 4 << 20;
/// An import that was cut off is collected after this time.
const LEASE_HOURS: i64 = 24;

/// How many blobs of one image are written at once.
const PARALLEL_BLOBS: usize = 3;

/// Whose turn it is to import an image, and when and how the last import of it ended.
pub(super) type Turn = tokio::sync::Mutex<Option<(Instant, Result<String, Arc<RuntimeError>>)>>;

/// The part of an image's configuration that is used.
#[derive(Deserialize)]
pub(super) struct Configuration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Process>,
    pub(super) rootfs: RootFs,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RootFs {
    #[serde(default)]
    pub(super) diff_ids: Vec<String>,
}

/// An image index, as other tools may have imported one.
#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

impl Containerd {
    /// Makes an image ready: see [`crate::runtime::Runtime::ensure_image`].
    pub(super) async fn image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        let reference = Reference::parse(&request.reference)?;
        let name = reference.to_string();
        let asked = Instant::now();
        let turn = self.turn(&name).await;
        let mut last = turn.lock().await;
        let present = self.record(&name).await?;
        let target = match (request.policy, present) {
            (PullPolicy::Never, None) => {
                return Err(RuntimeError::ImageNeverPull {
                    reference: request.reference.clone(),
                });
            }
            (PullPolicy::Never | PullPolicy::IfNotPresent, Some(target)) => target,
            (_, present) => match &*last {
                // It was under way when this was asked for: its end is this one's, too.
                Some((ended, outcome)) if *ended >= asked => outcome.clone().map_err(RuntimeError::Shared)?,
                _ => {
                    let outcome = self.fetch(&reference, present).await.map_err(Arc::new);
                    *last = Some((Instant::now(), outcome.clone()));
                    outcome.map_err(RuntimeError::Shared)?
                }
            },
        };
        drop(last);
        self.load(&name, &target).await
    }

    /// See [`crate::runtime::Runtime::has_image`].
    pub(super) async fn is_present(&self, reference: &str) -> Result<bool, RuntimeError> {
        let name = Reference::parse(reference)?.to_string();
        Ok(self.record(&name).await?.is_some())
    }

    /// Looks for the image in the sources and imports what containerd does not have of it; returns the manifest's digest.
    async fn fetch(&self, reference: &Reference, present: Option<String>) -> Result<String, RuntimeError> {
        let name = reference.to_string();
        match self.find(reference).await? {
            Some(found) if present.as_ref() == Some(&digest_of(&found.manifest)) => Ok(digest_of(&found.manifest)),
            Some(found) => self.import(&name, &found).await.map_err(|error| match error {
                RuntimeError::Io { .. } | RuntimeError::Containerd { .. } => RuntimeError::ImagePull {
                    reference: name,
                    why: error.to_string(),
                },
                other => other,
            }),
            None => Err(RuntimeError::ImageNotFound {
                reference: name,
                why: "no source has it".to_owned(),
            }),
        }
    }

    /// The pause image, built from the program when containerd has none, or another program's.
    pub(super) async fn pause_image(&self) -> Result<Image, RuntimeError> {
        let name = pause_image::name();
        let turn = self.turn(&name).await;
        let _turn = turn.lock().await;
        let program = self.options.pause_binary.clone();
        let built = tokio::task::spawn_blocking(move || pause_image::build(&program))
            .await
            .map_err(std::io::Error::other)
            .and_then(|built| built)
            .map_err(|source| RuntimeError::Io {
                doing: format!("reading {}", self.options.pause_binary.display()),
                source,
            })?;
        let digest = digest_of(&built.manifest);
        let target = match self.record(&name).await? {
            Some(target) if target == digest => target,
            _ => self.import(&name, &built).await?,
        };
        self.load(&name, &target).await
    }

    /// The lock of an image's name.
    pub(super) async fn turn(&self, name: &str) -> Arc<Turn> {
        let mut imports = self.imports.lock().await;
        imports.retain(|_, turn| Arc::strong_count(turn) > 1);
        imports.entry(name.to_owned()).or_default().clone()
    }

    async fn find(&self, reference: &Reference) -> Result<Option<FoundImage>, RuntimeError> {
        for source in &self.sources {
            if let Some(found) = source.find(reference).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The digest that the image's record points to.
    async fn record(&self, name: &str) -> Result<Option<String>, RuntimeError> {
        let request = self.client.request(GetImageRequest { name: name.to_owned() });
        let answer = self
            .client
            .call("looking for an image", self.client.images().get(request))
            .await
            .found()?;
        Ok(answer
            .and_then(|answer| answer.image?.target)
            .map(|target| target.digest))
    }

    /// Writes the image's blobs and record; returns the manifest's digest.
    async fn import(&self, name: &str, found: &FoundImage) -> Result<String, RuntimeError> {
        let lease = self.import_lease().await?;
        let result = self.import_leased(name, &lease.id, found).await;
        lease.end(result).await
    }

    /// A new lease, for what containerd's garbage collector must not take before the image holds it.
    async fn import_lease(&self) -> Result<Lease, RuntimeError> {
        let id = format!("{}{}", self.lease_prefix(), uuid::Uuid::new_v4().simple());
        let expire = Timestamp::now() + SignedDuration::from_hours(LEASE_HOURS);
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), format!("{expire:.0}"))]);
        let request = self.client.request(CreateRequest { id: id.clone(), labels });
        self.client
            .call("creating a lease", self.client.leases().create(request))
            .await?;
        Ok(Lease {
            client: self.client.clone(),
            id,
            ended: false,
        })
    }

    async fn import_leased(&self, name: &str, lease: &str, found: &FoundImage) -> Result<String, RuntimeError> {
        let bad = |why: String| RuntimeError::BadImage {
            reference: name.to_owned(),
            why,
        };
        let manifest = checked_manifest(&found.manifest).map_err(bad)?;
        let blobs = manifest.layers.iter().chain([&manifest.config]);
        // Each once, however often it is named.
        let distinct: BTreeMap<&str, &Descriptor> = blobs.map(|blob| (blob.digest.as_str(), blob)).collect();
        let writes: Vec<_> = distinct
            .into_values()
            .map(|blob| self.import_blob(name, lease, found, blob))
            .collect();
        futures::stream::iter(writes)
            .buffer_unordered(PARALLEL_BLOBS)
            .try_collect::<()>()
            .await?;
        let mut labels: HashMap<String, String> = manifest
            .layers
            .iter()
            .enumerate()
            .map(|(at, layer)| (format!("containerd.io/gc.ref.content.l.{at}"), layer.digest.clone()))
            .collect();
        labels.insert(
            "containerd.io/gc.ref.content.config".to_owned(),
            manifest.config.digest.clone(),
        );
        let digest = digest_of(&found.manifest);
        let size = found.manifest.len();
        let write = Blob {
            digest: &digest,
            size: size as u64,
            labels,
        };
        content::write(
            &self.client,
            name,
            lease,
            write,
            std::io::Cursor::new(found.manifest.clone()),
        )
        .await?;
        // Unpacked before the record is there: an image that is listed can be run.
        self.unpack(name, lease, &manifest).await?;
        let image = Record {
            name: name.to_owned(),
            target: Some(types::Descriptor {
                media_type: found.media_type.clone(),
                digest: digest.clone(),
                size: i64::try_from(size).unwrap_or(i64::MAX),
                annotations: HashMap::new(),
            }),
            ..Record::default()
        };
        let request = CreateImageRequest {
            image: Some(image.clone()),
            source_date_epoch: None,
        };
        let request = self.client.request(request);
        let created = self
            .client
            .call("creating an image", self.client.images().create(request))
            .await
            .made()?;
        if created.is_none() {
            let request = self.client.request(UpdateImageRequest {
                image: Some(image),
                update_mask: Some(prost_types::FieldMask {
                    paths: vec!["target".to_owned()],
                }),
                source_date_epoch: None,
            });
            self.client
                .call("updating an image", self.client.images().update(request))
                .await?;
        }
        tracing::info!(image = name, digest, "imported an image");
        Ok(digest)
    }

    async fn import_blob(
        &self,
        name: &str,
        lease: &str,
        found: &FoundImage,
        blob: &Descriptor,
    ) -> Result<(), RuntimeError> {
        let from = found
            .blobs
            .open(&blob.digest)
            .await
            .map_err(|source| RuntimeError::Io {
                doing: format!("opening blob {}", blob.digest),
                source,
            })?;
        let write = Blob {
            digest: &blob.digest,
            size: blob.size,
            labels: HashMap::new(),
        };
        content::write(&self.client, name, lease, write, from).await
    }

    /// Reads an image that has a record, and unpacks it where that has not been done.
    async fn load(&self, name: &str, target: &str) -> Result<Image, RuntimeError> {
        let bad = |why: String| RuntimeError::BadImage {
            reference: name.to_owned(),
            why,
        };
        let mut digest = target.to_owned();
        let mut bytes = content::read(&self.client, &digest, MAX_JSON).await?;
        if let Ok(index) = serde_json::from_slice::<Index>(&bytes) {
            digest = index
                .manifests
                .into_iter()
                .find(|manifest| manifest.platform.as_ref().is_none_or(Platform::is_ours))
                .ok_or_else(|| bad("it is not for this platform".to_owned()))?
                .digest;
            bytes = content::read(&self.client, &digest, MAX_JSON).await?;
        }
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| bad(format!("its manifest: {error}")))?;
        let configuration = self.configuration(name, &manifest).await?;
        let chain_id = chain_ids(&configuration.rootfs.diff_ids).pop().unwrap_or_default();
        if !chain_id.is_empty() && !self.has_snapshot(&chain_id).await? {
            // The record holds the content, but no snapshot before the configuration's label names the last.
            let lease = self.import_lease().await?;
            let result = self.unpack(name, &lease.id, &manifest).await;
            lease.end(result).await?;
        }
        let process = configuration.config.unwrap_or_default();
        Ok(Image {
            name: name.to_owned(),
            id: manifest.config.digest,
            digest,
            chain_id,
            config: ImageConfig {
                entrypoint: process.entrypoint.unwrap_or_default(),
                cmd: process.cmd.unwrap_or_default(),
                env: process.env.unwrap_or_default(),
                working_dir: process.working_dir.unwrap_or_default(),
                user: process.user.unwrap_or_default(),
                stop_signal: process.stop_signal.unwrap_or_default(),
            },
        })
    }

    pub(super) async fn configuration(&self, name: &str, manifest: &Manifest) -> Result<Configuration, RuntimeError> {
        let bad = |why: String| RuntimeError::BadImage {
            reference: name.to_owned(),
            why,
        };
        let bytes = content::read(&self.client, &manifest.config.digest, MAX_JSON).await?;
        Configuration::parse(&bytes, manifest.layers.len()).map_err(bad)
    }
}

impl Configuration {
    /// Reads the configuration of an image of so many layers.
    fn parse(bytes: &[u8], layers: usize) -> Result<Self, String> {
        let configuration: Self =
            serde_json::from_slice(bytes).map_err(|error| format!("its configuration: {error}"))?;
        let platform = Platform {
            architecture: configuration.architecture.clone(),
            os: configuration.os.clone(),
        };
        if !platform.architecture.is_empty() && !platform.is_ours() {
            return Err(format!("it is for {}/{}", platform.os, platform.architecture));
        }
        if configuration.rootfs.diff_ids.len() != layers {
            return Err("its configuration names another number of layers than its manifest".to_owned());
        }
        // What they make are the names of snapshots: nobody else's may be named.
        if let Some(diff_id) = configuration.rootfs.diff_ids.iter().find(|id| !is_digest(id)) {
            return Err(format!(
                "its configuration names {diff_id:?}, which is no sha256 digest"
            ));
        }
        Ok(configuration)
    }
}

/// Reads the manifest of an image that is to be imported.
fn checked_manifest(bytes: &[u8]) -> Result<Manifest, String> {
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|error| format!("its manifest: {error}"))?;
    let blobs = || manifest.layers.iter().chain([&manifest.config]);
    if let Some(blob) = blobs().find(|blob| !is_digest(&blob.digest)) {
        return Err(format!("{:?} is no sha256 digest", blob.digest));
    }
    if let Some(layer) = manifest.layers.iter().find(|layer| !is_layer(&layer.media_type)) {
        let (kind, digest) = (&layer.media_type, &layer.digest);
        return Err(format!(
            "layer {digest} is of the media type {kind:?}, which is no layer's"
        ));
    }
    Ok(manifest)
}

/// The names of the snapshots of an image with this manifest and configuration; for who checks them from outside.
#[doc(hidden)]
pub fn snapshots(manifest: &[u8], configuration: &[u8]) -> Result<Vec<String>, String> {
    let manifest = checked_manifest(manifest)?;
    let configuration = Configuration::parse(configuration, manifest.layers.len())?;
    Ok(chain_ids(&configuration.rootfs.diff_ids))
}

/// An import's lease: it goes with this when nobody waits for the import any more, and so does what was written.
struct Lease {
    client: Client,
    id: String,
    ended: bool,
}

impl Lease {
    /// Deletes it. What a failed import has written is gone at once.
    async fn end<T>(mut self, result: Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        self.ended = true;
        delete_lease(&self.client, self.id.clone(), result.is_err()).await?;
        result
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        let (client, id) = (self.client.clone(), std::mem::take(&mut self.id));
        runtime.spawn(async move {
            if let Err(error) = delete_lease(&client, id, true).await {
                // The next life of the agent does it.
                tracing::warn!(%error, "what an abandoned import has written remains for now");
            }
        });
    }
}

async fn delete_lease(client: &Client, id: String, sync: bool) -> Result<(), RuntimeError> {
    let request = client.request(DeleteRequest { id, sync });
    client
        .call("deleting a lease", client.leases().delete(request))
        .await
        .found()?;
    Ok(())
}

/// The media types of layers, packed as containerd can unpack them.
fn is_layer(media_type: &str) -> bool {
    let plain = media_type
        .trim_end_matches("+gzip")
        .trim_end_matches("+zstd")
        .trim_end_matches(".gzip");
    [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ]
    .contains(&plain)
}
