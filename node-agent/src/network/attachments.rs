//! What was added, on disk: so DEL and CHECK have the configuration and the result of the ADD, whatever happened since.
//!
//! One file a sandbox in `data_dir/cni/results`. It is written before each plugin runs, with the result of those before it, and
//! again when all have: a sandbox whose ADD was cut off is known, too, and how far that came.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{NetworkError, PodNetwork, conflist::ConfList};

/// The directory.
#[derive(Debug, Clone)]
pub struct Attachments {
    dir: PathBuf,
}

/// A sandbox's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whom it was added for.
    pub pod: Pod,
    /// With which configuration.
    pub list: ConfList,
    /// Which namespace the pin was, as (device, inode).
    pub namespace: Option<(u64, u64)>,
    /// In which boot of the machine.
    pub boot_id: String,
    /// The last plugin's result; `None` while, or if, the ADD did not end.
    pub result: Option<Value>,
    /// How far an ADD has come that failed, or is under way, or was cut off: the result of the last plugin that did its part.
    /// Some plugins find by it what they have to undo.
    #[serde(default)]
    pub reached: Option<Value>,
}

/// [`PodNetwork`], as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    namespace: String,
    name: String,
    uid: String,
    sandbox_id: String,
    netns: PathBuf,
}

impl Attachments {
    /// Nothing is made before the first write.
    pub fn new(data_dir: &Path) -> Self {
        Self {
            dir: data_dir.join("cni/results"),
        }
    }

    /// The sandbox's record. One that cannot be read is an error, never a record that is not there.
    pub fn read(&self, sandbox_id: &str) -> Result<Option<Record>, NetworkError> {
        let path = self.path(sandbox_id);
        match fs::read(&path) {
            Ok(bytes) => {
                let record = serde_json::from_slice(&bytes).map_err(io::Error::from);
                record.map(Some).map_err(|source| NetworkError::File { path, source })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(NetworkError::File { path, source }),
        }
    }

    /// Writes the record; it is durable when this returns.
    pub fn write(&self, record: &Record) -> Result<(), NetworkError> {
        let path = self.path(&record.pod.sandbox_id);
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            write_durably(&path, &serde_json::to_vec(record)?)
        };
        write().map_err(|source| NetworkError::File {
            path: path.clone(),
            source,
        })
    }

    /// Forgets the sandbox.
    pub fn remove(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let path = self.path(sandbox_id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(NetworkError::File { path, source }),
            _ => Ok(()),
        }
    }

    /// The sandboxes that have a record.
    pub fn list(&self) -> Result<Vec<String>, NetworkError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(NetworkError::File {
                    path: self.dir.clone(),
                    source,
                });
            }
        };
        let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned());
        Ok(entries.flatten().filter_map(name).collect())
    }

    fn path(&self, sandbox_id: &str) -> PathBuf {
        self.dir.join(format!("{sandbox_id}.json"))
    }
}

/// Writes beside, syncs, renames, syncs the directory: a reader sees the old content or the new.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

impl From<&PodNetwork> for Pod {
    fn from(pod: &PodNetwork) -> Self {
        let PodNetwork {
            namespace,
            name,
            uid,
            sandbox_id,
            netns,
        } = pod.clone();
        Self {
            namespace,
            name,
            uid,
            sandbox_id,
            netns,
        }
    }
}

impl From<&Pod> for PodNetwork {
    fn from(pod: &Pod) -> Self {
        let Pod {
            namespace,
            name,
            uid,
            sandbox_id,
            netns,
        } = pod.clone();
        Self {
            namespace,
            name,
            uid,
            sandbox_id,
            netns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the first version wrote it, with what a later one may add at each LATER.
    const KEPT: &str = r#"{"pod":{"namespace":"default","name":"a","uid":"uid-a","sandbox_id":"s1","netns":"/run/orlop/netns/s1"LATER},
        "list":{"name":"orlop","version":"1.1.0","plugins":[{"type":"orlop-bridge","cniVersion":"1.1.0"}],
        "disable_check":false,"disable_gc":true LATER},"namespace":[4,4026532700],"boot_id":"b1",
        "result":{"cniVersion":"1.1.0","ips":[{"address":"10.244.1.2/24"}]}LATER}"#;

    #[test]
    fn what_other_versions_kept_of_a_sandbox_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let attachments = Attachments::new(dir.path());
        fs::create_dir_all(&attachments.dir).unwrap();
        for later in ["", r#","later":{"of":[1]}"#] {
            fs::write(attachments.path("s1"), KEPT.replace("LATER", later)).unwrap();
            let record = attachments.read("s1").unwrap().unwrap();
            assert_eq!((&*record.pod.name, &*record.pod.sandbox_id), ("a", "s1"));
            assert_eq!((&*record.list.name, record.list.plugins.len()), ("orlop", 1));
            assert_eq!((record.namespace, &*record.boot_id), (Some((4, 4_026_532_700)), "b1"));
            assert_eq!(record.result.unwrap()["ips"][0]["address"], "10.244.1.2/24");
            assert_eq!(record.reached, None);
        }
    }
}
