//! Nodes.

use std::{borrow::Cow, collections::HashSet};

use ipnet::IpNet;
use orlop_proto::core::v1::{Node, NodeSpec, NodeStatus};

use super::{
    FieldError, Model,
    error::{Errors, Json, Path},
    meta, names, resources, taints,
};

impl Model for Node {
    fn set_defaults(&mut self) {
        let spec = self.spec.get_or_insert_default();
        if spec.pod_cidrs.is_empty() && !spec.pod_cidr.is_empty() {
            spec.pod_cidrs.push(spec.pod_cidr.clone());
        }
        if spec.pod_cidr.is_empty() {
            spec.pod_cidr = spec.pod_cidrs.first().cloned().unwrap_or_default();
        }
    }

    fn reset_status(&mut self) {}

    fn validate_create(&self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate(&mut errors, self, names::dns1123_subdomain);
        validate_spec(&mut errors, self.spec.as_ref());
        validate_status(&mut errors, self.status.as_ref());
        errors.into_found()
    }

    fn validate_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_spec(&mut errors, self.spec.as_ref());
        let ranges = |node: &Self| {
            node.spec
                .as_ref()
                .map(|spec| spec.pod_cidrs.clone())
                .unwrap_or_default()
        };
        let (new, old) = (ranges(self), ranges(old));
        if !old.is_empty() && new != old {
            let detail = "node updates may not change podCIDR except from \"\" to valid";
            errors.forbidden(&Path::root("spec").child("podCIDRs"), detail);
        }
        errors.into_found()
    }

    fn validate_status_update(&self, old: &Self) -> Vec<FieldError> {
        let mut errors = Errors::default();
        meta::validate_update(&mut errors, self, old);
        validate_status(&mut errors, self.status.as_ref());
        errors.into_found()
    }

    fn selectable_field(&self, name: &str) -> Option<Cow<'_, str>> {
        match name {
            "spec.unschedulable" => {
                let cordoned = self.spec.as_ref().is_some_and(|spec| spec.unschedulable);
                Some(if cordoned { "true" } else { "false" }.into())
            }
            _ => super::selectable_meta(self, name),
        }
    }
}

fn validate_spec(errors: &mut Errors, spec: Option<&NodeSpec>) {
    let Some(spec) = spec else { return };
    let path = Path::root("spec");
    taints::taints(errors, &path.child("taints"), &spec.taints);
    let ranges = path.child("podCIDRs");
    if spec.pod_cidrs.len() > 1 {
        errors.too_many(&ranges, spec.pod_cidrs.len(), 1);
    }
    for (index, range) in spec.pod_cidrs.iter().enumerate() {
        match range.parse::<IpNet>() {
            Ok(parsed) if parsed.trunc() == parsed => {}
            Ok(_) => errors.invalid(
                &ranges.index(index),
                range,
                "must not have bits set beyond the prefix length",
            ),
            Err(_) => {
                let detail = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
                errors.invalid(&ranges.index(index), range, detail);
            }
        }
    }
    if spec.pod_cidrs.first().is_some_and(|first| *first != spec.pod_cidr) {
        errors.invalid(&ranges, &Json(&spec.pod_cidrs), "first value must match `podCIDR`");
    }
}

fn validate_status(errors: &mut Errors, status: Option<&NodeStatus>) {
    let Some(status) = status else { return };
    let path = Path::root("status");
    resources::capacity(errors, &path.child("capacity"), &status.capacity);
    resources::capacity(errors, &path.child("allocatable"), &status.allocatable);
    let conditions = path.child("conditions");
    for (index, condition) in status.conditions.iter().enumerate() {
        let path = conditions.index(index);
        meta::condition(errors, &path, &condition.r#type, &condition.status);
        errors.time(&path.child("lastHeartbeatTime"), condition.last_heartbeat_time.as_ref());
        errors.time(
            &path.child("lastTransitionTime"),
            condition.last_transition_time.as_ref(),
        );
    }
    let addresses = path.child("addresses");
    let mut known = HashSet::new();
    for (index, address) in status.addresses.iter().enumerate() {
        let path = addresses.index(index);
        errors.one_of(&path.child("type"), &address.r#type, &["Hostname", "InternalIP"]);
        if address.r#type == "InternalIP" && address.address.parse::<std::net::IpAddr>().is_err() {
            errors.invalid(&path.child("address"), &address.address, "must be a valid IP address");
        }
        if !known.insert((&address.r#type, &address.address)) {
            errors.duplicate(&path, &Json(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::json::from_value;
    use serde_json::json;

    use super::*;

    fn node(spec: &serde_json::Value, status: &serde_json::Value) -> Node {
        let mut node: Node =
            from_value(&json!({"metadata": {"name": "n"}, "spec": spec, "status": status})).expect("node");
        node.set_defaults();
        node
    }

    #[test]
    fn nodes_are_checked() {
        let good = node(
            &json!({"podCIDR": "10.244.1.0/24", "taints": [{"key": "a", "effect": "NoSchedule"}]}),
            &json!({"capacity": {"cpu": "2", "memory": "1Gi"}, "conditions": [{"type": "Ready", "status": "True"}]}),
        );
        assert_eq!(good.validate_create(), []);
        let bad = node(
            &json!({
                "podCIDRs": ["10.244.1.1/24", "x"],
                "taints": [{"key": "a", "effect": "Never"}, {"key": "b", "value": "c d", "effect": "NoExecute"},
                    {"key": "b", "effect": "NoExecute"}],
            }),
            &json!({"capacity": {"cpu": "-2", "memory": "much"}, "conditions": [{"type": "Ready", "status": "Yes"}],
                "addresses": [{"type": "InternalIP", "address": "n"}]}),
        );
        let found = bad.validate_create();
        let fields: Vec<&str> = found.iter().map(|error| error.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "spec.taints[0].effect",
                "spec.taints[1].value",
                "spec.taints[2]",
                "spec.podCIDRs",
                "spec.podCIDRs[0]",
                "spec.podCIDRs[1]",
                "status.capacity[cpu]",
                "status.capacity[memory]",
                "status.conditions[0].status",
                "status.addresses[0].address",
            ]
        );
    }

    #[test]
    fn a_range_stays() {
        let status = json!({});
        let (none, one) = (
            node(&json!({}), &status),
            node(&json!({"podCIDR": "10.244.1.0/24"}), &status),
        );
        let other = node(&json!({"podCIDR": "10.244.2.0/24"}), &status);
        assert!(one.validate_update(&none).is_empty());
        assert!(one.validate_update(&one).is_empty());
        assert_eq!(other.validate_update(&one)[0].field, "spec.podCIDRs");
        assert_eq!(none.validate_update(&one)[0].field, "spec.podCIDRs");
    }
}
