//! Network namespaces that outlive their maker: each is held by a bind mount.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use super::NetworkError;

/// The pinned namespaces of `run_dir/netns`.
#[derive(Debug, Clone)]
pub struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Nothing is made before the first namespace is.
    pub fn new(run_dir: &Path) -> Self {
        Self {
            dir: run_dir.join("netns"),
        }
    }

    /// Where a sandbox's pin is.
    pub fn path(&self, sandbox_id: &str) -> PathBuf {
        self.dir.join(sandbox_id)
    }

    /// Makes the namespace with its loopback up, and pins it. A sound one is kept; what an earlier try left is replaced.
    pub fn create(&self, sandbox_id: &str) -> Result<PathBuf, NetworkError> {
        let path = self.path(sandbox_id);
        if identity(&path).is_some() {
            return Ok(path);
        }
        let failed = |source: io::Error| NetworkError::Namespace {
            path: path.clone(),
            source,
        };
        fs::create_dir_all(&self.dir).map_err(failed)?;
        clear(&path).map_err(failed)?;
        File::options()
            .create_new(true)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        let target = path.clone();
        // A namespace is a thread's; this one ends with it, and the pin keeps what it made.
        let made = std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || make(&target))
            .and_then(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
            });
        if let Err(source) = made {
            clear(&path).ok();
            return Err(failed(source));
        }
        Ok(path)
    }

    /// Takes the pin away; a success when there is none.
    pub fn delete(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let path = self.path(sandbox_id);
        clear(&path).map_err(|source| NetworkError::Namespace { path, source })
    }

    /// The sandboxes that have a pin, sound or not.
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
        Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }
}

/// Which namespace is pinned there, as (device, inode); `None` when it is none.
pub fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    if rustix::fs::fstatfs(&file).ok()?.f_type != libc::NSFS_MAGIC {
        return None;
    }
    let metadata = file.metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// On a thread of its own. The loopback first: a namespace that is pinned is complete.
fn make(path: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    loopback_up()?;
    mount(
        Some("/proc/thread-self/ns/net"),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all bytes zero is a valid ifreq: a name without characters, flags 0.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the flags that are set here fit the field's 16 bits"
    )]
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives for the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes away what is at the path: all mounts (a crash between two tries may have left two), then the file. Detached, so
/// that one who holds it open, or sees it through another mount namespace, does not matter.
fn clear(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(e) => return Err(e.into()),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
