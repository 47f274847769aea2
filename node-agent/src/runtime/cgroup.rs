//! cgroup files by hand: version 1, version 2, and both at once.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use super::RuntimeError;

/// How often an occupied cgroup is tried again: its last process may be on its way out.
const ATTEMPTS: u32 = 50;

/// The cgroup hierarchies of this mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    /// Where cgroup2 is mounted.
    pub unified: Option<PathBuf>,
    /// Where version 1 hierarchies are mounted, with their controllers.
    pub legacy: Vec<(PathBuf, Vec<String>)>,
}

impl Cgroups {
    /// Reads `/proc/self/mountinfo`.
    pub fn detect() -> Result<Self, RuntimeError> {
        fs::read_to_string("/proc/self/mountinfo")
            .map(|text| Self::parse(&text))
            .map_err(|source| RuntimeError::Io {
                doing: "reading /proc/self/mountinfo".to_owned(),
                source,
            })
    }

    /// From the text of a `mountinfo`.
    pub fn parse(mountinfo: &str) -> Self {
        let mut cgroups = Self {
            unified: None,
            legacy: Vec::new(),
        };
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let Some(mount_point) = left.split(' ').nth(4) else {
                continue;
            };
            let mount_point = PathBuf::from(mount_point.replace("\\040", " "));
            let mut right = right.split(' ');
            match right.next() {
                // A later mount at the same place hides an earlier one.
                Some("cgroup2") => cgroups.unified = Some(mount_point),
                Some("cgroup") => {
                    let options = right.nth(1).unwrap_or_default();
                    let controllers = options
                        .split(',')
                        .filter(|option| *option != "rw")
                        .map(str::to_owned)
                        .collect();
                    cgroups.legacy.retain(|(known, _)| *known != mount_point);
                    cgroups.legacy.push((mount_point, controllers));
                }
                _ => {}
            }
        }
        cgroups
    }

    /// Whether cgroup2 alone is there.
    pub fn is_pure_v2(&self) -> bool {
        self.legacy.is_empty() && self.unified.is_some()
    }

    /// Whether the kernel killed a process of this cgroup for want of memory.
    pub fn oom_killed(&self, cgroup: &str) -> bool {
        let counted = |file: PathBuf| {
            fs::read_to_string(file).ok().and_then(|text| {
                text.lines()
                    .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
            })
        };
        let legacy = self
            .legacy
            .iter()
            .filter(|(_, controllers)| controllers.iter().any(|controller| controller == "memory"))
            .filter_map(|(mount, _)| counted(below(mount, cgroup).join("memory.oom_control")));
        let unified = self
            .unified
            .iter()
            .filter_map(|mount| counted(below(mount, cgroup).join("memory.events")));
        legacy.chain(unified).any(|count| count > 0)
    }

    /// Removes a cgroup with those below it from every hierarchy; what is not there is a success.
    pub fn remove(&self, cgroup: &str) -> Result<(), RuntimeError> {
        for mount in self.legacy.iter().map(|(mount, _)| mount).chain(&self.unified) {
            let dir = below(mount, cgroup);
            remove_tree(&dir).map_err(|source| RuntimeError::Io {
                doing: format!("removing {}", dir.display()),
                source,
            })?;
        }
        Ok(())
    }
}

fn below(mount: &Path, cgroup: &str) -> PathBuf {
    mount.join(cgroup.trim_start_matches('/'))
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    for attempt in 0.. {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_hybrid_and_pure_hierarchies() {
        let hybrid = Cgroups::parse(
            "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:7 - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(hybrid.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(
            hybrid.legacy[1],
            (PathBuf::from("/sys/fs/cgroup/memory"), vec!["memory".to_owned()])
        );
        assert!(!hybrid.is_pure_v2());
        assert!(
            Cgroups::parse("30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n").is_pure_v2()
        );
    }

    #[test]
    fn a_kill_for_want_of_memory_is_read_from_either_version() {
        let dir = tempfile::tempdir().unwrap();
        let legacy = dir.path().join("memory");
        let unified = dir.path().join("unified");
        fs::create_dir_all(legacy.join("a/b")).unwrap();
        fs::create_dir_all(unified.join("a/c")).unwrap();
        fs::write(
            legacy.join("a/b/memory.oom_control"),
            "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        )
        .unwrap();
        fs::write(unified.join("a/c/memory.events"), "low 0\noom 1\noom_kill 0\n").unwrap();
        let cgroups = Cgroups {
            unified: Some(unified),
            legacy: vec![(legacy, vec!["memory".to_owned()])],
        };
        assert!(cgroups.oom_killed("/a/b"));
        assert!(!cgroups.oom_killed("/a/c"));
        assert!(!cgroups.oom_killed("/nowhere"));
    }
}
