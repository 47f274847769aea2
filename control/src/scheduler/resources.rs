//! Amounts of resources as integers: what pods ask for and what nodes have.

use std::collections::BTreeMap;

use orlop_proto::{
    core::v1::{Node, Pod},
    quantity::Quantity,
};

/// CPU that a pod without a request is taken to use when nodes are compared (kube-scheduler's figure), in millicores.
const DEFAULT_MILLI_CPU: i64 = 100;
/// Memory that a pod without a request is taken to use when nodes are compared (kube-scheduler's figure), in bytes.
const DEFAULT_MEMORY: i64 = 200 * 1024 * 1024;

/// Amounts of what a node shares out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a core.
    pub milli_cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes.
    pub ephemeral_storage: i64,
    /// How many pods.
    pub pods: i64,
}

impl Resources {
    /// What a node offers to pods.
    pub fn allocatable(node: &Node) -> Self {
        let empty = BTreeMap::new();
        let status = node.status.as_ref();
        let amounts = match status {
            Some(status) if !status.allocatable.is_empty() => &status.allocatable,
            Some(status) => &status.capacity,
            None => &empty,
        };
        Self {
            pods: whole(amounts.get("pods")),
            ..Self::of(amounts)
        }
    }

    /// What a pod asks for: the sum over its containers, and its place.
    pub fn requested(pod: &Pod) -> Self {
        let mut sum = Self {
            pods: 1,
            ..Self::default()
        };
        for requests in requests(pod) {
            sum = sum.plus(&Self::of(requests));
        }
        sum
    }

    /// As [`Resources::requested`], with kube-scheduler's figures for containers that ask for no CPU or no memory: so that
    /// such pods are spread too.
    pub fn assumed(pod: &Pod) -> Self {
        let mut sum = Self {
            pods: 1,
            ..Self::default()
        };
        for requests in requests(pod) {
            let mut amounts = Self::of(requests);
            if !requests.contains_key("cpu") {
                amounts.milli_cpu = DEFAULT_MILLI_CPU;
            }
            if !requests.contains_key("memory") {
                amounts.memory = DEFAULT_MEMORY;
            }
            sum = sum.plus(&amounts);
        }
        sum
    }

    /// The sum.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            milli_cpu: self.milli_cpu.saturating_add(other.milli_cpu),
            memory: self.memory.saturating_add(other.memory),
            ephemeral_storage: self.ephemeral_storage.saturating_add(other.ephemeral_storage),
            pods: self.pods.saturating_add(other.pods),
        }
    }

    /// The difference.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        Self {
            milli_cpu: self.milli_cpu.saturating_sub(other.milli_cpu),
            memory: self.memory.saturating_sub(other.memory),
            ephemeral_storage: self.ephemeral_storage.saturating_sub(other.ephemeral_storage),
            pods: self.pods.saturating_sub(other.pods),
        }
    }

    fn of(amounts: &BTreeMap<String, String>) -> Self {
        Self {
            milli_cpu: milli(amounts.get("cpu")),
            memory: whole(amounts.get("memory")),
            ephemeral_storage: whole(amounts.get("ephemeral-storage")),
            pods: 0,
        }
    }
}

static NO_REQUESTS: BTreeMap<String, String> = BTreeMap::new();

fn requests(pod: &Pod) -> impl Iterator<Item = &BTreeMap<String, String>> {
    pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| {
        container
            .resources
            .as_ref()
            .map_or(&NO_REQUESTS, |resources| &resources.requests)
    })
}

/// Thousandths, rounded up; what cannot be read (validation has refused it) counts as nothing.
fn milli(quantity: Option<&String>) -> i64 {
    quantity
        .and_then(|text| text.parse::<Quantity>().ok())
        .map_or(0, |quantity| quantity.millis())
}

/// Whole units, rounded up.
fn whole(quantity: Option<&String>) -> i64 {
    quantity
        .and_then(|text| text.parse::<Quantity>().ok())
        .map_or(0, |quantity| quantity.units())
}
