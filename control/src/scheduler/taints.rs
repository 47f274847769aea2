//! Taints and tolerations, as Kubernetes matches them.

use std::hash::{Hash, Hasher};

use orlop_proto::core::v1::{Pod, PodSpec, Taint, Toleration};
use prost::Message as _;

/// Kubernetes' taint of a node whose Ready condition is False.
pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Kubernetes' taint of a node whose Ready condition is Unknown.
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// Kubernetes' taint of a cordoned node.
pub const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// Effect: no new pods.
pub const NO_SCHEDULE: &str = "NoSchedule";
/// Effect: rather no new pods.
pub const PREFER_NO_SCHEDULE: &str = "PreferNoSchedule";
/// Effect: no new pods, and those that are there leave.
pub const NO_EXECUTE: &str = "NoExecute";

/// Whether a toleration covers a taint.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    if !toleration.effect.is_empty() && toleration.effect != taint.effect {
        return false;
    }
    if !toleration.key.is_empty() && toleration.key != taint.key {
        return false;
    }
    match toleration.operator.as_str() {
        "Exists" => true,
        "" | "Equal" => !toleration.key.is_empty() && toleration.value == taint.value,
        _ => false,
    }
}

/// Whether any toleration covers a taint.
pub fn tolerated(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| tolerates(toleration, taint))
}

/// A pod's tolerations. Equal ones are one key.
#[derive(Debug)]
pub struct Tolerations {
    /// As the pod has them.
    pub list: Vec<Toleration>,
    /// Encoded: what is compared and hashed.
    identity: Vec<u8>,
}

impl Tolerations {
    /// Of a pod.
    pub fn of(pod: &Pod) -> Self {
        let list = pod.spec.as_ref().map_or_else(Vec::new, |spec| spec.tolerations.clone());
        let spec = PodSpec {
            tolerations: list,
            ..PodSpec::default()
        };
        Self {
            identity: spec.encode_to_vec(),
            list: spec.tolerations,
        }
    }
}

impl PartialEq for Tolerations {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for Tolerations {}

impl Hash for Tolerations {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity.hash(state);
    }
}

/// A taint without a value and a time.
pub fn taint(key: &str, effect: &str) -> Taint {
    Taint {
        key: key.to_owned(),
        effect: effect.to_owned(),
        ..Taint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toleration(key: &str, operator: &str, value: &str, effect: &str) -> Toleration {
        Toleration {
            key: key.into(),
            operator: operator.into(),
            value: value.into(),
            effect: effect.into(),
            toleration_seconds: None,
        }
    }

    #[test]
    fn matches_as_kubernetes_does() {
        let gpu = Taint {
            key: "gpu".into(),
            value: "a100".into(),
            effect: NO_SCHEDULE.into(),
            time_added: None,
        };
        assert!(tolerates(&toleration("gpu", "Equal", "a100", NO_SCHEDULE), &gpu));
        assert!(tolerates(&toleration("gpu", "", "a100", ""), &gpu));
        assert!(tolerates(&toleration("gpu", "Exists", "", ""), &gpu));
        assert!(tolerates(&toleration("", "Exists", "", ""), &gpu));
        assert!(!tolerates(&toleration("gpu", "Equal", "h100", NO_SCHEDULE), &gpu));
        assert!(!tolerates(&toleration("gpu", "Exists", "", NO_EXECUTE), &gpu));
        assert!(!tolerates(&toleration("", "Equal", "a100", ""), &gpu));
        assert!(!tolerates(&toleration("cpu", "Exists", "", ""), &gpu));
    }
}
