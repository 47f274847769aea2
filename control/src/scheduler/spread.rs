//! Topology spread constraints, as kube-scheduler's PodTopologySpread evaluates them: required ones filter nodes, the others score them.
//!
//! A pod without constraints of its own is spread with its group over nodes and zones.

use std::{
    borrow::Cow,
    sync::{Arc, LazyLock},
};

use orlop_proto::{
    Resource as _,
    core::v1::{Pod, TopologySpreadConstraint},
    meta::v1::LabelSelector,
};

use super::{
    affinity::RequiredAffinity,
    likeness::{Counted, Likeness, group},
    node_sets::{NO_DOMAIN, NodeSet, Numbers, SetKey, Slot, Topology},
    taints::Tolerations,
    tally::Tally,
    view::ClusterView,
};
use crate::model::{
    selector::Selector,
    topology_spread::{DO_NOT_SCHEDULE, HONOR, IGNORE, SCHEDULE_ANYWAY},
};

/// The label whose values are machines: such a domain is one node.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// The label whose values are zones.
const ZONE: &str = "topology.kubernetes.io/zone";
/// What a score is at most.
const MOST: i64 = 100;

/// Nodes and zones, also of nodes that are in no zone.
static DEFAULT: LazyLock<SetKey> = LazyLock::new(|| SetKey {
    topologies: Arc::new([Topology::Node, Topology::Label(ZONE.into())]),
    labelled: false,
    affinity: None,
    tolerations: None,
});

/// How a pod is to be spread, computed once.
#[derive(Debug, Clone, Default)]
pub struct Spread {
    required: Vec<Rule>,
    preferred: Vec<Rule>,
    /// With which pods it is spread when it has no constraints.
    group: Option<Counted>,
}

#[derive(Debug, Clone)]
struct Rule {
    max_skew: i32,
    min_domains: usize,
    is_hostname: bool,
    /// `None`: nothing is counted.
    counted: Option<Counted>,
    /// Whether the pod will be counted itself.
    counts_itself: bool,
    nodes: SetKey,
    topology: usize,
}

impl Spread {
    /// Of a pod, with its node affinity.
    pub fn of(pod: &Pod, affinity: Option<&Arc<RequiredAffinity>>) -> Self {
        let constraints = pod
            .spec
            .as_ref()
            .map_or(&[][..], |spec| &spec.topology_spread_constraints);
        if constraints.is_empty() {
            return Self {
                group: group(pod).map(Counted::Group),
                ..Self::default()
            };
        }
        Self {
            required: rules(pod, constraints, DO_NOT_SCHEDULE, affinity),
            preferred: rules(pod, constraints, SCHEDULE_ANYWAY, affinity),
            group: None,
        }
    }

    /// Whether nodes are excluded by it.
    pub fn is_required(&self) -> bool {
        !self.required.is_empty()
    }

    /// Whether it has preferences of its own.
    pub fn is_preferred(&self) -> bool {
        !self.preferred.is_empty()
    }

    /// Whether pods like this one count in what is required.
    pub fn counts(&self, pods: &Likeness) -> bool {
        let counted = self.required.iter().filter_map(|rule| rule.counted.as_ref());
        counted.into_iter().any(|counted| pods.is_counted(counted))
    }

    /// Lets the view count from now on what this asks for.
    pub fn keep(&self, view: &mut ClusterView) {
        for rule in self.required.iter().chain(&self.preferred) {
            match &rule.counted {
                Some(counted) => view.keep_tally(counted, &rule.nodes, rule.topology),
                None => view.keep_set(&rule.nodes),
            }
        }
        if let Some(group) = &self.group {
            for topology in 0..DEFAULT.topologies.len() {
                view.keep_tally(group, &DEFAULT, topology);
            }
        }
    }
}

fn rules(
    pod: &Pod,
    constraints: &[TopologySpreadConstraint],
    action: &str,
    affinity: Option<&Arc<RequiredAffinity>>,
) -> Vec<Rule> {
    let constraints: Vec<_> = constraints
        .iter()
        .filter(|one| one.when_unsatisfiable == action)
        .collect();
    let topologies: Arc<[Topology]> = constraints
        .iter()
        .map(|one| Topology::Label(one.topology_key.as_str().into()))
        .collect();
    let namespace: Arc<str> = pod.namespace().into();
    let tolerations = constraints
        .iter()
        .any(|one| one.node_taints_policy == HONOR)
        .then(|| Arc::new(Tolerations::of(pod)));
    let rule = |(topology, one): (usize, &&TopologySpreadConstraint)| {
        let selector = selector(one.label_selector.as_ref());
        Rule {
            max_skew: one.max_skew,
            min_domains: usize::try_from(one.min_domains.unwrap_or(1)).unwrap_or(1),
            is_hostname: one.topology_key == HOSTNAME,
            counts_itself: selector.matches(&pod.meta().labels),
            // A selector of everything counts nothing, as in Kubernetes.
            counted: (!selector.is_nothing() && !selector.is_everything())
                .then(|| Counted::Selected(namespace.clone(), Arc::new(selector))),
            nodes: SetKey {
                topologies: topologies.clone(),
                labelled: true,
                affinity: affinity.filter(|_| one.node_affinity_policy != IGNORE).cloned(),
                tolerations: tolerations.clone().filter(|_| one.node_taints_policy == HONOR),
            },
            topology,
        }
    };
    constraints.iter().enumerate().map(rule).collect()
}

/// What cannot be read (validation has refused it) selects nothing.
fn selector(message: Option<&LabelSelector>) -> Selector {
    Selector::from_message(message).unwrap_or_else(|_| Selector::nothing())
}

/// Why a node does not satisfy a constraint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpreadMisfit {
    /// It has no label of that key.
    Label,
    /// Its domain would have too many pods.
    Skew,
}

/// What a pod requires, with the counts as they are: ready to be asked of nodes.
pub struct Limits<'a> {
    rules: Vec<Limit<'a>>,
}

struct Limit<'a> {
    nodes: Cow<'a, NodeSet>,
    topology: usize,
    tally: Option<Cow<'a, Tally>>,
    /// A domain may have so many pods before this one comes.
    most: i64,
}

impl<'a> Limits<'a> {
    /// Of a pod.
    pub fn of(spread: &Spread, view: &'a ClusterView) -> Self {
        let limit = |rule: &Rule| {
            let nodes = view.node_set(&rule.nodes);
            let tally = rule
                .counted
                .as_ref()
                .map(|counted| view.tally(counted, &rule.nodes, &nodes, rule.topology));
            let domains = nodes.len(rule.topology);
            let fewest = tally
                .as_ref()
                .filter(|_| domains >= rule.min_domains)
                .map_or(0, |tally| tally.fewest(domains));
            Limit {
                topology: rule.topology,
                most: i64::from(rule.max_skew) + i64::from(fewest) - i64::from(rule.counts_itself),
                nodes,
                tally,
            }
        };
        Self {
            rules: spread.required.iter().map(limit).collect(),
        }
    }

    /// Whether a node is good enough.
    pub fn check(&self, slot: Slot) -> Result<(), SpreadMisfit> {
        for limit in &self.rules {
            let domain = limit.nodes.domain(slot, limit.topology);
            if domain == NO_DOMAIN {
                return Err(SpreadMisfit::Label);
            }
            let pods = limit.tally.as_ref().map_or(0, |tally| tally.pods(domain));
            if i64::from(pods) > limit.most {
                return Err(SpreadMisfit::Skew);
            }
        }
        Ok(())
    }
}

/// How well nodes would spread a pod, each 0 to 100.
pub fn scores(spread: &Spread, view: &ClusterView, slots: &[Slot]) -> Vec<i64> {
    if let Some(group) = &spread.group {
        return default_scores(group, view, slots);
    }
    if spread.preferred.is_empty() {
        return vec![0; slots.len()];
    }
    let mut sums: Vec<Option<f64>> = vec![Some(0.0); slots.len()];
    for rule in &spread.preferred {
        let nodes = view.node_set(&rule.nodes);
        let tally = rule
            .counted
            .as_ref()
            .map(|counted| view.tally(counted, &rule.nodes, &nodes, rule.topology));
        // A node without a label of any of them is not scored.
        let scored = |slot: Slot| (0..spread.preferred.len()).all(|topology| nodes.domain(slot, topology) != NO_DOMAIN);
        let size = if rule.is_hostname {
            slots.iter().filter(|slot| scored(**slot)).count()
        } else {
            let found: Numbers<_> = slots
                .iter()
                .filter(|slot| scored(**slot))
                .map(|slot| nodes.domain(*slot, rule.topology))
                .collect();
            found.len()
        };
        let weight = weight(size);
        for (slot, sum) in slots.iter().zip(&mut sums) {
            let pods = tally
                .as_ref()
                .map_or(0, |tally| tally.pods(nodes.domain(*slot, rule.topology)));
            *sum = sum
                .filter(|_| scored(*slot))
                .map(|sum| sum + (f64::from(pods) * weight + f64::from(rule.max_skew - 1)));
        }
    }
    normalize(&sums)
}

/// What a domain's pods weigh: those of few domains are not to be watered down by many.
fn weight(domains: usize) -> f64 {
    (f64::from(u32::try_from(domains).unwrap_or(u32::MAX)) + 2.0).ln()
}

/// kube-scheduler's: the fewest pods give the most; a node that is not scored has nothing.
fn normalize(sums: &[Option<f64>]) -> Vec<i64> {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "a sum over at most 64 constraints of counts of pods"
    )]
    let whole: Vec<Option<i64>> = sums.iter().map(|sum| sum.map(|sum| sum.round() as i64)).collect();
    let most = whole.iter().flatten().max().copied().unwrap_or(0);
    let fewest = whole.iter().flatten().min().copied().unwrap_or(0);
    let score = |sum: &Option<i64>| match sum {
        None => 0,
        Some(_) if most == 0 => MOST,
        Some(sum) => MOST * (most + fewest - sum) / most,
    };
    whole.iter().map(score).collect()
}

/// With kube-scheduler's weights of nodes and zones; but the range of the sums is the range of the scores, so that replicas are
/// apart however many there are.
fn default_scores(group: &Counted, view: &ClusterView, slots: &[Slot]) -> Vec<i64> {
    let nodes = view.node_set(&DEFAULT);
    let tallies: Vec<_> = (0..DEFAULT.topologies.len())
        .map(|topology| view.tally(group, &DEFAULT, &nodes, topology))
        .collect();
    let zones: Numbers<_> = slots.iter().map(|slot| nodes.domain(*slot, 1)).collect();
    let weights = [weight(slots.len()), weight(zones.len())];
    let sums: Vec<f64> = slots
        .iter()
        .map(|slot| {
            tallies
                .iter()
                .zip(weights)
                .enumerate()
                .map(|(topology, (tally, weight))| f64::from(tally.pods(nodes.domain(*slot, topology))) * weight)
                .sum()
        })
        .collect();
    let most = sums.iter().copied().fold(0.0, f64::max);
    let fewest = sums.iter().copied().fold(f64::INFINITY, f64::min);
    let range = if most > fewest { most - fewest } else { 1.0 };
    #[allow(clippy::cast_possible_truncation, reason = "0 to 100")]
    sums.iter().map(|sum| (100.0 * (most - sum) / range) as i64).collect()
}
