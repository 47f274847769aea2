//! Requests and limits as the kernel is told, and the pod's quality of service: the kubelet's formulas.

use orlop_proto::core::v1::{Container, Pod};

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
    let limit = |name: &str| resources.limits.get(name).and_then(|text| milli(text));
    let request = |name: &str| {
        resources
            .requests
            .get(name)
            .and_then(|text| milli(text))
            .or_else(|| limit(name))
    };
    let cpu_shares = request("cpu").map_or(2, |cpu| (cpu * 1024 / 1000).clamp(2, 262_144));
    let cpu_quota = limit("cpu")
        .filter(|cpu| *cpu > 0)
        .map(|cpu| (cpu * QUOTA_PERIOD / 1000).max(MIN_QUOTA));
    let memory_limit = limit("memory").filter(|memory| *memory > 0).map(|memory| memory / 1000);
    let memory_request = request("memory").unwrap_or(0) / 1000;
    Resources {
        cpu_shares: u64::try_from(cpu_shares).unwrap_or(2),
        cpu_quota: cpu_quota.and_then(|quota| i64::try_from(quota).ok()),
        memory_limit: memory_limit.and_then(|limit| i64::try_from(limit).ok()),
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

/// Guaranteed, Burstable or BestEffort.
pub fn qos_class(pod: &Pod) -> &'static str {
    let Some(spec) = &pod.spec else { return "BestEffort" };
    let mut any = false;
    let mut guaranteed = true;
    for container in &spec.containers {
        let empty = Default::default();
        let resources = container.resources.as_ref().unwrap_or(&empty);
        for name in ["cpu", "memory"] {
            let value = |of: &std::collections::BTreeMap<String, String>| {
                of.get(name).and_then(|text| milli(text)).filter(|amount| *amount > 0)
            };
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

/// A quantity in thousandths, rounded up; `None` for what is none.
pub fn milli(text: &str) -> Option<i128> {
    let split = text
        .find(|letter: char| !matches!(letter, '0'..='9' | '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (numerator, denominator) = scale(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 18 || whole.len() > 20 {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = digits.checked_mul(numerator)?.checked_mul(1000)?;
    let divisor = denominator.checked_mul(10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?)?;
    Some(scaled.div_euclid(divisor) + i128::from(scaled.rem_euclid(divisor) != 0))
}

fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1024_i128.pow(power), 1));
    let decimal = |power: u32| Some((1000_i128.pow(power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "k" => decimal(1),
        "M" => decimal(2),
        "G" => decimal(3),
        "T" => decimal(4),
        "P" => decimal(5),
        "E" => decimal(6),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128
                .checked_pow(exponent.unsigned_abs())
                .filter(|_| exponent.abs() <= 18)?;
            Some(if exponent < 0 { (1, power) } else { (power, 1) })
        }
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

    #[test]
    fn quantities() {
        for (text, wanted) in [
            ("1", Some(1000)),
            ("100m", Some(100)),
            ("1.5", Some(1500)),
            ("0.0001", Some(1)),
            ("1Ki", Some(1_024_000)),
            ("1e3", Some(1_000_000)),
            ("1E", Some(10_i128.pow(21))),
            ("128Mi", Some(134_217_728_000)),
            ("x", None),
            ("1e1000", None),
            ("1Zi", None),
            ("", None),
        ] {
            assert_eq!(milli(text), wanted, "{text}");
        }
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
