//! Names and attributes: which inode is where, and what the kernel is told of it.

use std::{
    collections::HashMap,
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use fuser::{FileAttr, FileType, INodeNo};

/// Which inode is where.
#[derive(Debug)]
pub struct Names {
    next: u64,
    paths: HashMap<u64, PathBuf>,
    /// The other way round.
    pub inodes: HashMap<PathBuf, u64>,
}

impl Names {
    /// The root alone.
    pub fn new(root: PathBuf) -> Self {
        Self {
            next: INodeNo::ROOT.0,
            paths: [(INodeNo::ROOT.0, root.clone())].into(),
            inodes: [(root, INodeNo::ROOT.0)].into(),
        }
    }

    /// Where an inode is; an error when it is gone.
    pub fn path(&self, inode: u64) -> io::Result<PathBuf> {
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        self.paths.get(&inode).cloned().ok_or_else(gone)
    }

    /// The number of what is at a path, a new one when it has none.
    pub fn inode(&mut self, path: &Path) -> u64 {
        if let Some(known) = self.inodes.get(path) {
            return *known;
        }
        self.next += 1;
        self.paths.insert(self.next, path.to_owned());
        self.inodes.insert(path.to_owned(), self.next);
        self.next
    }

    /// What is at a path has no name any more.
    pub fn remove(&mut self, path: &Path) {
        if let Some(inode) = self.inodes.remove(path) {
            self.paths.remove(&inode);
        }
    }

    /// What is at a path, and all below it, is elsewhere now.
    pub fn rename(&mut self, from: &Path, to: &Path) {
        self.remove(to);
        let moved: Vec<PathBuf> = self
            .inodes
            .keys()
            .filter(|path| path.starts_with(from))
            .cloned()
            .collect();
        for path in moved {
            let Ok(rest) = path.strip_prefix(from) else { continue };
            let target = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            if let Some(inode) = self.inodes.remove(&path) {
                self.paths.insert(inode, target.clone());
                self.inodes.insert(target, inode);
            }
        }
    }
}

/// What the kernel is told of a file.
pub fn attributes(inode: u64, metadata: &Metadata) -> FileAttr {
    let time = |seconds: i64, nanoseconds: i64| {
        let since = Duration::new(
            u64::try_from(seconds).unwrap_or(0),
            u32::try_from(nanoseconds).unwrap_or(0),
        );
        SystemTime::UNIX_EPOCH + since
    };
    FileAttr {
        ino: INodeNo(inode),
        size: metadata.size(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::from_std(metadata.file_type()).unwrap_or(FileType::RegularFile),
        perm: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0),
        nlink: u32::try_from(metadata.nlink()).unwrap_or(u32::MAX),
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: u32::try_from(metadata.rdev()).unwrap_or(0),
        blksize: 4096,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_renames_and_are_never_used_twice() {
        let mut names = Names::new("/r".into());
        let (folder, file) = (names.inode(Path::new("/r/a")), names.inode(Path::new("/r/a/f")));
        let other = names.inode(Path::new("/r/b"));
        names.rename(Path::new("/r/a"), Path::new("/r/b"));
        assert_eq!(names.path(folder).unwrap(), Path::new("/r/b"));
        assert_eq!(names.path(file).unwrap(), Path::new("/r/b/f"));
        assert!(names.path(other).is_err(), "it was renamed over");
        names.remove(Path::new("/r/b/f"));
        assert!(names.path(file).is_err());
        assert!(names.inode(Path::new("/r/b/f")) > other);
        assert_eq!(names.inode(Path::new("/r/b")), folder);
    }
}
