//! What the kernel programs and the node agent share: keys and values of the pinned maps, and the choice of a backend.
//!
//! Everything here is read with `bpftool map dump` too: addresses are bytes in reading order, ports plain numbers in host
//! order, states and protocols enums. All types are `repr(C)` without padding; a change of a layout gets a new map name
//! (`svc4_v1` -> `svc4_v2`), because a pinned map outlives the program that made it.

#![no_std]

pub mod selection;

/// Service frontends: [`FrontendKey`] -> [`Frontend`].
pub const FRONTENDS: &str = "svc4_v1";
/// The arena of backends: index -> [`Slot`].
pub const ARENA: &str = "arena4_v1";
/// Counters by [`Frontend::service`]: index -> [`ServiceCounters`], per CPU.
pub const SERVICE_COUNTERS: &str = "svc_stats_v1";
/// Connections by [`Slot::backend`]: index -> [`BackendCounters`], per CPU.
pub const BACKEND_COUNTERS: &str = "be_stats_v1";
/// What should never happen, counted: one [`Failures`] per CPU.
pub const FAILURES: &str = "failures_v1";
/// Where a connected socket's ClusterIP is remembered: the lower bits of its cookie -> [`Socket`]. Cleared when the socket is
/// closed.
pub const SOCKETS: &str = "sockets4_v2";
/// The same for a socket whose place in [`SOCKETS`] is another's: socket -> [`Connected`]. Making it costs many times as much.
pub const CONNECTED: &str = "sk_conn4_v1";
/// The backends that an unconnected UDP socket keeps: socket -> [`Datagrams`].
pub const DATAGRAMS: &str = "sk_udp4_v1";
/// CPU time by cgroup id of a container: id -> [`CpuTime`], per CPU.
pub const CPU_TIME: &str = "cpu_v1";
/// What runs on each CPU now: one [`Running`] per CPU.
pub const RUNNING: &str = "running_v1";
/// Traffic by index of a pod's host interface: ifindex -> [`Traffic`], per CPU.
pub const TRAFFIC: &str = "net_v1";

/// IPPROTO_TCP or IPPROTO_UDP.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// IPPROTO_TCP.
    Tcp = 6,
    /// IPPROTO_UDP.
    Udp = 17,
}

impl Protocol {
    /// From the number in an IP header.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// Whose traffic a frontend is for. Later: traffic from outside, with its own backends.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Traffic of this node's own sockets and pods.
    Cluster = 0,
}

/// Where a service is reached.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrontendKey {
    /// The ClusterIP.
    pub address: [u8; 4],
    /// The service's port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Whose traffic.
    pub scope: Scope,
}

/// As the one word that it is: a hash of the fields one by one takes several times as long.
impl core::hash::Hash for FrontendKey {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        let ([a, b, c, d], [e, f]) = (self.address, self.port.to_ne_bytes());
        state.write_u64(u64::from_ne_bytes([
            a,
            b,
            c,
            d,
            e,
            f,
            self.protocol as u8,
            self.scope as u8,
        ]));
    }
}

/// A frontend's state: which slots of the arena are its backends. One write of this value is what makes a change
/// visible; the slots `base .. base + ready + terminating` were written before, and stay until no reader can be in them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frontend {
    /// Index into the service counters; never 0.
    pub service: u32,
    /// The number of this change, which is on its slots too. No two live ranges have the same.
    pub generation: u32,
    /// The first slot.
    pub base: u32,
    /// So many backends that take new connections, sorted by address and port.
    pub ready: u32,
    /// After them so many that finish, but still serve: used while none is ready. Sorted as well.
    pub terminating: u32,
    /// None yet.
    pub flags: u32,
    /// A hash of the service's uid and port, by which a restarted agent knows whose counters these are.
    pub owner: u32,
    /// [`selection::checksum`] of key and value: an element of a hash map may be recycled while a program reads it.
    pub check: u32,
}

/// Is a slot in use, and how.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotState {
    /// Nothing is here.
    Free = 0,
    /// Takes new connections.
    Ready = 1,
    /// Takes new connections only while no backend is ready.
    Terminating = 2,
}

/// A backend in the arena.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The pod's address.
    pub address: [u8; 4],
    /// The pod's port.
    pub port: u16,
    /// In use, and how.
    pub state: SlotState,
    /// Zero.
    pub reserved: u8,
    /// [`Frontend::generation`] of the frontend that this slot belongs to.
    pub generation: u32,
    /// Index into the backend counters; never 0. One id is one (service port, address, port).
    pub backend: u32,
}

/// Counters of a service's port.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Connections (for unconnected UDP: choices) that were given a backend.
    pub connections: u64,
    /// Those refused because there was none.
    pub refused: u64,
}

/// Counters of one backend of a service's port.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackendCounters {
    /// Connections (for unconnected UDP: choices) that were given this backend.
    pub connections: u64,
}

/// What should never happen.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Failures {
    /// Lookups given up, the connection refused: the frontend or its slot was another's each time.
    pub exhausted: u64,
    /// Connections refused because the socket's storage could not be made (no memory).
    pub no_storage: u64,
}

/// What a socket's last translated `connect` did.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connected {
    /// The ClusterIP.
    pub service_address: [u8; 4],
    /// The backend.
    pub backend_address: [u8; 4],
    /// The service's port. Zero: the socket is not connected through a service.
    pub service_port: u16,
    /// The backend's port.
    pub backend_port: u16,
}

/// A place in [`SOCKETS`]. Cookies are numbered as sockets come, so a place is free again long before it is asked for, unless
/// the socket there lives on.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// Whose place it is, until that socket is closed. Zero: nobody's.
    pub cookie: u64,
    /// What its last `connect` did.
    pub connected: Connected,
    /// Zero.
    pub reserved: u32,
}

/// How many services an unconnected UDP socket can talk to and still see each of them as the sender of its replies. The one
/// after these takes the place of the oldest.
pub const DATAGRAM_PEERS: usize = 8;

/// A service that an unconnected UDP socket talks to. The halves are written each at once.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The ClusterIP.
    pub service_address: [u8; 4],
    /// The service's port. Zero: this entry is free.
    pub service_port: u16,
    /// Zero.
    pub reserved: u16,
    /// The backend's address.
    pub backend_address: [u8; 4],
    /// The backend's port. Zero: not chosen yet.
    pub backend_port: u16,
    /// Zero.
    pub reserved2: u16,
}

/// The services that an unconnected UDP socket talks to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagrams {
    /// Counts the entries ever made; the next goes to this modulo [`DATAGRAM_PEERS`].
    pub next: u64,
    /// The services.
    pub peers: [Peer; DATAGRAM_PEERS],
}

/// CPU time of a container on one CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Nanoseconds that ended with a switch.
    pub nanoseconds: u64,
}

/// What runs on a CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Running {
    /// When it was switched to, CLOCK_MONOTONIC in nanoseconds.
    pub since: u64,
    /// The cgroup id (cgroup2) of the task, the one it is in, not its container's.
    pub cgroup: u64,
}

/// Traffic at a pod's host interface on one CPU, as the pod sees it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes to the pod, with Ethernet headers.
    pub rx_bytes: u64,
    /// Packets to the pod; a large segment counts as what it is cut into.
    pub rx_packets: u64,
    /// Bytes from the pod.
    pub tx_bytes: u64,
    /// Packets from the pod.
    pub tx_packets: u64,
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 8);
    assert!(size_of::<Frontend>() == 32);
    assert!(size_of::<Slot>() == 16);
    assert!(size_of::<ServiceCounters>() == 16);
    assert!(size_of::<BackendCounters>() == 8);
    assert!(size_of::<Failures>() == 16);
    assert!(size_of::<Connected>() == 12);
    assert!(size_of::<Socket>() == 24);
    assert!(size_of::<Peer>() == 16);
    assert!(size_of::<Datagrams>() == 8 + 16 * DATAGRAM_PEERS);
    assert!(size_of::<CpuTime>() == 8);
    assert!(size_of::<Running>() == 16);
    assert!(size_of::<Traffic>() == 32);
};
