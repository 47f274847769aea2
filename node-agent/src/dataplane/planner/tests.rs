use std::net::Ipv4Addr;

use orlop_ebpf_abi::{Protocol, Scope};
use proptest::prelude::*;

use super::{records::backends_of, *};
use crate::dataplane::ServiceId;

const LIMITS: Limits = Limits {
    frontends: 64,
    slots: 256,
};

/// The maps as the executor would leave them.
#[derive(Default, Clone)]
struct Maps {
    frontends: BTreeMap<FrontendKey, Frontend>,
    arena: BTreeMap<u32, Slot>,
}

impl Maps {
    fn write(&mut self, writes: &Writes) {
        for (base, slots) in writes.slots.iter() {
            for (index, slot) in (base..).zip(slots) {
                assert!(index < LIMITS.slots && index > 0);
                assert!(
                    self.arena.insert(index, *slot).is_none(),
                    "slot {index} is written while it is in use"
                );
            }
        }
        for (key, value) in &writes.frontends {
            self.frontends.insert(*key, *value);
        }
        for key in &writes.deletions {
            assert!(
                self.frontends.remove(key).is_some(),
                "{key:?} is deleted and is not there"
            );
        }
    }

    fn zero(&mut self, retired: &Retired) {
        for (base, length) in &retired.ranges {
            for index in *base..base + length {
                assert!(self.arena.remove(&index).is_some());
            }
        }
    }

    /// What a connection would find: backends by frontend, and no range shared.
    fn serve(&self) -> BTreeMap<FrontendKey, Vec<(Ipv4Addr, u16, SlotState)>> {
        let mut used = BTreeSet::new();
        self.frontends
            .iter()
            .map(|(key, value)| {
                assert_eq!(value.check, selection::checksum(key, value));
                let backends = (value.base..value.base + value.ready + value.terminating)
                    .map(|index| {
                        assert!(used.insert(index), "two frontends share slot {index}");
                        let slot = self.arena[&index];
                        assert_eq!(slot.generation, value.generation);
                        (slot.address.into(), slot.port, slot.state)
                    })
                    .collect();
                (*key, backends)
            })
            .collect()
    }
}

/// Protocol, port, and the backends' last address bytes with their states.
type Port<'a> = (u32, u32, &'a [(u8, u8)]);

fn service(name: &str, uid: &str, address: [u8; 4], ports: &[Port<'_>]) -> Arc<link::Service> {
    Arc::new(link::Service {
        namespace: "default".into(),
        name: name.into(),
        uid: uid.into(),
        addresses: vec![address.to_vec().into()],
        ports: ports
            .iter()
            .map(|(protocol, port, backends)| link::ServicePort {
                name: String::new(),
                protocol: *protocol,
                port: *port,
                backends_v4: backends
                    .iter()
                    .flat_map(|(last, state)| [10, 244, 1, *last, 0x1f, 0x90, *state, 0])
                    .collect(),
            })
            .collect(),
    })
}

fn upsert(services: &[&Arc<link::Service>]) -> ServiceChanges {
    ServiceChanges {
        upserts: services.iter().map(|service| Arc::clone(service)).collect(),
        ..Default::default()
    }
}

fn ranges(writes: &Writes) -> Vec<(u32, &[Slot])> {
    writes.slots.iter().collect()
}

fn key(address: [u8; 4], port: u16) -> FrontendKey {
    FrontendKey {
        address,
        port,
        protocol: Protocol::Tcp,
        scope: Scope::Cluster,
    }
}

#[test]
fn a_service_becomes_slots_and_a_frontend() {
    let mut planner = Planner::new(LIMITS);
    let web = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(3, 1), (1, 2), (2, 1)])]);
    let writes = planner.apply(&upsert(&[&web]));
    let slot = |last, state, backend| Slot {
        address: [10, 244, 1, last],
        port: 8080,
        state,
        reserved: 0,
        generation: 1,
        backend,
    };
    let slots = [
        slot(2, SlotState::Ready, 1),
        slot(3, SlotState::Ready, 2),
        slot(1, SlotState::Terminating, 3),
    ];
    assert_eq!(ranges(&writes), [(1, &slots[..])]);
    let (written, value) = writes.frontends[0];
    assert_eq!(written, key([10, 96, 0, 7], 80));
    assert_eq!(
        (
            value.service,
            value.generation,
            value.base,
            value.ready,
            value.terminating
        ),
        (1, 1, 1, 2, 1)
    );
    assert_eq!(
        (writes.frontends.len(), writes.deletions.len(), writes.full),
        (1, 0, None)
    );
    assert!(writes.retired.is_empty());
}

#[test]
fn the_same_again_writes_nothing() {
    let mut planner = Planner::new(LIMITS);
    let web = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1)])]);
    planner.apply(&upsert(&[&web]));
    assert_eq!(planner.apply(&upsert(&[&Arc::new((*web).clone())])), Writes::default());
    let whole = ServiceChanges {
        complete: true,
        ..upsert(&[&web])
    };
    assert_eq!(planner.apply(&whole), Writes::default());
}

#[test]
fn one_endpoint_writes_only_its_service() {
    let mut planner = Planner::new(LIMITS);
    let web = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1), (2, 1)])]);
    let other = service("other", "u2", [10, 96, 0, 8], &[(6, 80, &[(1, 1), (2, 1)])]);
    planner.apply(&upsert(&[&web, &other]));
    let more = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1), (2, 2), (5, 1)])]);
    let writes = planner.apply(&upsert(&[&more]));
    assert_eq!(writes.frontends.len(), 1);
    assert_eq!(ranges(&writes).len(), 1);
    let ids: Vec<_> = ranges(&writes)[0]
        .1
        .iter()
        .map(|slot| (slot.address[3], slot.backend))
        .collect();
    assert_eq!(
        ids,
        [(1, 1), (5, 5), (2, 2)],
        "a backend keeps its id while it is in the service"
    );
    assert_eq!(
        writes.retired,
        Retired {
            ranges: vec![(1, 2)],
            services: vec![],
            backends: vec![]
        }
    );
}

#[test]
fn an_address_that_goes_to_another_service_gets_new_ids() {
    let mut planner = Planner::new(LIMITS);
    let first = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1)])]);
    planner.apply(&upsert(&[&first]));
    let second = service("web", "u2", [10, 96, 0, 7], &[(6, 80, &[(1, 1)])]);
    let writes = planner.apply(&upsert(&[&second]));
    assert_eq!(writes.frontends[0].1.service, 2);
    assert_eq!(ranges(&writes)[0].1[0].backend, 2);
    assert_eq!(
        writes.retired,
        Retired {
            ranges: vec![(1, 1)],
            services: vec![1],
            backends: vec![1]
        }
    );
}

#[test]
fn two_claimants_the_first_serves_until_it_goes() {
    let mut planner = Planner::new(LIMITS);
    let a = service("a", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1)])]);
    let b = service("b", "u2", [10, 96, 0, 7], &[(6, 80, &[(2, 1)])]);
    assert_eq!(ranges(&planner.apply(&upsert(&[&b])))[0].1[0].address[3], 2);
    assert_eq!(ranges(&planner.apply(&upsert(&[&a])))[0].1[0].address[3], 1);
    let removal = ServiceChanges {
        removals: vec![("default".into(), "a".into())],
        ..Default::default()
    };
    let writes = planner.apply(&removal);
    assert_eq!(ranges(&writes)[0].1[0].address[3], 2);
    assert!(writes.deletions.is_empty());
}

#[test]
fn of_three_claimants_one_after_the_other_serves() {
    let mut planner = Planner::new(LIMITS);
    let claimant = |name: &str, last| service(name, name, [10, 96, 0, 7], &[(6, 80, &[(last, 1)])]);
    let (a, b, c) = (claimant("a", 1), claimant("b", 2), claimant("c", 3));
    for service in [&c, &a, &b] {
        planner.apply(&upsert(&[service]));
    }
    let frontend = key([10, 96, 0, 7], 80);
    let mut remove = |name: &str| {
        let removals = vec![("default".into(), name.into())];
        planner.apply(&ServiceChanges {
            removals,
            ..Default::default()
        });
        planner.owner_of(&frontend).map(|service| service.name.clone())
    };
    assert_eq!(remove("a").as_deref(), Some("b"));
    assert_eq!(remove("c").as_deref(), Some("b"));
    assert_eq!(remove("b"), None);
    assert!(planner.entries().next().is_none());
}

#[test]
fn what_does_not_fit_is_written_once_there_is_room() {
    let mut planner = Planner::new(Limits { frontends: 8, slots: 4 });
    let a = service("a", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1), (2, 1)])]);
    let b = service("b", "u2", [10, 96, 0, 8], &[(6, 80, &[(1, 1), (2, 1)])]);
    let writes = planner.apply(&upsert(&[&a, &b]));
    assert_eq!(
        (writes.frontends.len(), writes.full),
        (1, Some(orlop_ebpf_abi::BACKEND_COUNTERS))
    );
    let removal = ServiceChanges {
        removals: vec![("default".into(), "a".into())],
        ..Default::default()
    };
    let writes = planner.apply(&removal);
    assert_eq!(
        (writes.frontends.len(), writes.deletions.len()),
        (0, 1),
        "not before the grace period"
    );
    planner.release(&writes.retired);
    let writes = planner.retry();
    assert_eq!((writes.frontends.len(), writes.full), (1, None));
}

#[test]
fn adopted_entries_stay_until_a_complete_change() {
    let mut before = Planner::new(LIMITS);
    let mut maps = Maps::default();
    let web = service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1), (2, 1)])]);
    let old = service("old", "u2", [10, 96, 0, 8], &[(6, 80, &[(1, 1)])]);
    maps.write(&before.apply(&upsert(&[&web, &old])));
    let mut frontends: Vec<_> = maps.frontends.iter().map(|(key, value)| (*key, *value)).collect();
    let mut forged = frontends[0];
    forged.0.port = 81;
    frontends.push(forged);
    let (mut planner, wrong) = Planner::adopt(LIMITS, &frontends, |index| maps.arena.get(&index).copied());
    assert_eq!(wrong, [forged.0], "a value that belongs to another key is not believed");
    assert_eq!(planner.apply(&upsert(&[&web])), Writes::default());
    let writes = planner.apply(&ServiceChanges {
        complete: true,
        ..upsert(&[&web])
    });
    assert_eq!(writes.deletions, [key([10, 96, 0, 8], 80)]);
    assert!(writes.frontends.is_empty());
}

#[test]
fn addresses_that_no_pod_has_are_left_out() {
    let mut bad = (*service("web", "u1", [10, 96, 0, 7], &[(6, 80, &[(1, 1)])])).clone();
    let mut packed = bad.ports[0].backends_v4.to_vec();
    packed.extend([
        127, 0, 0, 1, 0, 80, 1, 0, 169, 254, 0, 1, 0, 80, 1, 0, 10, 0, 0, 1, 0, 0, 1, 0,
    ]);
    bad.ports[0].backends_v4 = packed.into();
    assert_eq!(backends_of(&bad, &key([10, 96, 0, 7], 80)).len(), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Upsert(u8, u8, Vec<(u8, u8)>, bool),
    Remove(u8),
    Restart,
    Resync,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..6_u8, 0..4_u8, prop::collection::vec((1..12_u8, 1..=2_u8), 0..9), any::<bool>())
            .prop_map(|(name, uid, backends, udp)| Step::Upsert(name, uid, backends, udp)),
        2 => (0..6_u8).prop_map(Step::Remove),
        1 => Just(Step::Restart),
        1 => Just(Step::Resync),
    ]
}

fn numbered(name: u8, uid: u8, backends: &[(u8, u8)], udp: bool) -> Arc<link::Service> {
    let ports: &[Port<'_>] = if udp {
        &[(6, 80, backends), (17, 53, backends)]
    } else {
        &[(6, 80, backends)]
    };
    // Some names share an address: two claimants.
    service(
        &format!("s{name}"),
        &format!("u{name}-{uid}"),
        [10, 96, 0, name / 2],
        ports,
    )
}

proptest! {
    /// Any sequence of changes, restarts and resyncs leaves maps that serve what a fresh start would; nothing overlaps
    /// on the way; and when all is removed the maps are empty and everything is free again.
    #[test]
    fn any_way_leads_to_the_same(steps in prop::collection::vec(step(), 1..40)) {
        let (mut planner, mut maps) = (Planner::new(LIMITS), Maps::default());
        let mut desired: BTreeMap<ServiceId, Arc<link::Service>> = BTreeMap::new();
        // What is retired is released one step later, as if a grace period had passed.
        let mut waiting = Retired::default();
        for step in steps {
            let changes = match step {
                Step::Upsert(name, uid, backends, udp) => {
                    let service = numbered(name, uid, &backends, udp);
                    desired.insert((service.namespace.clone(), service.name.clone()), Arc::clone(&service));
                    upsert(&[&service])
                }
                Step::Remove(name) => {
                    let id = ("default".to_owned(), format!("s{name}"));
                    desired.remove(&id);
                    ServiceChanges { removals: vec![id], ..Default::default() }
                }
                Step::Restart => {
                    maps.zero(&std::mem::take(&mut waiting));
                    let frontends: Vec<_> = maps.frontends.iter().map(|(key, value)| (*key, *value)).collect();
                    let (adopted, wrong) = Planner::adopt(LIMITS, &frontends, |index| maps.arena.get(&index).copied());
                    prop_assert!(wrong.is_empty());
                    planner = adopted;
                    ServiceChanges { upserts: desired.values().cloned().collect(), complete: true, ..Default::default() }
                }
                Step::Resync => {
                    ServiceChanges { upserts: desired.values().cloned().collect(), complete: true, ..Default::default() }
                }
            };
            let writes = planner.apply(&changes);
            prop_assert_eq!(writes.full, None);
            maps.write(&writes);
            maps.zero(&waiting);
            planner.release(&waiting);
            waiting = writes.retired;
            maps.serve();
        }
        maps.zero(&waiting);
        planner.release(&waiting);

        let (mut fresh, mut expected) = (Planner::new(LIMITS), Maps::default());
        expected.write(&fresh.apply(&ServiceChanges {
            upserts: desired.values().cloned().collect(), complete: true, ..Default::default()
        }));
        prop_assert_eq!(maps.serve(), expected.serve());

        let writes = planner.apply(&ServiceChanges { complete: true, ..Default::default() });
        maps.write(&writes);
        maps.zero(&writes.retired);
        planner.release(&writes.retired);
        prop_assert!(maps.frontends.is_empty() && maps.arena.is_empty());
        prop_assert_eq!(planner.free_ranges().collect::<Vec<_>>(), vec![(1, LIMITS.slots - 1)]);
        prop_assert_eq!(planner.highest_ids(), (0, 0));
    }
}
