//! The decision: filter, score, choose. Pure.

use std::{collections::BTreeMap, fmt, sync::Arc};

use orlop_proto::core::v1::{PodSpec, Taint};

use super::{
    affinity,
    node_sets::Slot,
    resources::Resources,
    spread::{self, Limits, SpreadMisfit},
    taints::{self, PREFER_NO_SCHEDULE},
    view::{ClusterView, NodeInfo, PodInfo},
};

/// So many nodes that would do are compared, of all that there are (kube-scheduler's figure for small clusters).
const FEASIBLE: usize = 100;
/// Where a pod prefers some nodes to others, at least so many percent of the nodes (kube-scheduler's figure).
const MIN_PERCENT: usize = 5;
/// The golden section in thousandths: how far from one node the next one to look at is. Neighbours in the order of nodes are often of one
/// zone or rack, so they are not looked at together.
const STRIDE: usize = 618;

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
    spread: usize,
    spread_label: usize,
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
    /// The pods would be spread too unevenly.
    Spread(SpreadMisfit),
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
    let order = view.order();
    let Some(spec) = pod.pod.spec.as_ref() else {
        return Scheduled {
            decision: Decision::Unschedulable(Diagnosis::default()),
            next_start: start,
        };
    };
    let wanted = sample_size(order.len(), has_preferences(pod, spec));
    let allowed = pod.allowed.as_ref().map(|key| view.node_set(key));
    let limits = Limits::of(&pod.spread, view);
    let mut diagnosis = Diagnosis {
        nodes: order.len(),
        ..Diagnosis::default()
    };
    let mut candidates: Vec<Candidate> = Vec::with_capacity(wanted.min(order.len()));
    let mut looked_at = 0;
    let stride = stride(order.len());
    for step in 0..order.len() {
        let slot = order[(start + step) % order.len() * stride % order.len()];
        let Some(info) = view.at(slot) else { continue };
        looked_at += 1;
        let is_allowed = || allowed.as_ref().is_none_or(|allowed| allowed.contains(slot));
        let fits = check(info, pod, spec, is_allowed).and_then(|()| limits.check(slot).map_err(Misfit::Spread));
        match fits {
            Ok(()) => candidates.push(Candidate::new(slot, info, pod, spec)),
            Err(misfit) => diagnosis.count(misfit),
        }
        if candidates.len() >= wanted {
            break;
        }
    }
    let next_start = if order.is_empty() {
        0
    } else {
        (start + looked_at) % order.len()
    };
    let decision = match best(view, pod, &candidates) {
        Some(slot) => Decision::Bind(view.name(slot)),
        None => Decision::Unschedulable(diagnosis),
    };
    Scheduled { decision, next_start }
}

/// Whether a pod may go to a node, but for what other nodes have a say in: its spread.
pub fn fits<'a>(info: &'a NodeInfo, pod: &PodInfo, spec: &PodSpec) -> Result<(), Misfit<'a>> {
    check(info, pod, spec, || affinity::allows(spec, &info.named))
}

fn check<'a>(
    info: &'a NodeInfo,
    pod: &PodInfo,
    spec: &PodSpec,
    is_allowed: impl FnOnce() -> bool,
) -> Result<(), Misfit<'a>> {
    if !info.is_open_to(&spec.tolerations) {
        return Err(Misfit::Unschedulable);
    }
    if let Some(taint) = info.refusing_taint(&spec.tolerations) {
        return Err(Misfit::Taint(taint));
    }
    if !is_allowed() {
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

/// Whether the pod itself says that it likes some nodes more than others.
fn has_preferences(pod: &PodInfo, spec: &PodSpec) -> bool {
    let affinity = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref());
    pod.spread.is_preferred()
        || affinity.is_some_and(|affinity| !affinity.preferred_during_scheduling_ignored_during_execution.is_empty())
}

/// How many feasible nodes are enough. For pods without preferences 100: of so many the best is among the best hundredth of all. For
/// others as kube-scheduler's default: 50 % less 1 % for each 125 nodes.
fn sample_size(nodes: usize, has_preferences: bool) -> usize {
    if nodes < FEASIBLE || !has_preferences {
        return FEASIBLE;
    }
    let percent = 50usize.saturating_sub(nodes / 125).max(MIN_PERCENT);
    (nodes * percent / 100).max(FEASIBLE)
}

/// A step that comes by all of so many nodes.
fn stride(nodes: usize) -> usize {
    let wanted = (nodes * STRIDE / 1000).max(1);
    (wanted..).find(|stride| gcd(*stride, nodes) == 1).unwrap_or(1)
}

fn gcd(left: usize, right: usize) -> usize {
    if right == 0 { left } else { gcd(right, left % right) }
}

struct Candidate {
    slot: Slot,
    /// Least allocated and balanced, 0 to 200.
    resources: i64,
    preference: i64,
    disliked: i64,
}

impl Candidate {
    fn new(slot: Slot, info: &NodeInfo, pod: &PodInfo, spec: &PodSpec) -> Self {
        let disliked = info
            .taints
            .iter()
            .filter(|taint| taint.effect == PREFER_NO_SCHEDULE && !taints::tolerated(&spec.tolerations, taint))
            .count();
        Self {
            slot,
            resources: resource_score(&info.allocatable, &info.assumed.plus(&pod.assumed)),
            preference: affinity::preference(spec, &info.named),
            disliked: i64::try_from(disliked).unwrap_or(i64::MAX),
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

fn best(view: &ClusterView, pod: &PodInfo, candidates: &[Candidate]) -> Option<Slot> {
    let most_preferred = candidates.iter().map(|candidate| candidate.preference).max()?.max(1);
    let most_disliked = candidates.iter().map(|candidate| candidate.disliked).max()?.max(1);
    let slots: Vec<Slot> = candidates.iter().map(|candidate| candidate.slot).collect();
    let spread = spread::scores(&pod.spread, view, &slots);
    let mut best: Option<(i64, Slot)> = None;
    for (candidate, spread) in candidates.iter().zip(spread) {
        let score = candidate.resources
            + WEIGHT_AFFINITY * (100 * candidate.preference / most_preferred)
            + WEIGHT_TAINTS * (100 - 100 * candidate.disliked / most_disliked)
            + WEIGHT_SPREAD * spread;
        if best.is_none_or(|(highest, _)| score > highest) {
            best = Some((score, candidate.slot));
        }
    }
    best.map(|(_, slot)| slot)
}

impl Diagnosis {
    fn count(&mut self, misfit: Misfit<'_>) {
        match misfit {
            Misfit::Unschedulable => self.unschedulable += 1,
            Misfit::Affinity => self.affinity += 1,
            Misfit::Spread(SpreadMisfit::Skew) => self.spread += 1,
            Misfit::Spread(SpreadMisfit::Label) => self.spread_label += 1,
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
            (self.spread, "node(s) didn't match pod topology spread constraints"),
            (
                self.spread_label,
                "node(s) didn't match pod topology spread constraints (missing required label)",
            ),
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
