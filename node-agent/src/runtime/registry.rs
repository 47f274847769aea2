//! Images from registries: OCI distribution over HTTP.
//!
//! Of an index the manifest for this platform is taken. Blobs are streamed, resumed where a connection broke, and never longer than
//! their manifest says; containerd checks their digests before it keeps them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{
    RuntimeError,
    image_source::{Blobs, Descriptor, FoundImage, ImageSource, MANIFEST, Manifest, Platform, digest_of},
    reference::{Reference, is_digest},
};

mod download;
#[doc(hidden)]
pub mod endpoint;
mod failure;
mod settings;

use download::Download;
use endpoint::Endpoint;
use failure::PullError;
pub use settings::{PullSettings, RegistrySettings, Secret};

/// What may be answered to a request for a manifest.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// No manifest or configuration may be larger.
const MAX_JSON: usize = 4 << 20;
/// No image may have more layers: overlayfs does not stack more.
const MAX_LAYERS: usize = 127;
/// How deep indexes may lie in each other.
const MAX_NESTING: usize = 4;
/// How many registries are remembered.
const MAX_ENDPOINTS: usize = 256;

/// The registries that images are pulled from.
pub struct Registries {
    settings: PullSettings,
    registries: BTreeMap<String, RegistrySettings>,
    endpoints: Mutex<HashMap<String, Arc<Endpoint>>>,
}

/// A manifest or an index.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
}

impl Registries {
    /// Pulls as the settings say; nothing is asked before an image is.
    pub fn new(settings: PullSettings, registries: BTreeMap<String, RegistrySettings>) -> Self {
        Self {
            settings,
            registries,
            endpoints: Mutex::default(),
        }
    }

    /// Where an image of this registry is looked for: its mirrors, then the registry itself.
    fn hosts(&self, domain: &str) -> Vec<String> {
        let mirrors = self.registries.get(domain).map(|registry| registry.mirrors.clone());
        mirrors
            .unwrap_or_default()
            .into_iter()
            .chain([domain.to_owned()])
            .collect()
    }

    async fn endpoint(&self, host: &str) -> Result<Arc<Endpoint>, PullError> {
        let mut endpoints = self.endpoints.lock().await;
        if let Some(endpoint) = endpoints.get(host) {
            return Ok(endpoint.clone());
        }
        let settings = self.registries.get(host).cloned().unwrap_or_default();
        let timeout = Duration::from_secs(self.settings.timeout_seconds);
        let parallel = self.settings.parallel_downloads;
        let endpoint = Arc::new(Endpoint::new(host, &settings, timeout, parallel).await?);
        if endpoints.len() >= MAX_ENDPOINTS {
            endpoints.clear();
        }
        endpoints.insert(host.to_owned(), endpoint.clone());
        Ok(endpoint)
    }

    async fn find_at(&self, host: &str, reference: &Reference) -> Result<FoundImage, PullError> {
        let endpoint = self.endpoint(host).await?;
        let repository = reference.path.clone();
        // A digest counts more than a tag.
        let named = reference.digest.clone().or(reference.tag.clone());
        let mut which = named.unwrap_or("latest".to_owned());
        let (mut bytes, mut document) = fetch(&endpoint, &repository, &which).await?;
        let mut depth = 0;
        while let Some(manifests) = document.manifests.take() {
            depth += 1;
            if depth > MAX_NESTING {
                return Err(PullError::lasting("its indexes lie too deep in each other"));
            }
            which = choose(&manifests)?.digest.clone();
            (bytes, document) = fetch(&endpoint, &repository, &which).await?;
        }
        let manifest: Manifest = parse("its manifest", &bytes)?;
        let sizes = self.checked_sizes(&manifest)?;
        let media_type = if document.media_type.is_empty() {
            MANIFEST.to_owned()
        } else {
            document.media_type
        };
        let blobs = Arc::new(RemoteBlobs {
            endpoint,
            repository,
            sizes,
        });
        Ok(FoundImage {
            media_type,
            manifest: bytes,
            blobs,
        })
    }

    /// The sizes of an image's blobs, if they are within the limits.
    fn checked_sizes(&self, manifest: &Manifest) -> Result<BTreeMap<String, u64>, PullError> {
        let (layers, limit) = (&manifest.layers, self.settings.max_image_bytes);
        if layers.len() > MAX_LAYERS {
            let count = layers.len();
            return Err(PullError::lasting(format!(
                "it has {count} layers, {MAX_LAYERS} are possible"
            )));
        }
        if manifest.config.size > MAX_JSON as u64 {
            return Err(PullError::lasting(format!(
                "its configuration is larger than {MAX_JSON} bytes"
            )));
        }
        let total = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        if total > limit {
            return Err(PullError::lasting(format!(
                "it has {total} bytes, images.max_image_bytes is {limit}"
            )));
        }
        let blobs = layers.iter().chain([&manifest.config]);
        Ok(blobs.map(|blob| (blob.digest.clone(), blob.size)).collect())
    }
}

#[async_trait]
impl ImageSource for Registries {
    async fn find(&self, reference: &Reference) -> Result<Option<FoundImage>, RuntimeError> {
        let mut failures = Vec::new();
        for host in self.hosts(&reference.domain) {
            match self.find_at(&host, reference).await {
                Ok(found) => return Ok(Some(found)),
                Err(error) => {
                    tracing::warn!(image = %reference, registry = host, %error, "an image cannot be pulled");
                    failures.push(format!("{host}: {error}"));
                }
            }
        }
        Err(RuntimeError::ImagePull {
            reference: reference.to_string(),
            why: failures.join("; "),
        })
    }
}

/// What is told of an answer that is no success; for who checks it from outside.
#[doc(hidden)]
pub fn complaint(status: u16, body: &[u8]) -> Option<String> {
    let status = reqwest::StatusCode::from_u16(status).ok()?;
    Some(PullError::of_answer(status, body).to_string())
}

/// Where a `Content-Range` begins, for who checks it from outside.
#[doc(hidden)]
pub fn range_begin(text: &str) -> Option<u64> {
    download::begin_of(text)
}

/// What is made of an answer to a request for a manifest; for who checks it from outside.
#[doc(hidden)]
pub fn check(bytes: &[u8]) -> Result<(), String> {
    let document: Document = parse("its manifest", bytes).map_err(|error| error.to_string())?;
    if let Some(manifests) = document.manifests {
        let chosen = choose(&manifests).map_err(|error| error.to_string())?;
        assert!(is_digest(&chosen.digest));
        return Ok(());
    }
    let manifest: Manifest = parse("its manifest", bytes).map_err(|error| error.to_string())?;
    let registries = Registries::new(PullSettings::default(), BTreeMap::new());
    let sizes = registries.checked_sizes(&manifest).map_err(|error| error.to_string())?;
    assert!(sizes.len() <= MAX_LAYERS + 1);
    Ok(())
}

/// A manifest or an index, by tag, or by the digest that it then has.
async fn fetch(endpoint: &Endpoint, repository: &str, which: &str) -> Result<(Bytes, Document), PullError> {
    let bytes = endpoint.manifest(repository, which, ACCEPTED, MAX_JSON).await?;
    let digest = digest_of(&bytes);
    if which.contains(':') && digest != which {
        return Err(PullError::lasting(format!(
            "its manifest should be {which}, but is {digest}"
        )));
    }
    let document = parse("its manifest", &bytes)?;
    Ok((bytes, document))
}

/// The manifest for this platform.
fn choose(manifests: &[Descriptor]) -> Result<&Descriptor, PullError> {
    let ours = |manifest: &&Descriptor| manifest.platform.as_ref().is_some_and(Platform::is_ours);
    let chosen = manifests.iter().find(ours);
    let chosen = chosen.or_else(|| manifests.iter().find(|manifest| manifest.platform.is_none()));
    let chosen = chosen.ok_or_else(|| {
        let platforms = manifests.iter().filter_map(|manifest| manifest.platform.as_ref());
        let names: Vec<String> = platforms
            .map(|platform| format!("{}/{}", platform.os, platform.architecture))
            .collect();
        PullError::lasting(format!("it is not for this platform, but for {}", names.join(", ")))
    })?;
    if !is_digest(&chosen.digest) {
        return Err(PullError::lasting(format!("{:?} is no sha256 digest", chosen.digest)));
    }
    Ok(chosen)
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, PullError> {
    serde_json::from_slice(bytes).map_err(|error| PullError::lasting(format!("{what}: {error}")))
}

/// An image's blobs in a registry.
struct RemoteBlobs {
    endpoint: Arc<Endpoint>,
    repository: String,
    sizes: BTreeMap<String, u64>,
}

#[async_trait]
impl Blobs for RemoteBlobs {
    async fn open(&self, digest: &str) -> std::io::Result<Box<dyn tokio::io::AsyncRead + Send + Unpin>> {
        let size = *self.sizes.get(digest).ok_or(std::io::ErrorKind::NotFound)?;
        let download = Download::new(self.endpoint.clone(), &self.repository, digest, size).await?;
        Ok(Box::new(tokio_util::io::StreamReader::new(download.stream())))
    }
}

#[cfg(test)]
mod tests;
