//! One look at all nodes: writes what the plans say.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use orlop_proto::{
    Resource as _,
    coordination::v1::Lease,
    core::v1::{Node, Pod},
    time,
};
use tokio::time::Instant;

use super::{
    Disruption, EvictionLimiter, Evictions, LifecycleConfig, Monitor,
    marks::Marks,
    plan::{evicts, is_ready, plan_conditions, plan_taints},
};
use crate::{
    cache::{ObjectKey, Reader},
    controllers::pods,
    events::Recorder,
    registry::{DeleteOptions, Preconditions, Registry},
    scheduler::taints::NO_EXECUTE,
};

/// The namespace of the nodes' leases.
const LEASES: &str = "kube-node-lease";
/// Writes under way at once.
pub(super) const WRITES: usize = 32;
/// How long the store may take to say its revision before our view counts as stale.
const FRESH_WITHIN: Duration = Duration::from_secs(1);

/// The controller's memory.
pub(super) struct Lifecycle {
    registry: Registry,
    recorder: Recorder,
    config: LifecycleConfig,
    nodes: Reader<Node>,
    leases: Reader<Lease>,
    pods: Reader<Pod>,
    monitor: Monitor,
    limiter: EvictionLimiter,
    evictions: Evictions,
    marks: Marks,
}

impl Lifecycle {
    pub(super) fn new(registry: Registry, recorder: Recorder, config: LifecycleConfig) -> Self {
        let cache = registry.cache().clone();
        Self {
            nodes: cache.reader(),
            leases: cache.reader(),
            pods: cache.reader(),
            monitor: Monitor::new(config.period.max(FRESH_WITHIN)),
            limiter: EvictionLimiter::default(),
            evictions: Evictions::default(),
            marks: Marks::default(),
            registry,
            recorder,
            config,
        }
    }

    pub(super) async fn look(&mut self, now: Instant) {
        // Where leases cannot be written nobody is silent.
        let writable = self.registry.store().trouble().is_none();
        let fresh = writable && matches!(self.registry.cache().catch_up(FRESH_WITHIN).await, Ok(true));
        let all = self.nodes.snapshot();
        let leases = self.leases.snapshot();
        // There may be thousands of nodes, and nothing is to be done about nearly all of them: those are not held.
        let at = time::now_seconds();
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        let with_leases = all.objects.peek().map(|node| {
            if !is_ready(&node) || is_tainted(&node) || plan_taints(&node, false, at).is_some() {
                nodes.push(node.clone());
            }
            let lease = leases.peek(LEASES, node.name());
            (node, lease)
        });
        self.monitor.observe(with_leases, now, fresh);
        if !fresh {
            tracing::warn!("the store cannot be read or written: nothing is said about nodes");
            return;
        }
        let is_silent = |name: &str| self.monitor.silence(name, now) > self.config.monitor_grace;
        let names = all.objects.keys().map(|key| &*key.name);
        let silent: HashSet<String> = names.filter(|name| is_silent(name)).map(str::to_owned).collect();
        let held: HashSet<String> = nodes.iter().map(|node| node.name().to_owned()).collect();
        nodes.extend(silent.difference(&held).filter_map(|name| all.peek("", name)));
        nodes.sort_unstable_by(|one, other| one.name().cmp(other.name()));
        self.write_conditions(&mut nodes, &silent).await;
        self.write_taints(&mut nodes, all.objects.len(), now).await;
        // Who was silent before we led is so until it speaks; and one that is not ready may not know its pods yet.
        let is_heard = |name: &str| !silent.contains(name) && all.peek("", name).is_some_and(|node| is_ready(&node));
        let pods = self.pods.snapshot();
        self.marks
            .look(&self.registry, &pods.objects, &silent, is_heard, now)
            .await;
        let evicting = nodes.iter().any(|node| has_no_execute(node));
        if silent.is_empty() && !evicting {
            self.evictions = Evictions::default();
            return;
        }
        let by_name: HashMap<&str, &Node> = nodes
            .iter()
            .filter(|node| has_no_execute(node))
            .map(|node| (node.name(), &**node))
            .collect();
        let due = self
            .evictions
            .due(&by_name, pods.objects.peek(), self.config.eviction_delay, now);
        stream::iter(due)
            .for_each_concurrent(WRITES, |pod| self.evict(pod))
            .await;
    }

    async fn write_conditions(&self, nodes: &mut [Arc<Node>], silent: &HashSet<String>) {
        let now = time::now_seconds();
        let writes: Vec<(usize, Arc<Node>)> = nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| silent.contains(node.name()) && plan_conditions(node, now).is_some())
            .map(|(index, node)| (index, node.clone()))
            .collect();
        let results = stream::iter(writes).map(|(index, node)| async move {
            let key = ObjectKey::new("", node.name());
            // With the version that was judged: a node that has spoken meanwhile is not written over.
            let version = node.meta().resource_version.clone();
            let written = self
                .registry
                .modify_status(&key, |node: &mut Node| {
                    let planned = plan_conditions(node, now).filter(|_| node.meta().resource_version == version);
                    let changes = planned.is_some();
                    if let Some(conditions) = planned {
                        node.status.get_or_insert_default().conditions = conditions;
                    }
                    changes
                })
                .await;
            (index, written)
        });
        let mut results = results.buffer_unordered(WRITES);
        while let Some((index, written)) = results.next().await {
            match written {
                // It has spoken meanwhile.
                Ok(node) if is_ready(&node) => {}
                Ok(node) => {
                    tracing::warn!(node = node.name(), "not heard of: NotReady");
                    let text = format!("Node {} status is now: NodeNotReady", node.name());
                    self.recorder.normal(&node, "NodeNotReady", text);
                    nodes[index] = Arc::new(node);
                }
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                Err(error) => tracing::warn!(node = nodes[index].name(), %error, "conditions could not be written"),
            }
        }
    }

    /// `nodes` are those of `all` that are not ready, or have or need taints.
    async fn write_taints(&mut self, nodes: &mut [Arc<Node>], all: usize, now: Instant) {
        let not_ready = nodes.iter().filter(|node| !is_ready(node)).count();
        let disruption = Disruption::judge(all - not_ready, not_ready, &self.config);
        self.limiter.refill(disruption, all, &self.config, now);
        let at = time::now_seconds();
        let doubtful = nodes.iter().any(|node| !is_ready(node) && !evicts(node));
        let pods = doubtful.then(|| self.pods.snapshot());
        let occupied: HashSet<String> = pods
            .iter()
            .flat_map(|pods| pods.objects.peek())
            .map(|pod| pods::node_name(&pod).to_owned())
            .collect();
        let mut writes = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            // Once tainted a node stays so until it is ready; when all are lost, nobody is. Where there is nobody to evict nothing
            // has to be slowed down.
            let may_evict = disruption != Disruption::Full
                && !is_ready(node)
                && (evicts(node) || !occupied.contains(node.name()) || self.limiter.take());
            if plan_taints(node, may_evict, at).is_some() {
                writes.push((index, node.name().to_owned(), may_evict));
            }
        }
        let registry = &self.registry;
        let results = stream::iter(writes).map(|(index, name, may_evict)| async move {
            let written = registry
                .modify(&ObjectKey::new("", &name), |node: &mut Node| {
                    let planned = plan_taints(node, may_evict, at);
                    let changes = planned.is_some();
                    if let Some(taints) = planned {
                        node.spec.get_or_insert_default().taints = taints;
                    }
                    changes
                })
                .await;
            (index, written)
        });
        let mut results = results.buffer_unordered(WRITES);
        while let Some((index, written)) = results.next().await {
            match written {
                Ok(node) => nodes[index] = Arc::new(node),
                Err(error) if error.is_not_found() => {}
                Err(error) => tracing::warn!(node = nodes[index].name(), %error, "taints could not be written"),
            }
        }
    }

    async fn evict(&self, pod: Arc<Pod>) {
        let key = ObjectKey::of(&*pod);
        let options = DeleteOptions {
            preconditions: Preconditions {
                uid: Some(pod.uid().to_owned()),
                resource_version: None,
            },
            ..DeleteOptions::default()
        };
        match self.registry.delete::<Pod>(&key, options).await {
            Ok(_) => {
                tracing::info!(pod = %key, node = pods::node_name(&pod), "evicted");
                self.recorder
                    .normal(&*pod, "TaintManagerEviction", format!("Marking for deletion Pod {key}"));
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => tracing::warn!(pod = %key, %error, "could not be evicted"),
        }
    }
}

fn is_tainted(node: &Node) -> bool {
    node.spec.as_ref().is_some_and(|spec| !spec.taints.is_empty())
}

fn has_no_execute(node: &Node) -> bool {
    node.spec
        .iter()
        .flat_map(|spec| &spec.taints)
        .any(|taint| taint.effect == NO_EXECUTE)
}
