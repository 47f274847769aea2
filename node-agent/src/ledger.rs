//! The ledger: what the node was last told, on disk, so that it goes on without control and after a reboot.
//!
//! Layout under `DATA_DIR/ledger`: `node` (ranges, the generation, whether a snapshot was ever complete),
//! `pods/UID` (one pod each, synced before it is acted on), `services` (all of them, written behind the maps; as long as it
//! lacks what the maps have, `services.behind` is there) and `routes` (all of them, behind the kernel's). Every
//! file is written to a temporary name, synced and renamed; the folder is synced after that. A file is framed with a magic, a format version
//! and a SHA-256 of its body: one that does not match is moved to `damaged/` and reported, and everything else goes on. One that the disk
//! does not give now is not damaged: the agent does not start without it, and its service manager tries again. Nor does it start on one
//! that a newer agent wrote in another format; fields that it does not know it passes over.
//!
//! Invariant: every session with control gets a generation, greater than all earlier ones; a write of an older generation
//! than the last accepted one is refused.

mod file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use imbl::OrdMap;
use orlop_proto::{core::v1::Pod, node::v1 as link};
use prost::Message;

use self::file::{
    FORMAT, Temporary, decode, frame, list, put_aside, read_or_put_aside, remove_temporary, sync_dir, unframe,
    write_file,
};
use crate::desired::{
    Desired, Routes,
    services::{Services, kept},
};

/// Pods' files that are written before they are synced: the disk takes them in one go then.
const SYNCED_TOGETHER: usize = 64;

/// What a session with control is known by: later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Generation(pub u64);

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The write belongs to a session that a later one has replaced.
    #[error("generation {given:?} is older than {current:?}")]
    Stale {
        /// The writer's.
        given: Generation,
        /// The last accepted one.
        current: Generation,
    },
    /// A file of an agent that is newer than this one.
    #[error(
        "{path}: a newer orlop-node wrote this in format {format}, and this one reads format {FORMAT}: start the newer one again, or \
         remove {} when no pod of this node is left",
        path.ancestors().find(|folder| folder.ends_with("ledger")).unwrap_or(path).display()
    )]
    Newer {
        /// Where.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// A pod whose uid cannot be a file's name.
    #[error("pod uid {0:?} is not usable as a file name")]
    BadUid(String),
}

/// What was put aside while loading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file, where it was.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// The node's ledger. One owner writes it.
#[derive(Debug)]
pub struct Ledger {
    dir: PathBuf,
    generation: Generation,
    node: NodeFile,
    /// The uids of pods whose files may not be as those in force: a call that wrote or removed them failed on the way.
    doubtful: BTreeSet<String>,
    behind: Arc<Behind>,
}

/// Says that the maps have services that the ledger's file lacks. Not synced: it matters to an agent that finds the maps of its
/// former life, and a reboot leaves no maps.
#[derive(Debug)]
pub struct Behind {
    path: PathBuf,
    /// Changes of the maps that were announced.
    notes: AtomicU64,
    /// Held over what is done to the file.
    file: Mutex<()>,
}

impl Behind {
    /// How often a change was announced.
    pub fn notes(&self) -> u64 {
        self.notes.load(Ordering::Acquire)
    }

    /// The maps are about to get what the file lacks: [`Self::write`] comes next. Does not wait for the disk.
    pub fn announce(&self) {
        self.notes.fetch_add(1, Ordering::AcqRel);
    }

    /// Writes that down. Waits for the disk.
    ///
    /// # Errors
    /// What the disk refuses.
    pub fn write(&self) -> Result<(), LedgerError> {
        let _file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        fs::write(&self.path, []).map_err(|source| self.failed(source))
    }

    /// The file has what the maps had at so many notes: when there was none since, it is no longer behind.
    fn caught_up(&self, notes: u64) -> Result<(), LedgerError> {
        let _file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if self.notes() != notes {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(self.failed(source)),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> LedgerError {
        LedgerError::Io {
            path: self.path.clone(),
            source,
        }
    }
}

/// The body of the file `node`.
#[derive(Clone, PartialEq, Message)]
struct NodeFile {
    #[prost(uint64, tag = "1")]
    generation: u64,
    #[prost(bool, tag = "2")]
    complete: bool,
    #[prost(message, optional, tag = "3")]
    ranges: Option<link::Welcome>,
    /// Only of an agent that had no file `routes`; until there is one.
    #[prost(message, repeated, tag = "4")]
    routes: Vec<link::Route>,
}

/// The body of the file `routes`.
#[derive(Clone, PartialEq, Message)]
struct RoutesFile {
    #[prost(message, repeated, tag = "1")]
    routes: Vec<link::Route>,
}

/// The body of the file `services`.
#[derive(Clone, PartialEq, Message)]
struct ServicesFile {
    #[prost(message, repeated, tag = "1")]
    services: Vec<link::Service>,
}

impl Ledger {
    /// Opens the ledger under `data_dir` and reads what it holds. Damaged files are moved aside and named.
    ///
    /// # Errors
    /// What the disk refuses, also to read a file: that says nothing about what is in it. A file that a newer agent wrote.
    pub fn open(data_dir: &Path) -> Result<(Self, Desired, Vec<Damage>), LedgerError> {
        let dir = data_dir.join("ledger");
        for path in [dir.join("pods"), dir.join("damaged")] {
            fs::create_dir_all(&path).map_err(|source| LedgerError::Io { path, source })?;
        }
        let mut damage = Vec::new();
        remove_temporary(&dir)?;
        remove_temporary(&dir.join("pods"))?;

        let node: NodeFile = read_or_put_aside(&dir, &dir.join("node"), &mut damage)?.unwrap_or_default();
        let mut pods = OrdMap::new();
        for path in list(&dir.join("pods"))? {
            let Some(pod) = read_or_put_aside::<Pod>(&dir, &path, &mut damage)? else {
                continue;
            };
            let uid = pod.metadata.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default();
            if path.file_name().and_then(|name| name.to_str()) == Some(uid.as_str()) {
                pods.insert(uid, Arc::new(pod));
            } else {
                put_aside(&dir, &path, format!("holds the pod {uid:?}"), &mut damage)?;
            }
        }
        let services: ServicesFile = read_or_put_aside(&dir, &dir.join("services"), &mut damage)?.unwrap_or_default();
        let routes: Option<RoutesFile> = read_or_put_aside(&dir, &dir.join("routes"), &mut damage)?;
        let routes = routes.map_or_else(|| node.routes.clone(), |file| file.routes);
        let desired = Desired {
            pods,
            services: services.services.into_iter().map(kept).collect(),
            routes: routes
                .into_iter()
                .map(|route| (Arc::from(&*route.node_name), Arc::new(route)))
                .collect(),
            ranges: node.ranges.clone().map(Arc::new),
            // A damaged file may hide a pod that still runs here: nothing is swept before control has named all again.
            complete: node.complete && damage.is_empty(),
        };
        let behind = Arc::new(Behind {
            path: dir.join("services.behind"),
            notes: AtomicU64::new(0),
            file: Mutex::new(()),
        });
        let mut ledger = Self {
            dir,
            generation: Generation(node.generation),
            node,
            doubtful: BTreeSet::new(),
            behind,
        };
        if desired.complete != ledger.node.complete {
            let node = NodeFile {
                complete: desired.complete,
                ..ledger.node.clone()
            };
            ledger.write_node(node)?;
        }
        Ok((ledger, desired, damage))
    }

    /// Begins a session: all writes of earlier ones are refused from now on.
    pub fn begin_session(&mut self) -> Result<Generation, LedgerError> {
        let generation = Generation(self.generation.0 + 1);
        let mut node = self.node.clone();
        node.generation = generation.0;
        self.write_node(node)?;
        self.generation = generation;
        Ok(generation)
    }

    /// Writes what `desired` says of the pods with the uids `changed`, of ranges, and of whether a whole snapshot has arrived; durable
    /// when it returns. What an earlier call left half-done is done as well.
    pub fn write(
        &mut self,
        generation: Generation,
        desired: &Desired,
        changed: BTreeSet<String>,
    ) -> Result<(), LedgerError> {
        self.check(generation)?;
        for uid in &changed {
            file_name(uid)?;
        }
        self.doubtful.extend(changed);
        if !self.doubtful.is_empty() {
            self.write_pods(&desired.pods)?;
        }
        let node = NodeFile {
            generation: self.generation.0,
            complete: desired.complete,
            ranges: desired.ranges.as_deref().cloned(),
            routes: self.node.routes.clone(),
        };
        if node != self.node {
            self.write_node(node)?;
        }
        self.doubtful.clear();
        Ok(())
    }

    /// Writes and removes the pods whose files are in doubt. Removals come after the writes.
    fn write_pods(&self, pods: &OrdMap<String, Arc<Pod>>) -> Result<(), LedgerError> {
        let dir = self.dir.join("pods");
        let written: Vec<_> = self
            .doubtful
            .iter()
            .filter_map(|uid| Some((uid, pods.get(uid)?)))
            .collect();
        let mut renames = Vec::with_capacity(written.len());
        let mut write = || {
            for some in written.chunks(SYNCED_TOGETHER) {
                let mut files = Vec::with_capacity(some.len());
                for (uid, pod) in some {
                    let path = dir.join(file_name(uid)?);
                    let temporary = Temporary::write(&path, &pod.encode_to_vec())?;
                    renames.push((temporary.path.clone(), path));
                    files.push(temporary);
                }
                files.into_iter().try_for_each(Temporary::sync)?;
            }
            Ok(())
        };
        write().inspect_err(|_| {
            // They would only take space on a disk that may have none.
            for (temporary, _) in &renames {
                let _ = fs::remove_file(temporary);
            }
        })?;
        for (temporary, path) in renames {
            fs::rename(&temporary, &path).map_err(|source| LedgerError::Io { path, source })?;
        }
        for uid in self.doubtful.iter().filter(|uid| !pods.contains_key(*uid)) {
            let path = dir.join(file_name(uid)?);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(LedgerError::Io { path, source });
                }
                _ => {}
            }
        }
        sync_dir(&dir)
    }

    /// What writes the files that are behind what is in force, to be used on a thread that may block.
    pub fn writer(&self, generation: Generation) -> Result<Writer, LedgerError> {
        self.check(generation)?;
        Ok(Writer {
            dir: self.dir.clone(),
            behind: Arc::clone(&self.behind),
        })
    }

    /// Notes that the services' file is behind the maps.
    pub fn behind(&self) -> Arc<Behind> {
        Arc::clone(&self.behind)
    }

    /// Whether the maps got services that the file lacks.
    pub fn services_are_behind(&self) -> bool {
        self.behind.path.exists()
    }

    fn write_node(&mut self, node: NodeFile) -> Result<(), LedgerError> {
        write_file(&self.dir.join("node"), &node.encode_to_vec())?;
        self.node = node;
        Ok(())
    }

    fn check(&self, given: Generation) -> Result<(), LedgerError> {
        if given < self.generation {
            return Err(LedgerError::Stale {
                given,
                current: self.generation,
            });
        }
        Ok(())
    }
}

/// All services that a ledger holds, for another process than the agent: nothing is changed. Empty when there are none.
pub fn read_services(data_dir: &Path) -> Result<Vec<Arc<link::Service>>, LedgerError> {
    let path = data_dir.join("ledger/services");
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(LedgerError::Io { path, source }),
    };
    let file: ServicesFile = decode(&bytes).map_err(|error| error.at(&path))?;
    Ok(file.services.into_iter().map(Arc::new).collect())
}

/// Writes the files that are behind what is in force.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    behind: Arc<Behind>,
}

impl Writer {
    /// Writes all services; durable when it returns. `notes` is [`Behind::notes`] of when the maps got the last of them.
    pub fn services(&self, services: &Services, notes: u64) -> Result<(), LedgerError> {
        write_all(&self.dir.join("services"), services.iter())?;
        self.behind.caught_up(notes)
    }

    /// Writes all routes; durable when it returns.
    pub fn routes(&self, routes: &Routes) -> Result<(), LedgerError> {
        write_all(&self.dir.join("routes"), routes.values())
    }
}

/// Writes a file of many messages: field by field, so that they are not copied into one message first.
fn write_all<'a, M: Message + 'a>(path: &Path, messages: impl Iterator<Item = &'a Arc<M>>) -> Result<(), LedgerError> {
    let mut body = Vec::new();
    for message in messages {
        prost::encoding::message::encode(1, &**message, &mut body);
    }
    write_file(path, &body)
}

/// Whether a pod with this uid can be kept: it becomes a file's name.
pub(crate) fn is_usable_uid(uid: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    !uid.is_empty() && uid.len() <= 128 && uid.bytes().all(fine)
}

fn file_name(uid: &str) -> Result<&str, LedgerError> {
    if is_usable_uid(uid) {
        Ok(uid)
    } else {
        Err(LedgerError::BadUid(uid.to_owned()))
    }
}

/// What is made of a file with these bytes, and of one whose body they are; for who checks it from outside.
#[doc(hidden)]
pub fn read_body(bytes: &[u8]) {
    let framed = [&frame(bytes)[..], bytes].concat();
    assert_eq!(unframe(&framed), Ok(bytes));
    let _refused_or_read = (
        unframe(bytes),
        NodeFile::decode(bytes),
        ServicesFile::decode(bytes),
        Pod::decode(bytes),
    );
}

/// Used by those who check the folder from outside, in tests.
#[doc(hidden)]
pub fn files(data_dir: &Path) -> BTreeMap<String, u64> {
    list(&data_dir.join("ledger/pods"))
        .unwrap_or_default()
        .into_iter()
        .filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), fs::metadata(&path).ok()?.len())))
        .collect()
}

#[cfg(test)]
mod tests;
