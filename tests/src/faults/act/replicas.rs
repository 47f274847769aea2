//! Control's replicas: that all of them answer, that one leads, and what happens when that one is lost.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context, Result, ensure};
use orlop_proto::{Resource, core::v1::Pod};

use super::{RECOVERY, Vigil, halt::ready_since, replica_of};
use crate::{
    client::Client,
    faults::plan::Loss,
    lab::{Lab, pod_is_ready},
    supervisor::Request,
    workload::servers,
};

/// The pods that a leader is lost over, and how many.
const BURST: &str = "burst";
/// See [`BURST`].
const BURST_COUNT: usize = 3;
/// Writes that the store refused because their leader had lost its claim: a counter of each replica.
const REFUSED: &str = "orlop_control_fenced_writes_total";

/// How often each replica's service was started.
pub(in crate::faults) fn starts(lab: &Lab) -> Result<BTreeMap<String, u32>> {
    let services = lab.services()?.into_iter();
    let controls = services.filter(|service| replica_of(&service.name).is_some());
    Ok(controls.map(|service| (service.name, service.starts)).collect())
}

/// Waits until these services were started again, and all replicas answer.
pub(in crate::faults) fn wait_for_starts(lab: &Lab, before: &BTreeMap<String, u32>) -> Result<()> {
    lab.wait("control is started again and answers", RECOVERY, || {
        let now = starts(lab)?;
        let again = before.iter().all(|(service, starts)| now.get(service) > Some(starts));
        again.then(|| all_answer(lab)).transpose()
    })
}

/// Asks every replica for something that needs the store.
pub(in crate::faults) fn all_answer(lab: &Lab) -> Result<()> {
    for replica in lab.spec.control_names() {
        let client = Client::connect_to(&lab.members, &replica)?;
        client.ready().with_context(|| format!("asking {replica}"))?;
    }
    Ok(())
}

/// The replica that leads, as all of them see it; `None` when there are several, or none, for now. One alone always does.
pub(in crate::faults) fn leader(lab: &Lab) -> Result<Option<String>> {
    match lab.spec.control_names() {
        replicas if replicas.len() > 1 => leader_among(lab, &replicas),
        replicas => Ok(replicas.into_iter().next()),
    }
}

/// The one of these replicas that says that it leads.
fn leader_among(lab: &Lab, replicas: &[String]) -> Result<Option<String>> {
    let mut leaders = Vec::new();
    for replica in replicas {
        if lab.metric(replica, "orlop_control_leader")? == 1 {
            leaders.push(replica.clone());
        }
    }
    Ok((leaders.len() == 1).then(|| leaders.remove(0)))
}

impl Vigil<'_> {
    /// Loses the leader in the middle of work until another one has taken its place and done the work; then the lost one goes on.
    /// What it writes late is refused, nothing was done twice, and no node was given up for it.
    pub(super) fn lose_leader(&mut self, loss: &Loss) -> Result<()> {
        let lab = self.lab;
        let lost = lab.wait("one replica leads", RECOVERY, || leader(lab))?;
        let mut others = lab.spec.control_names();
        others.retain(|replica| *replica != lost);
        println!("      {lost} leads");
        let other = Client::connect_to(&lab.members, others.first().context("another replica")?)?;
        let (nodes, begun, refused) = (ready_since(lab)?, other.revision()?, lab.metric(&lost, REFUSED)?);
        other.apply(&servers(BURST, u32::try_from(BURST_COUNT)?))?;
        match loss {
            Loss::Killed => self.keep_killed(&format!("{lost}/control"), |vigil| vigil.another_leads(&others, &other)),
            Loss::Hung => self.hang(&[format!("{lost}/control")], |vigil| {
                vigil.another_leads(&others, &other)
            }),
            Loss::Cut(way) => self.cut(&lost, *way, |vigil, _| vigil.another_leads(&others, &other)),
        }?;
        if *loss == Loss::Hung {
            self.wait("the late write of a leader that hung is refused", |lab| {
                Ok((lab.metric(&lost, REFUSED)? > refused).then_some(()))
            })?;
        }
        self.nothing_was_done_twice(begun)?;
        lab.client.delete("replicasets", "default", BURST, None)?;
        self.wait("the pods that a leader was lost over are gone", |lab| {
            Ok(burst(&lab.client)?.is_empty().then_some(()))
        })?;
        let now = ready_since(lab)?;
        ensure!(
            now == nodes,
            "a node was not Ready when {lost} was lost: {nodes:?}, now {now:?}"
        );
        Ok(())
    }

    /// Kills a service, which is started again in the end only: a leader that is back at once goes on with its own claim.
    fn keep_killed(&mut self, service: &str, meanwhile: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.lab.request(&Request::Kill(service.to_owned()))?;
        let outcome = meanwhile(self);
        self.lab.resume(service)?;
        outcome
    }

    /// Waits until one of the other replicas leads, has done what the lost one was to do, and writes go on.
    fn another_leads(&mut self, others: &[String], other: &Client) -> Result<()> {
        let (lab, since) = (self.lab, Instant::now());
        let next = lab.wait("another replica leads", RECOVERY, || leader_among(lab, others))?;
        self.measured(&format!("{next} led after"), since.elapsed(), None);
        lab.wait("the next leader ends what the lost one began", RECOVERY, || {
            let pods = burst(other)?;
            Ok((pods.len() == BURST_COUNT && pods.iter().all(pod_is_ready)).then_some(()))
        })?;
        self.measured(
            "the pods that were to be made then were ready after",
            since.elapsed(),
            None,
        );
        self.recorder.wait_for_writes().map(drop)
    }

    /// As many pods were made as were asked for, and none went: so it is told by every replica.
    fn nothing_was_done_twice(&mut self, begun: u64) -> Result<()> {
        let lab = self.lab;
        lab.wait("every replica answers", RECOVERY, || all_answer(lab).map(Some))?;
        let pods = burst(&lab.client)?;
        let versions = pods.iter().filter_map(|pod| pod.meta().resource_version.parse().ok());
        let until: u64 = versions.max().context("there are pods")?;
        for replica in lab.spec.control_names() {
            let client = Client::connect_to(&lab.members, &replica)?;
            let mut history = client.history("pods", begun, until)?;
            history.retain(|(_, name, _)| name.starts_with(BURST));
            let count = |wanted: &str| history.iter().filter(|(what, _, _)| what == wanted).count();
            ensure!(
                count("ADDED") == BURST_COUNT && count("DELETED") == 0,
                "{BURST_COUNT} pods were asked for; {replica} tells of {} made and {} deleted: {history:?}",
                count("ADDED"),
                count("DELETED"),
            );
        }
        Ok(())
    }
}

fn burst(client: &Client) -> Result<Vec<Pod>> {
    client.list("default", &format!("app={BURST}"))
}
