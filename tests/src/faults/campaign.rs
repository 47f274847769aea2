//! Rounds of faults in one lab: one round of a kind in the tests, many in `cargo xtask soak`.

use anyhow::{Context, Result, bail, ensure};
use std::{path::PathBuf, time::Duration};

use super::{
    act::{CONTROL, replicas},
    plan::{self, Fault, Kind, Shape},
    versions,
    vigil::{Figure, RECOVERY, Vigil},
};
use crate::{
    disk::FaultyDisk,
    lab::{Lab, Options, output},
    layout::{ETCD_CLIENTS, ETCD_MEMBER, StoreEngine, control_name, etcd_name},
    supervisor::Request,
};

/// How many members etcd has.
const ETCD_MEMBERS: u16 = 3;
/// A leader is given up sooner than by default, so that a round has time for all ways to lose one.
const LEADER: &str = "[leader]\nlease_duration = \"3s\"\nrenew_deadline = \"2s\"\nretry_period = \"500ms\"\n";

/// What a time above its bar is: that a dead node is NotReady within 20 s, its pods elsewhere within 60 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bars {
    /// It is printed: the machine is as busy as it likes, as CI's is.
    Told,
    /// A violation: the machine is quiet, as a soak's has to be.
    Held,
}

/// What to go through.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// Names the lab.
    pub name: String,
    /// Decides everything else together with the round's number.
    pub seed: u64,
    /// How many rounds.
    pub rounds: u64,
    /// Which faults each round has.
    pub kinds: Vec<Kind>,
    /// Control's store; etcd has three members then.
    pub store: StoreEngine,
    /// How many control replicas; over the embedded store there is one.
    pub controls: u16,
    /// How many nodes: 2 or more; with network faults 3 or more, the last one's cable is cut.
    pub nodes: u16,
    /// Whether times have to be below their bars.
    pub bars: Bars,
    /// Programs of another version: replacing ours, they and ours take turns.
    pub other_binaries: Option<PathBuf>,
}

impl Campaign {
    /// Goes through all rounds. The first violation ends it; then the lab's folder stays.
    pub fn run(&self) -> Result<()> {
        println!(
            "seed {}: {} rounds over {:?}, control replicas: {}",
            self.seed, self.rounds, self.store, self.controls
        );
        let options = Options {
            nodes: self.nodes,
            store: self.store,
            etcd_members: ETCD_MEMBERS,
            controls: self.controls,
            control_extra: if self.controls > 1 {
                LEADER.to_owned()
            } else {
                String::new()
            },
            // One pod may be hit in every round: what is measured is not its back-off.
            node_extra: "restart_backoff_ms = 500\nrestart_backoff_max_ms = 1000\n".to_owned(),
            clocks: self.clocks(),
            // The others run the machine's own, of the 1 series.
            containerd_2: vec!["node2".to_owned()],
            other_binaries: self.other_binaries.clone(),
            ..Options::default()
        };
        let lab = Lab::start(&self.name, &options)?;
        let mut disk = self.disk(&lab)?;
        for round in 0..self.rounds {
            self.round(&lab, disk.as_mut(), round)
                .with_context(|| format!("seed {} round {round} of {:?}", self.seed, self.store))?;
        }
        versions::tell(&lab)?;
        // The disk outlives what uses it.
        let ended = lab.finish();
        drop(disk);
        ended
    }

    fn has(&self, kinds: &[Kind]) -> bool {
        kinds.iter().any(|kind| self.kinds.contains(kind))
    }

    /// What a round does to the lab, in this order.
    pub fn faults(&self, round: u64) -> Vec<Fault> {
        plan::round(self.seed, round, &self.shape(), &self.kinds)
    }

    fn shape(&self) -> Shape {
        let nodes: Vec<String> = (1..=self.nodes).map(|index| format!("node{index}")).collect();
        let members = match self.store {
            StoreEngine::Embedded => 0,
            StoreEngine::Etcd => ETCD_MEMBERS,
        };
        Shape {
            remote: nodes.last().cloned().unwrap_or_default(),
            nodes,
            controls: (1..=self.controls)
                .map(|index| format!("{}/control", control_name(index)))
                .collect(),
            etcd: (1..=members)
                .map(|index| format!("{ETCD_MEMBER}/{}", etcd_name(index)))
                .collect(),
        }
    }

    /// The services whose clocks this campaign sets.
    fn clocks(&self) -> Vec<String> {
        let Shape { nodes, controls, .. } = self.shape();
        let agents = nodes.into_iter().map(|node| format!("{node}/agent"));
        let agents = agents.filter(|_| self.has(&[Kind::StepAgentClock]));
        let controls = controls.into_iter().filter(|_| self.has(&[Kind::StepControlClock]));
        controls.chain(agents).collect()
    }

    /// The disk under the store, where this campaign troubles it.
    fn disk(&self, lab: &Lab) -> Result<Option<FaultyDisk>> {
        if self.store != StoreEngine::Embedded || !self.has(&Kind::DISKS) {
            return Ok(None);
        }
        let data = lab.spec.member_directory("control").join("data");
        let disk = FaultyDisk::put_under(lab, "control", &data, CONTROL)?;
        lab.wait("control answers", RECOVERY, || Ok(lab.client.ready().ok()))?;
        lab.wait_for_nodes()?;
        Ok(Some(disk))
    }

    fn round(&self, lab: &Lab, disk: Option<&mut FaultyDisk>, round: u64) -> Result<()> {
        let mut vigil = Vigil::begin(lab, disk, self.seed, round)?;
        for fault in self.faults(round) {
            println!("   round {round}: {fault:?}");
            vigil.suffer(&fault)?;
        }
        if self.store == StoreEngine::Etcd {
            sleep_through_a_compaction(&mut vigil)?;
        }
        let above: Vec<String> = vigil.figures.iter().filter_map(Figure::above_its_bar).collect();
        for told in &above {
            println!("   {told}");
        }
        let mut violations = vigil.finish()?;
        if self.bars == Bars::Held {
            violations.extend(above);
        }
        if !violations.is_empty() {
            let told: Vec<&str> = violations.iter().take(20).map(String::as_str).collect();
            bail!("{} violations: {}", violations.len(), told.join("; "));
        }
        Ok(())
    }
}

/// A watcher that was away while etcd forgot where it was is told so, and misses nothing: it begins with a list.
fn sleep_through_a_compaction(vigil: &mut Vigil<'_>) -> Result<()> {
    println!("   a watcher sleeps through a compaction");
    vigil.recorder.sleeper().sleep();
    let (lab, lists) = (vigil.lab, vigil.recorder.sleeper().lists());
    for _ in 0..3 {
        vigil.recorder.wait_for_writes()?;
        std::thread::sleep(Duration::from_millis(300));
    }
    let revision = lab.client.list_revision("namespaces")?;
    ensure!(
        revision > vigil.recorder.sleeper().at(),
        "nothing was written meanwhile"
    );
    let body = format!("{{\"revision\": \"{revision}\"}}");
    let url = format!("http://127.0.0.1:{ETCD_CLIENTS}/v3/kv/compaction");
    output(lab.on_node(ETCD_MEMBER, &["curl", "-sSf", "-d", &body, &url])?).context("compacting etcd")?;
    // The window of events of any replica would still bridge the gap: a new one has none.
    let controls = replicas::starts(lab)?;
    for control in controls.keys() {
        lab.request(&Request::Signal(control.clone(), 9))?;
    }
    replicas::wait_for_starts(lab, &controls)?;
    vigil.recorder.sleeper().wake();
    lab.wait("the sleeper is told that its revision is compacted", RECOVERY, || {
        Ok((vigil.recorder.sleeper().lists() > lists).then_some(()))
    })?;
    vigil.settle()
}
