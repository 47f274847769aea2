//! Who was last heard of when.

use std::{
    collections::{HashMap, HashSet},
    ops::Deref,
    time::Duration,
};

use orlop_proto::{
    Resource as _,
    coordination::v1::Lease,
    core::v1::{Node, NodeCondition},
};
use prost_types::Timestamp;
use tokio::time::Instant;

/// Observes the nodes' signs of life.
#[derive(Debug)]
pub struct Monitor {
    /// A longer pause between two observations was ours, not the nodes'.
    longest_pause: Duration,
    last: Option<Instant>,
    nodes: HashMap<String, Observed>,
}

#[derive(Debug)]
struct Observed {
    sign: Sign,
    since: Instant,
}

/// What only a living node changes.
#[derive(Debug, Clone, PartialEq)]
struct Sign {
    uid: String,
    lease: Option<(String, Option<Timestamp>)>,
    /// Status and heartbeat time of condition Ready, as the node last said it: "Unknown" is our word, not the node's.
    ready: Option<(String, Option<Timestamp>)>,
}

impl Monitor {
    /// For observations that are made every `period`.
    pub fn new(period: Duration) -> Self {
        Self {
            longest_pause: period * 3,
            last: None,
            nodes: HashMap::new(),
        }
    }

    /// Takes the nodes and their leases in. `fresh` says whether they are as the store has them.
    pub fn observe(
        &mut self,
        nodes: impl Iterator<Item = (impl Deref<Target = Node>, Option<impl Deref<Target = Lease>>)>,
        now: Instant,
        fresh: bool,
    ) {
        let pause = self.last.map_or(Duration::ZERO, |last| now.duration_since(last));
        self.last = Some(now);
        if !fresh || pause > self.longest_pause {
            for observed in self.nodes.values_mut() {
                observed.since += pause;
            }
        }
        let mut present = HashSet::new();
        for (node, lease) in nodes {
            let mut sign = sign(&node, lease.as_deref());
            if sign.ready.is_none()
                && let Some(observed) = self.nodes.get(node.name())
            {
                sign.ready.clone_from(&observed.sign.ready);
            }
            present.insert(node.name().to_owned());
            match self.nodes.get_mut(node.name()) {
                Some(observed) if observed.sign == sign => {}
                Some(observed) => *observed = Observed { sign, since: now },
                None => {
                    self.nodes.insert(node.name().to_owned(), Observed { sign, since: now });
                }
            }
        }
        self.nodes.retain(|name, _| present.contains(name));
    }

    /// How long nothing was heard of a node.
    pub fn silence(&self, node: &str, now: Instant) -> Duration {
        self.nodes
            .get(node)
            .map_or(Duration::ZERO, |observed| now.saturating_duration_since(observed.since))
    }
}

fn sign(node: &Node, lease: Option<&Lease>) -> Sign {
    let ready = ready_condition(node).filter(|condition| condition.status != "Unknown");
    Sign {
        uid: node.uid().to_owned(),
        lease: lease.map(|lease| {
            (
                lease.uid().to_owned(),
                lease.spec.as_ref().and_then(|spec| spec.renew_time),
            )
        }),
        ready: ready.map(|condition| (condition.status.clone(), condition.last_heartbeat_time)),
    }
}

/// Condition Ready.
pub(super) fn ready_condition(node: &Node) -> Option<&NodeCondition> {
    node.status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|condition| condition.r#type == "Ready")
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::coordination::v1::LeaseSpec;

    const PERIOD: Duration = Duration::from_secs(1);

    fn node() -> Node {
        let mut node = Node::default();
        node.meta_mut().name = "n1".into();
        node
    }

    fn lease(seconds: i64) -> Lease {
        Lease {
            spec: Some(LeaseSpec {
                renew_time: Some(Timestamp { seconds, nanos: 0 }),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        }
    }

    /// Observes once a second for so long; `renewed` gives the lease's time at each second. Returns the silence at the end.
    fn silence_after(monitor: &mut Monitor, start: Instant, seconds: u64, renewed: impl Fn(u64) -> i64) -> Duration {
        for second in 0..=seconds {
            let (node, lease) = (node(), lease(renewed(second)));
            monitor.observe(
                [(&node, Some(&lease))].into_iter(),
                start + PERIOD * u32::try_from(second).unwrap(),
                true,
            );
        }
        monitor.silence("n1", start + Duration::from_secs(seconds))
    }

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_the_last_renewal_that_we_saw() {
        let start = Instant::now();
        let mut monitor = Monitor::new(PERIOD);
        // The node's clock is far off: it does not matter.
        let silence = silence_after(&mut monitor, start, 20, |second| {
            if second < 5 {
                7_000_000 + second as i64
            } else {
                7_000_005
            }
        });
        assert_eq!(silence, Duration::from_secs(15));
        assert_eq!(
            silence_after(&mut Monitor::new(PERIOD), start, 20, |second| -(second as i64)),
            Duration::ZERO
        );
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_verdict_is_no_sign_of_life_but_the_nodes_word_is() {
        let start = Instant::now();
        let mut monitor = Monitor::new(PERIOD);
        let lease = lease(1);
        let mut observe = |status: &str, second: u64| {
            let mut node = node();
            node.status.get_or_insert_default().conditions = vec![NodeCondition {
                r#type: "Ready".into(),
                status: status.into(),
                ..NodeCondition::default()
            }];
            let now = start + Duration::from_secs(second);
            monitor.observe([(&node, Some(&lease))].into_iter(), now, true);
            monitor.silence("n1", now).as_secs()
        };
        assert_eq!(observe("True", 0), 0);
        assert_eq!(observe("True", 2), 2);
        assert_eq!(observe("Unknown", 3), 3);
        assert_eq!(observe("Unknown", 4), 4);
        assert_eq!(observe("False", 5), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_pauses_are_nobodys_silence() {
        let start = Instant::now();
        let mut monitor = Monitor::new(PERIOD);
        silence_after(&mut monitor, start, 5, |_| 1);
        let later = start + Duration::from_secs(3600);
        let (node, lease) = (node(), lease(1));
        monitor.observe([(&node, Some(&lease))].into_iter(), later, true);
        assert_eq!(monitor.silence("n1", later), Duration::from_secs(5));
        monitor.observe([(&node, Some(&lease))].into_iter(), later + PERIOD, false);
        assert_eq!(
            monitor.silence("n1", later + PERIOD),
            Duration::from_secs(5),
            "the store could not be read"
        );
    }
}
