//! What an earlier life of the agent has written becomes the planner's entries again.

use std::collections::BTreeSet;

use orlop_ebpf_abi::{Frontend, FrontendKey, Slot, SlotState, selection};

use super::{Backend, Entry, Limits, Planner};

impl Planner {
    /// For maps that an earlier life of the agent has written. Entries that cannot be right are returned: they are to be
    /// deleted. The others stay until the first complete change says otherwise.
    #[must_use]
    pub fn adopt(
        limits: Limits,
        frontends: &[(FrontendKey, Frontend)],
        slot: impl Fn(u32) -> Option<Slot>,
    ) -> (Self, Vec<FrontendKey>) {
        let mut planner = Self::new(limits);
        let mut wrong = Vec::new();
        for (key, value) in frontends {
            match adopt_entry(key, value, &slot) {
                Some(entry) if planner.reserve(&entry) => {
                    planner.generation = planner.generation.max(entry.generation);
                    planner.entries.insert(*key, entry);
                }
                _ => wrong.push(*key),
            }
        }
        (planner, wrong)
    }

    /// Takes what an adopted entry uses. All of it or nothing.
    fn reserve(&mut self, entry: &Entry) -> bool {
        let length = entry.backends.len();
        let Ok(length) = u32::try_from(length) else {
            return false;
        };
        let mut seen = BTreeSet::new();
        let ids_free = entry
            .backends
            .iter()
            .all(|backend| self.backend_ids.is_free(backend.id) && seen.insert(backend.id));
        if !ids_free || !self.service_ids.is_free(entry.service) || !self.ranges.take(entry.base, length) {
            return false;
        }
        self.service_ids.take(entry.service);
        for backend in &entry.backends {
            self.backend_ids.take(backend.id);
        }
        true
    }
}

fn adopt_entry(key: &FrontendKey, value: &Frontend, slot: &impl Fn(u32) -> Option<Slot>) -> Option<Entry> {
    if value.check != selection::checksum(key, value) {
        return None;
    }
    let count = value.ready.checked_add(value.terminating)?;
    let end = value.base.checked_add(count)?;
    let backends = (value.base..end)
        .map(|index| {
            let slot = slot(index).filter(|slot| slot.generation == value.generation)?;
            let part = if index - value.base < value.ready {
                SlotState::Ready
            } else {
                SlotState::Terminating
            };
            (slot.state == part).then_some(Backend {
                address: slot.address,
                port: slot.port,
                state: slot.state,
                id: slot.backend,
            })
        })
        .collect::<Option<Box<[Backend]>>>()?;
    Some(Entry {
        service: value.service,
        generation: value.generation,
        base: value.base,
        owner: value.owner,
        backends,
    })
}
