//! The choice of a backend: the same Rust in the kernel programs and, for tests, on the host.
//!
//! A reader races with the agent. Slots of a live range never change: a changed service gets a fresh range, one write of
//! its frontend flips to it, and the old range is reused only after every program that could be in it has ended. What
//! can happen is that the frontend's element, in the kernel's hash map, is recycled for another service while its fields are being
//! copied. Both are noticed: the copied fields must have the frontend's checksum (it covers the key), and the slot must carry
//! its generation. Otherwise the reader looks again.

use crate::{Frontend, FrontendKey, Slot, SlotState};

/// How often a lookup is tried before it is given up.
pub const ATTEMPTS: u32 = 3;

/// Steps of the binary search in [`find`]: enough for a service with 65 535 ready backends.
pub const SEARCH_STEPS: u32 = 17;

/// The maps as a program, or a test, sees them.
pub trait Tables {
    /// A copy of the frontend's fields, one by one; not necessarily consistent.
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// A copy of a slot, `None` beyond the arena.
    fn slot(&self, index: u32) -> Option<Slot>;
    /// A random number.
    fn random(&self) -> u32;
}

/// What a lookup gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// The address is no service's.
    NotAService,
    /// The service has nobody that could answer.
    NoBackend {
        /// [`Frontend::service`].
        service: u32,
    },
    /// This one.
    Backend {
        /// [`Frontend::service`].
        service: u32,
        /// [`Slot::backend`].
        backend: u32,
        /// Its address.
        address: [u8; 4],
        /// Its port.
        port: u16,
        /// It is the one that the caller asked to keep.
        kept: bool,
    },
    /// Each attempt met another's entry.
    Exhausted,
}

/// Chooses a backend of the service at `key`, at random among those that are ready, else among those that still serve. With
/// `keep`, that backend if it is ready.
#[inline(always)]
pub fn select<T: Tables>(tables: &T, key: &FrontendKey, keep: Option<([u8; 4], u16)>) -> Selection {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        attempt += 1;
        let Some(frontend) = tables.frontend(key) else {
            return Selection::NotAService;
        };
        if frontend.check != checksum(key, &frontend) {
            continue;
        }
        let service = frontend.service;
        let (first, count) = if frontend.ready > 0 {
            (frontend.base, frontend.ready)
        } else {
            (frontend.base, frontend.terminating)
        };
        if count == 0 {
            return Selection::NoBackend { service };
        }
        if let Some((address, port)) = keep
            && frontend.ready > 0
            && let Some(backend) = find(tables, &frontend, address, port)
        {
            return Selection::Backend {
                service,
                backend,
                address,
                port,
                kept: true,
            };
        }
        let Some(slot) = tables.slot(first.wrapping_add(scale(tables.random(), count))) else {
            continue;
        };
        if slot.generation != frontend.generation {
            continue;
        }
        return Selection::Backend {
            service,
            backend: slot.backend,
            address: slot.address,
            port: slot.port,
            kept: false,
        };
    }
    Selection::Exhausted
}

/// The backend's id if it is among the ready ones.
#[inline(always)]
fn find<T: Tables>(tables: &T, frontend: &Frontend, address: [u8; 4], port: u16) -> Option<u32> {
    let wanted = order(address, port);
    let (mut low, mut high) = (0, frontend.ready);
    let mut step = 0;
    while step < SEARCH_STEPS && low < high {
        step += 1;
        let middle = low.wrapping_add(high.wrapping_sub(low) >> 1);
        let slot = tables.slot(frontend.base.wrapping_add(middle))?;
        if slot.generation != frontend.generation {
            return None;
        }
        let here = order(slot.address, slot.port);
        if here == wanted {
            return Some(slot.backend);
        }
        if here < wanted {
            low = middle.wrapping_add(1);
        } else {
            high = middle;
        }
    }
    None
}

/// The order of backends within their part of a range.
#[inline(always)]
#[must_use]
pub const fn order(address: [u8; 4], port: u16) -> u64 {
    ((u32::from_be_bytes(address) as u64) << 16) | port as u64
}

/// A random number below `count`.
#[inline(always)]
const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Binds a frontend's value to its key. Not against attackers: against a copy that is half of one entry and half of another.
#[inline(always)]
#[must_use]
pub const fn checksum(key: &FrontendKey, value: &Frontend) -> u32 {
    let place = ((key.port as u32) << 16) | ((key.protocol as u32) << 8) | key.scope as u32;
    let mut hash = mix(u32::from_be_bytes(key.address) ^ 0x9e37_79b9, place);
    hash = mix(hash, value.service);
    hash = mix(hash, value.generation);
    hash = mix(hash, value.base);
    hash = mix(hash, value.ready);
    mix(hash, value.terminating)
}

#[inline(always)]
const fn mix(hash: u32, word: u32) -> u32 {
    let mixed = (hash ^ word).wrapping_mul(0x85eb_ca6b);
    mixed ^ (mixed >> 15)
}

impl Slot {
    /// What stands in an unused part of the arena.
    pub const FREE: Self = Self {
        address: [0; 4],
        port: 0,
        state: SlotState::Free,
        reserved: 0,
        generation: 0,
        backend: 0,
    };
}
