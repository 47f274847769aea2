//! Network namespaces by path.

use std::{
    fs::File,
    io,
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{FlockOperation, flock};

use crate::error::{Failure, code};

/// How long another call for the same container may take, before an ADD gives up and a DEL goes on without its turn.
const TURN_PATIENCE: Duration = Duration::from_secs(30);
/// Between two attempts to lock a namespace.
const TURN_PAUSE: Duration = Duration::from_millis(2);

/// The container's namespace and our own, both open.
#[derive(Debug)]
pub struct Namespaces {
    container: File,
    host: File,
}

impl Namespaces {
    /// Opens both. Refuses what is not a network namespace, and the host's own.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let host = File::open("/proc/self/ns/net").map_err(|e| Failure::io("opening /proc/self/ns/net", &e))?;
        // Without O_NONBLOCK a FIFO would hold us for ever.
        let container = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| {
                let gone = matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
                let code = if gone {
                    code::UNKNOWN_CONTAINER
                } else {
                    code::INVALID_ENVIRONMENT
                };
                Failure::new(code, format!("CNI_NETNS {}", path.display())).with(e)
            })?;
        let invalid =
            |why: &str| Failure::new(code::INVALID_ENVIRONMENT, format!("CNI_NETNS {} {why}", path.display()));
        if !is_network_namespace(&container) {
            return Err(invalid("is not a network namespace"));
        }
        let identity = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
        let (a, b) = (identity(&container), identity(&host));
        if a.and_then(|a| Ok(a == b?))
            .map_err(|e| Failure::io("stat of a namespace", &e))?
        {
            return Err(invalid("is the host's own network namespace"));
        }
        Ok(Self { container, host })
    }

    /// Waits until no other call wires or unwires this container: a call that fails may otherwise give back the address that another one
    /// has found leased and uses. The turn lasts as long as this lives.
    pub async fn turn(&self) -> Result<(), Failure> {
        if turn(&self.container).await? {
            return Ok(());
        }
        let seconds = TURN_PATIENCE.as_secs();
        let msg = format!(
            "for {seconds} s the container's network namespace was locked: another call for this container has not ended, \
             or a process in the container holds the lock; end it"
        );
        Err(Failure::new(code::TRY_AGAIN, msg))
    }

    /// The container's, for the kernel to put an interface into.
    pub fn container(&self) -> &File {
        &self.container
    }

    /// Runs `f` in the container's namespace: sockets that it opens and files of `/proc/sys/net` that it writes are of there.
    /// The calling thread is back afterwards; if it cannot go back the process ends, for all that followed would be done
    /// in the wrong place.
    pub fn inside<T>(&self, f: impl FnOnce() -> T) -> Result<T, Failure> {
        setns(self.container.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|e| Failure::io("entering the container's network namespace", &e.into()))?;
        let value = f();
        if let Err(error) = setns(self.host.as_fd(), CloneFlags::CLONE_NEWNET) {
            eprintln!("orlop-bridge: cannot go back to the host's network namespace: {error}");
            std::process::abort();
        }
        Ok(value)
    }
}

/// The turn of a DEL, which does without the namespace: `None` when that is gone, or never was one. Nor does it need the turn: a
/// process of the container can open its own namespace and lock it for ever, and must not keep its address by that.
pub async fn turn_if_there(path: &Path) -> Result<Option<File>, Failure> {
    // Without O_NONBLOCK a FIFO would hold us for ever.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let Some(container) = opened.ok().filter(is_network_namespace) else {
        return Ok(None);
    };
    if turn(&container).await? {
        return Ok(Some(container));
    }
    eprintln!(
        "orlop-bridge: {} is locked for {} s, by another call or by a process in it; going on",
        path.display(),
        TURN_PATIENCE.as_secs()
    );
    Ok(None)
}

/// Whether the namespace could be locked in time. The lock is on the namespace itself, so it ends with the process that has it, and
/// there is no file to be left behind.
async fn turn(container: &File) -> Result<bool, Failure> {
    let deadline = Instant::now() + TURN_PATIENCE;
    loop {
        match flock(container, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::io("locking the container's network namespace", &error.into())),
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(TURN_PAUSE).await;
    }
}

fn is_network_namespace(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == libc::NSFS_MAGIC)
        && namespace_type(file) == libc::CLONE_NEWNET
}

/// The `CLONE_NEW...` of a namespace's file.
fn namespace_type(file: &File) -> libc::c_int {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the request takes no argument and answers with a number.
    unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(file), NS_GET_NSTYPE) }
}
