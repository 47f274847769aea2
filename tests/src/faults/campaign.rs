//! Rounds of faults in one lab: one round of a kind in the tests, many in `cargo xtask soak`.

use anyhow::{Context, Result, bail, ensure};
use std::time::Duration;

use super::{
    act::CONTROL,
    plan::{self, Kind, Shape},
    vigil::{Figure, RECOVERY, Vigil},
};
use crate::{
    disk::FaultyDisk,
    lab::{Lab, Options, output},
    layout::StoreEngine,
    supervisor::Request,
};

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
    /// How many nodes: 2 or more; with network faults 3 or more, the last one's cable is cut.
    pub nodes: u16,
    /// Whether times have to be below their bars.
    pub bars: Bars,
}

impl Campaign {
    /// Goes through all rounds. The first violation ends it; then the lab's folder stays.
    pub fn run(&self) -> Result<()> {
        println!("seed {}: {} rounds over {:?}", self.seed, self.rounds, self.store);
        let options = Options {
            nodes: self.nodes,
            store: self.store,
            etcd_members: 3,
            // One pod may be hit in every round: what is measured is not its back-off.
            node_extra: "restart_backoff_ms = 500\nrestart_backoff_max_ms = 1000\n".to_owned(),
            clocks: self.clocks(),
            // The others run the machine's own, of the 1 series.
            containerd_2: vec!["node2".to_owned()],
            ..Options::default()
        };
        let lab = Lab::start(&self.name, &options)?;
        let mut disk = self.disk(&lab)?;
        for round in 0..self.rounds {
            self.round(&lab, disk.as_mut(), round)
                .with_context(|| format!("seed {} round {round} of {:?}", self.seed, self.store))?;
        }
        // The disk outlives what uses it.
        let ended = lab.finish();
        drop(disk);
        ended
    }

    fn has(&self, kinds: &[Kind]) -> bool {
        kinds.iter().any(|kind| self.kinds.contains(kind))
    }

    /// The services whose clocks this campaign sets.
    fn clocks(&self) -> Vec<String> {
        let agents = (1..=self.nodes).map(|index| format!("node{index}/agent"));
        let control = self.has(&[Kind::StepControlClock]).then(|| CONTROL.to_owned());
        let agents = agents.filter(|_| self.has(&[Kind::StepAgentClock]));
        control.into_iter().chain(agents).collect()
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
        let nodes = lab.spec.node_names();
        let with_etcd = self.store == StoreEngine::Etcd;
        let etcd = |name: String| format!("control/{name}");
        let shape = Shape {
            remote: nodes.last().cloned().unwrap_or_default(),
            etcd: if with_etcd {
                lab.spec.etcd_names().into_iter().map(etcd).collect()
            } else {
                Vec::new()
            },
            nodes,
        };
        let mut vigil = Vigil::begin(lab, disk, self.seed, round)?;
        for fault in plan::round(self.seed, round, &shape, &self.kinds) {
            println!("   round {round}: {fault:?}");
            vigil.suffer(&fault)?;
        }
        if with_etcd {
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
    output(lab.on_node(
        "control",
        &["curl", "-sSf", "-d", &body, "http://127.0.0.1:2379/v3/kv/compaction"],
    )?)
    .context("compacting etcd")?;
    // Control's own window of events would still bridge the gap: a new control has none.
    let control = "control/control";
    let starts = lab.service(control)?.starts;
    lab.request(&Request::Signal(control.to_owned(), 9))?;
    lab.wait("control is started again", RECOVERY, || {
        Ok((lab.service(control)?.starts > starts && lab.client.ready().is_ok()).then_some(()))
    })?;
    vigil.recorder.sleeper().wake();
    lab.wait("the sleeper is told that its revision is compacted", RECOVERY, || {
        Ok((vigil.recorder.sleeper().lists() > lists).then_some(()))
    })?;
    vigil.settle()
}
