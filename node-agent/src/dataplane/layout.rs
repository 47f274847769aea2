//! Which maps there are, and the check before one that is pinned is opened: aya opens whatever lies at the path.
//!
//! A map's name carries the version of its layout. A pinned map of that name must have that layout: type, sizes, flags, and
//! the names, offsets and types of all fields, read from the map's own BTF. Only `max_entries` may differ, which is a
//! migration (see [`super::kernel`]).

use std::io;

use orlop_ebpf_abi as abi;

use super::{
    Sizes,
    bpf::{self, MapInfo},
    btf::Btf,
};

/// A map that is pinned.
#[derive(Debug)]
pub struct MapSpec {
    /// Its name, which is its pin's too.
    pub name: &'static str,
    /// BPF_MAP_TYPE_...
    pub kind: u32,
    /// BPF_F_...
    pub flags: u32,
    /// Bytes of a key and of a value.
    pub sizes: (u32, u32),
    /// [`Btf::shape`] of key and value; empty for a map without BTF.
    pub shape: (&'static str, &'static str),
    /// How many entries, by configuration; `None`: as the object says.
    pub entries: Option<fn(&Sizes) -> u32>,
}

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const SK_STORAGE: u32 = 24;
const RINGBUF: u32 = 27;
const NO_PREALLOC: u32 = 1;
const MMAPABLE: u32 = 1 << 10;

/// The ring buffer of `aya-log`.
pub const LOGS: &str = "AYA_LOGS";

/// Entries of [`abi::SOCKETS`]: programs find one by the lower bits of a cookie.
#[must_use]
pub fn sockets(sizes: &Sizes) -> u32 {
    sizes.sockets.clamp(1, 1 << 30).next_power_of_two()
}

/// All maps.
pub static MAPS: &[MapSpec] = &[
    MapSpec {
        name: abi::FRONTENDS,
        kind: HASH,
        flags: 0,
        sizes: (8, 32),
        shape: (
            "{address@0:[u8;4] port@4:u16 protocol@6:enum8 Tcp=6 Udp=17 scope@7:enum8 Cluster=0}",
            "{service@0:u32 generation@4:u32 base@8:u32 ready@12:u32 terminating@16:u32 flags@20:u32 owner@24:u32 check@28:u32}",
        ),
        entries: Some(|sizes| sizes.frontends),
    },
    MapSpec {
        name: abi::ARENA,
        kind: ARRAY,
        flags: MMAPABLE,
        sizes: (4, 16),
        shape: (
            "u32",
            "{address@0:[u8;4] port@4:u16 state@6:enum8 Free=0 Ready=1 Terminating=2 reserved@7:u8 generation@8:u32 backend@12:u32}",
        ),
        entries: Some(|sizes| sizes.slots),
    },
    MapSpec {
        name: abi::SERVICE_COUNTERS,
        kind: PERCPU_ARRAY,
        flags: 0,
        sizes: (4, 16),
        shape: ("u32", "{connections@0:u64 refused@8:u64}"),
        entries: Some(|sizes| sizes.frontends),
    },
    MapSpec {
        name: abi::BACKEND_COUNTERS,
        kind: PERCPU_ARRAY,
        flags: 0,
        sizes: (4, 8),
        shape: ("u32", "{connections@0:u64}"),
        entries: Some(|sizes| sizes.slots),
    },
    MapSpec {
        name: abi::FAILURES,
        kind: PERCPU_ARRAY,
        flags: 0,
        sizes: (4, 16),
        shape: ("u32", "{exhausted@0:u64 no_storage@8:u64}"),
        entries: None,
    },
    MapSpec {
        name: abi::SOCKETS,
        kind: ARRAY,
        flags: 0,
        sizes: (4, 24),
        shape: (
            "u32",
            "{cookie@0:u64 connected@8:{service_address@0:[u8;4] backend_address@4:[u8;4] service_port@8:u16 \
             backend_port@10:u16} reserved@20:u32}",
        ),
        entries: Some(sockets),
    },
    MapSpec {
        name: abi::CONNECTED,
        kind: SK_STORAGE,
        flags: NO_PREALLOC,
        sizes: (4, 12),
        shape: (
            "u32",
            "{service_address@0:[u8;4] backend_address@4:[u8;4] service_port@8:u16 backend_port@10:u16}",
        ),
        entries: None,
    },
    MapSpec {
        name: abi::DATAGRAMS,
        kind: SK_STORAGE,
        flags: NO_PREALLOC,
        sizes: (4, 136),
        shape: ("u32", PEERS),
        entries: None,
    },
    MapSpec {
        name: abi::CPU_TIME,
        kind: PERCPU_HASH,
        flags: 0,
        sizes: (8, 8),
        shape: ("u64", "{nanoseconds@0:u64}"),
        entries: Some(|sizes| sizes.containers),
    },
    MapSpec {
        name: abi::RUNNING,
        kind: PERCPU_ARRAY,
        flags: 0,
        sizes: (4, 16),
        shape: ("u32", "{since@0:u64 cgroup@8:u64}"),
        entries: None,
    },
    MapSpec {
        name: abi::TRAFFIC,
        kind: PERCPU_HASH,
        flags: 0,
        sizes: (4, 32),
        shape: (
            "u32",
            "{rx_bytes@0:u64 rx_packets@8:u64 tx_bytes@16:u64 tx_packets@24:u64}",
        ),
        entries: Some(|sizes| sizes.pods),
    },
    MapSpec {
        name: LOGS,
        kind: RINGBUF,
        flags: 0,
        sizes: (0, 0),
        shape: ("", ""),
        entries: None,
    },
];

const PEERS: &str = "{next@0:u64 peers@8:[{service_address@0:[u8;4] service_port@4:u16 reserved@6:u16 backend_address@8:[u8;4] \
                     backend_port@12:u16 reserved2@14:u16};8]}";

impl MapSpec {
    /// Compares a map with what its name promises; `Err` says the first difference.
    ///
    /// # Errors
    /// The difference in words, or why it cannot be told.
    pub fn check(&self, info: &MapInfo) -> Result<(), String> {
        let same = |what: &str, have: u32, want: u32| {
            if have == want {
                Ok(())
            } else {
                Err(format!("its {what} is {have}, not {want}"))
            }
        };
        let kernel_name: String = self.name.chars().take(15).collect();
        if info.name != kernel_name {
            return Err(format!("its name is {:?}", info.name));
        }
        same("type", info.kind, self.kind)?;
        // When a hash gets its memory is nothing that its entries or the programs see.
        let ignored = if self.kind == HASH { NO_PREALLOC } else { 0 };
        same("flags", info.flags & !ignored, self.flags)?;
        same("key size", info.key_size, self.sizes.0)?;
        same("value size", info.value_size, self.sizes.1)?;
        let (key, value) = shapes(info).map_err(|error| error.to_string())?;
        if (key.as_str(), value.as_str()) != self.shape {
            return Err(format!(
                "its entries are {key} -> {value}, not {} -> {}",
                self.shape.0, self.shape.1
            ));
        }
        Ok(())
    }
}

/// What a map's key and value look like by its BTF; empty without.
fn shapes(info: &MapInfo) -> io::Result<(String, String)> {
    if info.btf_id == 0 || info.btf_value == 0 {
        return Ok((String::new(), String::new()));
    }
    let bytes = bpf::btf_by_id(info.btf_id)?;
    let btf = Btf::parse(&bytes)?;
    Ok((btf.shape(info.btf_key), btf.shape(info.btf_value)))
}

/// The specification of a map by name.
#[must_use]
pub fn spec(name: &str) -> Option<&'static MapSpec> {
    MAPS.iter().find(|spec| spec.name == name)
}
