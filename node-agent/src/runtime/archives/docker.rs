//! What `docker save` writes: a manifest.json that names configurations and layers, but no manifest as registries have them.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    ArchiveError, ArchivedImage, Content, check_layers,
    contents::{Contents, Extent},
};
use crate::runtime::{
    image_source::{CONFIG, Descriptor, LAYER, LAYER_GZIP, Manifest},
    reference::Reference,
};

/// The file by which such an archive is known.
pub const MANIFEST_FILE: &str = "manifest.json";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// All images that the archive names.
pub fn images(contents: &Contents) -> Result<Vec<ArchivedImage>, ArchiveError> {
    let images: Vec<DockerImage> = contents.json(MANIFEST_FILE)?;
    Ok(images.into_iter().map(image).collect())
}

fn image(image: DockerImage) -> ArchivedImage {
    let names = image.repo_tags.unwrap_or_default();
    ArchivedImage {
        names: names.iter().filter_map(|name| Reference::parse(name).ok()).collect(),
        content: Content::Docker {
            config: image.config,
            layers: image.layers,
        },
    }
}

/// Writes the manifest that the archive does not have, and says where its blobs are.
pub fn manifest(
    contents: &Contents,
    config: &str,
    layers: &[String],
) -> Result<(Manifest, BTreeMap<String, Extent>), ArchiveError> {
    // Before any of them is read: a few bytes can name the same large file a million times.
    check_layers(layers)?;
    let mut extents = BTreeMap::new();
    let mut describe = |name: &str, config: bool| -> Result<Descriptor, ArchiveError> {
        let extent = contents.extent(name)?;
        let (digest, gzip) = contents.hash(extent)?;
        let media_type = match (config, gzip) {
            (true, _) => CONFIG,
            (false, true) => LAYER_GZIP,
            (false, false) => LAYER,
        };
        extents.insert(digest.clone(), extent);
        Ok(Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size: extent.size,
            platform: None,
            annotations: BTreeMap::new(),
        })
    };
    let config = describe(config, true)?;
    let layers: Vec<Descriptor> = layers
        .iter()
        .map(|layer| describe(layer, false))
        .collect::<Result<_, _>>()?;
    Ok((Manifest::new(config, layers), extents))
}
