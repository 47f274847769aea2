//! Requests and limits as the kernel is told, and the pod's quality of service: the kubelet's formulas.

use std::collections::BTreeMap;

use orlop_proto::{
    core::v1::{Container, Pod},
    quantity::Quantity,
};

use crate::runtime::Resources;

const GUARANTEED_OOM: i32 = -997;
const BEST_EFFORT_OOM: i32 = 1000;
/// Microseconds of a CPU quota's period, per CPU.
const QUOTA_PERIOD: i128 = 100_000;
/// The kernel takes no smaller quota.
const MIN_QUOTA: i128 = 1000;

/// What a container may use.
pub fn limits(pod: &Pod, container: &Container, memory_capacity: u64) -> Resources {
    let empty = Default::default();
    let resources = container.resources.as_ref().unwrap_or(&empty);
    let limit = |name: &str| amount(&resources.limits, name);
    let request = |name: &str| amount(&resources.requests, name).or_else(|| limit(name));
    let millis = |cpu: Quantity| i128::from(cpu.millis());
    let cpu_shares = request("cpu").map_or(2, |cpu| (millis(cpu) * 1024 / 1000).clamp(2, 262_144));
    let cpu_quota = limit("cpu")
        .map(millis)
        .filter(|cpu| *cpu > 0)
        .map(|cpu| (cpu * QUOTA_PERIOD / 1000).max(MIN_QUOTA));
    let memory_limit = limit("memory")
        .map(|memory| memory.units())
        .filter(|memory| *memory > 0);
    let memory_request = request("memory").map_or(0, |memory| i128::from(memory.units()));
    Resources {
        cpu_shares: u64::try_from(cpu_shares).unwrap_or(2),
        cpu_quota: cpu_quota.and_then(|quota| i64::try_from(quota).ok()),
        memory_limit,
        oom_score_adj: oom_score_adj(qos_class(pod), memory_request, memory_capacity),
    }
}

fn oom_score_adj(qos: &str, memory_request: i128, memory_capacity: u64) -> i32 {
    match qos {
        "Guaranteed" => GUARANTEED_OOM,
        "BestEffort" => BEST_EFFORT_OOM,
        _ => {
            let share = 1000 * memory_request / i128::from(memory_capacity.max(1));
            let adjust = i32::try_from(1000 - share).unwrap_or(0);
            adjust.clamp(1000 + GUARANTEED_OOM, BEST_EFFORT_OOM - 1)
        }
    }
}

/// `None` where there is none. Validation has refused what is no quantity.
fn amount(of: &BTreeMap<String, String>, name: &str) -> Option<Quantity> {
    of.get(name)?.parse().ok()
}

/// Guaranteed, Burstable or BestEffort.
pub fn qos_class(pod: &Pod) -> &'static str {
    let Some(spec) = &pod.spec else { return "BestEffort" };
    let mut any = false;
    let mut guaranteed = true;
    for container in &spec.containers {
        let empty = Default::default();
        let resources = container.resources.as_ref().unwrap_or(&empty);
        for name in ["cpu", "memory"] {
            let value = |of| amount(of, name).filter(|amount| !amount.is_negative() && !amount.is_zero());
            let (limit, request) = (value(&resources.limits), value(&resources.requests));
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::core::v1::{PodSpec, ResourceRequirements};

    use super::*;

    fn pod(limits: &[(&str, &str)], requests: &[(&str, &str)]) -> Pod {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let resources = ResourceRequirements {
            limits: map(limits),
            requests: map(requests),
        };
        let container = Container {
            name: "a".into(),
            resources: Some(resources),
            ..Default::default()
        };
        Pod {
            spec: Some(PodSpec {
                containers: vec![container],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// However a quantity is written: a limit that is not understood would be none.
    #[test]
    fn every_quantity_is_a_limit() {
        let of = |memory: &str| {
            let pod = pod(&[("cpu", memory), ("memory", memory)], &[]);
            let limits = limits(&pod, &pod.spec.as_ref().unwrap().containers[0], 1 << 30);
            (limits.memory_limit, limits.cpu_quota)
        };
        for (text, bytes, quota) in [
            ("1", 1, 100_000),
            ("1.5", 2, 150_000),
            ("100m", 1, 10_000),
            ("0.0001", 1, 1000),
            ("1e3", 1000, 100_000_000),
            ("2.0000000000000000000", 2, 200_000),
            ("000000000000000000000002", 2, 200_000),
            ("128Mi", 128 << 20, (128 << 20) * 100_000),
        ] {
            assert_eq!(of(text), (Some(bytes), Some(quota)), "{text}");
        }
        assert_eq!(of("1E").0, Some(1_000_000_000_000_000_000));
        assert_eq!(of("1e1000").0, Some(i64::MAX));
    }

    #[test]
    fn limits_are_the_kubelets() {
        let gib = 1 << 30;
        let of = |pod: &Pod| limits(pod, &pod.spec.as_ref().unwrap().containers[0], gib);
        let guaranteed = pod(&[("cpu", "500m"), ("memory", "64Mi")], &[]);
        assert_eq!(qos_class(&guaranteed), "Guaranteed");
        let wanted = Resources {
            cpu_shares: 512,
            cpu_quota: Some(50_000),
            memory_limit: Some(64 << 20),
            oom_score_adj: -997,
        };
        assert_eq!(of(&guaranteed), wanted);
        let burstable = pod(&[], &[("cpu", "1m"), ("memory", "512Mi")]);
        assert_eq!(qos_class(&burstable), "Burstable");
        let wanted = Resources {
            cpu_shares: 2,
            cpu_quota: None,
            memory_limit: None,
            oom_score_adj: 500,
        };
        assert_eq!(of(&burstable), wanted);
        assert_eq!(qos_class(&pod(&[], &[])), "BestEffort");
        assert_eq!(of(&pod(&[], &[])).oom_score_adj, 1000);
    }
}
