//! What conditions and taints a node should have. Pure.

use std::time::Duration;

use orlop_proto::core::v1::{Node, NodeCondition, Taint};
use prost_types::Timestamp;
use tokio::time::Instant;

use super::{LifecycleConfig, monitor::ready_condition};
use crate::scheduler::taints::{NO_EXECUTE, NO_SCHEDULE, NOT_READY, UNREACHABLE, UNSCHEDULABLE};

/// What a node that is not heard of cannot say any more.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// Conditions that keep new pods away while they are True.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// The conditions of a node that has been silent too long; `None` when they are that already.
pub fn plan_conditions(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let mut conditions = node
        .status
        .as_ref()
        .map(|status| status.conditions.clone())
        .unwrap_or_default();
    let mut changed = false;
    for kind in REPORTED {
        match conditions.iter_mut().find(|condition| condition.r#type == kind) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                condition.status = "Unknown".into();
                condition.reason = "NodeStatusUnknown".into();
                condition.message = "Kubelet stopped posting node status.".into();
                condition.last_transition_time = Some(now);
                changed = true;
            }
            None => {
                conditions.push(NodeCondition {
                    r#type: kind.into(),
                    status: "Unknown".into(),
                    reason: "NodeStatusNeverUpdated".into(),
                    message: "Kubelet never posted node status.".into(),
                    last_heartbeat_time: None,
                    last_transition_time: Some(now),
                });
                changed = true;
            }
        }
    }
    changed.then_some(conditions)
}

/// Whether condition Ready is True.
pub(super) fn is_ready(node: &Node) -> bool {
    ready_condition(node).is_some_and(|condition| condition.status == "True")
}

/// Whether the node has the taint that evicts, for its own condition's sake.
pub(super) fn evicts(node: &Node) -> bool {
    let wanted = ready_taint(node);
    taints(node)
        .iter()
        .any(|taint| taint.effect == NO_EXECUTE && Some(taint.key.as_str()) == wanted)
}

/// Whether we, and not the node, have said what condition Ready is.
pub(super) fn is_unknown(node: &Node) -> bool {
    ready_condition(node).is_some_and(|condition| condition.status == "Unknown")
}

/// Whether the node has a taint that says that it is not ready.
pub(super) fn says_not_ready(node: &Node) -> bool {
    taints(node)
        .iter()
        .any(|taint| [NOT_READY, UNREACHABLE].contains(&taint.key.as_str()))
}

/// The taint key that condition Ready asks for.
fn ready_taint(node: &Node) -> Option<&'static str> {
    match ready_condition(node).map(|condition| condition.status.as_str()) {
        Some("True") => None,
        Some("Unknown") => Some(UNREACHABLE),
        _ => Some(NOT_READY),
    }
}

fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().map_or(&[], |spec| &spec.taints)
}

/// The node's taints as its conditions ask for; `None` when they are that already. With `may_evict` a node that is not ready also
/// gets the NoExecute taint; users' own taints stay.
pub fn plan_taints(node: &Node, may_evict: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    if let Some(key) = ready_taint(node) {
        wanted.push((key, NO_SCHEDULE));
        if may_evict {
            wanted.push((key, NO_EXECUTE));
        }
    }
    for (kind, key) in PRESSURES {
        let conditions = node.status.iter().flat_map(|status| &status.conditions);
        if conditions
            .into_iter()
            .any(|condition| condition.r#type == kind && condition.status == "True")
        {
            wanted.push((key, NO_SCHEDULE));
        }
    }
    if node.spec.as_ref().is_some_and(|spec| spec.unschedulable) {
        wanted.push((UNSCHEDULABLE, NO_SCHEDULE));
    }
    let is_wanted = |taint: &Taint| wanted.contains(&(taint.key.as_str(), taint.effect.as_str()));
    let mut result: Vec<Taint> = taints(node)
        .iter()
        .filter(|taint| !is_ours(taint) || is_wanted(taint))
        .cloned()
        .collect();
    for (key, effect) in &wanted {
        if !result.iter().any(|taint| taint.key == *key && taint.effect == *effect) {
            result.push(Taint {
                key: (*key).to_owned(),
                value: String::new(),
                effect: (*effect).to_owned(),
                time_added: Some(now),
            });
        }
    }
    (result != taints(node)).then_some(result)
}

fn is_ours(taint: &Taint) -> bool {
    match taint.effect.as_str() {
        NO_EXECUTE => taint.key == NOT_READY || taint.key == UNREACHABLE,
        NO_SCHEDULE => {
            [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&taint.key.as_str())
                || PRESSURES.iter().any(|(_, key)| taint.key == *key)
        }
        _ => false,
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disruption {
    /// Some nodes at most are not ready.
    Normal,
    /// Most nodes are not ready: rather something between them and us than all of them.
    Partial,
    /// No node is ready: there is nowhere to go, and the fault is likely ours.
    Full,
}

impl Disruption {
    /// As Kubernetes judges a zone.
    pub fn judge(ready: usize, not_ready: usize, config: &LifecycleConfig) -> Self {
        if ready == 0 && not_ready > 0 {
            Self::Full
        } else if not_ready > 2 && not_ready * 100 >= config.outage_percent * (ready + not_ready) {
            Self::Partial
        } else {
            Self::Normal
        }
    }
}

/// A token bucket of one token, or of a second's: how fast nodes may get the taint that evicts.
#[derive(Debug)]
pub struct EvictionLimiter {
    tokens: f64,
    last: Option<Instant>,
}

impl Default for EvictionLimiter {
    fn default() -> Self {
        Self {
            tokens: 1.0,
            last: None,
        }
    }
}

impl EvictionLimiter {
    /// Refills for the time since the last call.
    pub fn refill(&mut self, disruption: Disruption, nodes: usize, config: &LifecycleConfig, now: Instant) {
        let rate = match disruption {
            Disruption::Normal => config.eviction_rate,
            Disruption::Partial if nodes > config.large_cluster => config.outage_eviction_rate,
            Disruption::Partial | Disruption::Full => 0.0,
        };
        let passed = self.last.map_or(Duration::ZERO, |last| now.duration_since(last));
        self.last = Some(now);
        self.tokens = if rate > 0.0 {
            (self.tokens + passed.as_secs_f64() * rate).min(rate.max(1.0))
        } else {
            0.0
        };
    }

    /// Takes a token if there is one.
    pub fn take(&mut self) -> bool {
        // Many small refills may sum up to a little less than a token.
        let may = self.tokens > 1.0 - 1e-6;
        if may {
            self.tokens = (self.tokens - 1.0).max(0.0);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::core::v1::{NodeSpec, NodeStatus};

    fn at(seconds: i64) -> Timestamp {
        Timestamp { seconds, nanos: 0 }
    }

    fn node(ready: &str) -> Node {
        let condition = |kind: &str, status: &str| NodeCondition {
            r#type: kind.into(),
            status: status.into(),
            ..NodeCondition::default()
        };
        Node {
            spec: Some(NodeSpec::default()),
            status: Some(NodeStatus {
                conditions: vec![condition("Ready", ready), condition("DiskPressure", "False")],
                ..NodeStatus::default()
            }),
            ..Node::default()
        }
    }

    fn keys(taints: &[Taint]) -> Vec<(&str, &str)> {
        taints
            .iter()
            .map(|taint| (taint.key.as_str(), taint.effect.as_str()))
            .collect()
    }

    #[test]
    fn silence_makes_everything_unknown_once() {
        let mut silent = node("True");
        let conditions = plan_conditions(&silent, at(9)).unwrap();
        assert!(conditions.iter().all(|condition| condition.status == "Unknown"));
        assert_eq!(conditions[0].reason, "NodeStatusUnknown");
        assert_eq!(
            conditions
                .iter()
                .find(|one| one.r#type == "PIDPressure")
                .unwrap()
                .reason,
            "NodeStatusNeverUpdated"
        );
        silent.status.get_or_insert_default().conditions = conditions;
        assert_eq!(plan_conditions(&silent, at(10)), None);
    }

    #[test]
    fn taints_follow_the_conditions_and_leave_users_alone() {
        let mut silent = node("Unknown");
        let mine = Taint {
            key: "mine".into(),
            effect: NO_EXECUTE.into(),
            ..Taint::default()
        };
        silent.spec.get_or_insert_default().taints = vec![mine.clone()];
        let slow = plan_taints(&silent, false, at(1)).unwrap();
        assert_eq!(keys(&slow), [("mine", NO_EXECUTE), (UNREACHABLE, NO_SCHEDULE)]);
        let taints = plan_taints(&silent, true, at(1)).unwrap();
        assert_eq!(
            keys(&taints),
            [
                ("mine", NO_EXECUTE),
                (UNREACHABLE, NO_SCHEDULE),
                (UNREACHABLE, NO_EXECUTE)
            ]
        );
        silent.spec.get_or_insert_default().taints.clone_from(&taints);
        assert!(evicts(&silent));
        assert_eq!(plan_taints(&silent, true, at(2)), None, "timeAdded stays");
        let mut back = node("True");
        back.spec.get_or_insert_default().taints = taints;
        assert_eq!(plan_taints(&back, true, at(3)).unwrap(), [mine]);
    }

    #[test]
    fn pressure_and_cordon() {
        let mut node = node("True");
        node.status.get_or_insert_default().conditions[1].status = "True".into();
        node.spec.get_or_insert_default().unschedulable = true;
        let taints = plan_taints(&node, true, at(1)).unwrap();
        assert_eq!(
            keys(&taints),
            [
                ("node.kubernetes.io/disk-pressure", NO_SCHEDULE),
                (UNSCHEDULABLE, NO_SCHEDULE)
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_mass_outage_slows_and_stops_eviction() {
        let config = LifecycleConfig::default();
        assert_eq!(Disruption::judge(2, 1, &config), Disruption::Normal);
        assert_eq!(Disruption::judge(1, 2, &config), Disruption::Normal);
        assert_eq!(Disruption::judge(2, 3, &config), Disruption::Partial);
        assert_eq!(Disruption::judge(0, 1, &config), Disruption::Full);
        assert_eq!(Disruption::judge(0, 0, &config), Disruption::Normal);
        let start = Instant::now();
        let taken = |disruption, nodes, seconds: u64| {
            let mut limiter = EvictionLimiter::default();
            (0..=seconds)
                .filter(|second| {
                    limiter.refill(disruption, nodes, &config, start + Duration::from_secs(*second));
                    limiter.take()
                })
                .count()
        };
        assert_eq!(taken(Disruption::Normal, 100, 95), 10);
        assert_eq!(taken(Disruption::Partial, 100, 250), 3);
        assert_eq!(taken(Disruption::Partial, 50, 250), 0);
        assert_eq!(taken(Disruption::Full, 100, 250), 0);
    }
}
