//! The pause image, made in memory from the static pause program.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncRead;

use super::image_source::{Blobs, CONFIG, Descriptor, FoundImage, LAYER, Manifest, architecture, digest_of};

/// Its name; the version is the agent's, the digest says which program it is.
pub fn name() -> String {
    format!("orlop.dev/pause:{}", env!("CARGO_PKG_VERSION"))
}

/// Builds the image from the program.
pub fn build(program: &Path) -> io::Result<FoundImage> {
    let binary = std::fs::read(program)?;
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(binary.len() as u64);
    header.set_mode(0o755);
    header.set_mtime(0);
    archive.append_data(&mut header, "pause", binary.as_slice())?;
    let layer = Bytes::from(archive.into_inner()?);
    let layer_digest = digest_of(&layer);
    let config = Bytes::from(
        serde_json::json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "Entrypoint": ["/pause"], "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [&layer_digest] },
        })
        .to_string(),
    );
    let describe = |media_type: &str, bytes: &Bytes| Descriptor {
        media_type: media_type.to_owned(),
        digest: digest_of(bytes),
        size: bytes.len() as u64,
        platform: None,
        annotations: BTreeMap::new(),
    };
    let manifest = Manifest::new(describe(CONFIG, &config), vec![describe(LAYER, &layer)]);
    let blobs = BTreeMap::from([(layer_digest, layer), (digest_of(&config), config)]);
    Ok(FoundImage {
        media_type: manifest.media_type.clone(),
        manifest: manifest.to_bytes(),
        blobs: Arc::new(InMemory(blobs)),
    })
}

struct InMemory(BTreeMap<String, Bytes>);

#[async_trait]
impl Blobs for InMemory {
    async fn open(&self, digest: &str) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
        let bytes = self.0.get(digest).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(io::Cursor::new(bytes)))
    }
}
