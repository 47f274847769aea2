//! The service maps: frontends and arena, as the planner's entries.

use std::{io, thread};

use orlop_ebpf_abi::{self as abi, Frontend, FrontendKey, Protocol, Scope};

use super::{
    bpf,
    kernel::{Kernel, Map},
    planner::Writes,
};

/// From so many frontends on they are written by several threads: the kernel needs most of a microsecond for each, and locks
/// but one bucket meanwhile.
const MANY: usize = 2048;
/// So many at most.
const THREADS: usize = 4;

/// Carries out what was planned: slots, then frontends, then deletions.
///
/// # Errors
/// The kernel's. What is written then is unknown: read the maps again.
pub fn write(kernel: &Kernel, arena: &super::arena::Arena, writes: &Writes) -> io::Result<()> {
    for (base, slots) in writes.slots.iter() {
        arena.write(base, slots)?;
    }
    let map = &kernel.map(abi::FRONTENDS).fd;
    let update = &|frontends: &[(FrontendKey, Frontend)]| {
        let keys: Vec<_> = frontends.iter().map(|(key, _)| encode_key(key)).collect();
        let values: Vec<_> = frontends.iter().map(|(_, value)| encode_value(value)).collect();
        bpf::update_batch(map, keys.as_flattened(), values.as_flattened(), keys.len())
    };
    if writes.frontends.len() < MANY {
        update(&writes.frontends)?;
    } else {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let (own, others) = writes.frontends.split_at(writes.frontends.len() / threads);
        thread::scope(|scope| {
            let others: Vec<_> = others
                .chunks(writes.frontends.len().div_ceil(threads))
                .map(|part| {
                    let spawned = thread::Builder::new().spawn_scoped(scope, move || update(part));
                    (part, spawned)
                })
                .collect();
            let mut done = update(own);
            for (part, spawned) in others {
                let of_other = match spawned {
                    Ok(thread) => thread
                        .join()
                        .map_err(|_panic| io::Error::other("a thread that wrote panicked"))
                        .flatten(),
                    // The machine has no thread left for us.
                    Err(_) => update(part),
                };
                done = done.and(of_other);
            }
            done
        })?;
    }
    delete(kernel, &writes.deletions)
}

/// Deletes frontends.
///
/// # Errors
/// The kernel's.
pub fn delete(kernel: &Kernel, keys: &[FrontendKey]) -> io::Result<()> {
    let map = &kernel.map(abi::FRONTENDS).fd;
    let encoded: Vec<_> = keys.iter().map(encode_key).collect();
    match bpf::delete_batch(map, encoded.as_flattened(), keys.len()) {
        // Somebody was there with bpftool: one by one.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            keys.iter().try_for_each(|key| bpf::delete(map, &encode_key(key)))
        }
        other => other,
    }
}

type Frontends = Vec<(FrontendKey, Frontend)>;

/// All frontends, and the keys of entries that cannot be ours.
///
/// # Errors
/// The kernel's.
pub fn read(map: &Map) -> io::Result<(Frontends, Vec<Vec<u8>>)> {
    let (mut frontends, mut foreign) = (Vec::new(), Vec::new());
    bpf::for_each(&map.fd, &map.info, |key, value| {
        match decode_key(key) {
            Some(decoded) => frontends.push((decoded, decode_value(value))),
            None => foreign.push(key.to_vec()),
        }
        true
    })?;
    Ok((frontends, foreign))
}

fn encode_key(key: &FrontendKey) -> [u8; 8] {
    let [a, b, c, d] = key.address;
    let port = key.port.to_ne_bytes();
    [a, b, c, d, port[0], port[1], key.protocol as u8, key.scope as u8]
}

/// A key as the map has it; `None` when it is none of ours.
pub fn decode_key(bytes: &[u8]) -> Option<FrontendKey> {
    let bytes: [u8; 8] = bytes.try_into().ok()?;
    Some(FrontendKey {
        address: [bytes[0], bytes[1], bytes[2], bytes[3]],
        port: u16::from_ne_bytes([bytes[4], bytes[5]]),
        protocol: Protocol::from_number(bytes[6].into())?,
        scope: (bytes[7] == Scope::Cluster as u8).then_some(Scope::Cluster)?,
    })
}

fn encode_value(value: &Frontend) -> [u8; 32] {
    let words = [
        value.service,
        value.generation,
        value.base,
        value.ready,
        value.terminating,
        value.flags,
        value.owner,
        value.check,
    ];
    let mut bytes = [0; 32];
    for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// A value as the map has it: 32 bytes.
pub fn decode_value(bytes: &[u8]) -> Frontend {
    let word = |index: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[4 * index..4 * index + 4]);
        u32::from_ne_bytes(word)
    };
    Frontend {
        service: word(0),
        generation: word(1),
        base: word(2),
        ready: word(3),
        terminating: word(4),
        flags: word(5),
        owner: word(6),
        check: word(7),
    }
}
