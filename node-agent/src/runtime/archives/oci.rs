//! The OCI image layout: an index.json, from which descriptors lead to manifests among the blobs.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

use super::{
    ArchiveError, ArchivedImage, Content, check_layers,
    contents::{Contents, Extent},
    parse,
};
use crate::runtime::{
    image_source::{Descriptor, MANIFEST, Manifest, Platform, digest_of},
    reference::{Reference, is_digest},
};

/// The file by which such a layout is known.
pub const INDEX_FILE: &str = "index.json";
/// How deep indexes may lie in each other.
const MAX_NESTING: usize = 4;
/// No archive may name more images, nor more indexes: one that names itself many times would be read without end.
const MAX_IMAGES: usize = 10_000;
const MAX_INDEXES: usize = 256;

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// All images for this platform that the layout leads to.
pub fn images(contents: &Contents) -> Result<Vec<ArchivedImage>, ArchiveError> {
    let mut found = Vec::new();
    follow(contents, contents.json(INDEX_FILE)?, &[], 0, &mut 0, &mut found)?;
    Ok(found)
}

fn follow(
    contents: &Contents,
    index: Index,
    inherited: &[Reference],
    depth: usize,
    indexes: &mut usize,
    images: &mut Vec<ArchivedImage>,
) -> Result<(), ArchiveError> {
    for descriptor in index.manifests {
        let mut names = names_of(&descriptor);
        names.extend_from_slice(inherited);
        if descriptor.media_type.contains("index") || descriptor.media_type.contains("manifest.list") {
            if depth >= MAX_NESTING {
                return Err(ArchiveError::Format("indexes lie too deep in each other".to_owned()));
            }
            *indexes += 1;
            if *indexes > MAX_INDEXES {
                return Err(ArchiveError::Format(format!("more than {MAX_INDEXES} indexes")));
            }
            let inner: Index = contents.json(&blob_name(&descriptor.digest)?)?;
            follow(contents, inner, &names, depth + 1, indexes, images)?;
        } else if descriptor.platform.as_ref().is_none_or(Platform::is_ours) {
            if images.len() >= MAX_IMAGES {
                return Err(ArchiveError::Format(format!("more than {MAX_IMAGES} images")));
            }
            images.push(ArchivedImage {
                names,
                content: Content::Oci { manifest: descriptor },
            });
        }
    }
    Ok(())
}

/// A manifest's media type and bytes, and where its blobs are.
pub fn manifest(
    contents: &Contents,
    manifest: &Descriptor,
) -> Result<(String, Bytes, BTreeMap<String, Extent>), ArchiveError> {
    let bytes = contents.bytes(&blob_name(&manifest.digest)?)?;
    if digest_of(&bytes) != manifest.digest {
        return Err(ArchiveError::Format(format!("{} has other bytes", manifest.digest)));
    }
    let parsed: Manifest = parse(&manifest.digest, &bytes)?;
    check_layers(&parsed.layers)?;
    let mut extents = BTreeMap::new();
    for blob in parsed.layers.iter().chain([&parsed.config]) {
        extents.insert(blob.digest.clone(), contents.extent(&blob_name(&blob.digest)?)?);
    }
    let media_type = if manifest.media_type.is_empty() {
        MANIFEST.to_owned()
    } else {
        manifest.media_type.clone()
    };
    Ok((media_type, bytes, extents))
}

/// The names that an index's annotations give: containerd's and Docker's full name, or OCI's, if it is a full one.
fn names_of(descriptor: &Descriptor) -> Vec<Reference> {
    ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
        .into_iter()
        .filter_map(|key| descriptor.annotations.get(key))
        .filter_map(|name| Reference::parse(name).ok())
        .collect()
}

fn blob_name(digest: &str) -> Result<String, ArchiveError> {
    match digest.split_once(':') {
        Some((algorithm, hex)) if is_digest(digest) => Ok(format!("blobs/{algorithm}/{hex}")),
        _ => Err(ArchiveError::Format(format!("{digest:?} is no sha256 digest"))),
    }
}
