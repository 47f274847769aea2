//! Pods that nobody will end: those of nodes that are gone, those that wait to go without ever having had a node, and the
//! oldest of too many ended ones.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use futures::{StreamExt as _, stream};
use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod},
};
use tokio::time::Instant;

use super::{GarbageConfig, pods};
use crate::{
    cache::ObjectKey,
    registry::{DeleteOptions, Preconditions, Registry},
    scheduler::is_terminal,
};

/// Deletions under way at once.
const DELETIONS: usize = 16;

/// Why a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    NodeGone,
    NeverScheduled,
    TooManyEnded,
}

/// Runs until it is dropped.
pub async fn run(registry: Registry, config: GarbageConfig) {
    let (pods, nodes) = (registry.cache().reader::<Pod>(), registry.cache().reader::<Node>());
    let mut missing_since: HashMap<String, Instant> = HashMap::new();
    let mut ticks = tokio::time::interval(config.period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let nodes = nodes.snapshot();
        let known: HashSet<&str> = nodes.objects.keys().map(|key| &*key.name).collect();
        let pods = pods.snapshot();
        let gone = quarantined(&mut missing_since, &known, pods.objects.peek(), Instant::now(), &config);
        let gone = confirm_gone(&registry, gone).await;
        let doomed = plan(pods.objects.peek(), &gone, config.terminated_pods);
        stream::iter(doomed)
            .for_each_concurrent(DELETIONS, |(pod, reason)| delete(&registry, pod, reason))
            .await;
    }
}

/// Nodes that pods are bound to and that have been missing long enough.
fn quarantined(
    missing_since: &mut HashMap<String, Instant>,
    known: &HashSet<&str>,
    pods: impl Iterator<Item = Arc<Pod>>,
    now: Instant,
    config: &GarbageConfig,
) -> Vec<String> {
    let mut missing: HashSet<String> = HashSet::new();
    for pod in pods {
        let node = pods::node_name(&pod);
        if !node.is_empty() && !known.contains(node) && !missing.contains(node) {
            missing.insert(node.to_owned());
        }
    }
    missing_since.retain(|node, _| missing.contains(node));
    for node in missing {
        missing_since.entry(node).or_insert(now);
    }
    let ripe = missing_since
        .iter()
        .filter(|(_, since)| now.duration_since(**since) >= config.node_quarantine);
    ripe.map(|(node, _)| node.clone()).collect()
}

/// Those that the store does not have either.
async fn confirm_gone(registry: &Registry, candidates: Vec<String>) -> HashSet<String> {
    let mut gone = HashSet::new();
    for node in candidates {
        match registry.get::<Node>(&ObjectKey::new("", &node)).await {
            Err(error) if error.is_not_found() => {
                gone.insert(node);
            }
            Err(error) => tracing::warn!(node, %error, "cannot be asked for"),
            Ok(_) => {}
        }
    }
    gone
}

/// Which pods go. Pure.
fn plan(
    all: impl Iterator<Item = Arc<Pod>>,
    gone_nodes: &HashSet<String>,
    terminated_limit: usize,
) -> Vec<(Arc<Pod>, Reason)> {
    let mut doomed = Vec::new();
    let mut ended = Vec::new();
    for pod in all {
        let node = pods::node_name(&pod);
        if gone_nodes.contains(node) {
            doomed.push((pod, Reason::NodeGone));
        } else if node.is_empty() && pod.is_deleting() && pod.meta().finalizers.is_empty() {
            doomed.push((pod, Reason::NeverScheduled));
        } else if is_terminal(&pod) && !pod.is_deleting() {
            ended.push(pod);
        }
    }
    if ended.len() > terminated_limit {
        ended.sort_by_key(|pod| {
            (
                pod.meta().creation_timestamp.map_or(0, |time| time.seconds),
                pod.name().to_owned(),
            )
        });
        let excess = ended.len() - terminated_limit;
        doomed.extend(ended.into_iter().take(excess).map(|pod| (pod, Reason::TooManyEnded)));
    }
    doomed
}

async fn delete(registry: &Registry, pod: Arc<Pod>, reason: Reason) {
    // Nobody is there to confirm its end; ended pods of living nodes are confirmed as usual.
    let grace = (reason != Reason::TooManyEnded).then_some(0);
    let options = DeleteOptions {
        grace_period_seconds: grace,
        preconditions: Preconditions {
            uid: Some(pod.uid().to_owned()),
            resource_version: None,
        },
        ..DeleteOptions::default()
    };
    let key = ObjectKey::of(&*pod);
    match registry.delete::<Pod>(&key, options).await {
        Ok(_) => tracing::info!(pod = %key, ?reason, "pod collected"),
        Err(error) if error.is_not_found() => {}
        Err(error) => tracing::warn!(pod = %key, ?reason, %error, "pod could not be collected"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::core::v1::{PodSpec, PodStatus};
    use std::time::Duration;

    fn pod(name: &str, node: &str, phase: &str, deleting: bool, created: i64) -> Arc<Pod> {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let mut pod = Pod {
            spec: Some(PodSpec {
                node_name: node.into(),
                ..PodSpec::default()
            }),
            status: Some(PodStatus {
                phase: phase.into(),
                ..PodStatus::default()
            }),
            ..Pod::default()
        };
        pod.meta_mut().name = name.into();
        pod.meta_mut().creation_timestamp = at(created);
        pod.meta_mut().deletion_timestamp = at(1).filter(|_| deleting);
        Arc::new(pod)
    }

    #[test]
    fn collects_what_nobody_else_ends() {
        let pods = [
            pod("lost", "gone", "Running", false, 1),
            pod("kept", "here", "Running", true, 1),
            pod("never", "", "Pending", true, 1),
            pod("waiting", "", "Pending", false, 1),
            pod("done-2", "here", "Succeeded", false, 2),
            pod("done-1", "here", "Failed", false, 1),
        ];
        let doomed = plan(pods.iter().cloned(), &["gone".to_owned()].into(), 1);
        let names: Vec<_> = doomed.iter().map(|(pod, reason)| (pod.name(), *reason)).collect();
        assert_eq!(
            names,
            [
                ("lost", Reason::NodeGone),
                ("never", Reason::NeverScheduled),
                ("done-1", Reason::TooManyEnded)
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_must_be_missing_for_a_while() {
        let config = GarbageConfig {
            node_quarantine: Duration::from_secs(20),
            ..GarbageConfig::default()
        };
        let pods = [pod("lost", "gone", "Running", false, 1)];
        let mut missing = HashMap::new();
        let start = Instant::now();
        let known = HashSet::new();
        let mut at = |known: &HashSet<&str>, seconds| {
            quarantined(
                &mut missing,
                known,
                pods.iter().cloned(),
                start + Duration::from_secs(seconds),
                &config,
            )
        };
        assert!(at(&known, 0).is_empty());
        assert!(at(&known, 19).is_empty());
        assert_eq!(at(&known, 20), ["gone"]);
        assert!(at(&["gone"].into(), 21).is_empty(), "it is back");
        assert!(at(&known, 22).is_empty(), "the wait begins anew");
    }
}
