//! A disk that can be made slow and failing while it is used: a pass-through FUSE file system in a member's mount namespace.
//!
//! [`FaultyDisk`] is a test's hand on it: it puts one under a folder of a member and tells it what goes wrong. The server is
//! `orlop-lab disk FOLDER`, which takes [`Troubles`] as lines of JSON and answers each with a line. What was written and not synced is
//! remembered, so that a sync that fails loses it, as disks do.

mod files;
mod names;
mod server;

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{lab::Lab, supervisor::Request};

/// An error that a disk gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskError {
    /// EIO.
    Io,
    /// ENOSPC.
    NoSpace,
}

/// What goes wrong from now on; by default nothing does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Troubles {
    /// Every read of a file fails.
    pub read: bool,
    /// Everything that takes space fails.
    pub write: Option<DiskError>,
    /// Every sync fails, and what was written since the last one is lost.
    pub sync: Option<DiskError>,
    /// A sync takes so much longer, in milliseconds.
    pub sync_delay_ms: u64,
    /// Not a state but an event: the machine loses its power now, and all that was not synced is lost.
    pub power_cut: bool,
}

/// A folder of a member, on such a disk.
pub struct FaultyDisk {
    server: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl FaultyDisk {
    /// Puts the disk under a folder of a member; what is in the folder is on it. The service that uses it is stopped meanwhile.
    pub fn put_under(lab: &Lab, member: &str, folder: &Path, service: &str) -> Result<Self> {
        lab.request(&Request::Stop(service.to_owned()))?;
        let program = lab.spec.binaries.join("orlop-lab").display().to_string();
        let mut server = lab
            .on_node(member, &[&program, "disk", &folder.display().to_string()])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a faulty disk")?;
        let orders = server.stdin.take().context("the disk has a stdin")?;
        let answers = BufReader::new(server.stdout.take().context("the disk has a stdout")?);
        let mut disk = Self {
            server,
            orders,
            answers,
        };
        disk.answer().context("mounting a faulty disk")?;
        lab.resume(service)?;
        Ok(disk)
    }

    /// From now on this goes wrong, and only this.
    pub fn suffer(&mut self, troubles: Troubles) -> Result<()> {
        println!("   the disk: {troubles:?}");
        let mut line = serde_json::to_vec(&troubles)?;
        line.push(b'\n');
        self.orders.write_all(&line).context("telling the disk")?;
        self.answer()
    }

    /// All is well again.
    pub fn heal(&mut self) -> Result<()> {
        self.suffer(Troubles::default())
    }

    fn answer(&mut self) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context("listening to the disk")?;
        ensure!(line.trim() == "done", "the disk says {line:?}");
        Ok(())
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        // What uses it is as good as dead: the lab goes down.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Mounts the disk over `folder` in this mount namespace and serves it until stdin ends: the program of [`FaultyDisk`].
pub fn serve(folder: &Path) -> Result<()> {
    let (session, state) = server::mount(folder)?;
    println!("done");
    for line in std::io::stdin().lines() {
        let troubles: Troubles = serde_json::from_str(&line?).context("not troubles")?;
        state.suffer(troubles)?;
        println!("done");
    }
    session.umount_and_join().context("unmounting")
}
