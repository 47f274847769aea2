//! One round of each kind of fault, with a fixed seed; `cargo xtask soak SEED` goes through many.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use orlop_tests::{
    faults::{
        campaign::{Bars, Campaign},
        plan::Kind,
    },
    layout::StoreEngine,
};

fn processes() -> Campaign {
    Campaign {
        name: "faults-etcd".to_owned(),
        seed: 19,
        rounds: 1,
        kinds: [&Kind::PROCESSES[..], &Kind::ETCD].concat(),
        store: StoreEngine::Etcd,
        nodes: 2,
        bars: Bars::Told,
    }
}

fn cables() -> Campaign {
    Campaign {
        name: "faults-net".to_owned(),
        seed: 5,
        rounds: 1,
        kinds: [&Kind::NETWORK[..], &[Kind::KillControl, Kind::HangControl]].concat(),
        store: StoreEngine::Embedded,
        nodes: 3,
        bars: Bars::Told,
    }
}

fn machines() -> Campaign {
    Campaign {
        name: "faults-machines".to_owned(),
        seed: 6,
        rounds: 1,
        kinds: [&Kind::MACHINES[..], &Kind::DISKS, &[Kind::ReplaceControl]].concat(),
        store: StoreEngine::Embedded,
        nodes: 3,
        bars: Bars::Told,
    }
}

#[test]
fn processes_and_etcd_are_killed_and_hang() -> Result<()> {
    processes().run()
}

#[test]
fn cables_are_cut_and_control_dies_meanwhile() -> Result<()> {
    cables().run()
}

#[test]
fn clocks_are_set_a_node_reboots_and_the_disk_fails() -> Result<()> {
    machines().run()
}

#[test]
fn every_kind_of_fault_has_its_round() -> Result<()> {
    let here = [processes().kinds, cables().kinds, machines().kinds, Kind::LONG.to_vec()].concat();
    for kind in Kind::value_variants() {
        ensure!(here.contains(kind), "{kind:?} is in no campaign");
    }
    Ok(())
}
