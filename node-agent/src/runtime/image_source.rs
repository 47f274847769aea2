//! Where images come from: [`ImageSource`], and the local archives that implement it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncRead;

use super::{RuntimeError, reference::Reference};

/// The media type of an OCI manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of an OCI image configuration.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The media type of an uncompressed OCI layer.
pub const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// The media type of a gzip-compressed OCI layer.
pub const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A place to look for images.
#[async_trait]
pub trait ImageSource: Send + Sync + 'static {
    /// The image, if this source has it. The content need not have been verified: the importer does that.
    async fn find(&self, reference: &Reference) -> Result<Option<FoundImage>, RuntimeError>;
}

/// An image that a source has: its manifest for this platform and a way to its blobs.
#[derive(Clone)]
pub struct FoundImage {
    /// The manifest's media type.
    pub media_type: String,
    /// The manifest, byte by byte.
    pub manifest: Bytes,
    /// Opens the blobs that the manifest names.
    pub blobs: Arc<dyn Blobs>,
}

/// The blobs of an image, by digest.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// A stream of the blob's bytes.
    async fn open(&self, digest: &str) -> std::io::Result<Box<dyn AsyncRead + Send + Unpin>>;
}

/// An image's blob as a manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// The platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Annotations, in an index: the image's name.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// A platform in an index.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Platform {
    /// GOARCH.
    pub architecture: String,
    /// GOOS.
    pub os: String,
}

impl Platform {
    /// Whether this machine runs it.
    pub fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == architecture()
    }
}

/// This machine's architecture in Go's words.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// Its own media type.
    #[serde(default)]
    pub media_type: String,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
}

impl Manifest {
    /// An OCI manifest of a configuration and layers.
    pub fn new(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            config,
            layers,
        }
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Bytes {
        // Plain structs of strings and numbers cannot fail to serialise.
        serde_json::to_vec(self).map(Bytes::from).unwrap_or_default()
    }
}

/// `sha256:...` of some bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}
