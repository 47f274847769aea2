//! Eviction by NoExecute taints: when each pod's time on its node is up. Pure but for its memory of when it began.

use std::{collections::HashMap, sync::Arc, time::Duration};

use orlop_proto::{
    Resource as _,
    core::v1::{Node, Pod, Taint, Toleration},
};
use tokio::time::Instant;

use crate::{
    controllers::pods,
    scheduler::taints::{NO_EXECUTE, NOT_READY, UNREACHABLE, tolerates},
};

/// Since when which pod has borne which taint. Measured by our own clock; after a restart it begins anew, as in Kubernetes.
#[derive(Debug, Default)]
pub struct Evictions {
    since: HashMap<(String, String), Instant>,
}

impl Evictions {
    /// The pods whose time is up. Pods and taints that are no longer there are forgotten.
    pub fn due(
        &mut self,
        nodes: &HashMap<&str, &Node>,
        all: impl Iterator<Item = Arc<Pod>>,
        default_delay: Duration,
        now: Instant,
    ) -> Vec<Arc<Pod>> {
        let mut still = HashMap::new();
        let mut due = Vec::new();
        for pod in all {
            if !pods::is_active(&pod) {
                continue;
            }
            let Some(node) = nodes.get(pods::node_name(&pod)) else {
                continue;
            };
            let tolerations = pod.spec.as_ref().map_or(&[][..], |spec| &spec.tolerations);
            let taints = node
                .spec
                .iter()
                .flat_map(|spec| &spec.taints)
                .filter(|taint| taint.effect == NO_EXECUTE);
            let mut is_due = false;
            for taint in taints {
                let key = (pod.uid().to_owned(), format!("{}={}", taint.key, taint.value));
                let since = self.since.get(&key).copied().unwrap_or(now);
                still.insert(key, since);
                is_due |= toleration_time(tolerations, taint, default_delay)
                    .is_some_and(|time| now.saturating_duration_since(since) >= time);
            }
            if is_due {
                due.push(pod);
            }
        }
        self.since = still;
        due
    }
}

/// How long a taint is borne; `None`: for ever. The shortest of the tolerations that match counts. Pods that say nothing of nodes that
/// are not ready or cannot be reached bear these for `default_delay`.
pub fn toleration_time(tolerations: &[Toleration], taint: &Taint, default_delay: Duration) -> Option<Duration> {
    let mut matching = tolerations
        .iter()
        .filter(|toleration| tolerates(toleration, taint))
        .peekable();
    if matching.peek().is_none() {
        let by_default = taint.key == NOT_READY || taint.key == UNREACHABLE;
        return Some(if by_default { default_delay } else { Duration::ZERO });
    }
    matching
        .filter_map(|toleration| toleration.toleration_seconds)
        .map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::taints::taint;
    use orlop_proto::core::v1::{NodeSpec, PodSpec};

    const DELAY: Duration = Duration::from_secs(20);

    fn toleration(key: &str, seconds: Option<i64>) -> Toleration {
        Toleration {
            key: key.into(),
            operator: "Exists".into(),
            toleration_seconds: seconds,
            ..Toleration::default()
        }
    }

    #[test]
    fn how_long_taints_are_borne() {
        let unreachable = taint(UNREACHABLE, NO_EXECUTE);
        let own = taint("maintenance", NO_EXECUTE);
        assert_eq!(toleration_time(&[], &unreachable, DELAY), Some(DELAY));
        assert_eq!(toleration_time(&[], &own, DELAY), Some(Duration::ZERO));
        assert_eq!(
            toleration_time(&[toleration(UNREACHABLE, None)], &unreachable, DELAY),
            None
        );
        let both = [toleration("", Some(90)), toleration(UNREACHABLE, Some(60))];
        assert_eq!(
            toleration_time(&both, &unreachable, DELAY),
            Some(Duration::from_secs(60))
        );
        assert_eq!(
            toleration_time(&[toleration("", Some(-1))], &own, DELAY),
            Some(Duration::ZERO)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn time_runs_only_while_the_taint_is_there() {
        let mut pod = Pod::default();
        pod.meta_mut().uid = "p".into();
        pod.spec = Some(PodSpec {
            node_name: "n".into(),
            ..PodSpec::default()
        });
        let pods = [Arc::new(pod)];
        let tainted = Node {
            spec: Some(NodeSpec {
                taints: vec![taint(UNREACHABLE, NO_EXECUTE)],
                ..NodeSpec::default()
            }),
            ..Node::default()
        };
        let clean = Node::default();
        let start = Instant::now();
        let mut evictions = Evictions::default();
        let mut due = |node: &Node, seconds| {
            evictions
                .due(
                    &[("n", node)].into(),
                    pods.iter().cloned(),
                    DELAY,
                    start + Duration::from_secs(seconds),
                )
                .len()
        };
        assert_eq!(due(&tainted, 0), 0);
        assert_eq!(due(&tainted, 19), 0);
        assert_eq!(due(&clean, 20), 0);
        assert_eq!(due(&tainted, 21), 0, "the time begins anew");
        assert_eq!(due(&tainted, 41), 1);
    }
}
