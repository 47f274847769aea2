//! Network namespaces that a file holds.

use std::{fs, path::Path, thread};

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Makes a network namespace and pins it at `path`, which should be in a mount namespace of the benchmark's own.
pub fn pin(path: &Path) -> Result<()> {
    fs::write(path, "").with_context(|| format!("making {}", path.display()))?;
    let target = path.to_owned();
    // A thread of its own: a namespace belongs to a thread.
    let made = thread::spawn(move || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        let (own, none): (_, Option<&str>) = (Some("/proc/thread-self/ns/net"), None);
        mount(own, &target, none, MsFlags::MS_BIND, none).context("pinning a network namespace")
    });
    made.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
}
