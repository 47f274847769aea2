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

/// Steps of the binary search in `find`: enough for a service with 65 535 ready backends.
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

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{cell::Cell, collections::BTreeSet, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::{Protocol, Scope};

    const KEY: FrontendKey = FrontendKey {
        address: [10, 96, 0, 1],
        port: 80,
        protocol: Protocol::Tcp,
        scope: Scope::Cluster,
    };

    struct Host {
        frontends: Vec<Option<Frontend>>,
        looked: Cell<usize>,
        slots: Vec<Slot>,
        random: Cell<u32>,
    }

    impl Tables for Host {
        /// The answers one after the other, the last one for ever.
        fn frontend(&self, _key: &FrontendKey) -> Option<Frontend> {
            let index = self.looked.replace(self.looked.get() + 1);
            self.frontends[index.min(self.frontends.len() - 1)]
        }
        fn slot(&self, index: u32) -> Option<Slot> {
            self.slots.get(index as usize).copied()
        }
        fn random(&self) -> u32 {
            self.random
                .set(self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
            self.random.get()
        }
    }

    fn frontend(key: &FrontendKey, generation: u32, base: u32, ready: u32, terminating: u32) -> Frontend {
        let mut value = Frontend {
            service: 9,
            generation,
            base,
            ready,
            terminating,
            flags: 0,
            owner: 0,
            check: 0,
        };
        value.check = checksum(key, &value);
        value
    }

    fn slot(last: u8, generation: u32) -> Slot {
        Slot {
            address: [10, 244, 0, last],
            port: 8080,
            state: SlotState::Ready,
            reserved: 0,
            generation,
            backend: u32::from(last) + 100,
        }
    }

    fn host(frontends: &[Option<Frontend>], slots: &[Slot]) -> Host {
        Host {
            frontends: frontends.to_vec(),
            looked: Cell::new(0),
            slots: slots.to_vec(),
            random: Cell::new(1),
        }
    }

    fn chosen(selection: Selection) -> u8 {
        match selection {
            Selection::Backend { address, backend, .. } => {
                assert_eq!(backend, u32::from(address[3]) + 100);
                address[3]
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ready_ones_are_chosen_and_all_of_them() {
        let tables = host(
            &[Some(frontend(&KEY, 7, 1, 3, 1))],
            &[Slot::FREE, slot(1, 7), slot(2, 7), slot(3, 7), slot(4, 7)],
        );
        let all: BTreeSet<u8> = (0..200).map(|_| chosen(select(&tables, &KEY, None))).collect();
        assert_eq!(all, BTreeSet::from([1, 2, 3]));
    }

    #[test]
    fn terminating_ones_only_without_ready_ones() {
        let tables = host(
            &[Some(frontend(&KEY, 7, 1, 0, 2))],
            &[Slot::FREE, slot(1, 7), slot(2, 7)],
        );
        let all: BTreeSet<u8> = (0..100).map(|_| chosen(select(&tables, &KEY, None))).collect();
        assert_eq!(all, BTreeSet::from([1, 2]));
    }

    #[test]
    fn nobody_and_no_service() {
        let tables = host(&[Some(frontend(&KEY, 7, 0, 0, 0))], &[]);
        assert_eq!(select(&tables, &KEY, None), Selection::NoBackend { service: 9 });
        assert_eq!(select(&host(&[None], &[]), &KEY, None), Selection::NotAService);
    }

    #[test]
    fn anothers_entry_is_looked_up_again_at_most_three_times() {
        let other = FrontendKey { port: 81, ..KEY };
        let (foreign, own) = (frontend(&other, 8, 2, 1, 0), frontend(&KEY, 7, 1, 1, 0));
        let slots = [Slot::FREE, slot(1, 7), slot(2, 8)];
        let after = |times: usize| {
            let mut answers = std::vec![Some(foreign); times];
            answers.push(Some(own));
            select(&host(&answers, &slots), &KEY, None)
        };
        assert_eq!((chosen(after(0)), chosen(after(2))), (1, 1));
        assert_eq!(after(3), Selection::Exhausted);
        // The element was deleted, and recycled: not a service, rather than another's backend.
        assert_eq!(
            select(&host(&[Some(foreign), None], &slots), &KEY, None),
            Selection::NotAService
        );
        // A copy that is half of one entry and half of another.
        let torn = Frontend {
            base: foreign.base,
            generation: foreign.generation,
            ..own
        };
        assert_eq!(chosen(select(&host(&[Some(torn), Some(own)], &slots), &KEY, None)), 1);
        // A slot of another generation, and one beyond the arena.
        assert_eq!(
            select(&host(&[Some(frontend(&KEY, 6, 1, 1, 0))], &slots), &KEY, None),
            Selection::Exhausted
        );
        assert_eq!(
            select(&host(&[Some(frontend(&KEY, 7, 3, 1, 0))], &slots), &KEY, None),
            Selection::Exhausted
        );
    }

    proptest! {
        /// A backend is kept exactly if it is among the ready ones, wherever it stands.
        #[test]
        fn kept_if_ready(ready in prop::collection::btree_set(0..=255_u8, 1..60), terminating in 0..3_u32, keep: u8) {
            let mut slots = std::vec![Slot::FREE];
            slots.extend(ready.iter().map(|last| slot(*last, 7)));
            let count = u32::try_from(ready.len()).unwrap();
            slots.extend((0..terminating).map(|_| slot(keep, 7)));
            let tables = host(&[Some(frontend(&KEY, 7, 1, count, terminating))], &slots);
            let selection = select(&tables, &KEY, Some(([10, 244, 0, keep], 8080)));
            let answer = chosen(selection);
            let is_kept = matches!(selection, Selection::Backend { kept: true, .. });
            prop_assert_eq!(is_kept, ready.contains(&keep));
            prop_assert!(ready.contains(&answer) && (!is_kept || answer == keep));
        }
    }
}
