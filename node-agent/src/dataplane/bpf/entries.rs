//! Entries of maps: one at a time, and many in one system call.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use super::{MapInfo, bpf, command, raw};

#[repr(C)]
struct ElementAttributes {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Writes one entry. For per-CPU maps `value` holds all CPUs'.
///
/// # Errors
/// The kernel's.
pub fn update(map: impl AsFd, key: &[u8], value: &[u8]) -> io::Result<()> {
    write(map, key, value, 0)
}

/// The same, only where there is none; `false` when there was.
///
/// # Errors
/// The kernel's.
pub fn add(map: impl AsFd, key: &[u8], value: &[u8]) -> io::Result<bool> {
    const NOEXIST: u64 = 1;
    match write(map, key, value, NOEXIST) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        other => other.map(|()| true),
    }
}

fn write(map: impl AsFd, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    element(command::MAP_UPDATE_ELEM, map, key, value.as_ptr() as u64, flags)
}

/// Deletes one entry; one that is not there is a success.
///
/// # Errors
/// The kernel's.
pub fn delete(map: impl AsFd, key: &[u8]) -> io::Result<()> {
    found(element(command::MAP_DELETE_ELEM, map, key, 0, 0)).map(drop)
}

/// Reads one entry of a map that is not per CPU; `value` is as long as its values. `false` when there is none.
///
/// # Errors
/// The kernel's.
pub fn lookup(map: impl AsFd, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    found(element(
        command::MAP_LOOKUP_ELEM,
        map,
        key,
        value.as_mut_ptr() as u64,
        0,
    ))
}

fn found(outcome: io::Result<()>) -> io::Result<bool> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        other => other.map(|()| true),
    }
}

fn element(command: u32, map: impl AsFd, key: &[u8], value: u64, flags: u64) -> io::Result<()> {
    let mut attributes = ElementAttributes {
        map: raw(map.as_fd()),
        reserved: 0,
        key: key.as_ptr() as u64,
        value,
        flags,
    };
    bpf(command, &mut attributes).map(drop)
}

#[repr(C)]
struct BatchAttributes {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

impl BatchAttributes {
    /// For `count` entries whose keys and values are at these addresses, from the first on. The descriptor is named by its
    /// number: it is borrowed, so that the caller still has it open when the call is made.
    fn new(map: BorrowedFd<'_>, keys: u64, values: u64, count: usize) -> io::Result<Self> {
        Ok(Self {
            from: 0,
            to: 0,
            keys,
            values,
            count: u32::try_from(count).map_err(io::Error::other)?,
            map: raw(map),
            element_flags: 0,
            flags: 0,
        })
    }
}

/// Writes `count` entries whose keys and values lie one after the other.
///
/// # Errors
/// The kernel's; the entries before the failing one are written.
pub fn update_batch(map: impl AsFd, keys: &[u8], values: &[u8], count: usize) -> io::Result<()> {
    batch(command::MAP_UPDATE_BATCH, map, keys, values, count)
}

/// Deletes `count` entries.
///
/// # Errors
/// The kernel's; `ENOENT` for a key that is not there, the ones after it are then untouched.
pub fn delete_batch(map: impl AsFd, keys: &[u8], count: usize) -> io::Result<()> {
    batch(command::MAP_DELETE_BATCH, map, keys, &[], count)
}

fn batch(command: u32, map: impl AsFd, keys: &[u8], values: &[u8], count: usize) -> io::Result<()> {
    if count == 0 {
        return Ok(());
    }
    let mut attributes = BatchAttributes::new(map.as_fd(), keys.as_ptr() as u64, values.as_ptr() as u64, count)?;
    bpf(command, &mut attributes).map(drop)
}

/// Calls `each` for the entries of a map, in the kernel's order, a few thousand per system call, until it says `false`. Values of
/// per-CPU maps hold all CPUs', each rounded up to 8 bytes.
///
/// # Errors
/// The kernel's.
pub fn for_each(map: impl AsFd, info: &MapInfo, mut each: impl FnMut(&[u8], &[u8]) -> bool) -> io::Result<()> {
    let key_size = info.key_size as usize;
    let value_size = value_bytes(info)?;
    let mut room: usize = 4096.min(info.max_entries.max(1) as usize);
    let (mut position, mut next) = ([0_u8; 64], [0_u8; 64]);
    let mut first = true;
    loop {
        let (mut keys, mut values) = (vec![0_u8; room * key_size], vec![0_u8; room * value_size]);
        let (to_keys, to_values) = (keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64);
        let mut attributes = BatchAttributes {
            from: if first { 0 } else { position.as_mut_ptr() as u64 },
            to: next.as_mut_ptr() as u64,
            ..BatchAttributes::new(map.as_fd(), to_keys, to_values, room)?
        };
        let ended = match bpf(command::MAP_LOOKUP_BATCH, &mut attributes) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // One bucket of a hash map holds more than there was room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = attributes.count as usize;
        for (key, value) in keys
            .chunks_exact(key_size)
            .zip(values.chunks_exact(value_size))
            .take(count)
        {
            if !each(key, value) {
                return Ok(());
            }
        }
        if ended {
            return Ok(());
        }
        position = next;
        first = false;
    }
}

/// Bytes of one entry's value as system calls carry it.
///
/// # Errors
/// The number of CPUs cannot be read.
pub fn value_bytes(info: &MapInfo) -> io::Result<usize> {
    const PERCPU: [u32; 3] = [5, 6, 10];
    let size = info.value_size as usize;
    if PERCPU.contains(&info.kind) {
        return Ok(size.next_multiple_of(8) * cpus()?);
    }
    Ok(size)
}

/// CPUs that the kernel has room for.
///
/// # Errors
/// The number cannot be read.
pub fn cpus() -> io::Result<usize> {
    aya::util::nr_cpus().map_err(|(path, error)| io::Error::other(format!("{path}: {error}")))
}
