//! Images from local archives: every `*.tar` in the configured directories, docker-archive or OCI layout.
//!
//! An archive is read once for its table of contents and its small JSON files; layers are read when an image is imported.
//! Everything in an archive is untrusted: sizes and counts are bounded, and digests are checked by the importer.

mod contents;
mod docker;
mod oci;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    io::SeekFrom,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};

use super::{
    RuntimeError,
    image_source::{Blobs, Descriptor, FoundImage, ImageSource},
    reference::Reference,
};
use contents::{Contents, Extent};

/// No image may have more layers (overlayfs takes 128).
const MAX_LAYERS: usize = 127;

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

/// One archive, and the images in it.
struct Archive {
    contents: Contents,
    images: Vec<ArchivedImage>,
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

impl Archive {
    fn read(path: &Path) -> Result<Self, ArchiveError> {
        let contents = Contents::read(path)?;
        let images = if contents.has(oci::INDEX_FILE) {
            oci::images(&contents)?
        } else if contents.has(docker::MANIFEST_FILE) {
            docker::images(&contents)?
        } else {
            let reason = format!("neither {} nor {} is in it", oci::INDEX_FILE, docker::MANIFEST_FILE);
            return Err(ArchiveError::Format(reason));
        };
        Ok(Self { contents, images })
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

    /// Makes the image readable.
    fn found(&self, image: &ArchivedImage) -> Result<FoundImage, ArchiveError> {
        let (media_type, manifest, extents) = match &image.content {
            Content::Oci { manifest } => oci::manifest(&self.contents, manifest)?,
            Content::Docker { config, layers } => {
                let (manifest, extents) = docker::manifest(&self.contents, config, layers)?;
                (manifest.media_type.clone(), manifest.to_bytes(), extents)
            }
        };
        let blobs = Arc::new(FileBlobs {
            path: self.contents.path.clone(),
            extents,
        });
        Ok(FoundImage {
            media_type,
            manifest,
            blobs,
        })
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
