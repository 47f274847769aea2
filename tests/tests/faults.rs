//! One round of each kind of fault, with a fixed seed; `cargo xtask soak SEED` goes through many.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use orlop_tests::{
    faults::{
        campaign::{Bars, Campaign},
        plan::{Fault, Kind, Part},
    },
    layout::StoreEngine,
};

fn processes() -> Campaign {
    Campaign {
        name: "faults-etcd".to_owned(),
        seed: 65,
        rounds: 1,
        kinds: [&Kind::PROCESSES[..], &Kind::ETCD, &Kind::REPLICAS].concat(),
        store: StoreEngine::Etcd,
        controls: 3,
        nodes: 2,
        bars: Bars::Told,
        other_binaries: None,
    }
}

fn cables() -> Campaign {
    Campaign {
        name: "faults-net".to_owned(),
        seed: 5,
        rounds: 1,
        kinds: [&Kind::NETWORK[..], &[Kind::KillControl, Kind::HangControl]].concat(),
        store: StoreEngine::Embedded,
        controls: 1,
        nodes: 3,
        bars: Bars::Told,
        other_binaries: None,
    }
}

fn machines() -> Campaign {
    Campaign {
        name: "faults-machines".to_owned(),
        seed: 6,
        rounds: 1,
        kinds: [&Kind::MACHINES[..], &Kind::DISKS, &[Kind::ReplaceControl]].concat(),
        store: StoreEngine::Embedded,
        controls: 1,
        nodes: 3,
        bars: Bars::Told,
        other_binaries: None,
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
    let mut here = Kind::LONG.to_vec();
    for campaign in [processes(), cables(), machines()] {
        let (planned, wanted) = (campaign.faults(0).len(), campaign.kinds.len());
        ensure!(
            planned == wanted,
            "{} can have {planned} of its {wanted} kinds",
            campaign.name
        );
        here.extend(campaign.kinds);
    }
    for kind in Kind::value_variants() {
        ensure!(here.contains(kind), "{kind:?} is in no campaign");
    }
    Ok(())
}

/// Where a fault happens is the seed's choice: node2, which runs containerd 2, has to be among the nodes whose shim and containerd hang.
#[test]
fn a_shim_and_a_containerd_of_the_2_series_hang() -> Result<()> {
    let faults = processes().faults(0);
    for part in [
        Part::Shim("node2".to_owned()),
        Part::Service("node2/containerd".to_owned()),
    ] {
        let hangs = faults
            .iter()
            .any(|fault| matches!(fault, Fault::Hang(hit, _) if *hit == part));
        ensure!(hangs, "{part:?} does not hang with this seed: {faults:?}");
    }
    Ok(())
}
