//! The objects of a benchmark, as Kubernetes' JSON: both sides get the same.

use serde_json::{Value, json};

/// What pods ask of their nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// CPU and memory.
    Plain,
    /// Also one of two zones of three, by required node affinity.
    Affinity,
    /// Also an even spread over the zones.
    Spread,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Affinity, Self::Spread];

    /// As figures and plots call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Affinity => "node affinity",
            Self::Spread => "topology spread",
        }
    }
}

const ZONE: &str = "topology.kubernetes.io/zone";

/// A node that takes 500 pods, in one of three zones: room for the pods of all runs on 100 nodes, of which two runs fill zones unevenly.
pub fn node(index: usize) -> Value {
    let resources = json!({"cpu": "64", "memory": "256Gi", "pods": "500"});
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node_name(index), "labels": {ZONE: format!("z{}", index % 3)}},
        "status": {
            "addresses": [{"type": "InternalIP", "address": format!("10.250.{}.{}", 1 + index / 250, 1 + index % 250)}],
            "capacity": resources, "allocatable": resources,
            "conditions": [{"type": "Ready", "status": "True"}]
        }
    })
}

/// A node's name.
pub fn node_name(index: usize) -> String {
    format!("n{index:05}")
}

/// A pod of a run: its label is the run's, so that runs do not count each other's pods.
pub fn pod(run: &str, index: usize, shape: Shape) -> Value {
    let requests = json!({"cpu": "100m", "memory": "100Mi"});
    let mut spec = json!({"containers": [{"name": "c", "image": "pause", "resources": {"requests": requests}}]});
    match shape {
        Shape::Plain => {}
        Shape::Affinity => {
            let expression = json!({"key": ZONE, "operator": "In", "values": ["z0", "z1"]});
            spec["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}}});
        }
        Shape::Spread => {
            spec["topologySpreadConstraints"] = json!([{
                "maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"run": run}}
            }]);
        }
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{run}-{index}"), "namespace": "default", "labels": {"run": run}},
        "spec": spec
    })
}
