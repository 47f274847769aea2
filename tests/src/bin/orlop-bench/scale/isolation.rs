//! Where the benchmarks of the control plane run: namespaces of their own, in which only the loopback interface exists.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// What the peers advertise: an address of the loopback interface of this namespace, since they refuse loopback addresses.
pub const ADDRESS: &str = "10.250.0.1";

/// The benchmark's folders.
pub struct Place {
    /// On the disk of the repository: both sides' durable state.
    pub disk: PathBuf,
    /// In memory: what simulated machines would write on disks of their own.
    pub memory: PathBuf,
    /// Ours.
    pub programs: PathBuf,
    /// The real Kubernetes and etcd.
    pub peers: PathBuf,
}

/// Moves this process, which must not have threads yet, into network and mount namespaces of its own.
pub fn enter(name: &str) -> Result<Place> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("making namespaces: run this as root")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    ip(&["link", "set", "lo", "up"])?;
    ip(&["address", "add", &format!("{ADDRESS}/16"), "dev", "lo"])?;
    let orlop = std::env::current_dir()?.join(".orlop");
    let disk = orlop.join("bench").join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&disk).with_context(|| format!("making {}", disk.display()))?;
    let memory = disk.join("memory");
    fs::create_dir_all(&memory)?;
    mount(Some("tmpfs"), &memory, Some("tmpfs"), MsFlags::empty(), none).context("mounting a tmpfs")?;
    let own = std::env::current_exe()?;
    Ok(Place {
        disk,
        memory,
        programs: own.parent().map(Path::to_owned).unwrap_or_default(),
        peers: orlop.join("peers"),
    })
}

impl Place {
    /// A fresh folder on the disk.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.disk.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(folder)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Its tmpfs goes with the mount namespace; what is left of the folder is the next run's to see.
        let _unmounted = nix::mount::umount2(&self.memory, nix::mount::MntFlags::MNT_DETACH);
        if std::env::var_os("ORLOP_KEEP_BENCH").is_none() {
            let _removed = fs::remove_dir_all(&self.disk);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("running ip")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
