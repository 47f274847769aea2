//! Maps that somebody else has written to: what the agent adopts of them, and what the programs choose from them.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use orlop_ebpf_abi::{
    Frontend, FrontendKey, Slot,
    selection::{Selection, Tables, checksum, select},
};
use orlop_node::dataplane::{
    ServiceChanges, arena,
    planner::{Limits, Planner},
    tables,
};

const SLOTS: u32 = 64;

struct Maps {
    frontends: Vec<(FrontendKey, Frontend)>,
    slots: Vec<Option<Slot>>,
}

impl Tables for Maps {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.frontends
            .iter()
            .find(|(known, _)| known == key)
            .map(|(_, value)| *value)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(index as usize).copied().flatten()
    }

    fn random(&self) -> u32 {
        0x9e37_79b9
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((count, rest)) = bytes.split_first() else {
        return;
    };
    let (entries, arena) = rest.split_at((usize::from(*count % 16) * 40).min(rest.len()));
    let mut frontends = BTreeMap::new();
    for entry in entries.chunks_exact(40) {
        let Some(key) = tables::decode_key(&entry[..8]) else {
            continue;
        };
        let mut value = tables::decode_value(&entry[8..]);
        // Nothing finds a checksum by chance.
        if value.flags & 1 == 0 {
            value.check = checksum(&key, &value);
        }
        frontends.insert(key, value);
    }
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight"));
    let slots = arena.chunks_exact(16).take(SLOTS as usize);
    let maps = Maps {
        frontends: frontends.into_iter().collect(),
        slots: slots
            .map(|slot| arena::decode([word(&slot[..8]), word(&slot[8..])]))
            .collect(),
    };
    for (key, value) in &maps.frontends {
        let keep = maps.slot(value.base).map(|slot| (slot.address, slot.port));
        for keep in [None, keep] {
            if let Selection::Backend {
                address, port, backend, ..
            } = select(&maps, key, keep)
            {
                let is_it = |slot: &Slot| (slot.address, slot.port, slot.backend) == (address, port, backend);
                assert!(
                    maps.slots
                        .iter()
                        .flatten()
                        .any(|slot| is_it(slot) && slot.generation == value.generation)
                );
            }
        }
    }

    let limits = Limits {
        frontends: 16,
        slots: SLOTS,
    };
    let (mut planner, wrong) = Planner::adopt(limits, &maps.frontends, |index| maps.slot(index));
    assert_eq!(planner.entries().count() + wrong.len(), maps.frontends.len());
    // Whatever was adopted: when nothing is wanted any more, all of it is free again.
    let writes = planner.apply(&ServiceChanges {
        complete: true,
        ..ServiceChanges::default()
    });
    planner.release(&writes.retired);
    assert_eq!(planner.entries().count(), 0);
    assert_eq!(planner.free_ranges().collect::<Vec<_>>(), [(1, SLOTS - 1)]);
    assert_eq!(planner.highest_ids(), (0, 0));
});
