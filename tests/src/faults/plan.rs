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
    /// A supervised service: "control2/control", "node1/agent", "node1/containerd", "etcd/etcd2".
    Service(String),
    /// The shim of one of the pods that faults may hit, on this node.
    Shim(String),
}

/// How the control replica that leads is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    /// kill -9.
    Killed,
    /// SIGSTOP.
    Hung,
    /// Its cable loses everything, or what goes one way: it reaches neither etcd nor the nodes.
    Cut(Option<Way>),
}

/// What is done to the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// kill -9.
    Kill(Part),
    /// SIGSTOP, and SIGCONT after this time.
    Hang(Part, Duration),
    /// The cable of a node, or of a control replica, loses everything for this time: both ways, or one.
    Cut(String, Option<Way>, Duration),
    /// As [`Fault::Cut`], until the node is NotReady and its pods run elsewhere; then the cable is healed.
    CutUntilReplaced(String, Option<Way>),
    /// All but a minority of etcd's members (these services) stop for this time.
    LoseQuorum(Vec<String>, Duration),
    /// Whichever control replica leads is lost until another one leads in its place.
    LoseLeader(Loss),
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
    KillLeader,
    HangLeader,
    CutLeader,
    /// Any replica, and too short for another to take its place.
    CutControl,
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
    /// What befalls one of several control replicas; the leader is lost as long as it leads.
    pub const REPLICAS: [Self; 4] = [Self::KillLeader, Self::HangLeader, Self::CutLeader, Self::CutControl];
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
    /// The services of control's replicas, "control/control" and so on.
    pub controls: Vec<String>,
    /// etcd's services; empty with the embedded store.
    pub etcd: Vec<String>,
}

impl Shape {
    /// Whether this can happen here.
    fn allows(&self, kind: Kind) -> bool {
        let of_etcd = Kind::ETCD.contains(&kind) || Kind::LONG.contains(&kind);
        !(of_etcd && self.etcd.is_empty()
            || Kind::DISKS.contains(&kind) && !self.etcd.is_empty()
            || Kind::REPLICAS.contains(&kind) && self.controls.len() < 2)
    }
}

/// Longer than a silent node, a leader's claim and a write's deadline last.
const WITHOUT_QUORUM: Duration = Duration::from_secs(25);

/// One round: each kind that can happen here once, in an order, on targets and for times that the seed chooses.
pub fn round(seed: u64, round: u64, shape: &Shape, kinds: &[Kind]) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(round));
    let mut kinds: Vec<Kind> = kinds.iter().copied().filter(|kind| shape.allows(*kind)).collect();
    kinds.shuffle(&mut random);
    kinds.into_iter().map(|kind| fault(&mut random, kind, shape)).collect()
}

fn fault(random: &mut StdRng, kind: Kind, shape: &Shape) -> Fault {
    let node = one_of(random, &shape.nodes);
    let on_node = |name: &str| Part::Service(format!("{node}/{name}"));
    let brief = Duration::from_millis(random.random_range(1_000..4_000));
    let control = one_of(random, &shape.controls);
    match kind {
        Kind::KillControl => Fault::Kill(Part::Service(control)),
        Kind::HangControl => Fault::Hang(Part::Service(control), brief),
        Kind::CutControl => Fault::Cut(member(&control), way(random), brief),
        Kind::KillLeader => Fault::LoseLeader(Loss::Killed),
        Kind::HangLeader => Fault::LoseLeader(Loss::Hung),
        Kind::CutLeader => Fault::LoseLeader(Loss::Cut(way(random))),
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
        Kind::ReplaceControl => Fault::Replace(control),
        Kind::StepControlClock => Fault::StepClock(control, step(random)),
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

/// The member of the lab that a service runs in.
fn member(service: &str) -> String {
    service.split('/').next().unwrap_or_default().to_owned()
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
    use std::collections::BTreeSet;

    use super::*;

    fn shape() -> Shape {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Shape {
            nodes: names(&["node1", "node2", "node3"]),
            remote: "node3".to_owned(),
            controls: names(&["control/control", "control2/control", "control3/control"]),
            etcd: names(&["etcd/etcd", "etcd/etcd2", "etcd/etcd3"]),
        }
    }

    fn all() -> Vec<Kind> {
        [
            &Kind::PROCESSES[..],
            &Kind::ETCD,
            &Kind::REPLICAS,
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
    fn every_replica_is_hit_by_some_seed() {
        let hit: BTreeSet<String> = (0..50)
            .flat_map(|seed| round(seed, 0, &shape(), &[Kind::KillControl, Kind::CutControl]))
            .filter_map(|fault| match fault {
                Fault::Kill(Part::Service(service)) => Some(member(&service)),
                Fault::Cut(member, ..) => Some(member),
                _ => None,
            })
            .collect();
        assert_eq!(
            hit,
            BTreeSet::from(["control", "control2", "control3"].map(str::to_owned))
        );
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
            let losses = faults.iter().filter(|fault| matches!(fault, Fault::LoseLeader(_)));
            assert_eq!(losses.count(), 3, "killed, hung and cut off");
            let embedded = Shape {
                etcd: Vec::new(),
                controls: shape().controls[..1].to_vec(),
                ..shape()
            };
            assert_eq!(
                round(seed, 0, &embedded, &all()).len(),
                all().len() - Kind::ETCD.len() - Kind::REPLICAS.len() - Kind::LONG.len()
            );
        }
    }
}
