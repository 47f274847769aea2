//! A pod's state directory: who it is, and the files that are mounted into its containers.

use std::{fmt::Write as _, fs, io, path::Path};

use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use super::{PodId, SandboxSpec};

/// What of the pod stands in its state directory, so that a later life of the agent knows whose it is. A newer agent may have written
/// more.
#[derive(Serialize, Deserialize)]
struct Identity {
    namespace: String,
    name: String,
    uid: String,
}

/// Writes `pod.json`, `hosts`, `hostname` and `resolv.conf`.
pub fn write_pod_files(dir: &Path, sandbox: &SandboxSpec) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let PodId { namespace, name, uid } = sandbox.pod.clone();
    write(
        &dir.join("pod.json"),
        &serde_json::to_string(&Identity { namespace, name, uid })?,
    )?;
    write(&dir.join("hosts"), &hosts(sandbox))?;
    write(&dir.join("hostname"), &format!("{}\n", sandbox.hostname))?;
    // Until the cluster has its own DNS a pod resolves as its node does.
    let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    write(&dir.join("resolv.conf"), &resolver)
}

/// Makes the memory that the pod's containers share as `/dev/shm`: an empty tmpfs at `shm`.
pub fn mount_shm(dir: &Path) -> io::Result<()> {
    let shm = dir.join("shm");
    unmount_shm(dir)?;
    fs::create_dir_all(&shm)?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    Ok(rustix::mount::mount(
        "shm",
        &shm,
        "tmpfs",
        flags,
        c"mode=1777,size=65536k",
    )?)
}

/// Takes it away; what is not mounted is a success.
pub fn unmount_shm(dir: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(dir.join("shm"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // There may be one upon another.
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whose state directory this is.
pub fn read_pod_id(dir: &Path) -> Option<PodId> {
    let text = fs::read_to_string(dir.join("pod.json")).ok()?;
    let Identity { namespace, name, uid } = serde_json::from_str(&text).ok()?;
    Some(PodId { namespace, name, uid })
}

fn hosts(sandbox: &SandboxSpec) -> String {
    let mut text = String::from(
        "# Orlop-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for address in &sandbox.addresses {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{address}\t{}", sandbox.hostname);
    }
    text
}

/// In place where the file is there: containers have it mounted, and a rename would not reach them.
fn write(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_state_directory_is_is_read_from_what_other_versions_wrote() {
        let dir = tempfile::tempdir().unwrap();
        for later in ["", r#","node":"n1","later":{"of":[1]}"#] {
            let text = format!(r#"{{"namespace":"default","name":"a","uid":"uid-a"{later}}}"#);
            fs::write(dir.path().join("pod.json"), text).unwrap();
            let id = read_pod_id(dir.path()).unwrap();
            assert_eq!((&*id.namespace, &*id.name, &*id.uid), ("default", "a", "uid-a"));
        }
    }
}
