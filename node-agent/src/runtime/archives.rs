//! Images from local archives: every `*.tar` in the configured directories, docker-archive or OCI layout.
//!
//! An archive is read once for its table of contents and its small JSON files; layers are read when an image is imported.
//! Everything in an archive is untrusted: sizes and counts are bounded, and digests are checked by the importer.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use sha2::Digest as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};

use super::{
    RuntimeError,
    image_source::{
        Blobs, CONFIG, Descriptor, FoundImage, ImageSource, LAYER, LAYER_GZIP, MANIFEST, Manifest, digest_of,
    },
    reference::{Reference, is_digest},
};

/// No JSON file of an image may be larger.
const MAX_JSON: u64 = 4 << 20;
/// No archive may have more files.
const MAX_ENTRIES: usize = 100_000;
/// No image may have more layers (overlayfs takes 128).
const MAX_LAYERS: usize = 127;
/// How deep indexes may lie in each other.
const MAX_NESTING: usize = 4;
/// No archive may name more images, nor more indexes: one that names itself many times would be read without end.
const MAX_IMAGES: usize = 10_000;
const MAX_INDEXES: usize = 256;

/// The archives in some directories.
pub struct Archives {
    shelf: Arc<Shelf>,
}

struct Shelf {
    dirs: Vec<PathBuf>,
    /// What is known of each archive, as long as the file is the same.
    known: Mutex<HashMap<PathBuf, (Stamp, Arc<Archive>)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    size: u64,
}

impl Archives {
    /// Archives in these directories; one that does not exist is empty.
    pub fn new(dirs: Vec<PathBuf>) -> Self {
        Self {
            shelf: Arc::new(Shelf {
                dirs,
                known: Mutex::new(HashMap::new()),
            }),
        }
    }
}

/// Reads an archive of these bytes, and one whose index they are, with every image in them; for who checks it from outside.
#[doc(hidden)]
pub fn check(bytes: &[u8]) -> Result<(), ArchiveError> {
    let mut with_index = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    with_index.append_data(&mut header, "index.json", bytes)?;
    for content in [bytes, &with_index.into_inner()?] {
        let file = std::env::temp_dir().join(format!("orlop-archive-{}.tar", std::process::id()));
        fs::write(&file, content)?;
        let outcome = Archive::read(&file).map(|archive| {
            for image in &archive.images {
                let _refused_or_found = archive.found(image);
            }
        });
        fs::remove_file(&file)?;
        // The bytes are an index, or an archive: hardly both.
        if outcome.is_ok() {
            return Ok(());
        }
    }
    Ok(())
}

impl Shelf {
    fn find(&self, reference: &Reference) -> Result<Option<FoundImage>, RuntimeError> {
        for path in self.files() {
            let archive = match self.open(&path) {
                Ok(archive) => archive,
                Err(error) => {
                    tracing::warn!(archive = %path.display(), %error, "an image archive cannot be read");
                    continue;
                }
            };
            if let Some(image) = archive.find(reference) {
                return archive.found(image).map(Some).map_err(|why| RuntimeError::BadImage {
                    reference: reference.to_string(),
                    why: format!("{}: {why}", path.display()),
                });
            }
        }
        Ok(None)
    }

    /// The archives, in the order of directories and names.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for dir in &self.dirs {
            let Ok(entries) = fs::read_dir(dir) else { continue };
            let mut here: Vec<PathBuf> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "tar"))
                // A FIFO would be waited for.
                .filter(|path| path.is_file())
                .collect();
            here.sort();
            files.append(&mut here);
        }
        files
    }

    fn open(&self, path: &Path) -> Result<Arc<Archive>, ArchiveError> {
        let metadata = fs::metadata(path)?;
        let stamp = Stamp {
            modified: metadata.modified().ok(),
            size: metadata.len(),
        };
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((known_stamp, archive)) = known.get(path)
            && *known_stamp == stamp
        {
            return Ok(archive.clone());
        }
        let archive = Arc::new(Archive::read(path)?);
        known.insert(path.to_owned(), (stamp, archive.clone()));
        Ok(archive)
    }
}

#[async_trait]
impl ImageSource for Archives {
    async fn find(&self, reference: &Reference) -> Result<Option<FoundImage>, RuntimeError> {
        let (shelf, reference) = (self.shelf.clone(), reference.clone());
        tokio::task::spawn_blocking(move || shelf.find(&reference))
            .await
            .map_err(|error| RuntimeError::Io {
                doing: "reading image archives".to_owned(),
                source: io::Error::other(error),
            })?
    }
}

/// Why an archive is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It cannot be read, or is no tar file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A JSON file in it is none.
    #[error("{file}: {source}")]
    Json {
        /// Which.
        file: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It breaks its format.
    #[error("{0}")]
    Format(String),
}

/// One archive's table of contents.
struct Archive {
    path: PathBuf,
    entries: HashMap<String, Extent>,
    images: Vec<ArchivedImage>,
}

#[derive(Debug, Clone, Copy)]
struct Extent {
    offset: u64,
    size: u64,
}

struct ArchivedImage {
    names: Vec<Reference>,
    content: Content,
}

enum Content {
    /// The names of files, as a docker-archive's manifest.json gives them.
    Docker { config: String, layers: Vec<String> },
    /// A manifest's descriptor in an OCI layout.
    Oci { manifest: Descriptor },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

impl Archive {
    fn read(path: &Path) -> Result<Self, ArchiveError> {
        let file = fs::File::open(path)?;
        let mut tar = tar::Archive::new(io::BufReader::new(file));
        let mut entries = HashMap::new();
        for entry in tar.entries_with_seek()? {
            let entry = entry?;
            let name = normal_name(&entry.path()?);
            let kind = entry.header().entry_type();
            if entries.len() >= MAX_ENTRIES {
                return Err(ArchiveError::Format(format!("more than {MAX_ENTRIES} files")));
            }
            if kind.is_file() || kind == tar::EntryType::Continuous {
                entries.insert(
                    name,
                    Extent {
                        offset: entry.raw_file_position(),
                        size: entry.size(),
                    },
                );
            } else if (kind.is_symlink() || kind.is_hard_link())
                && let Some(target) = entry.link_name()?
            {
                // `docker save` wrote a layer that two images share once, and a link for the second.
                let base = Path::new(&name).parent().unwrap_or(Path::new(""));
                let target = if kind.is_symlink() {
                    base.join(target)
                } else {
                    target.into_owned()
                };
                if let Some(extent) = entries.get(&normal_name(&target)).copied() {
                    entries.insert(name, extent);
                }
            }
        }
        let mut archive = Self {
            path: path.to_owned(),
            entries,
            images: Vec::new(),
        };
        archive.images = if archive.entries.contains_key("index.json") {
            let index: Index = archive.json("index.json")?;
            let mut images = Vec::new();
            archive.oci_images(index, &[], 0, &mut 0, &mut images)?;
            images
        } else if archive.entries.contains_key("manifest.json") {
            let images: Vec<DockerImage> = archive.json("manifest.json")?;
            images.into_iter().map(docker_image).collect()
        } else {
            return Err(ArchiveError::Format(
                "neither index.json nor manifest.json is in it".to_owned(),
            ));
        };
        Ok(archive)
    }

    fn oci_images(
        &self,
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
                let inner: Index = self.json(&blob_name(&descriptor.digest)?)?;
                self.oci_images(inner, &names, depth + 1, indexes, images)?;
            } else if descriptor
                .platform
                .as_ref()
                .is_none_or(super::image_source::Platform::is_ours)
            {
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

    fn find(&self, reference: &Reference) -> Option<&ArchivedImage> {
        self.images
            .iter()
            .find(|image| match (&reference.digest, &image.content) {
                (Some(digest), Content::Oci { manifest }) => {
                    manifest.digest == *digest
                        && image
                            .names
                            .iter()
                            .any(|name| name.domain == reference.domain && name.path == reference.path)
                }
                (Some(_), Content::Docker { .. }) => false,
                (None, _) => image.names.contains(reference),
            })
    }

    /// Makes the image readable: for a docker-archive this writes the manifest that it does not have.
    fn found(&self, image: &ArchivedImage) -> Result<FoundImage, ArchiveError> {
        let (media_type, manifest, extents) = match &image.content {
            Content::Oci { manifest } => {
                let bytes = self.bytes(&blob_name(&manifest.digest)?)?;
                if digest_of(&bytes) != manifest.digest {
                    return Err(ArchiveError::Format(format!("{} has other bytes", manifest.digest)));
                }
                let parsed: Manifest = parse(&manifest.digest, &bytes)?;
                check_layers(&parsed.layers)?;
                let mut extents = BTreeMap::new();
                for blob in parsed.layers.iter().chain([&parsed.config]) {
                    extents.insert(blob.digest.clone(), self.extent(&blob_name(&blob.digest)?)?);
                }
                let media_type = if manifest.media_type.is_empty() {
                    MANIFEST.to_owned()
                } else {
                    manifest.media_type.clone()
                };
                (media_type, bytes, extents)
            }
            Content::Docker { config, layers } => {
                let (manifest, extents) = self.docker_manifest(config, layers)?;
                (manifest.media_type.clone(), manifest.to_bytes(), extents)
            }
        };
        let blobs = Arc::new(FileBlobs {
            path: self.path.clone(),
            extents,
        });
        Ok(FoundImage {
            media_type,
            manifest,
            blobs,
        })
    }

    fn docker_manifest(
        &self,
        config: &str,
        layers: &[String],
    ) -> Result<(Manifest, BTreeMap<String, Extent>), ArchiveError> {
        // Before any of them is read: a few bytes can name the same large file a million times.
        check_layers(layers)?;
        let mut extents = BTreeMap::new();
        let mut describe = |name: &str, config: bool| -> Result<Descriptor, ArchiveError> {
            let extent = self.extent(name)?;
            let (digest, gzip) = self.hash(extent)?;
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

    fn hash(&self, extent: Extent) -> Result<(String, bool), ArchiveError> {
        let mut file = fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(extent.offset))?;
        let mut reader = file.take(extent.size);
        let mut hasher = sha2::Sha256::new();
        let mut buffer = vec![0; 1 << 17];
        let mut magic = [0; 2];
        let mut first = true;
        loop {
            let read = reader.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            if first && read >= 2 {
                magic.copy_from_slice(&buffer[..2]);
            }
            first = false;
            hasher.update(&buffer[..read]);
        }
        Ok((
            format!("sha256:{}", hex::encode(hasher.finalize())),
            magic == [0x1f, 0x8b],
        ))
    }

    fn extent(&self, name: &str) -> Result<Extent, ArchiveError> {
        self.entries
            .get(&normal_name(Path::new(name)))
            .copied()
            .ok_or_else(|| ArchiveError::Format(format!("{name} is named but not in it")))
    }

    fn bytes(&self, name: &str) -> Result<Bytes, ArchiveError> {
        let extent = self.extent(name)?;
        if extent.size > MAX_JSON {
            return Err(ArchiveError::Format(format!("{name} is larger than {MAX_JSON} bytes")));
        }
        let mut file = fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(extent.offset))?;
        let mut bytes = Vec::new();
        file.take(extent.size).read_to_end(&mut bytes)?;
        Ok(bytes.into())
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, ArchiveError> {
        parse(name, &self.bytes(name)?)
    }
}

fn parse<T: serde::de::DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T, ArchiveError> {
    serde_json::from_slice(bytes).map_err(|source| ArchiveError::Json {
        file: file.to_owned(),
        source,
    })
}

fn check_layers<T>(layers: &[T]) -> Result<(), ArchiveError> {
    if layers.len() > MAX_LAYERS {
        return Err(ArchiveError::Format(format!(
            "it has {} layers, {MAX_LAYERS} are possible",
            layers.len()
        )));
    }
    Ok(())
}

fn docker_image(image: DockerImage) -> ArchivedImage {
    let names = image.repo_tags.unwrap_or_default();
    ArchivedImage {
        names: names.iter().filter_map(|name| Reference::parse(name).ok()).collect(),
        content: Content::Docker {
            config: image.config,
            layers: image.layers,
        },
    }
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

/// The name of an entry without `.` and `..`: it is only a key, never a path on this machine.
fn normal_name(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            std::path::Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            std::path::Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

struct FileBlobs {
    path: PathBuf,
    extents: BTreeMap<String, Extent>,
}

#[async_trait]
impl Blobs for FileBlobs {
    async fn open(&self, digest: &str) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
        let extent = self.extents.get(digest).ok_or(io::ErrorKind::NotFound)?;
        let mut file = tokio::fs::File::open(&self.path).await?;
        file.seek(SeekFrom::Start(extent.offset)).await?;
        Ok(Box::new(file.take(extent.size)))
    }
}

#[cfg(test)]
mod tests;
