//! Which faults a round has, in which order, on whom and for how long: a pure function of the seed.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{
    disk::{DiskError, Troubles},
    layout::Way,
};

/// A part of the lab that can be killed or stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A supervised service: "control/control", "node1/agent", "node1/containerd", "control/etcd2".
    Service(String),
    /// The shim of one of the pods that faults may hit, on this node.
    Shim(String),
}

/// What is done to the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// kill -9.
    Kill(Part),
    /// SIGSTOP, and SIGCONT after this time.
    Hang(Part, Duration),
    /// A node's cable loses everything for this time: both ways, or one.
    Cut(String, Option<Way>, Duration),
    /// As [`Fault::Cut`], until the node is NotReady and its pods run elsewhere; then the cable is healed.
    CutUntilReplaced(String, Option<Way>),
    /// All but a minority of etcd's members (these services) stop for this time.
    LoseQuorum(Vec<String>, Duration),
    /// Another version of the agent, or of control, takes the place of this one.
    Replace(String),
    /// A service's wall clock is set so many seconds ahead (behind, when negative), and back.
    StepClock(String, i64),
    /// A node is switched off and on while there is no control.
    Reboot(String),
    /// The disk under the embedded store goes wrong for this time.
    Disk(Troubles, Duration),
}

/// The kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
#[expect(missing_docs, reason = "the names are those of `Fault` and `Part`")]
pub enum Kind {
    KillControl,
    HangControl,
    KillAgent,
    HangAgent,
    KillContainerd,
    HangContainerd,
    KillShim,
    HangShim,
    KillEtcd,
    HangEtcd,
    LoseQuorum,
    /// As long as nodes and leaders are given up otherwise.
    LoseQuorumLong,
    ReplaceAgent,
    ReplaceControl,
    CutBothWays,
    CutFromNode,
    CutToNode,
    CutUntilReplaced,
    StepControlClock,
    StepAgentClock,
    Reboot,
    FailingDisk,
    FullDisk,
    SlowDisk,
}

impl Kind {
    /// What befalls processes.
    pub const PROCESSES: [Self; 10] = [
        Self::KillControl,
        Self::HangControl,
        Self::KillAgent,
        Self::HangAgent,
        Self::KillContainerd,
        Self::HangContainerd,
        Self::KillShim,
        Self::HangShim,
        Self::ReplaceAgent,
        Self::ReplaceControl,
    ];
    /// What befalls etcd.
    pub const ETCD: [Self; 3] = [Self::KillEtcd, Self::HangEtcd, Self::LoseQuorum];
    /// What takes too long for CI, and is left to `cargo xtask soak`.
    pub const LONG: [Self; 1] = [Self::LoseQuorumLong];
    /// What befalls the network.
    pub const NETWORK: [Self; 4] = [
        Self::CutBothWays,
        Self::CutFromNode,
        Self::CutToNode,
        Self::CutUntilReplaced,
    ];
    /// What befalls a machine as a whole.
    pub const MACHINES: [Self; 3] = [Self::StepControlClock, Self::StepAgentClock, Self::Reboot];
    /// What befalls the disk under the embedded store.
    pub const DISKS: [Self; 3] = [Self::FailingDisk, Self::FullDisk, Self::SlowDisk];
}

/// Whom faults can hit.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Nodes whose processes are hit; the calm pods and their client run on the first two.
    pub nodes: Vec<String>,
    /// The node whose cable is cut: none of the calm pods is there.
    pub remote: String,
    /// etcd's services; empty with the embedded store.
    pub etcd: Vec<String>,
}

/// Longer than a silent node, a leader's claim and a write's deadline last.
const WITHOUT_QUORUM: Duration = Duration::from_secs(25);

/// One round: each kind once, in an order, on targets and for times that the seed chooses.
pub fn round(seed: u64, round: u64, shape: &Shape, kinds: &[Kind]) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(round));
    let mut kinds: Vec<Kind> = kinds.to_vec();
    let impossible = if shape.etcd.is_empty() {
        [&Kind::ETCD[..], &Kind::LONG].concat()
    } else {
        Kind::DISKS.to_vec()
    };
    kinds.retain(|kind| !impossible.contains(kind));
    kinds.shuffle(&mut random);
    kinds.into_iter().map(|kind| fault(&mut random, kind, shape)).collect()
}

fn fault(random: &mut StdRng, kind: Kind, shape: &Shape) -> Fault {
    let control = || Part::Service("control/control".to_owned());
    let node = one_of(random, &shape.nodes);
    let on_node = |name: &str| Part::Service(format!("{node}/{name}"));
    let brief = Duration::from_millis(random.random_range(1_000..4_000));
    match kind {
        Kind::KillControl => Fault::Kill(control()),
        Kind::HangControl => Fault::Hang(control(), brief),
        Kind::KillAgent => Fault::Kill(on_node("agent")),
        Kind::HangAgent => Fault::Hang(on_node("agent"), brief),
        Kind::KillContainerd => Fault::Kill(on_node("containerd")),
        Kind::HangContainerd => Fault::Hang(on_node("containerd"), brief),
        Kind::KillShim => Fault::Kill(Part::Shim(node)),
        Kind::HangShim => Fault::Hang(Part::Shim(node), brief),
        Kind::KillEtcd => Fault::Kill(Part::Service(one_of(random, &shape.etcd))),
        Kind::HangEtcd => Fault::Hang(Part::Service(one_of(random, &shape.etcd)), brief),
        Kind::LoseQuorum => Fault::LoseQuorum(most(random, &shape.etcd), brief),
        Kind::LoseQuorumLong => Fault::LoseQuorum(most(random, &shape.etcd), WITHOUT_QUORUM),
        Kind::ReplaceAgent => Fault::Replace(format!("{node}/agent")),
        Kind::ReplaceControl => Fault::Replace("control/control".to_owned()),
        Kind::StepControlClock => Fault::StepClock("control/control".to_owned(), step(random)),
        Kind::StepAgentClock => Fault::StepClock(format!("{node}/agent"), step(random)),
        Kind::Reboot => Fault::Reboot(shape.remote.clone()),
        Kind::FailingDisk => Fault::Disk(failing(random), brief),
        Kind::FullDisk => Fault::Disk(
            Troubles {
                write: Some(DiskError::NoSpace),
                ..Troubles::default()
            },
            brief,
        ),
        Kind::SlowDisk => Fault::Disk(
            Troubles {
                sync_delay_ms: random.random_range(50..1_000),
                ..Troubles::default()
            },
            brief,
        ),
        Kind::CutBothWays => Fault::Cut(shape.remote.clone(), None, brief),
        Kind::CutFromNode => Fault::Cut(shape.remote.clone(), Some(Way::FromMember), brief),
        Kind::CutToNode => Fault::Cut(shape.remote.clone(), Some(Way::ToMember), brief),
        Kind::CutUntilReplaced => Fault::CutUntilReplaced(shape.remote.clone(), way(random)),
    }
}

fn one_of(random: &mut StdRng, names: &[String]) -> String {
    names
        .get(random.random_range(0..names.len().max(1)))
        .cloned()
        .unwrap_or_default()
}

/// A majority of etcd's members.
fn most(random: &mut StdRng, members: &[String]) -> Vec<String> {
    let mut members = members.to_vec();
    members.shuffle(random);
    members.truncate(members.len() / 2 + 1);
    members
}

/// An hour or a month, ahead or behind.
fn step(random: &mut StdRng) -> i64 {
    const HOUR: i64 = 3600;
    [HOUR, -HOUR, 30 * 24 * HOUR, -30 * 24 * HOUR][random.random_range(0..4)]
}

fn failing(random: &mut StdRng) -> Troubles {
    let (write, sync) = [
        (Some(DiskError::Io), None),
        (None, Some(DiskError::Io)),
        (Some(DiskError::Io), Some(DiskError::Io)),
    ][random.random_range(0..3)];
    Troubles {
        write,
        sync,
        ..Troubles::default()
    }
}

fn way(random: &mut StdRng) -> Option<Way> {
    [None, Some(Way::FromMember), Some(Way::ToMember)][random.random_range(0..3)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Shape {
            nodes: names(&["node1", "node2", "node3"]),
            remote: "node3".to_owned(),
            etcd: names(&["control/etcd", "control/etcd2", "control/etcd3"]),
        }
    }

    fn all() -> Vec<Kind> {
        [
            &Kind::PROCESSES[..],
            &Kind::ETCD,
            &Kind::LONG,
            &Kind::NETWORK,
            &Kind::MACHINES,
            &Kind::DISKS,
        ]
        .concat()
    }

    #[test]
    fn a_round_is_a_function_of_its_seed() {
        assert_eq!(round(7, 3, &shape(), &all()), round(7, 3, &shape(), &all()));
        assert_ne!(round(7, 3, &shape(), &all()), round(7, 4, &shape(), &all()));
        assert_ne!(round(7, 3, &shape(), &all()), round(8, 3, &shape(), &all()));
    }

    #[test]
    fn each_kind_happens_once_and_quorum_is_really_lost() {
        for seed in 0..50 {
            let faults = round(seed, 0, &shape(), &all());
            assert_eq!(
                faults.len(),
                all().len() - Kind::DISKS.len(),
                "etcd's disks are its own"
            );
            let lost = faults.iter().filter_map(|fault| match fault {
                Fault::LoseQuorum(members, _) => Some(members.len()),
                _ => None,
            });
            assert_eq!(lost.collect::<Vec<_>>(), [2, 2], "two of three");
            let embedded = Shape {
                etcd: Vec::new(),
                ..shape()
            };
            assert_eq!(
                round(seed, 0, &embedded, &all()).len(),
                all().len() - Kind::ETCD.len() - Kind::LONG.len()
            );
        }
    }
}
