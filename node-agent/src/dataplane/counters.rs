//! Reads the counters: one system call for some thousand entries, no further than the highest id in use.

use std::{
    collections::HashMap,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use orlop_ebpf_abi as abi;

use super::{
    BackendCounters, NetworkCounters, ServiceCounters, ServiceId, bpf,
    kernel::{Kernel, Map},
    planner::Planner,
};

/// Sums over the CPUs of per-CPU values made of `N` 64-bit words.
fn sum<const N: usize>(value: &[u8]) -> [u64; N] {
    let mut sums = [0_u64; N];
    for cpu in value.chunks_exact(8 * N) {
        for (sum, word) in sums.iter_mut().zip(words(cpu)) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|chunk| {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    })
}

fn index(key: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&key[..4]);
    u32::from_ne_bytes(word)
}

/// The counters `0 ..= highest` of a per-CPU array.
fn array<const N: usize>(map: &Map, highest: u32) -> io::Result<Vec<[u64; N]>> {
    let mut sums = Vec::with_capacity(highest as usize + 1);
    bpf::for_each(&map.fd, &map.info, |key, value| {
        sums.push(sum(value));
        index(key) < highest
    })?;
    Ok(sums)
}

/// Connections by service: frontends of one service together. Services and backends that nobody here has connected to are left
/// out: of thousands, a node uses some.
pub fn services(kernel: &Kernel, planner: &Planner) -> io::Result<HashMap<ServiceId, ServiceCounters>> {
    let (services, backends) = planner.highest_ids();
    let by_service: Vec<[u64; 2]> = array(kernel.map(abi::SERVICE_COUNTERS), services)?;
    let by_backend: Vec<[u64; 1]> = array(kernel.map(abi::BACKEND_COUNTERS), backends)?;
    let mut counters: HashMap<ServiceId, ServiceCounters> = HashMap::new();
    for (key, entry) in planner.entries() {
        let Some(owner) = planner.owner_of(key) else { continue };
        let [connections, refused] = by_service.get(entry.service as usize).copied().unwrap_or_default();
        if connections == 0 && refused == 0 {
            continue;
        }
        let of_service = counters
            .entry((owner.namespace.clone(), owner.name.clone()))
            .or_default();
        of_service.connections += connections;
        of_service.refused += refused;
        let used = entry.backends.iter().filter_map(|backend| {
            let [connections] = by_backend.get(backend.id as usize).copied()?;
            (connections > 0).then(|| BackendCounters {
                address: SocketAddr::from((Ipv4Addr::from(backend.address), backend.port)),
                protocol: key.protocol as u8,
                connections,
            })
        });
        of_service.backends.extend(used);
    }
    Ok(counters)
}

/// Sets counters to zero whose ids `free` says are free: an id begins with zero.
pub fn clear(map: &Map, free: impl Fn(u32) -> bool) -> io::Result<()> {
    let mut stale = Vec::new();
    bpf::for_each(&map.fd, &map.info, |key, value| {
        if free(index(key)) && value.iter().any(|byte| *byte != 0) {
            stale.push(index(key));
        }
        true
    })?;
    clear_ids(map, &stale)
}

/// Sets these counters to zero.
pub fn clear_ids(map: &Map, ids: &[u32]) -> io::Result<()> {
    const CHUNK: usize = 1024;
    let size = bpf::value_bytes(&map.info)?;
    let zeros = vec![0_u8; size * CHUNK.min(ids.len())];
    for chunk in ids.chunks(CHUNK) {
        let keys: Vec<u8> = chunk.iter().flat_map(|id| id.to_ne_bytes()).collect();
        bpf::update_batch(&map.fd, &keys, &zeros[..size * chunk.len()], chunk.len())?;
    }
    Ok(())
}

/// Traffic by interface index.
pub fn traffic(map: &Map) -> io::Result<HashMap<u32, NetworkCounters>> {
    let mut counters = HashMap::new();
    bpf::for_each(&map.fd, &map.info, |key, value| {
        let [rx_bytes, rx_packets, tx_bytes, tx_packets] = sum(value);
        counters.insert(
            index(key),
            NetworkCounters {
                rx_bytes,
                rx_packets,
                tx_bytes,
                tx_packets,
            },
        );
        true
    })?;
    Ok(counters)
}

/// CPU time by container. Time up to the last switch first, then what runs since: a switch in between is seen at the next
/// reading rather than twice.
pub fn cpu(kernel: &Kernel) -> io::Result<HashMap<u64, u64>> {
    let map = kernel.map(abi::CPU_TIME);
    let mut times = HashMap::new();
    bpf::for_each(&map.fd, &map.info, |key, value| {
        let [nanoseconds] = sum(value);
        times.extend(words(key).next().map(|id| (id, nanoseconds)));
        true
    })?;
    let containers = containers(&kernel.node_cgroup);
    let map = kernel.map(abi::RUNNING);
    let mut running = Vec::new();
    bpf::for_each(&map.fd, &map.info, |_key, value| {
        running.extend(words(value));
        true
    })?;
    let now = monotonic_now()?;
    for cpu in running.chunks_exact(2) {
        if let Some(container) = containers.get(&cpu[1])
            && cpu[0] != 0
        {
            *times.entry(*container).or_default() += now.saturating_sub(cpu[0]);
        }
    }
    Ok(times)
}

/// Removes the CPU time of containers that are gone and were gone at the last reading too.
pub fn forget_gone_containers(kernel: &Kernel, times: &HashMap<u64, u64>, last: &HashMap<u64, u64>) -> io::Result<()> {
    let living = containers(&kernel.node_cgroup);
    let living: std::collections::BTreeSet<u64> = living.into_values().collect();
    for (id, time) in times {
        if !living.contains(id) && last.get(id) == Some(time) {
            bpf::delete(&kernel.map(abi::CPU_TIME).fd, &id.to_ne_bytes())?;
        }
    }
    Ok(())
}

fn monotonic_now() -> io::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec()), u64::try_from(now.tv_nsec()));
    match (seconds, nanoseconds) {
        (Ok(seconds), Ok(nanoseconds)) => Ok(seconds * 1_000_000_000 + nanoseconds),
        _ => Err(io::Error::other("the clock is before zero")),
    }
}

/// The container of every cgroup below the node's: `POD_UID/CONTAINER_ID`, and what is below that.
fn containers(node: &Path) -> HashMap<u64, u64> {
    let mut found = HashMap::new();
    for pod in directories(node) {
        for container in directories(&pod) {
            if let Ok(metadata) = fs::metadata(&container) {
                gather(&container, metadata.ino(), &mut found, 0);
            }
        }
    }
    found
}

fn gather(directory: &Path, container: u64, found: &mut HashMap<u64, u64>, depth: u32) {
    const DEEPEST: u32 = 16;
    if let Ok(metadata) = fs::metadata(directory) {
        found.insert(metadata.ino(), container);
    }
    if depth < DEEPEST {
        for child in directories(directory) {
            gather(&child, container, found, depth + 1);
        }
    }
}

fn directories(parent: &Path) -> impl Iterator<Item = std::path::PathBuf> + use<> {
    fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}
