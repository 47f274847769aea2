//! bpf(2) by hand, where aya offers nothing: batches, replacing a pinned link's program, infos with BTF ids.

mod entries;

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

pub use entries::{add, cpus, delete, delete_batch, for_each, lookup, update, update_batch, value_bytes};

mod command {
    pub const MAP_LOOKUP_ELEM: u32 = 1;
    pub const MAP_UPDATE_ELEM: u32 = 2;
    pub const MAP_DELETE_ELEM: u32 = 3;
    pub const OBJ_PIN: u32 = 6;
    pub const OBJ_GET: u32 = 7;
    pub const PROG_GET_FD_BY_ID: u32 = 13;
    pub const MAP_GET_FD_BY_ID: u32 = 14;
    pub const OBJ_GET_INFO_BY_FD: u32 = 15;
    pub const BTF_GET_FD_BY_ID: u32 = 19;
    pub const MAP_LOOKUP_BATCH: u32 = 24;
    pub const MAP_UPDATE_BATCH: u32 = 26;
    pub const MAP_DELETE_BATCH: u32 = 27;
    pub const LINK_CREATE: u32 = 28;
    pub const LINK_UPDATE: u32 = 29;
    pub const ENABLE_STATS: u32 = 32;
}

/// What the kernel says of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapInfo {
    /// BPF_MAP_TYPE_...
    pub kind: u32,
    /// The kernel's id.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value (on one CPU).
    pub value_size: u32,
    /// How many fit.
    pub max_entries: u32,
    /// BPF_F_...
    pub flags: u32,
    /// Up to 15 characters.
    pub name: String,
    /// The BTF object that describes key and value, 0 for none.
    pub btf_id: u32,
    /// Type id of the key there.
    pub btf_key: u32,
    /// Type id of the value there.
    pub btf_value: u32,
}

/// What the kernel says of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    /// The kernel's id.
    pub id: u32,
    /// Ids of the maps that it uses.
    pub map_ids: Vec<u32>,
    /// Instructions that the verifier walked.
    pub verified_instructions: u32,
}

/// What the kernel says of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// The attached program's id.
    pub program: u32,
    /// What it is attached to.
    pub target: Target,
}

/// What a link is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A cgroup by id; 0 once it is gone.
    Cgroup(u64),
    /// An interface by index (in the network namespace of the link's making); 0 once it is gone.
    Interface(u32),
    /// A tracepoint.
    Tracing,
}

fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: every caller passes the attribute struct of its command, with pointers to memory that outlives the call and
    // is as large as the sizes beside them say. The kernel takes what lies beyond the given size as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn new_fd(raw: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

#[repr(C)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at `path`.
///
/// # Errors
/// The kernel's, `NotFound` among them.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(command::OBJ_GET, &mut attributes).map(new_fd)
}

/// Pins a map, program or link.
///
/// # Errors
/// The kernel's.
pub fn pin(fd: impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attributes = ObjectAttributes {
        path: path.as_ptr() as u64,
        fd: raw(fd.as_fd()),
        flags: 0,
    };
    bpf(command::OBJ_PIN, &mut attributes).map(drop)
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// An info struct as bytes: fields are read at the offsets of the kernel's ABI, what an older kernel does not know is 0.
struct Info<const N: usize>([u8; N]);

impl<const N: usize> Info<N> {
    fn get(fd: BorrowedFd<'_>, buffer: [u8; N]) -> io::Result<Self> {
        let mut buffer = buffer;
        let mut attributes = InfoAttributes {
            fd: raw(fd),
            length: u32::try_from(N).unwrap_or(0),
            info: buffer.as_mut_ptr() as u64,
        };
        bpf(command::OBJ_GET_INFO_BY_FD, &mut attributes)?;
        Ok(Self(buffer))
    }

    fn u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[offset..offset + 4]);
        u32::from_ne_bytes(bytes)
    }

    fn u64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[offset..offset + 8]);
        u64::from_ne_bytes(bytes)
    }
}

/// What the kernel says of a map.
///
/// # Errors
/// The kernel's.
pub fn map_info(fd: impl AsFd) -> io::Result<MapInfo> {
    let info = Info::get(fd.as_fd(), [0_u8; 80])?;
    let name = &info.0[24..40];
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(MapInfo {
        kind: info.u32(0),
        id: info.u32(4),
        key_size: info.u32(8),
        value_size: info.u32(12),
        max_entries: info.u32(16),
        flags: info.u32(20),
        name: String::from_utf8_lossy(&name[..length]).into_owned(),
        btf_id: info.u32(64),
        btf_key: info.u32(68),
        btf_value: info.u32(72),
    })
}

/// What the kernel says of a program.
///
/// # Errors
/// The kernel's.
pub fn program_info(fd: impl AsFd) -> io::Result<ProgramInfo> {
    const LENGTH: usize = 232;
    let count = Info::get(fd.as_fd(), [0_u8; LENGTH])?.u32(52);
    let mut map_ids = vec![0_u32; count as usize];
    let mut ask = [0_u8; LENGTH];
    ask[52..56].copy_from_slice(&count.to_ne_bytes());
    ask[56..64].copy_from_slice(&(map_ids.as_mut_ptr() as u64).to_ne_bytes());
    let info = Info::get(fd.as_fd(), ask)?;
    Ok(ProgramInfo {
        id: info.u32(4),
        map_ids,
        verified_instructions: info.u32(216),
    })
}

/// What the kernel says of a link.
///
/// # Errors
/// The kernel's, or a link of a kind that we never make.
pub fn link_info(fd: impl AsFd) -> io::Result<LinkInfo> {
    let info = Info::get(fd.as_fd(), [0_u8; 32])?;
    let target = match info.u32(0) {
        1 | 2 => Target::Tracing,
        3 => Target::Cgroup(info.u64(16)),
        11 => Target::Interface(info.u32(16)),
        kind => return Err(io::Error::other(format!("a link of kind {kind}"))),
    };
    Ok(LinkInfo {
        program: info.u32(8),
        target,
    })
}

#[repr(C)]
struct IdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

/// Opens a program by id.
///
/// # Errors
/// The kernel's.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(command::PROG_GET_FD_BY_ID, &mut IdAttributes { id, next: 0, flags: 0 }).map(new_fd)
}

/// Opens a map by id.
///
/// # Errors
/// The kernel's.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(command::MAP_GET_FD_BY_ID, &mut IdAttributes { id, next: 0, flags: 0 }).map(new_fd)
}

/// The bytes of a BTF object.
///
/// # Errors
/// The kernel's.
pub fn btf_by_id(id: u32) -> io::Result<Vec<u8>> {
    let fd = bpf(command::BTF_GET_FD_BY_ID, &mut IdAttributes { id, next: 0, flags: 0 }).map(new_fd)?;
    let size = Info::get(fd.as_fd(), [0_u8; 32])?.u32(8);
    let mut bytes = vec![0_u8; size as usize];
    let mut ask = [0_u8; 32];
    ask[0..8].copy_from_slice(&(bytes.as_mut_ptr() as u64).to_ne_bytes());
    ask[8..12].copy_from_slice(&size.to_ne_bytes());
    Info::get(fd.as_fd(), ask)?;
    Ok(bytes)
}

#[repr(C)]
struct LinkCreateAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    more: [u64; 4],
}

/// Attaches a program: `target` is a cgroup's descriptor, an interface's index, or 0 for a tracepoint.
///
/// # Errors
/// The kernel's.
pub fn create_link(program: impl AsFd, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attributes = LinkCreateAttributes {
        program: raw(program.as_fd()),
        target,
        attach_type,
        flags: 0,
        more: [0; 4],
    };
    bpf(command::LINK_CREATE, &mut attributes).map(new_fd)
}

#[repr(C)]
struct LinkUpdateAttributes {
    link: u32,
    program: u32,
    flags: u32,
    old: u32,
}

/// Replaces a link's program, atomically.
///
/// # Errors
/// The kernel's; `ENOLINK` when what it was attached to is gone.
pub fn update_link(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let mut attributes = LinkUpdateAttributes {
        link: raw(link.as_fd()),
        program: raw(program.as_fd()),
        flags: 0,
        old: 0,
    };
    bpf(command::LINK_UPDATE, &mut attributes).map(drop)
}

/// Makes the kernel measure every program's run time (`run_time_ns`, `run_cnt`) until the descriptor is closed, at the latest when
/// this process ends.
///
/// # Errors
/// The kernel's.
pub fn enable_run_time_statistics() -> io::Result<OwnedFd> {
    const RUN_TIME: u32 = 0;
    bpf(command::ENABLE_STATS, &mut { RUN_TIME }).map(new_fd)
}
