//! The decision: filter, score, choose. Pure.

use std::{collections::BTreeMap, fmt, sync::Arc};

use orlop_proto::{
    Resource as _,
    core::v1::{PodSpec, Taint},
};

use super::{
    affinity,
    resources::Resources,
    taints::{self, NO_EXECUTE, NO_SCHEDULE, PREFER_NO_SCHEDULE, UNSCHEDULABLE},
    view::{ClusterView, NodeInfo, PodInfo, unschedulable},
};

/// Below so many nodes all of them are looked at (kube-scheduler's figure).
const MIN_FEASIBLE: usize = 100;
/// At least so many percent of the nodes are looked at (kube-scheduler's figure).
const MIN_PERCENT: usize = 5;

/// kube-scheduler's weights; a score before weighting is 0 to 100.
const WEIGHT_TAINTS: i64 = 3;
const WEIGHT_AFFINITY: i64 = 2;
const WEIGHT_SPREAD: i64 = 2;

/// Where a pod goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// To this node.
    Bind(Arc<str>),
    /// Nowhere now, and why.
    Unschedulable(Diagnosis),
}

/// A decision and where the next one begins to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    /// The decision.
    pub decision: Decision,
    /// The rotation for the next pod.
    pub next_start: usize,
}

/// Why no node would do: how many nodes failed for which reason. Its text is kube-scheduler's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnosis {
    /// How many nodes there are.
    pub nodes: usize,
    unschedulable: usize,
    affinity: usize,
    taints: BTreeMap<(String, String), usize>,
    cpu: usize,
    memory: usize,
    ephemeral_storage: usize,
    pods: usize,
}

/// Why one node would not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misfit<'a> {
    /// It is cordoned.
    Unschedulable,
    /// It has a taint that the pod does not tolerate.
    Taint(&'a Taint),
    /// The pod's selector or affinity excludes it.
    Affinity,
    /// It has too little left.
    Resources(Shortage),
}

/// Which resources a node lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shortage {
    cpu: bool,
    memory: bool,
    ephemeral_storage: bool,
    pods: bool,
}

/// Decides where a pod goes. `start` rotates over the nodes so that sampling is fair: pass the last
/// [`Scheduled::next_start`].
pub fn schedule(view: &ClusterView, pod: &PodInfo, start: usize) -> Scheduled {
    let nodes = view.nodes();
    let Some(spec) = pod.pod.spec.as_ref() else {
        return Scheduled {
            decision: Decision::Unschedulable(Diagnosis::default()),
            next_start: start,
        };
    };
    let wanted = sample_size(nodes.len());
    let mut diagnosis = Diagnosis {
        nodes: nodes.len(),
        ..Diagnosis::default()
    };
    let mut candidates: Vec<Candidate<'_>> = Vec::with_capacity(wanted.min(nodes.len()));
    let mut looked_at = 0;
    for step in 0..nodes.len() {
        let info = &nodes[(start + step) % nodes.len()];
        looked_at += 1;
        match fits(info, pod, spec) {
            Ok(()) => candidates.push(Candidate::new(info, pod, spec)),
            Err(misfit) => diagnosis.count(misfit),
        }
        if candidates.len() >= wanted {
            break;
        }
    }
    let next_start = if nodes.is_empty() {
        0
    } else {
        (start + looked_at) % nodes.len()
    };
    let decision = match best(&candidates) {
        Some(info) => Decision::Bind(info.node.name().into()),
        None => Decision::Unschedulable(diagnosis),
    };
    Scheduled { decision, next_start }
}

/// Whether a pod may go to a node.
pub fn fits<'a>(info: &'a NodeInfo, pod: &PodInfo, spec: &PodSpec) -> Result<(), Misfit<'a>> {
    if unschedulable(&info.node) && !taints::tolerated(&spec.tolerations, &taints::taint(UNSCHEDULABLE, NO_SCHEDULE)) {
        return Err(Misfit::Unschedulable);
    }
    let refused = info.taints.iter().find(|taint| {
        (taint.effect == NO_SCHEDULE || taint.effect == NO_EXECUTE) && !taints::tolerated(&spec.tolerations, taint)
    });
    if let Some(taint) = refused {
        return Err(Misfit::Taint(taint));
    }
    if !affinity::allows(spec, &info.node) {
        return Err(Misfit::Affinity);
    }
    let shortage = shortage(&info.allocatable.minus(&info.requested), &pod.requests);
    if shortage == Shortage::default() {
        Ok(())
    } else {
        Err(Misfit::Resources(shortage))
    }
}

fn shortage(free: &Resources, asked: &Resources) -> Shortage {
    Shortage {
        cpu: asked.milli_cpu > 0 && asked.milli_cpu > free.milli_cpu,
        memory: asked.memory > 0 && asked.memory > free.memory,
        ephemeral_storage: asked.ephemeral_storage > 0 && asked.ephemeral_storage > free.ephemeral_storage,
        pods: asked.pods > free.pods,
    }
}

/// How many feasible nodes are enough, as kube-scheduler's default: all below 100, then 50 % less 1 % for each 125 nodes.
fn sample_size(nodes: usize) -> usize {
    if nodes < MIN_FEASIBLE {
        return nodes.max(1);
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(MIN_PERCENT);
    (nodes * percent / 100).max(MIN_FEASIBLE)
}

struct Candidate<'a> {
    info: &'a NodeInfo,
    /// Least allocated and balanced, 0 to 200.
    resources: i64,
    preference: i64,
    disliked: i64,
    members: i64,
}

impl<'a> Candidate<'a> {
    fn new(info: &'a NodeInfo, pod: &PodInfo, spec: &PodSpec) -> Self {
        let disliked = info
            .taints
            .iter()
            .filter(|taint| taint.effect == PREFER_NO_SCHEDULE && !taints::tolerated(&spec.tolerations, taint))
            .count();
        Self {
            info,
            resources: resource_score(&info.allocatable, &info.assumed.plus(&pod.assumed)),
            preference: affinity::preference(spec, &info.node),
            disliked: i64::try_from(disliked).unwrap_or(i64::MAX),
            members: info.members(pod.group),
        }
    }
}

/// How free (0 to 100) and how evenly used (0 to 100) the node would be.
fn resource_score(allocatable: &Resources, used: &Resources) -> i64 {
    let cpu = permille(used.milli_cpu, allocatable.milli_cpu);
    let memory = permille(used.memory, allocatable.memory);
    let least = ((1000 - cpu) + (1000 - memory)) / 20;
    let balanced = 100 - (cpu - memory).abs() / 20;
    least + balanced
}

fn permille(used: i64, total: i64) -> i64 {
    if total <= 0 {
        return 1000;
    }
    // Exact up to 8 PiB.
    (used.max(0).saturating_mul(1000) / total).min(1000)
}

fn best<'a>(candidates: &[Candidate<'a>]) -> Option<&'a NodeInfo> {
    let most_preferred = candidates.iter().map(|candidate| candidate.preference).max()?.max(1);
    let most_disliked = candidates.iter().map(|candidate| candidate.disliked).max()?.max(1);
    let most = candidates.iter().map(|candidate| candidate.members).max()?;
    let fewest = candidates.iter().map(|candidate| candidate.members).min()?;
    let range = (most - fewest).max(1);
    let mut best: Option<(i64, &NodeInfo)> = None;
    for candidate in candidates {
        let score = candidate.resources
            + WEIGHT_AFFINITY * (100 * candidate.preference / most_preferred)
            + WEIGHT_TAINTS * (100 - 100 * candidate.disliked / most_disliked)
            + WEIGHT_SPREAD * (100 * (most - candidate.members) / range);
        if best.is_none_or(|(highest, _)| score > highest) {
            best = Some((score, candidate.info));
        }
    }
    best.map(|(_, info)| info)
}

impl Diagnosis {
    fn count(&mut self, misfit: Misfit<'_>) {
        match misfit {
            Misfit::Unschedulable => self.unschedulable += 1,
            Misfit::Affinity => self.affinity += 1,
            Misfit::Taint(taint) => {
                *self.taints.entry((taint.key.clone(), taint.value.clone())).or_default() += 1;
            }
            Misfit::Resources(shortage) => {
                self.cpu += usize::from(shortage.cpu);
                self.memory += usize::from(shortage.memory);
                self.ephemeral_storage += usize::from(shortage.ephemeral_storage);
                self.pods += usize::from(shortage.pods);
            }
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nodes == 0 {
            return formatter.write_str("no nodes available to schedule pods");
        }
        let mut reasons: Vec<String> = [
            (self.unschedulable, "node(s) were unschedulable"),
            (self.affinity, "node(s) didn't match Pod's node affinity/selector"),
            (self.cpu, "Insufficient cpu"),
            (self.memory, "Insufficient memory"),
            (self.ephemeral_storage, "Insufficient ephemeral-storage"),
            (self.pods, "Too many pods"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, reason)| format!("{count} {reason}"))
        .collect();
        for ((key, value), count) in &self.taints {
            reasons.push(format!("{count} node(s) had untolerated taint {{{key}: {value}}}"));
        }
        reasons.sort();
        write!(
            formatter,
            "0/{} nodes are available: {}.",
            self.nodes,
            reasons.join(", ")
        )
    }
}
