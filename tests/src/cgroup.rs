//! The cgroup trees of a lab, in whatever hierarchies this machine has: pure cgroup2, or v1 controllers beside it.
//!
//! Everything that a lab starts is below `/orlop-lab/ID` in each hierarchy, so one `cgroup.kill` ends a lab, whoever made it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The folder of all labs in each hierarchy.
pub const PARENT: &str = "orlop-lab";

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The v1 options that name it ("cpu,cpuacct", "name=systemd"); empty for cgroup2.
    pub options: String,
}

impl Hierarchy {
    /// Whether this is cgroup2.
    pub fn is_v2(&self) -> bool {
        self.options.is_empty()
    }
}

/// What this process sees in `/proc/self/mountinfo`, cgroup2 first.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    let mut found = parse_mountinfo(&text);
    if !found.iter().any(Hierarchy::is_v2) {
        bail!("cgroup2 is not mounted; mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified");
    }
    found.sort_by_key(|hierarchy| !hierarchy.is_v2());
    Ok(found)
}

fn parse_mountinfo(text: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(mount), mut right) = (left.split(' ').nth(4), right.split(' ')) else {
            continue;
        };
        let options = match right.next() {
            Some("cgroup2") => String::new(),
            Some("cgroup") => {
                let super_options = right.nth(1).unwrap_or_default();
                let named = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children");
                super_options.split(',').filter(named).collect::<Vec<_>>().join(",")
            }
            _ => continue,
        };
        if !found.iter().any(|known| known.options == options) {
            found.push(Hierarchy {
                mount: PathBuf::from(mount),
                options,
            });
        }
    }
    found
}

/// Makes a cgroup (`orlop-lab/ID/...`) in every hierarchy; what is there already stays.
pub fn create(path: &str) -> Result<()> {
    for hierarchy in hierarchies()? {
        let mut directory = hierarchy.mount.clone();
        for part in path.split('/') {
            directory.push(part);
            match fs::create_dir(&directory) {
                Ok(()) => inherit(&hierarchy, &directory)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("making cgroup {}", directory.display())),
            }
        }
    }
    Ok(())
}

/// A new cpuset of v1 is empty and takes no process until it has its parent's values; in cgroup2 the parent has to hand its
/// controllers down.
fn inherit(hierarchy: &Hierarchy, directory: &Path) -> Result<()> {
    let parent = directory.parent().context("a cgroup has a parent")?;
    if hierarchy.is_v2() {
        let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace() {
            // A parent with processes of its own cannot (the machine's root can); then the controller is simply not there.
            let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    if hierarchy.options.split(',').any(|option| option == "cpuset") {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let value = fs::read_to_string(parent.join(file))
                .with_context(|| format!("reading {file} of {}", parent.display()))?;
            fs::write(directory.join(file), value.trim())
                .with_context(|| format!("writing {file} of {}", directory.display()))?;
        }
        fs::write(directory.join("cgroup.clone_children"), "1").context("writing cgroup.clone_children")?;
    }
    Ok(())
}

/// Moves this process into a cgroup, in every hierarchy.
pub fn join(path: &str) -> Result<()> {
    join_in(path, |_| true)
}

/// Moves this process into a cgroup of cgroup2, and leaves it where it is in the others.
pub fn join_cgroup2(path: &str) -> Result<()> {
    join_in(path, Hierarchy::is_v2)
}

fn join_in(path: &str, chosen: impl Fn(&Hierarchy) -> bool) -> Result<()> {
    for hierarchy in hierarchies()?.iter().filter(|hierarchy| chosen(hierarchy)) {
        let procs = hierarchy.mount.join(path).join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("joining {}", procs.display()))?;
    }
    Ok(())
}

/// The ids of all labs that have a cgroup, living or left over.
pub fn labs() -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for hierarchy in hierarchies()? {
        let Ok(entries) = fs::read_dir(hierarchy.mount.join(PARENT)) else {
            continue;
        };
        for entry in entries.flatten() {
            if entry.path().is_dir() {
                let id = entry.file_name().to_string_lossy().into_owned();
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
        }
    }
    Ok(ids)
}

/// Ends every process of a lab and removes its cgroups from every hierarchy.
pub fn remove(id: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let hierarchies = hierarchies()?;
    loop {
        let mut busy = None;
        for hierarchy in &hierarchies {
            let directory = hierarchy.mount.join(PARENT).join(id);
            if !directory.exists() {
                continue;
            }
            if hierarchy.is_v2() {
                let _ = fs::write(directory.join("cgroup.kill"), "1");
            }
            if let Err(error) = remove_tree(&directory) {
                busy = Some((directory, error));
            }
        }
        let Some((directory, error)) = busy else { break };
        if Instant::now() > deadline {
            bail!("{} cannot be removed: {error}", directory.display());
        }
        thread::sleep(Duration::from_millis(50));
    }
    for hierarchy in &hierarchies {
        // The folder of all labs goes with the last of them.
        let _ = fs::remove_dir(hierarchy.mount.join(PARENT));
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_of_both_kinds_of_hosts() {
        let hybrid = "29 23 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      38 23 0:35 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
                      39 23 0:36 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let found = parse_mountinfo(hybrid);
        assert_eq!(found.len(), 3);
        assert_eq!(
            found[0],
            Hierarchy {
                mount: "/sys/fs/cgroup/cpu".into(),
                options: "cpu".into()
            }
        );
        assert_eq!(found[1].options, "name=systemd");
        assert!(found[2].is_v2());
        let pure = "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            parse_mountinfo(pure),
            vec![Hierarchy {
                mount: "/sys/fs/cgroup".into(),
                options: String::new()
            }]
        );
    }
}
