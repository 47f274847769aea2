//! The maps. Sizes here are what the loader replaces by configuration; names and layouts are `orlop-ebpf-abi`'s.
#![allow(
    non_upper_case_globals,
    reason = "a map's name is its symbol, and the names are what one reads in bpftool"
)]

use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, SkStorage},
    helpers::generated::bpf_get_prandom_u32,
    macros::btf_map,
};
use orlop_ebpf_abi::{
    BackendCounters, Connected, CpuTime, Datagrams, Failures, Frontend, FrontendKey, Running, ServiceCounters, Slot,
    Socket, Traffic, selection::Tables,
};

// Preallocated: ten thousand entries are written in half the time, and a change never waits for the kernel's memory.
#[btf_map]
pub static svc4_v1: HashMap<FrontendKey, Frontend, 131072> = HashMap::new();

#[btf_map]
pub static arena4_v1: Array<Slot, 262144, { BPF_F_MMAPABLE as usize }> = Array::new();

#[btf_map]
pub static svc_stats_v1: PerCpuArray<ServiceCounters, 131072> = PerCpuArray::new();

#[btf_map]
pub static be_stats_v1: PerCpuArray<BackendCounters, 262144> = PerCpuArray::new();

#[btf_map]
pub static failures_v1: PerCpuArray<Failures, 1> = PerCpuArray::new();

#[btf_map]
pub static sockets4_v2: Array<Socket, 131072> = Array::new();

/// One less than the entries of `sockets4_v2`, which are a power of two.
#[unsafe(no_mangle)]
static SOCKETS_MASK: Global<u32> = Global::new(0);

/// Where a socket with this cookie has its place, if it is not another's.
#[inline(always)]
pub fn place(cookie: u64) -> Option<*mut Socket> {
    sockets4_v2.get_ptr_mut(cookie as u32 & SOCKETS_MASK.load())
}

#[btf_map]
pub static sk_conn4_v1: SkStorage<Connected> = SkStorage::new();

#[btf_map]
pub static sk_udp4_v1: SkStorage<Datagrams> = SkStorage::new();

#[btf_map]
pub static cpu_v1: PerCpuHashMap<u64, CpuTime, 4096> = PerCpuHashMap::new();

#[btf_map]
pub static running_v1: PerCpuArray<Running, 1> = PerCpuArray::new();

#[btf_map]
pub static net_v1: PerCpuHashMap<u32, Traffic, 4096> = PerCpuHashMap::new();

/// The pinned maps.
pub struct Pinned;

impl Tables for Pinned {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        let entry = svc4_v1.get_ptr(key)?;
        // SAFETY: the verifier has checked the pointer. The element may be rewritten meanwhile, hence volatile reads, which
        // neither tear a field nor read it twice; the checksum tells whether they belong together.
        unsafe {
            Some(Frontend {
                service: (&raw const (*entry).service).read_volatile(),
                generation: (&raw const (*entry).generation).read_volatile(),
                base: (&raw const (*entry).base).read_volatile(),
                ready: (&raw const (*entry).ready).read_volatile(),
                terminating: (&raw const (*entry).terminating).read_volatile(),
                flags: 0,
                owner: 0,
                check: (&raw const (*entry).check).read_volatile(),
            })
        }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot> {
        let slot = arena4_v1.get_ptr(index)?;
        // SAFETY: as above. The state is not read: which part of the range a slot is in says it.
        unsafe {
            Some(Slot {
                address: (&raw const (*slot).address).cast::<u32>().read_volatile().to_ne_bytes(),
                port: (&raw const (*slot).port).read_volatile(),
                state: orlop_ebpf_abi::SlotState::Free,
                reserved: 0,
                generation: (&raw const (*slot).generation).read_volatile(),
                backend: (&raw const (*slot).backend).read_volatile(),
            })
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_get_prandom_u32() }
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count_connection(service: u32, backend: u32) {
    if let Some(counters) = svc_stats_v1.get_ptr_mut(service) {
        // SAFETY: this CPU's own element, checked by the verifier.
        unsafe { (*counters).connections += 1 };
    }
    if let Some(counters) = be_stats_v1.get_ptr_mut(backend) {
        // SAFETY: as above.
        unsafe { (*counters).connections += 1 };
    }
}

/// Counts a connection that nobody could take.
#[inline(always)]
pub fn count_refused(service: u32) {
    if let Some(counters) = svc_stats_v1.get_ptr_mut(service) {
        // SAFETY: as above.
        unsafe { (*counters).refused += 1 };
    }
}

/// This CPU's failures.
#[inline(always)]
pub fn failures() -> Option<*mut Failures> {
    failures_v1.get_ptr_mut(0)
}
