//! What a node says of itself and its pods, written to the registry; only what concerns it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use futures::future::BoxFuture;
use orlop_proto::{
    Resource,
    coordination::v1::Lease,
    core::v1::{Node, NodeStatus, Pod, PodStatus},
    metrics::v1 as metrics,
    node::v1::PodReport,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Inner, hub::node_of, session::ensure_node};
use crate::{
    cache::{ObjectKey, Reader},
    controllers::api_endpoints::replicas,
    registry::{Registry, RegistryError},
    store::StoreError,
};

const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Writes reports of one session of a node, as long as that is the node's latest.
#[derive(Clone)]
pub(super) struct ReportWriter {
    inner: Arc<Inner>,
    /// Writes for this session only.
    registry: Arc<Registry>,
    node: Arc<str>,
    labels: Arc<BTreeMap<String, String>>,
    nodes: Reader<Node>,
    pods: Reader<Pod>,
    leases: Reader<Lease>,
    /// Ends the session.
    closed: CancellationToken,
}

impl ReportWriter {
    pub fn new(
        inner: Arc<Inner>,
        registry: Registry,
        node: Arc<str>,
        labels: BTreeMap<String, String>,
        closed: CancellationToken,
    ) -> Self {
        let cache = registry.cache().clone();
        Self {
            node,
            labels: Arc::new(labels),
            nodes: cache.reader(),
            pods: cache.reader(),
            leases: cache.reader(),
            registry: Arc::new(registry),
            inner,
            closed,
        }
    }

    /// Writes the node's status until it is written.
    pub fn node(&self, status: NodeStatus) -> BoxFuture<'static, ()> {
        let writer = self.clone();
        Box::pin(async move {
            let mut retry = Retry::new(&writer, "node status");
            while !retry.settled(writer.write_node(&status).await).await {}
        })
    }

    async fn write_node(&self, status: &NodeStatus) -> Result<(), RegistryError> {
        let merge = |node: &mut Node| {
            let merged = merge_node_status(node.status.as_ref(), status);
            let differs = node.status.as_ref() != Some(&merged);
            node.status = Some(merged);
            differs
        };
        let key = ObjectKey::new("", &self.node);
        match self.registry.modify_status(&key, merge).await {
            Err(error) if error.is_not_found() => {
                ensure_node(&self.inner, &self.node, &self.labels).await?;
                Err(error)
            }
            written => written.map(drop),
        }
    }

    /// The pod that a report speaks of; `None` when it is no concern of this node.
    pub fn reported(&self, report: &PodReport) -> Option<Arc<Pod>> {
        // No longer there, or a namesake: the node learns of it by its snapshot.
        let pod = self.pods.peek(&report.namespace, &report.name)?;
        if pod.uid() != report.uid {
            return None;
        }
        if node_of(&pod) != &*self.node {
            self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                node = &*self.node,
                namespace = report.namespace,
                pod = report.name,
                bound_to = node_of(&pod),
                "report of a pod that is not this node's refused"
            );
            return None;
        }
        Some(pod)
    }

    /// Writes a pod's status until it is written, or dropped.
    pub fn pod(&self, pod: Arc<Pod>, report: PodReport) -> BoxFuture<'static, ()> {
        let writer = self.clone();
        Box::pin(async move {
            if report.gone {
                writer.confirm_gone(&pod).await;
            } else {
                let mut retry = Retry::new(&writer, "pod status");
                let mut status = report.status.unwrap_or_default();
                writer.keep_own_addresses(&pod, &mut status);
                while !retry.settled(writer.write_pod(&pod, &status).await).await {}
            }
        })
    }

    /// Takes out the addresses that a pod of this node cannot have: it would get the traffic of whoever has them.
    fn keep_own_addresses(&self, pod: &Pod, status: &mut PodStatus) {
        let refused = |text: &str| {
            // What is no address at all is found by the validation.
            let checked = text.parse().map_or(Ok(()), |address| self.check_address(address));
            let Err(reason) = checked else { return false };
            self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                node = &*self.node,
                namespace = pod.namespace(),
                pod = pod.name(),
                address = text,
                reason,
                "address of a pod refused"
            );
            true
        };
        let given = status.pod_ips.len();
        status.pod_ips.retain(|ip| !refused(&ip.ip));
        if status.pod_ips.len() < given {
            // The first of them says the same as `podIP`.
            status.pod_ip = status.pod_ips.first().map(|ip| ip.ip.clone()).unwrap_or_default();
        } else if given == 0 && refused(&status.pod_ip) {
            status.pod_ip.clear();
        }
    }

    fn check_address(&self, address: IpAddr) -> Result<(), String> {
        self.registry.check_pod_address(&self.node, address)?;
        if replicas(&self.leases).iter().any(|replica| *replica.ip() == address) {
            return Err("is that of control".to_owned());
        }
        Ok(())
    }

    async fn confirm_gone(&self, pod: &Pod) {
        if !pod.is_deleting() {
            tracing::warn!(
                node = &*self.node,
                namespace = pod.namespace(),
                pod = pod.name(),
                "a pod that nobody deleted is reported as gone; ignored"
            );
            return;
        }
        let mut retry = Retry::new(self, "confirmation of a pod's end");
        while !retry
            .settled(
                self.registry
                    .confirm_pod_gone(pod.namespace(), pod.name(), pod.uid())
                    .await,
            )
            .await
        {}
    }

    async fn write_pod(&self, pod: &Pod, status: &PodStatus) -> Result<(), RegistryError> {
        let merge = |stored: &mut Pod| {
            // It may be another by now: read again, checked again.
            if stored.uid() != pod.uid() || node_of(stored) != &*self.node {
                return false;
            }
            let merged = merge_pod_status(stored.status.as_ref(), status);
            let differs = stored.status.as_ref() != Some(&merged);
            stored.status = Some(merged);
            differs
        };
        match self.registry.modify_status(&ObjectKey::of(pod), merge).await {
            Err(error) if error.is_not_found() => Ok(()),
            written => written.map(drop),
        }
    }

    /// Whether the stored Ready condition is another than the node's own word.
    pub fn is_ready_otherwise(&self, word: Option<&str>) -> bool {
        let node = self.nodes.peek("", &self.node);
        node.is_some_and(|node| node.status.as_ref().and_then(ready) != word)
    }

    /// A node measures itself and its own pods.
    pub fn check_metrics(&self, report: &metrics::NodeReport) -> Result<(), String> {
        if let Some(node) = &report.node
            && node.name != *self.node
        {
            return Err(format!("metrics of node {:?}", node.name));
        }
        for pod in &report.pods {
            let own = |known: &Arc<Pod>| known.uid() != pod.uid || node_of(known) == &*self.node;
            if !self.pods.peek(&pod.namespace, &pod.name).as_ref().is_none_or(own) {
                return Err(format!("metrics of pod {}/{}", pod.namespace, pod.name));
            }
        }
        Ok(())
    }
}

/// The status of condition Ready.
pub(super) fn ready(status: &NodeStatus) -> Option<&str> {
    let ready = status.conditions.iter().find(|condition| condition.r#type == "Ready");
    ready.map(|ready| ready.status.as_str())
}

/// Waits between the attempts at a write.
struct Retry {
    node: Arc<str>,
    closed: CancellationToken,
    what: &'static str,
    wait: Duration,
}

impl Retry {
    fn new(writer: &ReportWriter, what: &'static str) -> Self {
        Self {
            node: Arc::clone(&writer.node),
            closed: writer.closed.clone(),
            what,
            wait: RETRY_MIN,
        }
    }

    /// Whether that was the last attempt: it is done, or there is no use in another. Otherwise returns after a wait.
    async fn settled(&mut self, result: Result<(), RegistryError>) -> bool {
        let (node, what) = (&*self.node, self.what);
        match result {
            Ok(()) => return true,
            Err(error @ (RegistryError::Invalid { .. } | RegistryError::Store(StoreError::TooLarge(_)))) => {
                tracing::warn!(node, what, %error, "report refused");
                return true;
            }
            Err(RegistryError::Fenced(_)) => {
                tracing::info!(
                    node,
                    what,
                    "report not written: the node has told of it in another session since"
                );
                self.closed.cancel();
                // Not written, so not to be acknowledged.
                return std::future::pending().await;
            }
            Err(error) => tracing::warn!(node, what, %error, "report not written; trying again"),
        }
        sleep(self.wait).await;
        self.wait = (self.wait * 2).min(RETRY_MAX);
        false
    }
}

/// The node's word, with the times at which its conditions last changed. Conditions that it does not speak of stay.
fn merge_node_status(stored: Option<&NodeStatus>, reported: &NodeStatus) -> NodeStatus {
    let mut merged = reported.clone();
    let now = now();
    for condition in &mut merged.conditions {
        let known = stored
            .iter()
            .flat_map(|status| &status.conditions)
            .find(|known| known.r#type == condition.r#type);
        condition.last_transition_time = match known {
            Some(known) if known.status == condition.status && known.last_transition_time.is_some() => {
                known.last_transition_time
            }
            _ => Some(now),
        };
        condition.last_heartbeat_time = condition.last_heartbeat_time.or(Some(now));
    }
    for known in stored.iter().flat_map(|status| &status.conditions) {
        if !merged
            .conditions
            .iter()
            .any(|condition| condition.r#type == known.r#type)
        {
            merged.conditions.push(known.clone());
        }
    }
    merged
}

/// The node's word on its pod. Conditions that others write stay; a pod that has ended does not begin again.
fn merge_pod_status(stored: Option<&PodStatus>, reported: &PodStatus) -> PodStatus {
    let mut merged = reported.clone();
    let Some(stored) = stored else { return merged };
    for condition in &mut merged.conditions {
        let known = stored.conditions.iter().find(|known| known.r#type == condition.r#type);
        if let Some(known) = known
            && known.status == condition.status
            && known.last_transition_time.is_some()
        {
            condition.last_transition_time = known.last_transition_time;
        }
    }
    let reported_type = |name: &str| reported.conditions.iter().any(|condition| condition.r#type == name);
    let others = stored
        .conditions
        .iter()
        .filter(|known| !reported_type(&known.r#type))
        .cloned();
    // Others' conditions first, as the scheduler wrote them before the node came to know of the pod.
    merged.conditions = others.chain(std::mem::take(&mut merged.conditions)).collect();
    if (stored.phase == "Failed" || stored.phase == "Succeeded") && merged.phase != stored.phase {
        merged.phase.clone_from(&stored.phase);
        merged.reason.clone_from(&stored.reason);
        merged.message.clone_from(&stored.message);
    }
    if merged.qos_class.is_empty() {
        merged.qos_class.clone_from(&stored.qos_class);
    }
    merged.start_time = stored.start_time.or(merged.start_time);
    merged
}

pub(super) fn now() -> prost_types::Timestamp {
    SystemTime::now().into()
}

#[cfg(test)]
mod tests {
    use orlop_proto::core::v1::{NodeCondition, PodCondition};

    use super::*;

    fn at(seconds: i64) -> Option<prost_types::Timestamp> {
        Some(prost_types::Timestamp { seconds, nanos: 0 })
    }

    #[test]
    fn node_conditions_keep_their_transition_times() {
        let condition = |name: &str, status: &str, since| NodeCondition {
            r#type: name.into(),
            status: status.into(),
            last_transition_time: since,
            ..Default::default()
        };
        let stored = NodeStatus {
            conditions: vec![
                condition("Ready", "Unknown", at(10)),
                condition("DiskPressure", "False", at(20)),
                condition("NetworkUnavailable", "False", at(30)),
            ],
            ..Default::default()
        };
        let reported = NodeStatus {
            conditions: vec![
                condition("Ready", "True", None),
                condition("DiskPressure", "False", None),
            ],
            ..Default::default()
        };
        let merged = merge_node_status(Some(&stored), &reported);
        assert_eq!(merged.conditions[0].status, "True");
        assert!(merged.conditions[0].last_transition_time.unwrap().seconds > 1000);
        assert_eq!(merged.conditions[1].last_transition_time, at(20));
        assert_eq!(merged.conditions[2].r#type, "NetworkUnavailable");
    }

    #[test]
    fn a_pod_keeps_what_others_say_of_it() {
        let condition = |name: &str, status: &str, since| PodCondition {
            r#type: name.into(),
            status: status.into(),
            last_transition_time: since,
            ..Default::default()
        };
        let stored = PodStatus {
            phase: "Failed".into(),
            reason: "Evicted".into(),
            conditions: vec![
                condition("PodScheduled", "True", at(1)),
                condition("Ready", "False", at(2)),
            ],
            start_time: at(3),
            qos_class: "Burstable".into(),
            ..Default::default()
        };
        let reported = PodStatus {
            phase: "Running".into(),
            conditions: vec![condition("Ready", "False", at(50))],
            start_time: at(60),
            ..Default::default()
        };
        let merged = merge_pod_status(Some(&stored), &reported);
        assert_eq!(merged.phase, "Failed");
        assert_eq!(merged.reason, "Evicted");
        assert_eq!(merged.conditions[0].r#type, "PodScheduled");
        assert_eq!(merged.conditions[1].last_transition_time, at(2));
        assert_eq!(merged.start_time, at(3));
        assert_eq!(merged.qos_class, "Burstable");
        assert_eq!(
            merge_pod_status(Some(&merged), &reported),
            merged,
            "a second report changes nothing"
        );
    }
}
