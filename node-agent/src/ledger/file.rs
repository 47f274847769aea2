//! The ledger's files: framed, written beside their place and put there when they are synced, and put aside when they are damaged.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use prost::Message;
use sha2::{Digest, Sha256};

use super::{Damage, LedgerError};

// The header has the same fields in every format; the format is that of the body. What the checksum is of: see `checksum`.
const MAGIC: &[u8; 8] = b"orlopldg";
pub(super) const FORMAT: u32 = 1;
const HEADER: usize = 8 + 4 + 32;

pub(super) fn frame(body: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_be_bytes());
    header[12..].copy_from_slice(&checksum(FORMAT, body));
    header
}

/// Of the body; in every format but the first of its number too, so that a flipped bit of that is damage and no newer format.
pub(super) fn checksum(format: u32, body: &[u8]) -> [u8; 32] {
    let mut sum = Sha256::new();
    if format != 1 {
        sum.update(format.to_be_bytes());
    }
    sum.chain_update(body).finalize().into()
}

/// Why a file's body cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// In what way it is damaged.
    Damaged(String),
    /// It is whole, and a newer agent wrote it in this format.
    Newer(u32),
}

impl Unreadable {
    /// As an error of the ledger, where a damaged file is one.
    pub fn at(self, path: &Path) -> LedgerError {
        let path = path.to_owned();
        match self {
            Self::Newer(format) => LedgerError::Newer { path, format },
            Self::Damaged(reason) => LedgerError::Io {
                path,
                source: io::Error::other(reason),
            },
        }
    }
}

pub(super) fn unframe(bytes: &[u8]) -> Result<&[u8], Unreadable> {
    let damaged = |reason: &str| Unreadable::Damaged(reason.to_owned());
    let (header, body) = bytes
        .split_at_checked(HEADER)
        .ok_or_else(|| damaged("shorter than its header"))?;
    if &header[..8] != MAGIC {
        return Err(damaged("not a ledger file"));
    }
    let format = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    if header[12..] != checksum(format, body) {
        return Err(damaged("the checksum does not match"));
    }
    match format {
        FORMAT => Ok(body),
        0 => Err(damaged("format 0")),
        newer => Err(Unreadable::Newer(newer)),
    }
}

/// The message in a file with these bytes.
pub(super) fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, Unreadable> {
    M::decode(unframe(bytes)?).map_err(|error| Unreadable::Damaged(error.to_string()))
}

/// A file that is not in its place yet.
pub(super) struct Temporary {
    pub path: PathBuf,
    file: File,
}

impl Temporary {
    /// Writes, and does not sync.
    pub fn write(place: &Path, body: &[u8]) -> Result<Self, LedgerError> {
        let path = place.with_extension("tmp");
        let write = || -> io::Result<File> {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(&frame(body))?;
            file.write_all(body)?;
            Ok(file)
        };
        match write() {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(Self::failed(path, source)),
        }
    }

    pub fn sync(self) -> Result<(), LedgerError> {
        self.file.sync_all().map_err(|source| Self::failed(self.path, source))
    }

    /// What is half-written would only take space on a disk that may have none.
    fn failed(path: PathBuf, source: io::Error) -> LedgerError {
        let _ = fs::remove_file(&path);
        LedgerError::Io { path, source }
    }
}

pub(super) fn write_file(path: &Path, body: &[u8]) -> Result<(), LedgerError> {
    let temporary = Temporary::write(path, body)?;
    let written = temporary.path.clone();
    temporary.sync()?;
    fs::rename(&written, path).map_err(|source| LedgerError::Io {
        path: path.to_owned(),
        source,
    })?;
    path.parent().map_or(Ok(()), sync_dir)
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), LedgerError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| LedgerError::Io {
            path: dir.to_owned(),
            source,
        })
}

pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, LedgerError> {
    let entries = || -> io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect() };
    entries().map_err(|source| LedgerError::Io {
        path: dir.to_owned(),
        source,
    })
}

/// What a crash left half-written was never acted on.
pub(super) fn remove_temporary(dir: &Path) -> Result<(), LedgerError> {
    for path in list(dir)? {
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(&path).map_err(|source| LedgerError::Io { path, source })?;
        }
    }
    Ok(())
}

pub(super) fn read_or_put_aside<M: Message + Default>(
    ledger: &Path,
    path: &Path,
    damage: &mut Vec<Damage>,
) -> Result<Option<M>, LedgerError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(LedgerError::Io {
                path: path.to_owned(),
                source,
            });
        }
    };
    match decode(&bytes) {
        Ok(message) => Ok(Some(message)),
        Err(Unreadable::Damaged(reason)) => {
            put_aside(ledger, path, reason, damage)?;
            Ok(None)
        }
        Err(newer) => Err(newer.at(path)),
    }
}

pub(super) fn put_aside(
    ledger: &Path,
    path: &Path,
    reason: String,
    damage: &mut Vec<Damage>,
) -> Result<(), LedgerError> {
    let stamp = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis());
    let name = path
        .file_name()
        .map_or_else(|| "unnamed".to_owned(), |name| name.to_string_lossy().into_owned());
    let aside = ledger.join("damaged").join(format!("{name}.{stamp}"));
    fs::rename(path, &aside).map_err(|source| LedgerError::Io {
        path: path.to_owned(),
        source,
    })?;
    tracing::error!(file = %path.display(), aside = %aside.display(), reason, "damaged ledger file put aside");
    damage.push(Damage {
        path: path.to_owned(),
        reason,
    });
    Ok(())
}
