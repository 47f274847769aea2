//! What is watched while faults are acted out, and has to hold in the end: the history of writes, the calm pods' processes, a long
//! connection, an open loop of new ones, everybody's addresses.

use std::{
    collections::BTreeSet,
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use orlop_proto::core::v1::Pod;

use super::{
    act::replicas,
    history::{self, check},
    pods::{Addresses, Processes, processes},
    recorder::{Recorder, summary},
};
use crate::{
    disk::FaultyDisk,
    lab::{Lab, pod_is_ready},
    workload::{client, finish, web},
};

/// The pods that faults may hit, and how many.
pub const PREY: &str = "app=prey";
/// See [`PREY`].
pub const PREY_COUNT: usize = 3;
/// Requests a second of the open loop.
const RATE: &str = "40";
/// A busy machine is given this long to be well again.
pub const RECOVERY: Duration = Duration::from_secs(120);

/// A measured time, beside what it should not be above.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Of what.
    pub what: String,
    /// How long it took.
    pub took: Duration,
    /// The bar, where there is one.
    pub bar: Option<Duration>,
}

impl Figure {
    /// That it is above its bar, in words; `None` when it is not.
    pub fn above_its_bar(&self) -> Option<String> {
        let bar = self.bar.filter(|bar| self.took > *bar)?;
        Some(format!("above its bar of {bar:?}: {} {:?}", self.what, self.took))
    }
}

/// Everything that is watched through one round.
pub struct Vigil<'lab> {
    pub(super) lab: &'lab Lab,
    pub(super) recorder: Recorder,
    /// The disk under the embedded store, when faults can hit it.
    pub(super) disk: Option<&'lab mut FaultyDisk>,
    /// Times that were measured.
    pub figures: Vec<Figure>,
    calm: Vec<Pod>,
    before: Processes,
    hold: Child,
    load: Child,
    addresses: Addresses,
}

/// Two ReplicaSets of two, one on each of the first two nodes, behind one service: no fault is aimed at them.
fn calm() -> String {
    let mut manifest = String::from(
        "apiVersion: v1\nkind: Service\nmetadata: {name: calm, namespace: default}\nspec:\n  selector: {app: calm}\n\
         \x20 ports:\n  - {name: http, port: 80, targetPort: 8080}\n",
    );
    for node in ["node1", "node2"] {
        manifest += &format!(
            "---\napiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {{name: calm-{node}, namespace: default}}\n\
             spec:\n  replicas: 2\n  selector: {{matchLabels: {{app: calm, on: {node}}}}}\n  template:\n\
             \x20   metadata: {{labels: {{app: calm, on: {node}}}}}\n    spec:\n\
             \x20     nodeSelector: {{kubernetes.io/hostname: {node}}}\n      containers:\n\
             \x20     - {{name: web, image: \"orlop.dev/fixture:1\", args: [web, \"8080\"]}}\n"
        );
    }
    manifest
}

impl<'lab> Vigil<'lab> {
    /// Brings the workload up and begins to write, to watch and to ask.
    pub fn begin(lab: &'lab Lab, disk: Option<&'lab mut FaultyDisk>, seed: u64, round: u64) -> Result<Self> {
        let namespace = format!("history-{round}");
        lab.client.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n---\n{}---\n{}{}",
            calm(),
            web("prey", u32::try_from(PREY_COUNT)?),
            client("client", "node1")
        ))?;
        let pods = lab.wait_for_pods("app=calm", 4)?;
        lab.wait_for_pods(PREY, PREY_COUNT)?;
        let client = lab.wait_for_pod("client")?;
        let address = lab.cluster_ip("calm")?;
        lab.wait_for_answers(&client, &["get", &address, "80", "40"], &pods)?;
        let mut calm = pods;
        calm.push(client.clone());
        let before = processes(lab, &calm)?;
        ensure!(before.len() >= 10, "a pod has a pause and a program: {before:?}");
        Ok(Self {
            recorder: Recorder::begin(&lab.members, &lab.spec.control_names(), &namespace, seed)?,
            hold: lab.begin(&client, &["hold", &address, "80", "stdin"])?,
            load: lab.begin(&client, &["load", &address, "80", RATE, "stdin"])?,
            lab,
            disk,
            figures: Vec::new(),
            calm,
            before,
            addresses: Addresses::default(),
        })
    }

    /// Notes a time.
    pub fn measured(&mut self, what: &str, took: Duration, bar: Option<Duration>) {
        println!("      {what}: {:.1} s", took.as_secs_f64());
        let what = what.to_owned();
        self.figures.push(Figure { what, took, bar });
    }

    /// Waits until the lab is well again after a fault, then looks at everything that can be looked at meanwhile.
    pub fn settle(&mut self) -> Result<()> {
        let since = Instant::now();
        self.wait("every control replica answers, and one leads", |lab| {
            replicas::all_answer(lab)?;
            replicas::leader(lab)
        })?;
        self.recorder.write_at_each()?;
        self.wait("all nodes are Ready", |lab| {
            let nodes: Vec<orlop_proto::core::v1::Node> = lab.client.list("", "")?;
            let untainted = |node: &&orlop_proto::core::v1::Node| {
                crate::lab::node_is_ready(node) && node.spec.as_ref().is_none_or(|spec| spec.taints.is_empty())
            };
            Ok((nodes.iter().filter(untainted).count() == usize::from(lab.spec.nodes)).then_some(()))
        })?;
        self.wait("all pods are Ready again", |lab| {
            let pods: Vec<Pod> = lab.client.list("default", "")?;
            let well = pods
                .iter()
                .all(|pod| pod_is_ready(pod) && !orlop_proto::Resource::is_deleting(pod));
            Ok((well && pods.len() == 5 + PREY_COUNT).then_some(()))
        })?;
        self.measured("well again after", since.elapsed(), None);
        ensure!(
            processes(self.lab, &self.calm)? == self.before,
            "a pod was restarted that no fault was aimed at"
        );
        for (child, what) in [
            (&mut self.hold, "the long connection"),
            (&mut self.load, "the open loop"),
        ] {
            if child.try_wait()?.is_some() {
                bail!("{what} has ended");
            }
        }
        Ok(())
    }

    /// As [`Lab::wait`], and looks at everybody's addresses meanwhile.
    pub(super) fn wait<T>(&mut self, what: &str, mut question: impl FnMut(&Lab) -> Result<Option<T>>) -> Result<T> {
        let (lab, addresses) = (self.lab, &mut self.addresses);
        lab.wait(what, RECOVERY, || {
            addresses.observe(&lab.client.list::<Pod>("", "")?);
            question(lab)
        })
    }

    /// Ends the vigil: everything that does not hold, in words.
    pub fn finish(self) -> Result<BTreeSet<String>> {
        ensure!(self.addresses.held() > 0, "no pod had an address");
        let mut violations = self.addresses.twice;
        match finish(self.hold) {
            Ok(told) if told.starts_with("requests ") => println!("   the long connection: {}", told.trim()),
            other => drop(violations.insert(format!("the long connection was lost: {other:?}"))),
        }
        let load = finish(self.load).context("the open loop")?;
        println!("   the open loop: {}", load.trim());
        if !load.trim().ends_with(" lost 0") {
            violations.insert(format!("requests were lost: {}", load.trim()));
        }
        let history = self.recorder.finish()?;
        println!("   {}", summary(&history));
        let kept = self.lab.spec.directory.join("history.txt");
        let found = check(&history);
        if !found.is_empty() {
            std::fs::write(&kept, format!("{history:#?}")).context("keeping the history")?;
        }
        violations.extend(found.iter().map(history::Violation::to_string));
        Ok(violations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_above_its_bar_is_found() {
        let figure = |seconds, bar: Option<u64>| Figure {
            what: "a node was NotReady after".to_owned(),
            took: Duration::from_secs(seconds),
            bar: bar.map(Duration::from_secs),
        };
        assert_eq!(figure(20, Some(20)).above_its_bar(), None);
        assert_eq!(figure(900, None).above_its_bar(), None);
        let told = figure(21, Some(20)).above_its_bar();
        assert_eq!(
            told.as_deref(),
            Some("above its bar of 20s: a node was NotReady after 21s")
        );
    }
}
