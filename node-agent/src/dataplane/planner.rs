//! From service records to map entries: pure, tested without a kernel.
//!
//! The planner knows what is in the maps. Given changes it says what to write, and which ranges and ids are no longer
//! referred to; the executor writes (slots first, then frontends, then deletions), waits for a grace period, zeroes what was
//! given up, and hands it back with [`Planner::release`]. Whatever the order in which changes came, the maps serve the same.

mod adoption;
mod claims;
pub mod records;
pub mod space;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map},
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use claims::Claimants;
use indexmap::IndexSet;
use orlop_ebpf_abi::{Frontend, FrontendKey, Slot, SlotState, selection};
use orlop_proto::node::v1 as link;
use records::{frontends_of, owner, read_backends};
use space::{Ids, Ranges};

use super::ServiceChanges;
use crate::desired::services::{Name, Named};

/// How much fits into the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Frontends, which is service ids too (0 is none).
    pub frontends: u32,
    /// Slots of the arena, which is backend ids too. Slot 0 is never used.
    pub slots: u32,
}

/// A backend in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend {
    /// The pod's address.
    pub address: [u8; 4],
    /// The pod's port.
    pub port: u16,
    /// Ready or terminating.
    pub state: SlotState,
    /// Its counter.
    pub id: u32,
}

/// A frontend as it is in the maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its counter.
    pub service: u32,
    /// Of its last change.
    pub generation: u32,
    /// The first slot; 0 without backends.
    pub base: u32,
    /// Hash of the service's uid and port.
    pub owner: u32,
    /// Ready ones first, each part sorted.
    pub backends: Box<[Backend]>,
}

/// What to write, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Writes {
    /// Fresh ranges.
    pub slots: FreshSlots,
    /// Frontends, written after the slots.
    pub frontends: Vec<(FrontendKey, Frontend)>,
    /// Frontends that go.
    pub deletions: Vec<FrontendKey>,
    /// What is free after a grace period that begins when all this is written.
    pub retired: Retired,
    /// The map that has no room for the rest, which is planned again with the next changes.
    pub full: Option<&'static str>,
}

/// Slots to be written: ranges of the arena, and what they are to hold, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FreshSlots {
    /// First slot and length.
    ranges: Vec<(u32, usize)>,
    slots: Vec<Slot>,
}

impl FreshSlots {
    /// Every range: its first slot and all of them.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[Slot])> {
        let mut rest = &self.slots[..];
        self.ranges.iter().map(move |(base, length)| {
            let (slots, after) = rest.split_at(*length);
            rest = after;
            (*base, slots)
        })
    }

    /// How many slots.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// None at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn push(&mut self, entry: &Entry) {
        if !entry.backends.is_empty() {
            self.ranges.push((entry.base, entry.backends.len()));
            self.slots.extend(slots_of(entry));
        }
    }
}

/// Ranges and ids that nothing refers to any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retired {
    /// First slot and length.
    pub ranges: Vec<(u32, u32)>,
    /// Service ids.
    pub services: Vec<u32>,
    /// Backend ids.
    pub backends: Vec<u32>,
}

impl Retired {
    /// Nothing is given up.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.services.is_empty() && self.backends.is_empty()
    }
}

/// A port of a service, and what the frontends that it claims should be.
#[derive(Debug, Default)]
struct Wanted {
    owner: u32,
    backends: Vec<([u8; 4], u16, SlotState)>,
}

type ByKey<T> = HashMap<FrontendKey, T, BuildHasherDefault<KeyHasher>>;

/// Frontends' keys come from control, nobody picks them to collide: multiplying is enough, and a fraction of SipHash.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        // The table takes buckets from the lower bits, where a product has mixed least.
        self.0 ^ (self.0 >> 32)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Planner {
    limits: Limits,
    services: IndexSet<Named>,
    claims: ByKey<Claimants>,
    entries: ByKey<Entry>,
    ranges: Ranges,
    service_ids: Ids,
    backend_ids: Ids,
    generation: u32,
    /// Frontends that did not fit.
    pending: BTreeSet<FrontendKey>,
    /// Of the frontend that is being settled.
    wanted: Wanted,
}

impl Planner {
    /// For empty maps.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            services: IndexSet::new(),
            claims: ByKey::default(),
            entries: ByKey::default(),
            ranges: Ranges::new(1, limits.slots),
            service_ids: Ids::new(limits.frontends),
            backend_ids: Ids::new(limits.slots),
            generation: 0,
            pending: BTreeSet::new(),
            wanted: Wanted::default(),
        }
    }

    /// Plans the changes.
    pub fn apply(&mut self, changes: &ServiceChanges) -> Writes {
        let mut touched: Vec<_> = std::mem::take(&mut self.pending).into_iter().collect();
        for (namespace, name) in &changes.removals {
            self.remove_service(Name { namespace, name }, &mut touched);
        }
        if changes.complete && !self.services.is_empty() {
            let kept: HashSet<_> = changes.upserts.iter().map(|service| Name::of(service)).collect();
            let gone = |named: &&Named| !kept.contains(&Name::of(&named.0));
            let gone: Vec<Named> = self.services.iter().filter(gone).cloned().collect();
            for service in &gone {
                self.remove_service(Name::of(&service.0), &mut touched);
            }
        }
        touched.reserve(changes.upserts.len());
        self.claims
            .reserve(changes.upserts.len().saturating_sub(self.services.len()));
        for service in &changes.upserts {
            self.upsert_service(service, &mut touched);
        }
        if changes.complete {
            touched.extend(
                self.entries
                    .keys()
                    .filter(|key| !self.claims.contains_key(*key))
                    .copied(),
            );
        }
        touched.sort_unstable();
        touched.dedup();
        let mut writes = Writes::default();
        self.entries
            .reserve(self.claims.len().saturating_sub(self.entries.len()));
        // What goes first gives its room up for what comes, if not at once then after the grace period.
        let (staying, going): (Vec<_>, Vec<_>) = touched.into_iter().partition(|key| self.claims.contains_key(key));
        for key in going.into_iter().chain(staying) {
            self.settle(key, &mut writes);
        }
        writes
    }

    /// Plans what did not fit last time again.
    pub fn retry(&mut self) -> Writes {
        self.apply(&ServiceChanges::default())
    }

    /// Ranges and ids that were retired can be used again.
    pub fn release(&mut self, retired: &Retired) {
        for (base, length) in &retired.ranges {
            self.ranges.release(*base, *length);
        }
        for id in &retired.services {
            self.service_ids.release(*id);
        }
        for id in &retired.backends {
            self.backend_ids.release(*id);
        }
    }

    /// Every frontend that is in the maps.
    pub fn entries(&self) -> impl Iterator<Item = (&FrontendKey, &Entry)> {
        self.entries.iter()
    }

    /// Who serves at a frontend: `None` for an adopted entry that nothing has claimed yet.
    #[must_use]
    pub fn owner_of(&self, key: &FrontendKey) -> Option<&Arc<link::Service>> {
        self.claims.get(key).map(Claimants::first)
    }

    /// Known services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<link::Service>> {
        self.services.iter().map(|named| &named.0)
    }

    /// Free ranges of the arena: first slot and length.
    pub fn free_ranges(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ranges.free()
    }

    /// The highest service and backend ids in use; for reading counters no further than needed.
    #[must_use]
    pub fn highest_ids(&self) -> (u32, u32) {
        (self.service_ids.highest(), self.backend_ids.highest())
    }

    /// Is this service id in use (or retired, and not yet released)?
    #[must_use]
    pub fn service_id_is_free(&self, id: u32) -> bool {
        self.service_ids.is_free(id)
    }

    /// Is this backend id in use (or retired, and not yet released)?
    #[must_use]
    pub fn backend_id_is_free(&self, id: u32) -> bool {
        self.backend_ids.is_free(id)
    }

    fn remove_service(&mut self, name: Name<'_>, touched: &mut Vec<FrontendKey>) {
        if let Some(service) = self.services.swap_take(&name) {
            self.unclaim(&service.0, touched);
        }
    }

    fn unclaim(&mut self, service: &link::Service, touched: &mut Vec<FrontendKey>) {
        for key in frontends_of(service) {
            if let Some(others) = self.claims.remove(&key).and_then(|all| all.without(Name::of(service))) {
                self.claims.insert(key, others);
            }
            touched.push(key);
        }
    }

    fn upsert_service(&mut self, service: &Arc<link::Service>, touched: &mut Vec<FrontendKey>) {
        if let Some(known) = self.services.get(&Name::of(service))
            && (Arc::ptr_eq(&known.0, service) || known.0 == *service)
        {
            return;
        }
        if let Some(old) = self.services.replace(Named(Arc::clone(service))) {
            self.unclaim(&old.0, touched);
        }
        for key in frontends_of(service) {
            match self.claims.entry(key) {
                hash_map::Entry::Vacant(place) => {
                    place.insert(Claimants::One(Arc::clone(service)));
                }
                hash_map::Entry::Occupied(mut others) => others.get_mut().add(service),
            }
            touched.push(key);
        }
    }

    /// Brings one frontend to what its first claimant wants.
    fn settle(&mut self, key: FrontendKey, writes: &mut Writes) {
        let mut wanted = std::mem::take(&mut self.wanted);
        let owned = self.owner_of(&key).map(|service| {
            wanted.owner = owner(service, &key);
            read_backends(service, &key, &mut wanted.backends);
        });
        if owned.is_none() {
            if let Some(entry) = self.entries.remove(&key) {
                writes.deletions.push(key);
                retire(&entry, &[], true, &mut writes.retired);
            }
        } else if let Err(map) = self.write(key, &wanted, writes) {
            writes.full = Some(map);
            self.pending.insert(key);
        }
        self.wanted = wanted;
    }

    /// Unless it is as wanted.
    fn write(&mut self, key: FrontendKey, wanted: &Wanted, writes: &mut Writes) -> Result<(), &'static str> {
        let existing = self.entries.get(&key);
        if existing.is_some_and(|entry| is_as_wanted(entry, wanted)) {
            return Ok(());
        }
        let same_owner = existing.filter(|entry| entry.owner == wanted.owner);
        let known: BTreeMap<u64, u32> = same_owner
            .iter()
            .flat_map(|entry| entry.backends.iter())
            .map(|backend| (selection::order(backend.address, backend.port), backend.id))
            .collect();
        let kept_service = same_owner.map(|entry| entry.service);
        let length = u32::try_from(wanted.backends.len()).map_err(|_too_many| orlop_ebpf_abi::ARENA)?;
        let is_known =
            |(address, port, _): &&([u8; 4], u16, SlotState)| known.contains_key(&selection::order(*address, *port));
        let fresh = wanted.backends.len() - wanted.backends.iter().filter(is_known).count();
        if existing.is_none() && self.entries.len() >= self.limits.frontends as usize {
            return Err(orlop_ebpf_abi::FRONTENDS);
        }
        if !self.backend_ids.has(fresh) {
            return Err(orlop_ebpf_abi::BACKEND_COUNTERS);
        }
        if kept_service.is_none() && !self.service_ids.has(1) {
            return Err(orlop_ebpf_abi::SERVICE_COUNTERS);
        }
        let base = self.ranges.allocate(length).ok_or(orlop_ebpf_abi::ARENA)?;
        // Nothing fails from here on.
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        let backends: Box<[Backend]> = wanted
            .backends
            .iter()
            .map(|(address, port, state)| {
                let id = known.get(&selection::order(*address, *port)).copied();
                Backend {
                    address: *address,
                    port: *port,
                    state: *state,
                    id: id.unwrap_or_else(|| self.backend_ids.allocate()),
                }
            })
            .collect();
        let service = kept_service.unwrap_or_else(|| self.service_ids.allocate());
        let entry = Entry {
            service,
            generation: self.generation,
            base,
            owner: wanted.owner,
            backends,
        };
        writes.slots.push(&entry);
        writes.frontends.push((key, frontend_of(&key, &entry)));
        if let Some(old) = self.entries.insert(key, entry) {
            let new = &self.entries[&key];
            retire(&old, &new.backends, old.service != new.service, &mut writes.retired);
        }
        Ok(())
    }
}

/// Gives up an entry's range, and the ids that `kept` does not have.
fn retire(entry: &Entry, kept: &[Backend], service: bool, retired: &mut Retired) {
    if let Ok(length @ 1..) = u32::try_from(entry.backends.len()) {
        retired.ranges.push((entry.base, length));
    }
    let kept: BTreeSet<u32> = kept.iter().map(|backend| backend.id).collect();
    retired.backends.extend(
        entry
            .backends
            .iter()
            .map(|backend| backend.id)
            .filter(|id| !kept.contains(id)),
    );
    if service {
        retired.services.push(entry.service);
    }
}

fn is_as_wanted(entry: &Entry, wanted: &Wanted) -> bool {
    entry.owner == wanted.owner
        && entry.backends.len() == wanted.backends.len()
        && entry
            .backends
            .iter()
            .zip(&wanted.backends)
            .all(|(have, (address, port, state))| {
                have.address == *address && have.port == *port && have.state == *state
            })
}

/// The slots of an entry's range.
fn slots_of(entry: &Entry) -> impl Iterator<Item = Slot> {
    entry.backends.iter().map(|backend| Slot {
        address: backend.address,
        port: backend.port,
        state: backend.state,
        reserved: 0,
        generation: entry.generation,
        backend: backend.id,
    })
}

/// The frontend's value of an entry.
#[must_use]
pub fn frontend_of(key: &FrontendKey, entry: &Entry) -> Frontend {
    let ready = entry
        .backends
        .iter()
        .filter(|backend| backend.state == SlotState::Ready)
        .count();
    let count = |number: usize| u32::try_from(number).unwrap_or(0);
    let mut value = Frontend {
        service: entry.service,
        generation: entry.generation,
        base: entry.base,
        ready: count(ready),
        terminating: count(entry.backends.len() - ready),
        flags: 0,
        owner: entry.owner,
        check: 0,
    };
    value.check = selection::checksum(key, &value);
    value
}

#[cfg(test)]
mod tests;
