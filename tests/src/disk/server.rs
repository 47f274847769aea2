//! The FUSE server of a faulty disk: everything goes to the folder behind it, unless it is troubled.
//!
//! Files keep their own inode numbers here, never used twice, so that the kernel cannot take a new file for one that it knew. The
//! kernel keeps no attributes: what a failed sync has taken back is seen at once.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::{
    DiskError, Troubles,
    files::{Backed, Files},
    names::{Names, attributes},
};

/// The kernel asks each time.
const TTL: Duration = Duration::ZERO;
/// While some wait for a slow sync, others go on.
const THREADS: usize = 8;

/// Mounts the disk over the folder.
pub fn mount(folder: &Path) -> Result<(BackgroundSession, Arc<State>)> {
    let behind = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
    let root = PathBuf::from(format!("/proc/self/fd/{}", behind.as_raw_fd()));
    let state = Arc::new(State {
        _behind: behind,
        troubles: Mutex::default(),
        names: Mutex::new(Names::new(root)),
        files: Files::default(),
        handles: Mutex::default(),
        next: AtomicU64::new(1),
    });
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.mount_options = vec![
        MountOption::FSName("orlop-faulty-disk".to_owned()),
        MountOption::DefaultPermissions,
    ];
    let session = fuser::spawn_mount(Disk(Arc::clone(&state)), folder, &config).context("mounting by FUSE")?;
    Ok((session, state))
}

/// What the server knows.
pub struct State {
    _behind: File,
    troubles: Mutex<Troubles>,
    names: Mutex<Names>,
    files: Files,
    handles: Mutex<HashMap<u64, Handle>>,
    next: AtomicU64,
}

#[derive(Clone)]
enum Handle {
    File(Arc<Backed>),
    Folder(Arc<Vec<(u64, FileType, OsString)>>),
}

fn failure(error: DiskError) -> io::Error {
    io::Error::from_raw_os_error(match error {
        DiskError::Io => libc::EIO,
        DiskError::NoSpace => libc::ENOSPC,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// From now on this goes wrong.
    pub fn suffer(&self, troubles: Troubles) -> io::Result<()> {
        *lock(&self.troubles) = troubles;
        if troubles.power_cut {
            self.files.lose_all()?;
        }
        Ok(())
    }

    fn troubles(&self) -> Troubles {
        *lock(&self.troubles)
    }

    fn may_write(&self) -> io::Result<()> {
        self.troubles().write.map_or(Ok(()), |error| Err(failure(error)))
    }

    fn path(&self, inode: INodeNo) -> io::Result<PathBuf> {
        lock(&self.names).path(inode.0)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    fn attributes(&self, path: &Path) -> io::Result<FileAttr> {
        let inode = lock(&self.names).inodes.get(path).copied();
        let metadata = if inode == Some(INodeNo::ROOT.0) {
            fs::metadata(path)?
        } else {
            fs::symlink_metadata(path)?
        };
        let inode = inode.unwrap_or_else(|| lock(&self.names).inode(path));
        Ok(attributes(inode, &metadata))
    }

    fn backed(&self, inode: INodeNo) -> io::Result<Arc<Backed>> {
        let path = self.path(inode)?;
        self.files
            .get(inode.0, || File::options().read(true).write(true).open(path))
    }

    fn handle(&self, handle: Handle) -> FileHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.handles).insert(number, handle);
        FileHandle(number)
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<Backed>> {
        match lock(&self.handles).get(&handle.0) {
            Some(Handle::File(file)) => Ok(Arc::clone(file)),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn close(&self, handle: FileHandle) {
        drop(lock(&self.handles).remove(&handle.0));
        self.files.tidy();
    }

    fn sync(&self, file: Option<&Backed>) -> io::Result<()> {
        thread::sleep(Duration::from_millis(self.troubles().sync_delay_ms));
        match self.troubles().sync {
            Some(error) => {
                file.map_or(Ok(()), Backed::lose)?;
                Err(failure(error))
            }
            None => {
                if let Some(file) = file {
                    file.sync();
                }
                Ok(())
            }
        }
    }

    fn create(&self, parent: INodeNo, name: &OsStr, mode: u32) -> io::Result<(FileAttr, FileHandle)> {
        self.may_write()?;
        let path = self.child(parent, name)?;
        let mut options = File::options();
        drop(options.read(true).write(true).create(true).mode(mode).open(&path)?);
        let attributes = self.attributes(&path)?;
        let file = self.backed(attributes.ino)?;
        Ok((attributes, self.handle(Handle::File(file))))
    }

    fn change(
        &self,
        inode: INodeNo,
        (mode, uid, gid): (Option<u32>, Option<u32>, Option<u32>),
        size: Option<u64>,
        handle: Option<FileHandle>,
    ) -> io::Result<FileAttr> {
        if let Some(size) = size {
            self.may_write()?;
            let file = handle.map_or_else(|| self.backed(inode), |handle| self.file(handle))?;
            file.set_length(size)?;
        }
        let path = self.path(inode)?;
        if let Some(mode) = mode {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        if uid.is_some() || gid.is_some() {
            chown(&path, uid, gid)?;
        }
        self.attributes(&path)
    }

    fn folder(&self, inode: INodeNo) -> io::Result<FileHandle> {
        let path = self.path(inode)?;
        let mut entries = vec![
            (inode.0, FileType::Directory, OsString::from(".")),
            (inode.0, FileType::Directory, OsString::from("..")),
        ];
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
            entries.push((
                lock(&self.names).inode(&path.join(entry.file_name())),
                kind,
                entry.file_name(),
            ));
        }
        Ok(self.handle(Handle::Folder(Arc::new(entries))))
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, by: fn(&Path) -> io::Result<()>) -> io::Result<()> {
        let path = self.child(parent, name)?;
        by(&path)?;
        lock(&self.names).remove(&path);
        Ok(())
    }
}

struct Disk(Arc<State>);

fn entry(reply: ReplyEntry, result: io::Result<FileAttr>) {
    match result {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(error) => reply.error(Errno::from(error)),
    }
}

fn empty(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(Errno::from(error)),
    }
}

fn attr(reply: ReplyAttr, result: io::Result<FileAttr>) {
    match result {
        Ok(attributes) => reply.attr(&TTL, &attributes),
        Err(error) => reply.error(Errno::from(error)),
    }
}

fn opened(reply: ReplyOpen, result: io::Result<FileHandle>) {
    match result {
        Ok(handle) => reply.opened(handle, FopenFlags::empty()),
        Err(error) => reply.error(Errno::from(error)),
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(
            reply,
            self.0.child(parent, name).and_then(|path| self.0.attributes(&path)),
        );
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        attr(reply, self.0.path(inode).and_then(|path| self.0.attributes(&path)));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        attr(reply, self.0.change(inode, (mode, uid, gid), size, handle));
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        match self.0.path(inode).and_then(fs::read_link) {
            Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let made = self.0.may_write().and_then(|()| {
            let path = self.0.child(parent, name)?;
            fs::DirBuilder::new().mode(mode & !umask).create(&path)?;
            self.0.attributes(&path)
        });
        entry(reply, made);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.remove(parent, name, |path| fs::remove_file(path)));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.0.remove(parent, name, |path| fs::remove_dir(path)));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to_parent: INodeNo,
        to_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = || -> io::Result<()> {
            if !flags.is_empty() {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            let (from, to) = (self.0.child(parent, name)?, self.0.child(to_parent, to_name)?);
            fs::rename(&from, &to)?;
            lock(&self.0.names).rename(&from, &to);
            Ok(())
        };
        empty(reply, renamed());
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _: i32, reply: ReplyCreate) {
        match self.0.create(parent, name, mode & !umask) {
            Ok((attributes, handle)) => {
                reply.created(&TTL, &attributes, Generation(0), handle, FopenFlags::empty());
            }
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let file = self.0.backed(inode);
        opened(reply, file.map(|file| self.0.handle(Handle::File(file))));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = || -> io::Result<Vec<u8>> {
            if self.0.troubles().read {
                return Err(failure(DiskError::Io));
            }
            self.0.file(handle)?.read(offset, size as usize)
        };
        match read() {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self
            .0
            .may_write()
            .and_then(|()| self.0.file(handle)?.write(offset, data));
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.0.close(handle);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.0.file(handle).and_then(|file| self.0.sync(Some(&file))));
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        opened(reply, self.0.folder(inode));
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let found = lock(&self.0.handles).get(&handle.0).cloned();
        let Some(Handle::Folder(entries)) = found else {
            return reply.error(Errno::EBADF);
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, (inode, kind, name)) in (offset + 1..).zip(entries.iter().skip(from)) {
            if reply.add(INodeNo(*inode), place, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.0.close(handle);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(reply, self.0.sync(None));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let root = self.0.path(INodeNo::ROOT);
        match root.and_then(|root| Ok(rustix::fs::statvfs(&root)?)) {
            Ok(found) => {
                let full = self.0.troubles().write == Some(DiskError::NoSpace);
                let free = if full { 0 } else { found.f_bavail };
                let block = u32::try_from(found.f_bsize).unwrap_or(4096);
                let (fragment, name) = (u32::try_from(found.f_frsize).unwrap_or(block), 255);
                reply.statfs(
                    found.f_blocks,
                    free,
                    free,
                    found.f_files,
                    found.f_ffree,
                    block,
                    name,
                    fragment,
                );
            }
            Err(error) => reply.error(Errno::from(error)),
        }
    }
}
