//! From service records to map entries: pure, tested without a kernel.
//!
//! The planner knows what is in the maps. Given changes it says what to write, and which ranges and ids are no longer
//! referred to; the executor writes (slots first, then frontends, then deletions), waits for a grace period, zeroes what was
//! given up, and hands it back with [`Planner::release`]. Whatever the order in which changes came, the maps serve the same.

mod adoption;
pub mod records;
pub mod space;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map},
    hash::{BuildHasherDefault, Hasher},
    sync::Arc,
};

use orlop_ebpf_abi::{Frontend, FrontendKey, Slot, SlotState, selection};
use orlop_proto::node::v1 as link;
use records::{backends_of, frontends_of, owner};
use space::{Ids, Ranges};

use super::{ServiceChanges, ServiceId};

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
    /// Fresh ranges: the first slot and all of them.
    pub slots: Vec<(u32, Vec<Slot>)>,
    /// Frontends, written after the slots.
    pub frontends: Vec<(FrontendKey, Frontend)>,
    /// Frontends that go.
    pub deletions: Vec<FrontendKey>,
    /// What is free after a grace period that begins when all this is written.
    pub retired: Retired,
    /// The map that has no room for the rest, which is planned again with the next changes.
    pub full: Option<&'static str>,
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
    services: BTreeMap<ServiceId, Arc<link::Service>>,
    /// Who wants to be at a frontend, by namespace and name; the first of them is.
    claims: ByKey<Vec<Arc<link::Service>>>,
    entries: ByKey<Entry>,
    ranges: Ranges,
    service_ids: Ids,
    backend_ids: Ids,
    generation: u32,
    /// Frontends that did not fit.
    pending: BTreeSet<FrontendKey>,
}

impl Planner {
    /// For empty maps.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            services: BTreeMap::new(),
            claims: ByKey::default(),
            entries: ByKey::default(),
            ranges: Ranges::new(1, limits.slots),
            service_ids: Ids::new(limits.frontends),
            backend_ids: Ids::new(limits.slots),
            generation: 0,
            pending: BTreeSet::new(),
        }
    }

    /// Plans the changes.
    pub fn apply(&mut self, changes: &ServiceChanges) -> Writes {
        let mut touched: Vec<_> = std::mem::take(&mut self.pending).into_iter().collect();
        for service in &changes.removals {
            self.remove_service(service, &mut touched);
        }
        if changes.complete && !self.services.is_empty() {
            let kept: BTreeSet<_> = changes.upserts.iter().map(|service| named(service)).collect();
            let gone: Vec<_> = self
                .services
                .keys()
                .filter(|(namespace, name)| !kept.contains(&(namespace.as_str(), name.as_str())))
                .cloned()
                .collect();
            for service in &gone {
                self.remove_service(service, &mut touched);
            }
        }
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
        self.claims.get(key)?.first()
    }

    /// Known services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<link::Service>> {
        self.services.values()
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

    fn remove_service(&mut self, id: &ServiceId, touched: &mut Vec<FrontendKey>) {
        if let Some(service) = self.services.remove(id) {
            self.unclaim(&service, touched);
        }
    }

    fn unclaim(&mut self, service: &link::Service, touched: &mut Vec<FrontendKey>) {
        for key in frontends_of(service) {
            if let Some(claimants) = self.claims.get_mut(&key) {
                claimants.retain(|claimant| named(claimant) != named(service));
                if claimants.is_empty() {
                    self.claims.remove(&key);
                }
            }
            touched.push(key);
        }
    }

    fn upsert_service(&mut self, service: &Arc<link::Service>, touched: &mut Vec<FrontendKey>) {
        let id = (service.namespace.clone(), service.name.clone());
        match self.services.entry(id) {
            btree_map::Entry::Vacant(place) => {
                place.insert(Arc::clone(service));
            }
            btree_map::Entry::Occupied(known) if Arc::ptr_eq(known.get(), service) || known.get() == service => return,
            btree_map::Entry::Occupied(mut known) => {
                let old = known.insert(Arc::clone(service));
                self.unclaim(&old, touched);
            }
        }
        for key in frontends_of(service) {
            // Nearly always there is one.
            let claimants = self.claims.entry(key).or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = claimants.binary_search_by(|claimant| named(claimant).cmp(&named(service))) {
                claimants.insert(place, Arc::clone(service));
            }
            touched.push(key);
        }
    }

    /// Brings one frontend to what its first claimant wants.
    fn settle(&mut self, key: FrontendKey, writes: &mut Writes) {
        let wanted = self.owner_of(&key).map(|service| wanted(service, &key));
        match wanted {
            None => {
                if let Some(entry) = self.entries.remove(&key) {
                    writes.deletions.push(key);
                    retire(&entry, &[], true, &mut writes.retired);
                }
            }
            Some(wanted) => {
                if self.entries.get(&key).is_some_and(|entry| is_as_wanted(entry, &wanted)) {
                    return;
                }
                if let Err(map) = self.write(key, &wanted, writes) {
                    writes.full = Some(map);
                    self.pending.insert(key);
                }
            }
        }
    }

    fn write(&mut self, key: FrontendKey, wanted: &Wanted, writes: &mut Writes) -> Result<(), &'static str> {
        let same_owner = self.entries.get(&key).filter(|entry| entry.owner == wanted.owner);
        let known: BTreeMap<u64, u32> = same_owner
            .iter()
            .flat_map(|entry| entry.backends.iter())
            .map(|backend| (selection::order(backend.address, backend.port), backend.id))
            .collect();
        let kept_service = same_owner.map(|entry| entry.service);
        let length = u32::try_from(wanted.backends.len()).map_err(|_too_many| orlop_ebpf_abi::ARENA)?;
        let fresh = wanted
            .backends
            .iter()
            .filter(|(address, port, _)| !known.contains_key(&selection::order(*address, *port)))
            .count();
        if !self.entries.contains_key(&key) && self.entries.len() >= self.limits.frontends as usize {
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
        if !entry.backends.is_empty() {
            writes.slots.push((base, slots_of(&entry)));
        }
        writes.frontends.push((key, frontend_of(&key, &entry)));
        if let Some(old) = self.entries.insert(key, entry) {
            let new = &self.entries[&key];
            retire(&old, &new.backends, old.service != new.service, &mut writes.retired);
        }
        Ok(())
    }
}

/// A service's namespace and name.
fn named(service: &link::Service) -> (&str, &str) {
    (&service.namespace, &service.name)
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
#[must_use]
pub fn slots_of(entry: &Entry) -> Vec<Slot> {
    entry
        .backends
        .iter()
        .map(|backend| Slot {
            address: backend.address,
            port: backend.port,
            state: backend.state,
            reserved: 0,
            generation: entry.generation,
            backend: backend.id,
        })
        .collect()
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

fn wanted(service: &link::Service, key: &FrontendKey) -> Wanted {
    Wanted {
        owner: owner(service, key),
        backends: backends_of(service, key),
    }
}

#[cfg(test)]
mod tests;
