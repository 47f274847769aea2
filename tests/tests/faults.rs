//! One round of each kind of fault, with a fixed seed; `cargo xtask soak SEED` goes through many.

use anyhow::Result;
use orlop_tests::{
    faults::{campaign::Campaign, plan::Kind},
    layout::StoreEngine,
};

#[test]
fn processes_and_etcd_are_killed_and_hang() -> Result<()> {
    let campaign = Campaign {
        name: "faults-etcd".to_owned(),
        seed: 4,
        rounds: 1,
        kinds: [&Kind::PROCESSES[..], &Kind::ETCD].concat(),
        store: StoreEngine::Etcd,
        nodes: 2,
    };
    campaign.run()
}

#[test]
fn cables_are_cut_and_control_dies_meanwhile() -> Result<()> {
    let campaign = Campaign {
        name: "faults-net".to_owned(),
        seed: 5,
        rounds: 1,
        kinds: [&Kind::NETWORK[..], &[Kind::KillControl, Kind::HangControl]].concat(),
        store: StoreEngine::Embedded,
        nodes: 3,
    };
    campaign.run()
}

#[test]
fn clocks_are_set_a_node_reboots_and_the_disk_fails() -> Result<()> {
    let campaign = Campaign {
        name: "faults-machines".to_owned(),
        seed: 6,
        rounds: 1,
        kinds: [&Kind::MACHINES[..], &Kind::DISKS, &[Kind::ReplaceControl]].concat(),
        store: StoreEngine::Embedded,
        nodes: 3,
    };
    campaign.run()
}
