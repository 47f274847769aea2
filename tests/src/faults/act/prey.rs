//! The pods that faults may hit: whom a fault is aimed at, and that it leaves the others alone.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use orlop_proto::{
    Resource,
    apps::v1::ReplicaSet,
    core::v1::{Affinity, NodeAffinity, NodeSelectorRequirement, NodeSelectorTerm, Pod, PreferredSchedulingTerm},
};

use super::Vigil;
use crate::{
    faults::{
        plan::{Fault, Part},
        pods::{Processes, node_of, processes},
        vigil::PREY,
    },
    lab::{Lab, pod_is_ready},
};

/// The pods that a fault is not to touch, of those that may be hit, and their processes before it.
pub(super) struct Spared(Vec<(Pod, Processes)>);

impl Spared {
    /// None of their processes has ended or begun.
    pub fn check(&self, lab: &Lab) -> Result<()> {
        for (pod, before) in &self.0 {
            let (name, node) = (pod.name(), node_of(pod));
            let now = processes(lab, std::slice::from_ref(pod)).with_context(|| format!("looking at {name}"))?;
            ensure!(
                now == *before,
                "pod {name} on {node}, at which the fault was not aimed, was restarted: {before:?}, now {now:?}"
            );
        }
        Ok(())
    }
}

impl Vigil<'_> {
    /// Sees to it that a fault hits somebody, and notes who has to come through it unharmed.
    pub(super) fn aim(&mut self, fault: &Fault) -> Result<Spared> {
        let struck: BTreeSet<String> = match fault {
            Fault::Kill(Part::Shim(node)) => [self.prey_on(node)?.uid().to_owned()].into(),
            Fault::Hang(Part::Shim(node), _) => self.prey_on(node).map(|_| BTreeSet::new())?,
            Fault::CutUntilReplaced(node, _) | Fault::Reboot(node) => {
                self.prey_on(node)?;
                prey_of(self.lab, node)?
                    .iter()
                    .map(|pod| pod.uid().to_owned())
                    .collect()
            }
            _ => BTreeSet::new(),
        };
        let mut spared = Vec::new();
        for pod in self.lab.client.list::<Pod>("default", PREY)? {
            if !struck.contains(pod.uid()) {
                let own = processes(self.lab, std::slice::from_ref(&pod))?;
                ensure!(own.len() >= 2, "{} has a pause and a program: {own:?}", pod.name());
                spared.push((pod, own));
            }
        }
        Ok(Spared(spared))
    }

    /// A pod that may be hit, on a node. An evicted pod's successor does not come back by itself: where none is, one is made to.
    pub(super) fn prey_on(&mut self, node: &str) -> Result<Pod> {
        if let Some(pod) = prey_of(self.lab, node)?.into_iter().next() {
            return Ok(pod);
        }
        self.wait("new pods that may be hit prefer a node", |lab| {
            let set: Option<ReplicaSet> = lab.client.get("default", "prey")?;
            let mut set = set.context("the ReplicaSet of the pods that may be hit is gone")?;
            let template = set.spec.as_mut().and_then(|spec| spec.template.as_mut());
            let pod = template.and_then(|template| template.spec.as_mut());
            pod.context("a ReplicaSet has a template")?.affinity = Some(preferring(node));
            lab.client.update(set).map(Some)
        })?;
        let pods: Vec<Pod> = self.lab.client.list("default", PREY)?;
        let other = pods.first().context("a pod that may be hit")?;
        self.lab.client.delete("pods", "default", other.name(), Some(1))?;
        self.wait(
            "one of the pods that may be hit is on the node that they prefer",
            |lab| Ok((!prey_of(lab, node)?.is_empty()).then_some(())),
        )?;
        self.settle()?;
        let came = prey_of(self.lab, node)?.into_iter().next();
        came.with_context(|| format!("no pod that may be hit is on {node}"))
    }
}

/// The ready pods that may be hit, on a node.
pub(super) fn prey_of(lab: &Lab, node: &str) -> Result<Vec<Pod>> {
    let mut pods: Vec<Pod> = lab.client.list("default", PREY)?;
    pods.retain(|pod| node_of(pod) == node && pod_is_ready(pod) && !pod.is_deleting());
    Ok(pods)
}

fn preferring(node: &str) -> Affinity {
    let term = PreferredSchedulingTerm {
        weight: 100,
        preference: Some(NodeSelectorTerm {
            match_expressions: vec![NodeSelectorRequirement {
                key: "kubernetes.io/hostname".to_owned(),
                operator: "In".to_owned(),
                values: vec![node.to_owned()],
            }],
            ..NodeSelectorTerm::default()
        }),
    };
    Affinity {
        node_affinity: Some(NodeAffinity {
            preferred_during_scheduling_ignored_during_execution: vec![term],
            ..NodeAffinity::default()
        }),
    }
}
