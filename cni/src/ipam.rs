//! Built-in address management, `"ipam": {"type": "orlop"}`.
//!
//! The leases of a network are one file, `DATA_DIR/NETWORK.json`, written whole to a temporary file, synced and renamed, under an
//! exclusive lock on `DATA_DIR/NETWORK.lock`. So a kill at any instruction leaves the state before or after a change. A
//! lease is durable before its address is used, and is found by the container's id afterwards: what an ADD that was killed
//! has leased is returned by the runtime's DEL or GC, and taken up by an ADD of the same container.
//!
//! The file names its format: one of a newer format is refused and left as it is, and fields that are not known are passed over, and gone
//! with the next change. It names the boot that it is of, too. A reboot ends all network namespaces, so leases of another boot are free.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    config::OrlopIpam,
    error::{Failure, code},
    result::Ip,
};
use pool::Pool;

mod pool;

/// How long others may hold the lock. They hold it for a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const FORMAT: u32 = 1;

/// The leases of a network, locked for as long as this lives.
#[derive(Debug)]
pub struct Leases {
    path: PathBuf,
    state: State,
    /// Closing it gives the lock back.
    _lock: File,
}

/// What a reservation came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    /// One address for each set of ranges.
    pub ips: Vec<Ip>,
    /// Whether the lease is of this call; one that was found is not this call's to roll back.
    pub fresh: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    format: u32,
    boot_id: String,
    /// The last address given, by the first range of its set: the next search begins after it, so that an address rests
    /// before it is used again.
    last: BTreeMap<String, IpAddr>,
    leases: BTreeMap<IpAddr, Lease>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    container_id: String,
    ifname: String,
}

impl Leases {
    /// Locks and reads the leases of `network`. Waits for others up to ten seconds, then says "try again later".
    pub fn open(ipam: &OrlopIpam, network: &str) -> Result<Self, Failure> {
        let dir = &ipam.data_dir;
        let failed = |what: &str, path: &Path, e: &io::Error| Failure::io(format!("{what} {}", path.display()), e);
        let boot_id =
            fs::read_to_string(&ipam.boot_id_file).map_err(|e| failed("reading boot id", &ipam.boot_id_file, &e))?;
        let lock_path = dir.join(format!("{network}.lock"));
        let lock = open_lock(dir, &lock_path).map_err(|e| failed("opening", &lock_path, &e))?;
        wait_for(&lock, &lock_path)?;
        let path = dir.join(format!("{network}.json"));
        let state = match fs::read(&path) {
            Ok(bytes) => parse(&bytes).map_err(|why| {
                let msg = format!(
                    "{} cannot be read; remove it when no pod of this network is left",
                    path.display()
                );
                Failure::new(code::IO, msg).with(why)
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => State::of_boot(""),
            Err(e) => return Err(failed("reading", &path, &e)),
        };
        let boot_id = boot_id.trim();
        let state = if state.boot_id == boot_id {
            state
        } else {
            State {
                last: state.last,
                ..State::of_boot(boot_id)
            }
        };
        Ok(Self {
            path,
            state,
            _lock: lock,
        })
    }

    /// Leases an address from each set of `ipam`, `requested` ones first. The same attachment gets what it has.
    pub fn reserve(
        &mut self,
        ipam: &OrlopIpam,
        container_id: &str,
        ifname: &str,
        requested: &[IpAddr],
    ) -> Result<Reservation, Failure> {
        let pools = pools(ipam)?;
        let wanted = assign_requests(&pools, requested)?;
        let owner = Lease {
            container_id: container_id.to_owned(),
            ifname: ifname.to_owned(),
        };
        let held: Vec<IpAddr> = self
            .state
            .leases
            .iter()
            .filter(|(_, l)| **l == owner)
            .map(|(ip, _)| *ip)
            .collect();
        if let Some(ips) = already_held(&pools, &held) {
            return Ok(Reservation { ips, fresh: false });
        }
        let mut next = self.state.clone();
        // Leases of ranges that are no longer configured do not count as held.
        next.leases.retain(|_, lease| *lease != owner);
        let mut ips = Vec::new();
        for (pool, wanted) in pools.iter().zip(wanted) {
            let key = pool.key();
            let taken = |ip: &IpAddr| next.leases.contains_key(ip);
            let ip = match wanted {
                Some(ip) if taken(&ip) => {
                    return Err(Failure::new(
                        code::RANGE_FULL,
                        format!("requested address {ip} is in use"),
                    ));
                }
                Some(ip) => ip,
                None => pool.next_free(next.last.get(&key).copied(), taken).ok_or_else(|| {
                    Failure::new(code::RANGE_FULL, format!("no address is free in {}", pool.describe()))
                })?,
            };
            next.last.insert(key, ip);
            next.leases.insert(ip, owner.clone());
            ips.push(pool.entry(ip));
        }
        self.commit(next)?;
        Ok(Reservation { ips, fresh: true })
    }

    /// Returns what the attachment has; a success when it has nothing.
    pub fn release(&mut self, container_id: &str, ifname: &str) -> Result<(), Failure> {
        self.retain(|id, name| !(id == container_id && name == ifname))
    }

    /// Returns what `keep` (of container id and interface) does not name.
    pub fn retain(&mut self, keep: impl Fn(&str, &str) -> bool) -> Result<(), Failure> {
        let mut next = self.state.clone();
        next.leases.retain(|_, lease| keep(&lease.container_id, &lease.ifname));
        self.commit(next)
    }

    /// What the attachment has.
    pub fn held(&self, container_id: &str, ifname: &str) -> Vec<IpAddr> {
        let of = |lease: &Lease| lease.container_id == container_id && lease.ifname == ifname;
        self.state
            .leases
            .iter()
            .filter(|(_, lease)| of(lease))
            .map(|(ip, _)| *ip)
            .collect()
    }

    fn commit(&mut self, next: State) -> Result<(), Failure> {
        if next == self.state {
            return Ok(());
        }
        write_durably(&self.path, &next)
            .map_err(|e| Failure::io(format!("writing leases {}", self.path.display()), &e))?;
        self.state = next;
        Ok(())
    }
}

impl State {
    fn of_boot(boot_id: &str) -> Self {
        Self {
            format: FORMAT,
            boot_id: boot_id.to_owned(),
            last: BTreeMap::new(),
            leases: BTreeMap::new(),
        }
    }
}

/// Checks the ranges without touching the leases: for STATUS.
pub fn check(ipam: &OrlopIpam) -> Result<(), Failure> {
    pools(ipam).map(|_| ())
}

/// The addresses of the gateways, with prefix lengths: what the bridge gets.
pub fn gateways(ips: &[Ip]) -> Vec<IpNet> {
    ips.iter()
        .filter_map(|ip| IpNet::new(ip.gateway?, ip.address.prefix_len()).ok())
        .collect()
}

/// The gateways of all ranges, given or not.
pub fn all_gateways(ipam: &OrlopIpam) -> Result<Vec<IpNet>, Failure> {
    Ok(pools(ipam)?.iter().flat_map(Pool::gateways).collect())
}

fn pools(ipam: &OrlopIpam) -> Result<Vec<Pool>, Failure> {
    let pools = ipam
        .ranges
        .iter()
        .map(|set| Pool::new(set))
        .collect::<Result<Vec<_>, _>>()?;
    for (index, pool) in pools.iter().enumerate() {
        if let Some(other) = pools[..index].iter().find(|other| other.overlaps(pool)) {
            let (a, b) = (other.describe(), pool.describe());
            return Err(Failure::new(
                code::INVALID_CONFIG,
                format!("ipam.ranges: {a} and {b} overlap"),
            ));
        }
    }
    Ok(pools)
}

/// Which requested address each pool is to give. One that no pool has is an error.
fn assign_requests(pools: &[Pool], requested: &[IpAddr]) -> Result<Vec<Option<IpAddr>>, Failure> {
    let mut wanted = vec![None; pools.len()];
    for ip in requested {
        let slot = pools
            .iter()
            .position(|pool| pool.contains(*ip))
            .filter(|index| wanted[*index].is_none());
        let Some(index) = slot else {
            return Err(Failure::new(
                code::INVALID_CONFIG,
                format!("requested address {ip} cannot be given by any range"),
            ));
        };
        wanted[index] = Some(*ip);
    }
    Ok(wanted)
}

fn already_held(pools: &[Pool], held: &[IpAddr]) -> Option<Vec<Ip>> {
    pools
        .iter()
        .map(|pool| held.iter().find(|ip| pool.contains(**ip)).map(|ip| pool.entry(*ip)))
        .collect()
}

fn open_lock(dir: &Path, path: &Path) -> io::Result<File> {
    let open = || {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
    };
    match open() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(dir)?;
            open()
        }
        other => other,
    }
}

fn wait_for(lock: &File, path: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut pause = Duration::from_micros(100);
    loop {
        match flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Failure::io(format!("locking {}", path.display()), &e.into())),
        }
        if Instant::now() >= deadline {
            let msg = format!("{} has been held for {} s", path.display(), LOCK_PATIENCE.as_secs());
            return Err(Failure::new(code::TRY_AGAIN, msg));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

fn parse(bytes: &[u8]) -> Result<State, String> {
    /// What a file of every format has.
    #[derive(Deserialize)]
    struct Marked {
        format: u32,
    }
    let Marked { format } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if format > FORMAT {
        return Err(format!(
            "a newer orlop-bridge wrote it in format {format}, and this one reads format {FORMAT}: the newer one reads it"
        ));
    }
    if format != FORMAT {
        return Err(format!("format {format} is not known"));
    }
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

/// The lock is held, so one name for the temporary file is enough; what a killed call left of it is overwritten.
fn write_durably(path: &Path, state: &State) -> io::Result<()> {
    let temporary = path.with_extension("json.new");
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(state)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests;
