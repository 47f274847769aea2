//! A tar file's table of contents, and reading from it.

use std::{
    collections::HashMap,
    fs, io,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::Digest as _;

use super::{ArchiveError, parse};

/// No JSON file of an image may be larger.
const MAX_JSON: u64 = 4 << 20;
/// No archive may have more files.
const MAX_ENTRIES: usize = 100_000;

/// What is where in one archive.
pub struct Contents {
    /// The archive.
    pub path: PathBuf,
    entries: HashMap<String, Extent>,
}

/// A file's bytes in the archive.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Where they begin.
    pub offset: u64,
    /// How many there are.
    pub size: u64,
}

impl Contents {
    /// Goes through the archive once.
    pub fn read(path: &Path) -> Result<Self, ArchiveError> {
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
        Ok(Self {
            path: path.to_owned(),
            entries,
        })
    }

    /// Whether there is a file of this very name.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The digest of a file, and whether it is compressed.
    pub fn hash(&self, extent: Extent) -> Result<(String, bool), ArchiveError> {
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

    /// Where a named file is.
    pub fn extent(&self, name: &str) -> Result<Extent, ArchiveError> {
        self.entries
            .get(&normal_name(Path::new(name)))
            .copied()
            .ok_or_else(|| ArchiveError::Format(format!("{name} is named but not in it")))
    }

    /// A small file.
    pub fn bytes(&self, name: &str) -> Result<Bytes, ArchiveError> {
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

    /// A small file of JSON.
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, ArchiveError> {
        parse(name, &self.bytes(name)?)
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
